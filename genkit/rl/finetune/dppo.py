"""Diffusion policy policy optimization (Ren et al. 2024): PPO on the steps of the denoising chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from genkit.config.numbers import Count, Natural, NonNegative, Positive
from genkit.rl.finetune.advantages import clip_quantiles, denoising_discounts, normalize
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.divergence import gaussian_kl, step_means
from genkit.rl.finetune.experience import Experience, Task
from genkit.rl.finetune.learner import Learner, Share
from genkit.rl.finetune.reward_method import RewardMethod, UnitInterval


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7), to be maximized, ``[B]``."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


class Targets(NamedTuple):
    """What an iteration's gradient steps are computed from."""

    first: int
    """index of the first denoising step that is trained"""
    advantages: Tensor
    """scaled, [M]"""
    discounts: Tensor
    """of the trained denoising steps, [K - first]"""
    reference: Tensor
    """the steps' means under the model before any reward, [K, M, *S]; those of the trajectories if no KL is wanted"""


@dataclass(frozen=True, kw_only=True)
class DPPO(RewardMethod):
    """Every denoising step is an action with its own ratio; all are credited with the outcome of the sample."""

    clip: Positive = 0.2
    """Largest change of a step's probability ratio from 1; 10 to 20 % of them clipped is healthy."""
    batch: Count = 2048
    """Rows of a gradient step, each one denoising step of a trajectory."""
    epochs: Count = 5
    """Passes over the trajectories of an iteration."""
    ft_denoising_steps: Count | None = 1
    """Train only this many last steps, K' in the paper; None: all. On four ways the gradients of two halves of 4,000
    decisions had a cosine of 0.2 at the last of four steps and of 0 before it (docs/log.md): training all steps learned
    nothing and lost the modes, among which the early steps choose."""
    denoise_gamma: UnitInterval = 0.95
    """Discount from one denoising step to the one before."""
    clip_advantage_quantile: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """Clip advantages to the range from this quantile to 1 minus it, so that rare ones, such as a fall, do not set the
    scale of all others; 0: no clipping."""
    bc_coef: NonNegative = 0.1
    """Weight of the behaviour-cloning loss (the objective's own loss on demonstrations), which keeps the variety that a
    reward does not ask for."""
    kl: NonNegative = 0.0
    """Weight of the KL divergence from the model before any reward, in nats per step."""
    stop_kl: Positive = 0.03
    """End an iteration early after an epoch in which the KL divergence of a step from its distribution when drawn,
    in nats over all entries of a sample, is larger than this on average."""
    lr_ramp: Natural = 0
    """Iterations after the warmup over which lr rises linearly: Adam's first steps are large and follow a single batch,
    which a trained policy may not survive."""

    def learning_rate(self, iteration: int) -> float:
        """The learning rate of an iteration after the warmup."""
        if not self.lr_ramp:
            return self.lr
        return self.lr * min(1.0, (iteration - self.warmup + 1) / (self.lr_ramp + 1))

    def check(self, chain: Chain, task: Task) -> None:
        chain.first_trained(self.ft_denoising_steps)

    def scale_advantages(self, learner: Learner, advantages: Tensor) -> Tensor:
        """Advantages in the units that ``kl`` and ``bc_coef`` are relative to."""
        return normalize(advantages)

    def improve(self, learner: Learner, task: Task, experience: Experience, iteration: int) -> dict[str, float]:
        targets, generator = self.targets(learner, experience), learner.generator(iteration, 2)
        trained, count = learner.chain.steps - targets.first, len(targets.advantages)
        lr = self.learning_rate(iteration)
        sums, steps, stopped = torch.zeros(3, dtype=torch.float64), 0, False

        def loss(share: Share) -> tuple[Tensor, Tensor]:
            return self.loss(learner, experience, targets, share)

        for _ in range(self.epochs):
            kl_sum, rows = 0.0, 0
            for pairs in torch.randperm(trained * count, generator=generator).split(self.batch):
                means = learner.gradient_step(pairs, loss, lr)
                sums += means
                steps += 1
                kl_sum += float(means[1]) * len(pairs)
                rows += len(pairs)
            if kl_sum / rows > self.stop_kl:
                stopped = True
                break
        surrogate, kl, clipped = (sums / steps).tolist()
        return {"surrogate": surrogate, "kl_step": kl, "clipped": clipped, "stopped_early": float(stopped)}

    def targets(self, learner: Learner, experience: Experience) -> Targets:
        """Scaled advantages, discounts and reference means of an iteration."""
        chain = learner.chain
        first = chain.first_trained(self.ft_denoising_steps)
        clipped = clip_quantiles(experience.advantages, self.clip_advantage_quantile)
        advantages = self.scale_advantages(learner, clipped)
        discounts = denoising_discounts(chain.steps - first, self.denoise_gamma).to(experience.advantages)
        reference = experience.trajectory.means
        if self.kl:
            reference = experience.reference_means
            if reference is None:
                reference = step_means(chain, learner.reference, experience)
        return Targets(first, advantages, discounts, reference)

    def loss(self, learner: Learner, experience: Experience, targets: Targets, share: Share) -> tuple[Tensor, Tensor]:
        """The mean loss of rows ``k * M + m``: denoising step k (from the first that is trained) of trajectory m.

        Also returns, ``[3]``, means of the surrogate, of the KL divergence from the policy that drew the rows,
        and of whether a ratio was clipped.
        """
        chain, trajectory, count = learner.chain, experience.trajectory, len(targets.advantages)
        k, m = targets.first + share.rows // count, share.rows % count
        cond = {name: v[m] for name, v in experience.cond.items()}
        x, following, old_mean = trajectory.xs[k, m], trajectory.xs[k + 1, m], trajectory.means[k, m]
        mean, std = chain.mean_at(learner.denoiser, x, k, cond), chain.std_at(x, k, cond)
        old_std = std if trajectory.stds is None else trajectory.stds[k, m]
        log_prob = chain.density(following, mean, k, experience.used, std)
        ratio = (log_prob - chain.density(following, old_mean, k, experience.used, old_std)).exp()
        advantages = targets.advantages[m] * targets.discounts[k - targets.first]
        surrogate = clipped_surrogate(ratio, advantages, self.clip).mean()
        loss = -surrogate
        if self.kl:
            fixed_std = std.detach()
            loss = loss + self.kl * gaussian_kl(mean, fixed_std, targets.reference[k, m], fixed_std).mean()
        if self.bc_coef:
            loss = loss + self.bc_coef * share.bc_loss(self.bc_batch)
        with torch.no_grad():
            kl = gaussian_kl(mean, std, old_mean, old_std).mean()
            clipped = ((ratio - 1).abs() > self.clip).to(surrogate).mean()
            return loss, torch.stack([surrogate, kl.to(surrogate), clipped])
