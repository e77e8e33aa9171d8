"""Choosing at inference: the best of several samples, and the Q-function that they are chosen by."""

import json

import numpy as np
import pytest
import torch

from genkit.cli.commands.rollout import main as rollout
from genkit.core import Spec, Vector
from genkit.diffusion.samplers import Seeds
from genkit.envs.four_ways import FourWays
from genkit.rl.policies.best_of_n import best_of
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.policy import Policy
from genkit.rl.policies.q_function import (
    Decisions,
    QFunction,
    collect_decisions,
    discounted_returns,
    learn_q,
    load_q,
    save_q,
)
from genkit.rl.policies.rollout import RolloutSettings, q_requirements
from tests.support.refusals import refuses


def plain(z, cond, noise=None):
    return z if noise is None else z + 0 * noise(z.shape[1:])


def test_best_of_n_takes_the_largest_of_each_row_whatever_the_batch():
    value = lambda x, cond: x[:, 0] * cond["sign"]  # noqa: E731
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
    draw = Seeds(range(4))
    z = draw((2,))
    best = best_of(plain, value, 5)(z, {"sign": sign}, draw)
    again = Seeds(range(4))
    every = torch.stack([again((2,)) for _ in range(5)])
    want = torch.where(sign > 0, every[:, :, 0].amax(0), every[:, :, 0].amin(0))
    assert torch.equal(best[:, 0], want)
    alone = Seeds([2])
    assert torch.equal(best_of(plain, value, 5)(alone((2,)), {"sign": sign[2:3]}, alone)[0], best[2])
    assert torch.equal(best_of(plain, value, 1)(z, {"sign": sign}, draw), z)
    with pytest.raises(ValueError, match="best_of: given 0"):
        best_of(plain, value, 0)


def test_discounted_returns_by_hand():
    """Chunks of two steps, gamma 0.5."""
    assert discounted_returns(np.array([1.0, 2, 3, 4, 5]), 2, 0.5).tolist() == [3 + 0.5 * (7 + 0.5 * 5), 7 + 0.5 * 5, 5]
    assert discounted_returns(np.array([1.0, 2, 3]), 2, 0.5).tolist() == [3 + 0.5 * 3, 3]


class PaysEachStep(FourWays):
    """Four ways with a reward of 1 in each step, so that every decision of an episode is followed by another return."""

    def step(self, actions):
        goes_on = ~self.ended
        obs, _, terminated, truncated, info = super().step(actions)
        return obs, goes_on.astype(float), terminated, truncated, info


def test_decisions_are_those_of_their_own_episodes(policy):
    actor, seeds = Policy.load(policy, steps=1), range(15)
    done = run_episodes(actor, PaysEachStep(4), seeds)
    data = collect_decisions(actor, PaysEachStep(4), seeds, 0.5)
    for path in done.paths:
        steps = len(path) - 1
        chunks = [min(actor.act_steps, steps - first) for first in range(0, steps, actor.act_steps)]
        for d in range(len(chunks)):
            row = (data.obs[:, 0] == torch.from_numpy(path[d * actor.act_steps]).float()).all(1).nonzero()[:, 0]
            assert data.returns[row].tolist() == [sum(n * 0.5**k for k, n in enumerate(chunks[d:]))]
    assert len(data.returns) == sum(-(-done.lengths // actor.act_steps))
    assert max(done.lengths) > actor.act_steps


OBS = Spec((1, 3), {"obs": Vector((1, 1))})


def test_q_learns_what_followed_and_is_blind_to_what_is_not_done(tmp_path):
    """Returns ``-(first action - obs)^2``: its gradient and its largest are known."""
    g = torch.Generator().manual_seed(0)
    obs, x = torch.rand(2000, 1, 1, generator=g) - 0.5, torch.randn(2000, 1, 3, generator=g)
    returns = 100 - 10 * (x[:, 0, 0] - obs[:, 0, 0]) ** 2
    used = torch.tensor([[1.0, 0.0, 0.0]])
    q, explains = learn_q(OBS, used, Decisions(obs, x, returns), epochs=20, batch=128, lr=3e-3)
    assert explains > 0.9
    x = torch.zeros(5, 1, 3)
    x[:, 0, 0] = torch.linspace(-1, 1, 5)
    other = x + torch.tensor([0.0, 5.0, -5.0])
    values = q(x, {"obs": torch.zeros(5, 1, 1)})
    assert torch.equal(values, q(other, {"obs": torch.zeros(5, 1, 1)}))
    assert int(values.argmax()) == 2
    about = {"weights": "ema", "act_steps": 1}
    save_q(tmp_path, q, {**about, "episodes": 3})
    again = load_q(tmp_path, OBS, about)
    assert torch.equal(again(x, {"obs": torch.zeros(5, 1, 1)}), values)
    with pytest.raises(ValueError, match="was learned with act_steps 1, not 2"):
        load_q(tmp_path, OBS, {"act_steps": 2})
    (tmp_path / "q.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        load_q(tmp_path, OBS, about)
    with pytest.raises(ValueError, match="--fit-q"):
        load_q(tmp_path / "none", OBS, about)


def test_rollout_learns_q_and_heeds_it(policy, capsys):
    some = [str(policy), "--episodes", "8", "--json", "--no-picture", "--max-steps", "16"]
    with pytest.raises(ValueError, match=r"has no q\.safetensors yet; learn one: --fit-q 500"):
        rollout([*some, "--best-of", "4"])
    results = {}
    for name, more in {
        "plain": [],
        "best": ["--fit-q", "20", "--best-of", "4"],
        "guided": ["--q-guidance", "2"],
    }.items():
        assert rollout([*some, *more]) == 0
        results[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "q_explained_variance" in results["best"]
    assert (policy / "q.safetensors").is_file()
    names = [p.name for p in (policy / "rollouts").glob("*.json")]
    assert any("best4" in name and "seed100000-n8" in name for name in names), names
    assert any("-q2-" in name and "seed100000-n8" in name for name in names), names
    with pytest.raises(ValueError, match="was learned with act_steps"):
        rollout([*some, "--best-of", "4", "--act-steps", "2"])
    with pytest.raises(ValueError, match=r"was learned with guidance 1\.0, not 2\.0"):
        rollout([*some, "--best-of", "4", "--guidance", "2"])


def test_q_is_of_the_conditions_that_it_was_learned_with(policy):
    actor = Policy.load(policy)
    needs = [q_requirements(actor, RolloutSettings(conditions=c)) for c in ((), ("skill=0",), ("skill=3",))]
    save_q(policy, QFunction(actor.run.spec, torch.ones(actor.run.spec.shape)), needs[1])
    load_q(policy, actor.run.spec, needs[1])
    for other in (needs[0], needs[2]):
        refuses(
            lambda other=other: load_q(policy, actor.run.spec, other), "was learned with conditions {'skill': [0.0]}"
        )
