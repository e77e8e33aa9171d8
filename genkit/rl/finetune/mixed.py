"""The sum ``L_diffusion + weight L_RL``: the objective's own loss on demonstrations, and minus the expected reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genkit.core import Cond, Denoiser, Noise
from genkit.rl.finetune.advantages import normalised
from genkit.rl.finetune.chain import Chain, start
from genkit.rl.finetune.dppo import surrogate
from genkit.rl.finetune.learner import Experience, Learner, Method, Task


@dataclass(frozen=True, kw_only=True)
class Mixed(Method):
    """One pass over fresh walks, each gradient step the sum of both losses."""

    weight: Annotated[float, Ge(0)] = 1.0
    """lambda: of minus the expected reward, in units of its deviation, beside the objective's own loss"""
    gradient: Literal["ratio", "through"] = "ratio"
    """of the expected reward: by the likelihood ratio (Williams 1992), or back through the chain, where the reward is a
    differentiable function (Clark et al. 2024)"""
    clip: Annotated[float, Gt(0)] = 0.2
    """how far a step's ratio may go from 1 within an iteration. Without it, what went badly is pushed away the harder
    the further it is: on four ways the success went from 0.72 to 0 within one iteration"""
    last: Annotated[int, Ge(1)] | None = None
    """train the last so many steps only; None: all. Through the chain that is truncation (DRaFT-K)"""
    warmup: Annotated[int, Ge(0)] = 2
    """first iterations, in which the critic alone learns"""

    def check(self, chain: Chain, task: Task) -> None:
        if self.gradient == "ratio":
            chain.first(self.last)
        elif not task.differentiable:
            raise ValueError("method.gradient: given through, but an environment has no gradient; allowed: ratio")
        elif chain.sigma is not None:
            raise ValueError("noise: learned learns by the likelihood ratio; with gradient through: fixed, ddim or sde")

    def update(self, learner: Learner, task: Task, seen: Experience, iteration: int) -> dict[str, float]:
        logs = self.critic_update(learner, seen, iteration)
        if learner.critic is not None and iteration < self.warmup:
            return logs
        return {**logs, **{"ratio": self.by_ratio, "through": self.back}[self.gradient](learner, task, seen, iteration)}

    def by_ratio(self, learner: Learner, task: Task, seen: Experience, iteration: int) -> dict[str, float]:
        """Minus ``A p(x_{k+1} | x_k) / p_drawn(x_{k+1} | x_k)``, clipped as PPO's; where nothing has moved yet its
        gradient is that of ``A log p``. Rows are whole walks, and each is seen once."""
        chain, advantages, total, steps = learner.chain, normalised(seen.advantages), 0.0, 0
        first = chain.first(self.last)
        drawn = torch.stack([self.drawn(chain, seen, k) for k in range(first, chain.steps)])
        order = torch.randperm(len(advantages), generator=learner.generator(iteration, 2))
        for m in order.split(max(1, self.batch // chain.steps)):
            cond = {name: v[m] for name, v in seen.cond.items()}
            log_p = chain.log_prob(learner.denoiser, seen.walk.xs[:, m], cond, self.last, seen.used)
            gain = surrogate((log_p - drawn[:, m]).exp(), advantages[m], self.clip)
            clone = learner.clone_loss(self.clone_batch)
            learner.step(clone - self.weight * gain.mean(), self.lr)  # of a step: lambda means the same for all chains
            total, steps = total + float(clone.detach()), steps + 1
        return {"diffusion_loss": total / max(1, steps)}

    @staticmethod
    def drawn(chain: Chain, seen: Experience, k: int) -> Tensor:
        """``log p`` of step k of every walk, ``[M]``, by the weights that drew it."""
        walk = seen.walk
        at = torch.full((len(seen.advantages),), k, device=walk.xs.device)
        return chain.density(walk.xs[k + 1], walk.means[k], at, seen.used, None if walk.stds is None else walk.stds[k])

    def back(self, learner: Learner, task: Task, seen: Experience, iteration: int) -> dict[str, float]:
        """Minus the reward of new walks, differentiated."""
        count = seen.walk.xs.shape[1]
        spread = float(seen.advantages.std(correction=0).clamp(min=1e-8))
        total, steps = 0.0, 0
        for i, first in enumerate(range(0, count, self.batch)):
            z, cond = task.draw(learner, iteration * 1_000_003 + i, min(self.batch, count - first))
            g = learner.generator(iteration, 3, i)
            noise: Noise = lambda shape, g=g, z=z: torch.randn(len(z), *shape, generator=g).to(z)  # noqa: E731
            at = start(learner.objective, learner.state.nets, z, cond, noise, learner.chain)
            x = through(learner.chain, at.denoise, at.x, at.cond, noise, self.last)
            clone = learner.clone_loss(self.clone_batch)
            learner.step(clone - self.weight * task.reward(x, at.cond).mean() / spread, self.lr)
            total, steps = total + float(clone.detach()), steps + 1
        return {"diffusion_loss": total / max(1, steps)}


def through(
    chain: Chain, denoise: Denoiser, x: Tensor, cond: Cond, noise: Noise, last: int | None = None, save: bool = True
) -> Tensor:
    """Where a walk from ``x`` ends, ``[B, *S]``, with the gradient of its ``last`` steps (all).

    ``save`` keeps the points alone and computes each step again in the backward pass: the memory of one step.
    """
    first = chain.steps - (chain.steps if last is None else last)
    if first < 0:
        raise ValueError(f"last: given {last}; allowed 1 … {chain.steps}, the steps there are")
    for k in range(chain.steps):

        def mean(x: Tensor, k: int = k) -> Tensor:
            return chain.mean_std(denoise, x, k, cond)[0]

        with torch.set_grad_enabled(k >= first):
            at = checkpoint(mean, x, use_reentrant=False) if save and k >= first else mean(x)
            assert isinstance(at, Tensor)
            std = chain.links[k].std
            x = at + std * noise(x.shape[1:]) if std else at
    return x
