"""Episodes by hand: receding horizon, batches of seeds, what counts."""

import numpy as np
import pytest

from genkit.envs.four_ways import FourWays
from genkit.rl.policies.episodes import Episodes, entropy_bits, joined, run_episodes
from tests.support.breaking import Gaps
from tests.support.refusals import refuses


class Counting:
    """The k-th action of the d-th chunk is 100 d + k; keeps the observations that it is given."""

    obs_shape, action_dim = (3, 1), 1

    def __init__(self, act_steps):
        self.act_steps, self.observations = act_steps, []

    def reset(self, seeds, rows=None):
        if rows is None:
            self.observations = []

    def act(self, obs, rows):
        self.observations.append(obs[:, :, 0].tolist())
        actions = 100.0 * len(self.observations) + np.arange(self.act_steps)
        return np.broadcast_to(actions[None, :, None], (len(obs), self.act_steps, 1))


class Logging:
    """Counts time as its observation; row i ends after 5 + i steps, the last by the time limit."""

    num, obs_dim, action_dim, max_steps = 2, 1, 1, 6

    def reset(self, seeds, rows=None):
        if rows is None:
            self.time, self.log = np.zeros(2), []
        self.time[[0, 1] if rows is None else rows] = 0
        return self.time[:, None].copy()

    def step(self, actions):
        self.time += 1
        self.log.append(actions[:, 0].tolist())
        ends = self.time == np.array([5, 6])
        reward = np.array([1.0, 2.0])
        cut = ends & np.array([False, True])
        info = {"success": ends & ~cut, "coverage": np.array([self.time[0] / 10, 1 / self.time[1]])}
        return self.time[:, None].copy(), reward, ends & ~cut, cut, info


def test_the_first_actions_of_each_chunk_are_carried_out():
    policy, env = Counting(4), Logging()
    done = run_episodes(policy, env, [0, 1])
    assert [a for _, a in env.log] == [100, 101, 102, 103, 200, 201]
    assert [a for a, _ in env.log] == [100, 101, 102, 103, 200, 201]  # a row that has ended ignores the rest
    assert [s[-1] for s in policy.observations] == [
        [0, 0, 0],
        [2, 3, 4],
    ]  # the newest three, the first repeated at the start
    assert done.returns.tolist() == [5, 12]
    assert done.best.tolist() == [1, 2]
    assert done.lengths.tolist() == [5, 6]
    assert done.truncated.tolist() == [False, True]
    assert done.info["success"].tolist() == [True, False]
    assert done.info["coverage"].tolist() == [0.5, 1.0]  # the largest on the way, none of it after the end
    assert [len(p) for p in done.paths] == [6, 7]
    assert done.summary()["success"]["value"] == 0.5

    assert [p.tolist() for p in done.rewards] == [[1] * 5, [2] * 6]


def test_a_row_that_has_ended_takes_the_next_start_and_only_rows_that_go_on_are_asked():
    policy, env = Counting(4), Logging()
    done = run_episodes(policy, env, [0, 1, 2])
    assert done.returns.tolist() == [5, 12, 5]  # both rows end within the second chunk; then one start is left
    assert [len(p) for p in done.paths] == [6, 7, 6]
    assert [a for a, _ in env.log] == [100, 101, 102, 103, 200, 201, 300, 301, 302, 303, 400]
    assert [a for _, a in env.log][6:] == [0] * 5  # a row without an episode gets zeros
    assert policy.observations[2:] == [[[0, 0, 0]], [[2, 3, 4]]]  # of one row, begun anew
    refuses(lambda: run_episodes(Counting(4), FourWays(2), [0]), "2 observed numbers", "trained on 1 and 1")


class Ahead:
    """An environment that takes the actions of a chunk before the outcome of the first is looked at."""

    def __init__(self, env):
        self.env, self.sizes = env, []
        self.num, self.obs_dim, self.action_dim, self.max_steps = env.num, env.obs_dim, env.action_dim, env.max_steps
        self.reset, self.step, self.frame, self.pixels = env.reset, env.step, env.frame, env.pixels

    def step_chunk(self, actions):
        self.sizes.append(actions.shape[1])
        return [self.step(actions[:, k]) for k in range(actions.shape[1])]


class Seeing(Counting):
    """Sees the last two images too, and moves slowly."""

    obs_shape, action_dim, frame_shape = (2, 2), 2, (3, 8, 8)

    def reset(self, seeds, rows=None):
        super().reset(seeds, rows)
        self.images = [] if rows is None else self.images

    def act(self, obs, rows, frames=None):
        self.images.append(frames)
        return 0.02 + 1e-4 * np.repeat(super().act(obs, rows), 2, 2) % 0.03


@pytest.mark.parametrize("film", [0, 1])
def test_chunks_at_once_are_looked_at_where_images_are_needed(film):
    policies, envs = (Seeing(5), Seeing(5)), (FourWays(2, max_steps=12), Ahead(FourWays(2, max_steps=12)))
    one, two = (run_episodes(p, e, range(3), film=film) for p, e in zip(policies, envs, strict=True))
    for a, b in zip(one.paths, two.paths, strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(*(p.images for p in policies), strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(policies[0].images[1][:, 0], policies[0].images[1][:, 1])
    for a, b in zip(one.frames, two.frames, strict=True):
        assert len(a) == len(b) == one.lengths[0] + 1
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert envs[1].sizes[:4] == ([1, 1, 1, 1] if film else [4, 1, 4, 1])


def test_entropy_is_that_of_the_ways_that_succeed():
    assert entropy_bits(np.array([5, 5, 5, 5])) == pytest.approx(2)
    assert entropy_bits(np.array([8, 0, 0, 0])) == 0
    info = {"mode": np.array([0, 1, 3, 3, 3]), "success": np.array([1, 1, 0, 0, 0])}
    many = Episodes(np.zeros(5), np.zeros(5), np.ones(5), np.zeros(5), info, [], [], 4)
    assert many.mode_entropy_bits == pytest.approx(1)


def test_a_reward_that_is_no_number_is_refused_by_its_seed_and_step():
    refuses(lambda: run_episodes(Counting(2), Gaps(3), [10, 11, 12]), "reward nan", "step 3", "seed 11")


class TellsOnlySuccess(Logging):
    """Reports success in the step in which an episode has it, as Gym environments may, if it is ``reached`` at all."""

    def __init__(self, reached):
        self.reached = reached

    def step(self, actions):
        *outcome, info = super().step(actions)
        return *outcome, {"success": info["success"]} if self.reached and info["success"].any() else {}


def test_batches_that_report_no_success_have_none():
    """In either order: the first may be the one of them that never succeeded."""
    never, once = (run_episodes(Counting(4), TellsOnlySuccess(reached), [0, 1]) for reached in (False, True))
    assert joined([never, once]).info["success"].tolist() == [False, False, True, False]
    assert joined([once, never]).summary()["success"]["value"] == 0.25


def test_films_of_an_environment_without_pictures_are_refused():
    refuses(lambda: run_episodes(Counting(4), Logging(), [0], film=1), "film: given 1", "draws no pictures")
