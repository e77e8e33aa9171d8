"""Environments of gymnasium, PushT among them."""

import numpy as np
import pytest

from genkit.data.demonstrations.push_t import Pusht, mirror_state
from genkit.envs import make
from genkit.envs.gym import keypoints
from tests.support.refusals import refuses


def test_gymnasium_ids_work_and_time_limits_are_no_ends():
    pytest.importorskip("gymnasium")
    env = make("Pendulum-v1", 2)
    assert (env.obs_dim, env.action_dim, env.max_steps) == (3, 1, 200)
    first = env.reset([4, 4])
    assert np.array_equal(first[0], first[1])
    log = [env.step(np.array([[0.5], [5.0]])) for _ in range(203)]
    assert [i for i, r in enumerate(log) if r[3].any()] == [199]
    assert not any(r[2].any() for r in log)
    assert log[201][1].tolist() == [0, 0]
    refuses(lambda: make("Pendulun-v1", 1), "Pendulun-v1", "does not know")
    refuses(lambda: make("CartPole-v1", 1), "needs a flat box")


def test_pusht_is_set_to_a_state_of_the_demonstrations():
    pytest.importorskip("gym_pusht")
    from genkit.envs.gym import PushT

    env = PushT(1, max_steps=3)
    env.reset([0])
    state = np.array([100.0, 120.0, 250.0, 300.0, 2.0])
    obs = env.set_state(0, state)
    assert np.allclose(obs[0, :18].reshape(9, 2), keypoints(state[2:]), atol=0.5)  # it was 90 pixels off
    assert np.allclose(obs[0, 18:], state[:2], atol=0.5)
    log = [env.step(np.array([[100.0, 120.0]])) for _ in range(4)]
    assert [bool(r[3][0]) for r in log] == [False, False, True, False]
    assert 0 <= log[0][4]["coverage"][0] < 0.95
    source = Pusht(root="x")
    assert source.observed == ("keypoint", "state[0:2]")


def test_the_world_of_pusht_is_the_same_in_the_mirror():
    pytest.importorskip("gym_pusht")
    env = make("pusht", 2)
    env.reset([0, 0])
    state = np.array([[300.0, 420.0, 250.0, 300.0, 2.0]])
    env.set_state(0, state[0])  # type: ignore[attr-defined]
    env.set_state(1, mirror_state(state)[0])  # type: ignore[attr-defined]
    for i in range(80):  # from below against the T, and round it
        where = np.array([256 + 120 * np.cos(i / 8), 300 + 120 * np.sin(i / 8)])
        obs, reward, *_ = env.step(np.stack([where, 512 - where[::-1]]))
        assert np.allclose(obs[0, 18:], 512 - obs[1, [19, 18]], atol=1e-6)
        assert abs(reward[0] - reward[1]) < 1e-4
        world = env.envs[0].unwrapped  # type: ignore[attr-defined]
        assert world._get_coverage() == type(world)._get_coverage(world)  # the goal's polygons are made once
    moved = obs[0, :18].reshape(9, 2) - keypoints(state[0, 2:])
    assert np.abs(moved).max() > 30  # it was pushed
