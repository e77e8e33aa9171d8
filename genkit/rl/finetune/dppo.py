"""Diffusion policy policy optimisation (Ren et al. 2024): PPO on the steps of the denoising chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from genkit.rl.finetune.advantages import normalised, over_steps, trimmed
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.learner import Experience, Learner, Method, Share, Task, apart, means_of


def surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7), each ``[B]``; to be made large."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


@dataclass(frozen=True, kw_only=True)
class DPPO(Method):
    """Every denoising step is an action with its own ratio; what came of the sample is credited to all of them."""

    clip: Annotated[float, Gt(0)] = 0.2
    """how far a step's ratio may go from 1; 10 to 20 % of them clipped is healthy"""
    batch: Annotated[int, Ge(1)] = 2048
    epochs: Annotated[int, Ge(1)] = 5
    """passes over an iteration's walks"""
    last: Annotated[int, Ge(1)] | None = 1
    """train the last so many steps only, the K' of the paper; None: all. On four ways the gradients of two halves of
    4,000 decisions had a cosine of 0.2 at the last of four steps, of 0 before (docs/log.md): all of them learn nothing,
    and they lose the ways, between which the early steps choose"""
    denoise_gamma: Share = 0.95
    """discount from one denoising step to the one before"""
    trim: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """advantages below the quantile ``trim`` or above ``1 - trim`` become it: rare ones, such as a fall, are then not
    the unit in which all others are small"""
    clone: Annotated[float, Ge(0)] = 0.1
    """weight of the objective's own loss on demonstrations: it keeps the variety that a reward does not ask for"""
    kl: Annotated[float, Ge(0)] = 0.0
    """weight of the divergence from the model as it was, in nats a step"""
    stop_kl: Annotated[float, Gt(0)] = 0.03
    """divergence of a step from its law when it was drawn, in nats (of all numbers of a sample together), after which
    an iteration ends early"""
    warmup: Annotated[int, Ge(0)] = 2
    """first iterations, in which the critic alone learns"""
    ramp: Annotated[int, Ge(0)] = 0
    """iterations after these in which ``lr`` rises to what it is: Adam's first steps are long ones, whose direction is
    one batch's, and a trained policy may not survive them"""

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration after the warm-up."""
        return self.lr * min(1.0, (iteration - self.warmup + 1) / (self.ramp + 1)) if self.ramp else self.lr

    def check(self, chain: Chain, task: Task) -> None:
        chain.first(self.last)

    def scaled(self, learner: Learner, advantages: Tensor) -> Tensor:
        """In units that ``kl`` and ``clone`` are weighed against."""
        return normalised(advantages)

    def update(self, learner: Learner, task: Task, seen: Experience, iteration: int) -> dict[str, float]:
        logs = self.critic_update(learner, seen, iteration)
        if learner.critic is not None and iteration < self.warmup:
            return logs
        chain, last = learner.chain, self.last or learner.chain.steps
        first = chain.first(last)
        fade = over_steps(last, self.denoise_gamma).to(seen.advantages)
        advantages = self.scaled(learner, trimmed(seen.advantages, self.trim))
        reference = seen.walk.means
        if self.kl:
            reference = means_of(chain, learner.reference, seen) if seen.before is None else seen.before
        count, g = len(advantages), learner.generator(iteration, 2)
        sums, steps, stopped = torch.zeros(4, dtype=torch.float64), 0, False
        for _ in range(self.epochs):
            moved, rows = 0.0, 0
            for pairs in torch.randperm(last * count, generator=g).split(self.batch):
                k, m = first + pairs // count, pairs % count
                cond = {name: v[m] for name, v in seen.cond.items()}
                x, after, old = seen.walk.xs[k, m], seen.walk.xs[k + 1, m], seen.walk.means[k, m]
                mean, std = chain.mean_at(learner.denoiser, x, k, cond), chain.std_at(x, k, cond)
                wide = std if seen.walk.stds is None else seen.walk.stds[k, m]
                log_p = chain.density(after, mean, k, seen.used, std)
                ratio = (log_p - chain.density(after, old, k, seen.used, wide)).exp()
                gain = surrogate(ratio, advantages[m] * fade[k - first], self.clip).mean()
                loss = -gain
                if self.kl:
                    here = std.detach()
                    loss = loss + self.kl * apart(mean, here, reference[k, m], here).mean()
                if self.clone:
                    loss = loss + self.clone * learner.clone_loss(self.clone_batch)
                learner.step(loss, self.rate(iteration))
                with torch.no_grad():
                    kl = apart(mean, std, old, wide).mean()
                    clipped = ((ratio - 1).abs() > self.clip).double().mean()
                    sums += torch.stack([gain.double(), kl.double(), clipped, (ratio - 1).abs().max().double()]).cpu()
                steps, moved, rows = steps + 1, moved + float(kl) * len(pairs), rows + len(pairs)
            if moved / rows > self.stop_kl:
                stopped = True
                break
        gain, kl, clipped, _ = (sums / steps).tolist()
        return {**logs, "gain": gain, "kl_step": kl, "clipped": clipped, "stopped": float(stopped)}
