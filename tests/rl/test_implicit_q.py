"""Implicit Q-learning against expectiles in closed form, and decisions against the recordings that they are from."""

import math

import numpy as np
import pytest
import torch

from genkit.core import Spec, Vector
from genkit.data.demonstrations.replay import Replay
from genkit.rl.policies.implicit_q import Transitions, expectile_loss, learn_implicit_q, recorded_transitions
from genkit.rl.policies.q_function import Decisions, held_out_tenth, learn_q
from genkit.rl.policies.rollout import rollout
from tests.support.refusals import refuses


def test_the_expectile_of_a_coin_is_the_expectile():
    """The minimum for 0 and 1 with equal shares is at ``expectile`` itself."""
    coin = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for expectile in (0.5, 0.7, 0.95):
        v = torch.tensor(expectile, dtype=torch.float64, requires_grad=True)
        expectile_loss(coin - v, expectile).sum().backward()
        assert float(v.grad) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_q_of_a_chain_of_two_decisions(expectile):
    """The first leads to a second, which is rewarded by 1 if its action is positive: ``Q(first) = gamma expectile``."""
    g = torch.Generator().manual_seed(0)
    action = torch.where(torch.rand(2000, 1, 1, generator=g) < 0.5, -1.0, 1.0)
    first = torch.arange(2000)[:, None, None] % 2 == 0
    obs, following = torch.where(first, -1.0, 1.0), torch.ones(2000, 1, 1)
    rewards = torch.where(first, 0.0, (action > 0).float())[:, 0, 0]
    data = Transitions(obs, action, rewards, following, (~first).float()[:, 0, 0])
    spec = Spec((1, 1), {"obs": Vector((1, 1))})
    q, explains = learn_implicit_q(spec, torch.ones(1, 1), data, gamma=0.8, expectile=expectile, steps=700, lr=3e-3)
    x = torch.tensor([-1.0, 1.0]).view(2, 1, 1)
    assert (q(x, {"obs": torch.ones(2, 1, 1)}) * q.scale).tolist() == pytest.approx([0, 1], abs=0.1)
    assert (q(x, {"obs": -torch.ones(2, 1, 1)}) * q.scale).tolist() == pytest.approx([0.8 * expectile] * 2, abs=0.1)
    assert explains > 0.9


def test_decisions_are_those_of_the_recordings(tmp_path):
    """Rewards count up, so a sum tells its steps; observations are the number of their step."""
    lengths = (7, 5)
    steps = [np.arange(n) + 100.0 * e for e, n in enumerate(lengths)]
    np.savez(tmp_path / "d.npz", obs=np.concatenate(steps)[:, None], action=np.concatenate(steps)[:, None],
             reward=np.concatenate([np.arange(n) + 1.0 for n in lengths]), episode_ends=np.cumsum(lengths))  # fmt: skip
    settings = {"obs_steps": 2, "pred_steps": 6, "act_steps": 3}
    source = Replay(root=str(tmp_path / "d.npz"), reward="reward", **settings)
    codec = source.load().codec
    data = recorded_transitions(source, 3, codec)
    now = [(e, t) for e, n in enumerate(lengths) for t in range(n)]
    assert len(data.rewards) == len(now)
    for i, (e, t) in enumerate(now):
        n, first = lengths[e], 100.0 * e
        chunk = codec.decode(data.chunks[i : i + 1])[0, 0, 1:4].tolist()
        assert chunk == pytest.approx([first + min(t + k, n - 1) for k in range(3)], abs=1e-3)
        assert data.obs[i, :, 0].tolist() == [first + max(0, t - 1), first + t]
        assert float(data.rewards[i]) == sum(k + 1 for k in range(t, min(t + 3, n)))
        assert bool(data.ended[i]) == (t + 3 >= n)
        if t + 3 < n:
            assert data.next_obs[i, :, 0].tolist() == [first + t + 2, first + t + 3]
    plain = Replay(root=str(tmp_path / "d.npz"), **settings)
    refuses(lambda: recorded_transitions(plain, 3, codec), "no rewards", "train with --data.reward")


def test_a_rollout_learns_q_from_the_demonstrations(policy):
    refuses(lambda: rollout(policy, episodes=2, fit_q=3, offline_q=True), "fit_q: given 3 with offline_q")


def test_q_of_a_few_decisions_says_what_it_explains_and_of_fewer_that_there_are_too_few():
    spec, g = Spec((1, 1), {"obs": Vector((1, 1))}), torch.Generator().manual_seed(0)
    for num in (3, 9, 10, 40):
        test, train = held_out_tenth(num, g)
        assert len(test) == max(2, num // 10)
        assert sorted([*test.tolist(), *train.tolist()]) == list(range(num))
    obs, x = torch.zeros(3, 1, 1), torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1)
    _, explained = learn_q(spec, torch.ones(1, 1), Decisions(obs, x, x.flatten()), epochs=2)
    assert math.isfinite(explained)
    few = Transitions(obs, x, x.flatten(), obs, torch.ones(3))
    assert math.isfinite(learn_implicit_q(spec, torch.ones(1, 1), few, gamma=0.9, steps=2)[1])
    refuses(lambda: learn_q(spec, torch.ones(1, 1), Decisions(*(v[:2] for v in (obs, x, x.flatten())))), "given 2 dec")
