"""The base class of reward methods: the settings and the frame of an iteration that they all have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le

from genkit.config.numbers import Count, Natural, Positive
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.divergence import compare_with_reference
from genkit.rl.finetune.experience import Experience, Task
from genkit.rl.finetune.learner import Learner, ShareLoss

UnitInterval = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True, kw_only=True)
class RewardMethod(ABC):
    """A way to learn from rewards: a frozen dataclass of its settings.

    A subclass implements :meth:`improve`; ``docs/contributing/reward-method.md`` is the recipe.
    """

    lr: Positive = 1e-4
    """Learning rate of the networks. Ten times as much loses the variety of the demonstrations sooner."""
    warmup: Natural = 2
    """First iterations in which only the critic learns, if there is one."""
    gamma: UnitInterval = 0.99
    """Discount from one decision to the next."""
    gae_lambda: UnitInterval = 0.95
    """Lambda of generalised advantage estimation: 0 trusts the critic, 1 the returns."""
    critic_lr: Positive = 1e-3
    """Learning rate of the critic."""
    critic_epochs: Count = 5
    """Passes of the critic over the decisions of an iteration."""
    critic_batch: Count | None = None
    """Rows of a gradient step of the critic; None: the same as batch."""
    batch: Count = 1024
    """Rows of a gradient step."""
    bc_batch: Count = 256
    """Demonstrations of a gradient step, if the method has a behaviour-cloning loss."""

    uses_chain: ClassVar[bool] = True
    """whether it learns from the chain of denoising steps, and so from models that have one"""
    needs_log_prob: ClassVar[bool] = True
    """whether it learns through the log-probability of the steps, which learned noise needs as well"""
    needs_critic: ClassVar[bool] = True
    """whether it learns a critic of an environment's rewards"""

    @property
    def files(self) -> Mapping[str, Path]:
        """The files that it learns from instead of samples and episodes of the model's own, by the setting's name."""
        return {}

    def check(self, chain: Chain, task: Task) -> None:  # noqa: B027  (most have nothing to refuse)
        """``ValueError`` if it cannot learn from such a chain or task."""

    def collect(self, learner: Learner, task: Task, iteration: int) -> tuple[Any, dict[str, float]]:
        """What the iteration learns from, an :class:`Experience` unless the method needs none, and what to log."""
        experience, divergence = compare_with_reference(learner, task.collect(learner, iteration))
        return experience, {**experience.logs, **divergence}

    def update(self, learner: Learner, task: Task, experience: Experience, iteration: int) -> dict[str, float]:
        """Learn from the experience of one iteration: the critic first, then, after the warmup, the networks.

        Returns what to log.
        """
        logs = self.update_critic(learner, experience, iteration)
        if learner.critic is not None and iteration < self.warmup:
            return logs
        return {**logs, **self.improve(learner, task, experience, iteration)}

    @abstractmethod
    def improve(self, learner: Learner, task: Task, experience: Experience, iteration: int) -> dict[str, float]:
        """Improve the networks by gradient steps (:meth:`Learner.gradient_step`); returns what to log.

        Random numbers come from ``learner.generator(iteration, 2, ...)``, so that a resumed run is the same.
        """

    def learn_in_epochs(self, learner: Learner, n: int, loss: ShareLoss, iteration: int, epochs: int) -> float:
        """Gradient steps on ``n`` samples, in a new order in each of ``epochs`` passes; the mean of what ``loss``
        reports over the steps."""
        total, steps = 0.0, 0
        for epoch in range(epochs):
            order = torch.randperm(n, generator=learner.generator(iteration, 2, epoch))
            for rows in order.split(self.batch):
                total += float(learner.gradient_step(rows, loss, self.lr))
                steps += 1
        return total / max(1, steps)

    def update_critic(self, learner: Learner, experience: Experience, iteration: int) -> dict[str, float]:
        """Fit the critic, if there is one, to the returns."""
        if learner.critic is None or experience.returns is None:
            return {}
        generator = learner.generator(iteration, 1)
        rows = self.critic_batch or self.batch
        error = learner.fit_critic(experience.cond["obs"], experience.returns, generator, self.critic_epochs, rows)
        advantages, returns = experience.advantages, experience.returns
        unexplained = advantages.var(correction=0) / returns.var(correction=0).clamp(min=1e-12)
        return {"critic_loss": error, "explained_variance": 1 - float(unexplained)}
