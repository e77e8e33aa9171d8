"""PushT's demonstrations and their mirror images."""

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from genkit.data.codecs import Actions
from genkit.data.demonstrations.push_t import Pusht, mirror_state
from genkit.envs import make
from genkit.envs.gym import keypoints
from tests.support.refusals import refuses

# The outline of the T in its own frame, as gym-pusht builds it: a bar and a stem, symmetric about x = 0.
OUTLINE = np.array([[-60, 30], [60, 30], [60, 0], [-60, 0], [-15, 30], [-15, 120], [15, 120], [15, 30]], float)


def outline(pose):
    c, s = np.cos(pose[2]), np.sin(pose[2])
    return OUTLINE @ np.array([[c, s], [-s, c]]) + pose[:2]


def pushes(path, episodes=5, steps=20):
    """A replay buffer of PushT: random states, and images of a dot at the hand."""
    rng = np.random.default_rng(0)
    n = episodes * steps
    state = np.concatenate([rng.uniform(100, 400, (n, 4)), rng.uniform(0, 2 * np.pi, (n, 1))], 1).astype(np.float32)
    img = np.zeros((n, 64, 64, 3), np.uint8)
    img[np.arange(n), (state[:, 1] / 8).astype(int), (state[:, 0] / 8).astype(int)] = 255
    arrays = {"state": state, "keypoint": keypoints(state[:, 2:]).astype(np.float32), "img": img,
              "action": rng.uniform(100, 400, (n, 2)).astype(np.float32)}  # fmt: skip
    np.savez(path, **arrays, episode_ends=np.arange(1, episodes + 1) * steps)
    return arrays


def test_a_mirror_turns_one_t_into_another():
    """The mirror image of a T is a T: point by point, on the other side. The goal is its own mirror image."""
    state = np.random.default_rng(0).uniform(0, 6, (10, 5)) * [80, 80, 80, 80, 1]
    mirrored = mirror_state(state)
    other = OUTLINE * [-1, 1]
    order = [int(np.flatnonzero((v == OUTLINE).all(1))[0]) for v in other]
    for one, two in zip(state, mirrored, strict=True):
        assert np.allclose(512 - outline(one[2:])[:, ::-1], outline(two[2:])[order])
        assert np.allclose(two[:2], [512 - one[1], 512 - one[0]])
    assert np.allclose(mirror_state(mirrored), state)
    goal = np.array([[0, 512, 256, 256, np.pi / 4]])
    assert np.allclose(mirror_state(goal), goal)


def test_pusht_trains_on_mirror_images_too_and_tests_on_recordings_only(tmp_path):
    arrays = pushes(tmp_path / "p.npz")
    settings: dict[str, Any] = {"root": str(tmp_path / "p.npz"), "held_out": 0.4}
    plain, twice = Pusht(**settings), Pusht(**settings, mirror=True)
    one, two = plain.episodes("train"), twice.episodes("train")
    assert (len(one), len(two)) == (3, 6)
    for a, b, c in zip(one, two[:3], two[3:], strict=True):
        assert np.array_equal(a.obs, b.obs)
        assert np.allclose(c.actions, 512 - a.actions[:, ::-1])
        assert np.allclose(c.obs[:, 18:], 512 - a.obs[:, [19, 18]])
        middle = lambda e: e.obs[:, :18].reshape(-1, 9, 2)  # noqa: E731
        back = mirror_state(arrays["state"])[:, 2:]
        assert all((np.abs(keypoints(back) - k).max((1, 2)) < 1e-3).any() for k in middle(c))
    assert [len(d.episodes("test")) for d in (plain, twice)] == [2, 2]
    test = plain.episodes("test")[0].obs
    assert np.array_equal(test, twice.episodes("test")[0].obs)
    assert not any(
        np.allclose(512 - test[:, [19, 18]], e.obs[:, 18:]) for e in two
    )  # its mirror image is not trained on either
    x, codec = twice.load().x, plain.load().codec
    assert len(x) == 2 * len(plain.load().x)
    assert type(codec) is Actions
    assert torch.allclose(x[len(x) // 2 :], -x[: len(x) // 2].flip(1), atol=1e-4)  # relative actions change their sign


def test_arrays_without_a_known_mirror_image_are_refused(tmp_path):
    arrays = pushes(tmp_path / "p.npz")
    np.savez(tmp_path / "q.npz", **arrays, aim=arrays["action"], episode_ends=[100])
    refuses(lambda: Pusht(root=str(tmp_path / "q.npz"), action="aim", mirror=True).load(), "mirror: 'aim'", "keypoint")


def test_images_are_mirrored_too(tmp_path):
    pushes(tmp_path / "p.npz")
    data = Pusht(root=str(tmp_path / "p.npz"), frames=("img",), observed=("state[0:2]",), mirror=True)
    for e in data.episodes("train"):
        assert e.frames is not None
        positions = [np.argwhere(f[0])[0] for f in e.frames[0]]
        assert np.abs(np.array(positions)[:, ::-1] - e.obs / 8).max() <= 1


def test_images_are_drawn_from_the_states_as_the_environment_shows_them(tmp_path, monkeypatch):
    """What a policy sees in an episode is what it would have seen in a recording of it; mirrored, its mirror image."""
    pytest.importorskip("gym_pusht")
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))
    env = make("pusht", 1, entries=("state[0:2]",))
    obs, shown, states = env.reset([7]), [], []
    for _ in range(4):
        assert np.allclose(obs[0], env.envs[0].unwrapped.get_obs()[:2])
        shown.append(env.pixels((32, 32))[0])
        states.append(env.envs[0].unwrapped.get_obs())
        obs = env.step(np.array([[100.0, 400.0]]))[0]
    np.savez(tmp_path / "p.npz", state=np.float32(states), action=np.float32(states)[:, :2], episode_ends=[4],
             keypoint=keypoints(np.float32(states)[:, 2:]))  # fmt: skip
    source = Pusht(root=str(tmp_path / "p.npz"), pixels=32, mirror=True)
    plain, mirrored = source.episodes("train")
    assert plain.frames is not None
    assert mirrored.frames is not None
    assert np.abs(plain.frames[0].astype(int) - np.stack(shown)).mean() < 0.5
    assert np.abs(np.diff(plain.frames[0].astype(int), axis=0)).mean() > 0.5
    across = plain.frames[0][:, :, ::-1, ::-1].swapaxes(2, 3)
    error, other = (np.abs(mirrored.frames[0].astype(int) - v).mean() for v in (across, plain.frames[0]))
    assert error < 0.4 * other  # half a pixel apart
    assert source.load().spec.cond["obs"].entries == ("state[0:2]",)  # type: ignore[union-attr]
    assert plain.obs.shape == (4, 2)
    shutil.copy(tmp_path / "p.npz", tmp_path / "q.npz")
    replace(source, root=str(tmp_path / "q.npz")).episodes("train")
    assert len(list(tmp_path.glob("frames/*.npy"))) == 2  # plain and mirrored: the same states are drawn once
