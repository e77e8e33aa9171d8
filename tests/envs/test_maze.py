"""PointMaze: shortest paths, and the environment of gymnasium-robotics whose observations are dictionaries."""

from itertools import pairwise

import numpy as np
import pytest

from genkit.cli.main import main as genkit
from genkit.envs import make, make_expert
from genkit.envs.maze import next_cells
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.policy import Policy

# A ring with a dead end below its left side, and a room without a door.
PLAN = """
########
#....#.#
#.##.###
#....###
#.######
########
"""
WALL = np.array([[c == "#" for c in line] for line in PLAN.split()])


def follow(following, at, goal):
    path = [at]
    while path[-1] != goal and len(path) < WALL.size:
        path.append(tuple(following[(*path[-1], *goal)].tolist()))
    return path


def test_the_next_cell_is_on_a_shortest_path():
    """Against Dijkstra's lengths (scipy) from every free cell to every other, and no step passes a wall."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import shortest_path

    following = next_cells(WALL)
    free = [tuple(cell) for cell in np.argwhere(~WALL).tolist()]
    near = [(i, j) for i, a in enumerate(free) for j, b in enumerate(free) if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1]
    rows, columns = zip(*near, strict=True)
    lengths = shortest_path(coo_matrix((np.ones(len(near)), (rows, columns)), shape=(len(free),) * 2).tocsr())
    assert np.isinf(lengths).any()  # the room without a door
    for i, a in enumerate(free):
        for j, b in enumerate(free):
            if np.isinf(lengths[i, j]):
                assert tuple(following[(*a, *b)].tolist()) == a
                continue
            path = follow(following, a, b)
            assert len(path) - 1 == lengths[i, j]
            assert all(not WALL[cell] for cell in path)
            assert all(abs(c[0] - d[0]) + abs(c[1] - d[1]) == 1 for c, d in pairwise(path))


@pytest.mark.parametrize("name", ["PointMaze_UMaze-v3", "PointMaze_Large-v3"])
def test_the_expert_reaches_every_goal(name):
    pytest.importorskip("gymnasium_robotics")
    env, guide = make(name, 10), make_expert(name, "scripted", 10)
    assert (env.obs_dim, env.action_dim) == (8, 2)
    obs = env.reset(range(10))
    begun = np.linalg.norm(obs[:, :2] - obs[:, 2:4], axis=1)
    success = np.zeros(10, bool)
    for _ in range(env.max_steps):
        obs, _, _, _, info = env.step(guide.act(obs))
        success |= info["success"] > 0
    assert success.all()
    assert begun.min() > 0.5  # no episode starts there
    assert np.linalg.norm(obs[:, :2] - obs[:, 2:4], axis=1).max() < 0.05  # and it stays there


@pytest.mark.slow
def test_a_policy_learns_the_path_from_few_demonstrations(tmp_path, monkeypatch):
    """A straight push reaches 22 of the 30 goals: the others are behind the wall."""
    pytest.importorskip("gymnasium_robotics")
    monkeypatch.chdir(tmp_path)
    assert genkit(["demo", "PointMaze_UMaze-v3", "--episodes=60"]) == 0
    options = [
        "--objective.prediction=x0",
        "--objective.loss-space=x0",
        "--objective.cond-dropout=0",
        "--device=cpu",
        "--precision=fp32",
    ]
    data = ["--data=replay", "--data.root=PointMaze_UMaze-v3.npz", "--data.env=PointMaze_UMaze-v3"]
    steps = ["--data.obs-steps=1", "--data.pred-steps=8", "--data.act-steps=4", "--steps=1500", "--batch=256"]
    net = ["--backbone=mlp", "--backbone.width=64", "--backbone.depth=2", "--lr=2e-3", "--tensorboard=false"]
    assert genkit(["train", "--objective=flow", *options, *data, *steps, *net, "--sample-every=0", "--ema=0.98"]) == 0
    policy = Policy.load("runs/latest", steps=4)
    world = make("PointMaze_UMaze-v3", 30)
    assert run_episodes(policy, world, range(100_000, 100_030)).info["success"].mean() >= 0.93

    class Straight:
        obs_shape, action_dim = (1, 8), 2

        def reset(self, seeds, rows=None): ...

        def act(self, obs, rows):
            o = obs[:, 0]
            return (10 * (o[:, 2:4] - o[:, :2]) - 2 * o[:, 6:]).clip(-1, 1)[:, None]

    assert run_episodes(Straight(), world, range(100_000, 100_030)).info["success"].mean() < 0.8
