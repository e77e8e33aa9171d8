"""Plans: windows of states that repeat the last one, and the conditions of an episode."""

import json

import numpy as np
import pytest
import torch

from genkit.core import Batch, Label
from genkit.data import DATA
from genkit.data.codecs import Plans, from_dict, to_dict
from genkit.data.demonstrations.replay import Replay
from genkit.data.demonstrations.windows import discounted_return
from genkit.envs.four_ways import OBSTACLES
from tests.support.refusals import refuses


@pytest.fixture
def buffer(tmp_path):
    """Two episodes of 4 and 3 steps: obs count the steps, actions are 10 times that, rewards 1 at the ends."""
    count = np.arange(7.0)[:, None]
    arrays = {"obs": count, "action": 10 * count, "reward": np.array([0, 0, 0, 1.0, 0, 0, 1]),
              "kind": np.array([2, 2, 2, 2, 0, 0, 0]), "episode_ends": np.array([4, 7])}  # fmt: skip

    def make(**changes) -> str:
        np.savez(tmp_path / "demos.npz", **{**arrays, **changes})
        return str(tmp_path / "demos.npz")

    return make


def test_plans_reach_over_the_end_and_stand_still_there(buffer):
    data = Replay(root=buffer(), plan="both", obs_steps=2, pred_steps=4, act_steps=2).load()
    world = data.x
    states = [
        [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 3], [2, 3, 3, 3],
        [4, 4, 5, 6], [4, 5, 6, 6], [5, 6, 6, 6],
    ]  # fmt: skip
    assert world[:, 1].tolist() == states
    assert (world[:, 0] / 10).tolist() == states
    assert data.cond["obs"][:, :, 0].tolist() == [row[:2] for row in states]
    only = Replay(root=buffer(), plan="states", obs_steps=2, pred_steps=4, act_steps=2).load()
    assert torch.equal(only.x, world[:, 1:])


def test_the_last_state_is_the_one_that_the_last_action_led_to():
    for obs, actions, rewards, skill, last, *_ in DATA["four-ways"](n=8).episodes("train"):
        assert np.allclose(last, obs[-1] + actions[-1])
        assert rewards.tolist() == [0.0] * (len(actions) - 1) + [1.0]
        assert set(skill) == {skill[0]}
        above = [obs[np.abs(obs[:, 0] - x).argmin(), 1] > 0 for x, _ in OBSTACLES]
        assert skill[0] == 2 * above[0] + above[1]
    data = DATA["four-ways"](n=8, plan="states", pred_steps=12).load()
    ends = np.stack([e[4] for e in DATA["four-ways"](n=8).episodes("train")])
    stands = data.x[(data.x[:, :, -1] == data.x[:, :, -2]).all(1)][:, :, -1]
    assert torch.cdist(stands, torch.from_numpy(ends).float()).min(1).values.max() < 1e-6


def test_returns_are_those_of_the_episode_and_skills_those_of_now(buffer):
    assert discounted_return(np.array([1.0, 2.0, 4.0]), 0.5) == 3
    settings = {"obs_steps": 1, "pred_steps": 2, "act_steps": 1, "reward": "reward", "skill": "kind", "discount": 0.5}
    data = Replay(root=buffer(), conditions=("returns", "skill", "goal"), **settings).load()
    assert data.cond["returns"][:, 0].tolist() == [0.125] * 3 + [0.25] * 2  # chunks need no window at the last step
    assert data.cond["skill"].tolist() == [2, 2, 2, 0, 0]
    assert data.cond["goal"][:, 0].tolist() == [1, 2, 3, 5, 6]
    assert data.spec.cond["skill"] == Label(3)
    assert data.spec.cond["goal"].shape == (1,)  # type: ignore[union-attr]
    assert torch.equal(data.cond["obs"], Replay(root=buffer(), **settings).load().cond["obs"])
    silent = Replay(root=buffer(), conditions=("returns",), **{**settings, "reward": ""})
    refuses(silent.load, "have no rewards", "--data.reward")
    refuses(Replay(root=buffer(kind=np.full(7, 0.5)), conditions=("skill",), **settings).load, "kind holds 0.5")
    refuses(
        Replay(root=buffer(reward=np.full(7, np.nan)), conditions=("returns",), **settings).load, "episode 0", "reward"
    )
    refuses(lambda: Replay(root=buffer(), plan="states", relative_to="obs").load(), "relative_to", "plan")
    refuses(lambda: Replay(root=buffer(), plan="states", pred_steps=8, obs_steps=1), "act_steps: given 8", "have 7")


def test_the_codec_of_plans_scales_states_as_samples_do():
    data = DATA["four-ways"](n=4, plan="both", obs_steps=2).load()
    codec = data.codec
    assert isinstance(codec, Plans)
    assert (codec.actions, codec.states) == (2, (2.0,))
    assert from_dict(json.loads(json.dumps(to_dict(codec)))) == codec
    x = codec.encode(Batch(data.x)).x
    assert torch.allclose(codec.decode(x), data.x, atol=1e-6)
    states = codec.encode_states(data.cond["obs"].transpose(1, 2))
    assert torch.allclose(states, x[:, 2:, :2], atol=1e-6)
