"""The gradient of a reward through the generator: for models that draw in one pass, and for samplers of few steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit.config.numbers import Count
from genkit.core import Cond
from genkit.evaluation.metrics import Moments
from genkit.rl.finetune.chain import seeded_noise
from genkit.rl.finetune.experience import Task
from genkit.rl.finetune.frechet_reward import FrechetReward
from genkit.rl.finetune.learner import Learner, Share
from genkit.rl.finetune.reward_method import RewardMethod
from genkit.rl.finetune.tasks import FunctionTask

STRIDE = 1_000_003  # of the numbers of draws from one iteration to the next
BEFORE = -1  # the iteration of the samples that are drawn before the first step


@dataclass(frozen=True)
class Start:
    """What some samples start from, the same on all ranks: normals, conditions, and the key of further noise."""

    z: Tensor
    cond: Cond
    key: tuple[int, ...]

    def draw(self, learner: Learner, share: Share) -> tuple[Tensor, Cond]:
        """The samples ``[B, *S]`` of the rows of a share, by the current weights, and their conditions."""
        noise = seeded_noise(len(self.z), learner.generator(*self.key), self.z.device, self.z.dtype, share.rows)
        cond = {name: v[share.rows] for name, v in self.cond.items()}
        return learner.generate(self.z[share.rows], cond, noise), cond


@dataclass(frozen=True, kw_only=True)
class Direct(RewardMethod):
    """Follow the gradient of the reward through the generator's own steps (Clark et al. 2024), of which it has few.

    No exploration and no chain: it serves GANs, flow maps, drifting and distilled models and the decoder of a VAE as
    well as a sampler of few steps. With ``--reward frechet`` it is the FD-loss of Yang et al. (2026): the distance is
    that of a ``population`` of recent samples, and its gradient goes through the newest ones.
    """

    batch: Count = 256
    """Rows of a gradient step."""
    population: Count = 4096
    """Samples whose mean and covariance the reward frechet compares: those of a step and, with weights that fall
    exponentially, of the steps before. As many as batch, or fewer: of the step alone."""

    uses_chain: ClassVar[bool] = False
    needs_log_prob: ClassVar[bool] = False

    def collect(self, learner: Learner, task: Task, iteration: int) -> tuple[Any, dict[str, float]]:
        return None, {}  # samples are drawn where they are learned from

    def improve(self, learner: Learner, task: Task, experience: Any, iteration: int) -> dict[str, float]:
        assert isinstance(task, FunctionTask)
        total, steps = 0.0, 0
        for start in self.starts(learner, task, iteration, task.samples):
            scored = self.judge_population(learner, task, start)

            def loss(share: Share, start: Start = start, scored: FunctionTask = scored) -> tuple[Tensor, Tensor]:
                reward = scored.reward(*start.draw(learner, share)).mean()
                return -reward, reward

            total += float(learner.gradient_step(torch.arange(len(start.z)), loss, self.lr))
            steps += 1
        return {"reward": total / steps}

    def starts(self, learner: Learner, task: FunctionTask, iteration: int, samples: int) -> Iterator[Start]:
        """The starts of the gradient steps of an iteration."""
        for i, first in enumerate(range(0, samples, self.batch)):
            z, cond = task.draw(learner, iteration * STRIDE + i, min(self.batch, samples - first))
            yield Start(z, cond, (iteration, 3, i))

    def judge_population(self, learner: Learner, task: FunctionTask, start: Start) -> FunctionTask:
        """The task whose rewards are those of the samples of ``start`` within the population, which they join.

        Before the first step the population is drawn with the weights as they are.
        """
        reward = task.function
        if not isinstance(reward, FrechetReward):
            return task
        if learner.population is None:
            for earlier in self.starts(learner, task, BEFORE, self.population):
                self.add_samples(learner, task, reward, earlier)
        population = self.add_samples(learner, task, reward, start)
        return replace(task, function=reward.within(population))

    def add_samples(self, learner: Learner, task: FunctionTask, reward: FrechetReward, start: Start) -> Moments:
        """The population with the samples of ``start``, and without as many of the earlier ones as it has room for."""
        own = Moments.zeros(reward.reference.dim, learner.device)
        with torch.no_grad(), learner.autocast():
            for share in learner.shares(torch.arange(len(start.z))):
                if share.counted:
                    own.add(reward.extract(task.decode(start.draw(learner, share)[0])))
        both = gather_moments(learner, own)
        if learner.population is not None:
            room = max(0, self.population - len(start.z))
            both = learner.population.scaled(min(learner.population.n or 0, room)).merge(both)
        learner.population = both
        return both


def gather_moments(learner: Learner, own: Moments) -> Moments:
    """The moments of the rows of all ranks, the same on each."""
    if learner.world == 1:
        return own
    parts = [own.mean.new_tensor([own.n or 0.0]), own.mean, own.scatter.flatten()]
    total = Moments.zeros(own.dim, own.mean.device)
    for row in learner.gather(torch.cat(parts)[None]):
        n, mean, scatter = row.split([1, own.dim, own.dim**2])
        total = total.merge(Moments(int(n), mean, scatter.view(own.dim, own.dim)))
    return total
