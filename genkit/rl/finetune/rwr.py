"""Reward-weighted regression: the objective's own loss on samples, the better ones weighing more."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from genkit.core import Batch
from genkit.rl.finetune.learner import Experience, Learner, Method, Task


def weights_of(worth: Tensor, tau: float, most: float = float("inf")) -> Tensor:
    """``exp(R / tau)`` [B], by the largest and then of mean 1, none more than ``most`` (Peters & Schaal 2007; Peng et
    al. 2019). With rewards R, the regression's optimum is ``p0 exp(R / tau)`` up to a constant."""
    w = ((worth - worth.max()) / tau).exp()
    w = w / w.mean()
    return w.clamp(max=most)


@dataclass(frozen=True, kw_only=True)
class RWR(Method):
    """Regress onto what was tried, weighted by ``exp(A / tau)``, A in units of its deviation, and onto demonstrations.

    Without the demonstrations every iteration multiplies the law by the weights again and it collapses: on four ways
    20 iterations left 0.99 of 1.99 bits of the ways, and with them 1.98 (docs/results/rwr-four-ways.json).
    """

    tau: Annotated[float, Gt(0)] = 1.0
    """temperature, in deviations of the advantages"""
    most: Annotated[float, Gt(0)] = 10.0
    """the largest weight, where the mean is 1"""
    demos: Annotated[float, Ge(0), Lt(1)] = 0.5
    """share of demonstrations in every batch, of weight 1"""
    epochs: Annotated[int, Ge(1)] = 5
    """passes over an iteration's samples"""
    warmup: Annotated[int, Ge(0)] = 2
    """first iterations, in which the critic alone learns"""
    noisy: ClassVar[bool] = False

    def update(self, learner: Learner, task: Task, seen: Experience, iteration: int) -> dict[str, float]:
        logs = self.critic_update(learner, seen, iteration)
        if learner.critic is not None and iteration < self.warmup:
            return logs
        a = seen.advantages
        weights = weights_of(a / a.std(correction=0).clamp(min=1e-8), self.tau, self.most)
        tried = Batch(seen.walk.xs[-1], seen.cond, weights)
        total, steps = 0.0, 0
        for epoch in range(self.epochs):
            order = torch.randperm(len(a), generator=learner.generator(iteration, 2, epoch))
            for rows in order.split(self.batch):
                loss = self.loss(learner, tried, rows, (iteration, epoch, int(rows[0])))
                learner.step(loss, self.lr)
                total, steps = total + float(loss.detach()), steps + 1
        share = float(weights.sum() ** 2 / (weights**2).sum() / len(weights))
        return {**logs, "loss": total / max(1, steps), "effective": share}

    def loss(self, learner: Learner, tried: Batch, rows: Tensor, key: tuple[int, ...]) -> Tensor:
        assert tried.weight is not None
        own = replace(
            tried, x=tried.x[rows], cond={k: v[rows] for k, v in tried.cond.items()}, weight=tried.weight[rows]
        )
        each = learner.objective.loss(learner.phase, learner.state.nets, own).per_sample
        assert own.weight is not None
        loss = (each * own.weight).mean()
        if self.demos:
            clone = learner.clone_loss(max(1, round(self.demos * len(rows)))) / math.prod(learner.spec.shape)
            loss = (1 - self.demos) * loss + self.demos * clone
        return loss
