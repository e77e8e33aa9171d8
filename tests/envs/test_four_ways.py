"""Four ways: the world, its ends and its expert."""

import math

import numpy as np
import torch

from genkit.data import DATA
from genkit.envs import make_expert
from genkit.envs.four_ways import OBSTACLES, RADIUS, FourWays, FourWaysExpert, distance
from genkit.envs.recording import DemoSettings, record_demonstrations
from tests.support.refusals import refuses


def test_the_expert_succeeds_on_all_four_ways_alike():
    world, guide = FourWays(200), FourWaysExpert(200)
    obs = world.reset(range(200))
    guide.reset(range(200))
    won = np.zeros(200)
    for _ in range(world.max_steps):
        obs, reward, _, _, info = world.step(guide.act(obs))
        won += reward
    assert (won == 1).all()  # once, and nothing after the end
    assert (info["mode"] == guide.modes).all()
    assert np.bincount(info["mode"]).tolist() == [50] * 4


def test_the_world_ends_as_it_should():
    world = FourWays(3, max_steps=30)
    world.reset([0, 1, 2])
    world.position[:] = [[0, 0], [0, 0], [2.5, 0]]
    moves = np.array([[0.1, 0.0], [0.0, 0.0], [0.1, 0.0]])
    log = [world.step(moves) for _ in range(40)]
    reward, terminated, truncated = (np.stack([r[i] for r in log]) for i in (1, 2, 3))
    edge = OBSTACLES[0][0] - RADIUS
    assert terminated[:, 0].nonzero()[0].tolist() == [math.floor(edge / 0.1)]  # a hit; the step that enters it
    assert reward[:, 0].sum() == 0
    assert truncated[:, 1].nonzero()[0].tolist() == [29]  # the time limit is no end of the task
    assert not terminated[:, 1].any()
    assert terminated[:, 2].nonzero()[0].tolist() == reward[:, 2].nonzero()[0].tolist()
    assert reward[:, 2].sum() == 1
    assert world.position[0, 0] < OBSTACLES[0][0]  # a row that has ended stands still
    world.reset([5], [1])
    assert world.ended.tolist() == [True, False, True]
    both = FourWays(1, max_steps=6)
    both.reset([0])
    both.position[:] = 0
    last = [both.step(moves[:1]) for _ in range(6)][-1]
    assert (last[2].tolist(), last[3].tolist()) == ([True], [False])  # a hit at the time limit is a hit
    fast = FourWays(1)
    fast.reset([0])
    fast.position[:] = 0
    assert np.allclose(fast.step(np.array([[3.0, 4.0]]))[0], [[0.09, 0.12]])  # no step is longer than MAX_STEP
    refuses(lambda: fast.step(np.array([[np.nan, 0]])), "row 0", "finite")


def test_a_step_does_not_jump_over_an_obstacle():
    a, b = np.array([[-1.0, 0.5], [-1, 0], [2, 2]]), np.array([[1.0, 0.5], [1, 0], [3, 3]])
    assert np.allclose(distance(np.zeros(2), a, b), [0.5, 0, 8**0.5])


def test_worlds_and_demonstrations_depend_on_their_seed_alone():
    a, b = FourWays(3).reset([7, 8, 9]), FourWays(1).reset([8])
    assert np.array_equal(a[1:2], b)
    one, two = (DATA["four-ways"](n=4).load().x for _ in range(2))
    assert torch.equal(one, two)
    test = DATA["four-ways"](n=4).load("test")
    assert not torch.equal(one[:20], test.x[:20])
    assert test.codec == DATA["four-ways"](n=4).load().codec


def test_an_expert_that_never_succeeds_is_refused(monkeypatch):
    monkeypatch.setattr(FourWaysExpert, "act", lambda self, obs: np.full((len(obs), 2), (0.1, 0.0)))
    refuses(
        lambda: record_demonstrations(DemoSettings(env="four-ways", episodes=4)), "did not succeed once in 16 episodes"
    )
    refuses(lambda: make_expert("four-ways", "person", 3), "allowed: scripted")
