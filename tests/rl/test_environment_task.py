"""Experience in an environment: episodes by hand."""

import numpy as np
import pytest
import torch

from genkit.backbones import MLP
from genkit.core import Spec, Vector
from genkit.data.codecs import Actions
from genkit.diffusion.paths import Linear
from genkit.rl.finetune.chain import Chain, seeded_noise
from genkit.rl.finetune.learner import Critic
from genkit.rl.finetune.noise import FixedNoise
from genkit.rl.finetune.tasks import EnvironmentTask
from tests.support.breaking import Gaps
from tests.support.learning import make_learner
from tests.support.refusals import refuses


class Clock:
    """N worlds of one number, the time; a step is worth 1, and the time limit (or, if so told, the world) ends it."""

    obs_dim = action_dim = 1

    def __init__(self, num, max_steps, terminates=False):
        self.num, self.max_steps, self.terminates = num, max_steps, terminates
        self.time = np.zeros(num)

    def reset(self, seeds, rows=None):
        self.time[range(self.num) if rows is None else rows] = 0
        return self.time[:, None].copy()

    def step(self, actions):
        ended = self.time >= self.max_steps
        self.time = np.where(ended, self.time, self.time + 1)
        now = ~ended & (self.time >= self.max_steps)
        no = np.zeros(self.num, bool)
        return (
            self.time[:, None].copy(),
            1.0 - ended,
            now if self.terminates else no,
            no if self.terminates else now,
            {},
        )


class Flat(Critic):
    """Knows no better than that all is worth 3."""

    def forward(self, obs):
        return torch.full((len(obs),), 3.0)


def make_task(env, num, decisions, lam=0.0, act_steps=2, spec=None, limit=None):
    spec = spec or Spec((1, 2), {"obs": Vector((1, 1))})
    nets = {"net": MLP(width=8, depth=1).denoiser(spec)}
    critic = Flat(spec)
    critic.scale.fill_(1.0)
    learner = make_learner(nets, Chain.on_grid(Linear(), 1, FixedNoise(0.1)), spec, critic=critic)
    task = EnvironmentTask(env, Actions((0.0,), (1.0,)), act_steps, decisions, 0.5, lam, limit)
    task.begin(learner, 0)
    return task, learner


@pytest.mark.parametrize("terminates", [True, False])
def test_time_limits_are_bootstrapped_from_and_ends_are_not(terminates):
    """One world of five steps, two to a decision: of three decisions the last brings 1 and ends the episode."""
    task, learner = make_task(Clock(1, 5, terminates), 1, 6)
    experience = task.collect(learner, 0)
    goes_on, end = 2 + 0.5 * 3 - 3, 1 - 3 + (0 if terminates else 0.5 * 3)
    assert experience.advantages.tolist() == [goes_on, goes_on, end] * 2
    assert experience.cond["obs"].flatten().tolist() == [0, 2, 4, 0, 2, 4]
    assert torch.equal(experience.returns, experience.advantages + 3)
    assert experience.logs == {"reward": 10.0, "episodes": 2.0, "return": 5.0}  # no success: this world knows of none


def test_first_episodes_are_cut_at_ages_of_their_own():
    task, learner = make_task(Clock(4, 8), 4, 4)
    obs = task.collect(learner, 0).cond["obs"].reshape(4, 4)
    assert obs.T.tolist() == [[0, 0, 2, 4], [0, 2, 0, 2], [0, 2, 4, 0], [0, 2, 4, 6]]
    assert task.collect(learner, 1).cond["obs"].reshape(4, 4)[0].tolist() == [6, 4, 2, 0]


def test_cut_episodes_are_not_counted_but_bootstrapped():
    task, learner = make_task(Clock(4, 8), 4, 4)
    experience = task.collect(learner, 0)
    assert experience.advantages.tolist() == [0.5] * 16
    assert experience.logs["episodes"] == 1


@pytest.mark.parametrize("terminates", [True, False])
def test_an_episode_that_is_lost_ends_and_is_not_bootstrapped(terminates):
    """The clock is at 4 after two decisions, 1.5 scales of 2 from the demonstrations' 1; it would go on to 8."""
    spec = Spec((1, 2), {"obs": Vector((1, 1), (1.0,), (2.0,))})
    task, learner = make_task(Clock(1, 8, terminates), 1, 4, spec=spec, limit=1.4)
    experience = task.collect(learner, 0)
    goes_on, end = 2 + 0.5 * 3 - 3, 2 - 3
    assert experience.cond["obs"].flatten().tolist() == [0, 2, 0, 2]
    assert experience.advantages.tolist() == [goes_on, end] * 2
    assert experience.logs == {"reward": 8.0, "episodes": 2.0, "return": 4.0}


def test_the_last_stack_of_an_episode_is_the_last_that_was_observed():
    """Two observations are seen, and the episode ends after two of four steps: at 5 and 6, not 6 and 6."""
    spec = Spec((1, 5), {"obs": Vector((2, 1))})
    task, learner = make_task(Clock(1, 6), 1, 2, act_steps=4, spec=spec)
    noise = seeded_noise(1, learner.generator(0, 0), learner.device)
    with torch.no_grad():
        first, second = (task.decide(learner, noise) for _ in range(2))
    assert first.next_obs.flatten().tolist() == [3, 4]
    assert (second.next_obs.flatten().tolist(), second.ended.tolist()) == ([5, 6], [True])


class Ticking(Clock):
    """Its mode is the time, and a step that does not count is worth nothing that is finite."""

    def step(self, actions):
        obs, reward, *ends, info = super().step(actions)
        return obs, np.where(self.time > 1, np.nan, reward), *ends, {**info, "mode": self.time.astype(int)}


def test_the_rest_of_a_chunk_does_not_count_after_an_episode_is_lost():
    task, _ = make_task(Ticking(1, 8), 1, 1, limit=0.5)
    total, terminated, ended = task.act(np.zeros((1, 1, 3)))
    assert (total.tolist(), terminated.tolist(), ended.tolist(), task.mode.tolist()) == ([1], [True], [True], [1])


@pytest.mark.parametrize("name", ["obs", "reward"])
def test_what_is_no_number_is_the_environments_fault(name):
    task, learner = make_task(Gaps(2, name), 2, 6)
    refuses(lambda: task.collect(learner, 0), f"env: gave {name} nan in step 3 of the episode of seed {task.seeds[1]};")
