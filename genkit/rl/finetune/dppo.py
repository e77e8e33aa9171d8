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
from genkit.rl.finetune.divergence import (
    categorical_entropy,
    categorical_kl,
    gaussian_kl,
    reference_choice,
    step_means,
)
from genkit.rl.finetune.experience import Experience, Task
from genkit.rl.finetune.learner import Learner, Share
from genkit.rl.finetune.reward_method import RewardMethod, UnitInterval


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7), to be maximized, ``[B]``."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def name_means(means: Tensor) -> dict[str, float]:
    """The means over rows that :meth:`DPPO.loss` returns, for the log.

    ``means`` are the surrogate, the KL divergence and the clipped share of denoising steps, each a sum over these
    divided by the number of all rows; and, if there are choices, their share of the rows, and likewise their KL
    divergence and their clipped share.
    """
    if len(means) == 3:
        return dict(zip(("surrogate", "kl_step", "clipped"), means.tolist(), strict=True))
    surrogate, kl, clipped, share, kl_choice, clipped_choice = means.tolist()
    steps = {"surrogate": surrogate / (1 - share), "kl_step": kl / (1 - share), "clipped": clipped / (1 - share)}
    return {**steps, "kl_choice_step": kl_choice / share, "clipped_choice": clipped_choice / share}


class Targets(NamedTuple):
    """What an iteration's gradient steps are computed from."""

    first: int
    """index of the first denoising step that is trained"""
    advantages: Tensor
    """scaled, [M]"""
    discounts: Tensor
    """of the choice before the first step, if there is one, and the trained denoising steps, [choices + K - first]"""
    reference: Tensor
    """the steps' means under the model before any reward, [K, M, *S]; those of the trajectories if no KL is wanted"""
    choices: int = 0
    """1 if the trajectories begin with a choice, else 0"""
    reference_choice: Tensor | None = None
    """log-probabilities of the choice, as ``reference``, [M, A]"""


@dataclass(frozen=True, kw_only=True)
class DPPO(RewardMethod):
    """Every denoising step is an action with its own ratio; all are credited with the outcome of the sample.

    If the model makes a choice before the first step, such as an anchor, it is an action too, the chain's step 0.
    """

    clip: Positive = 0.2
    """Largest change of a step's probability ratio from 1; 10 to 20 % of them clipped is healthy."""
    choice_clip: Positive = 0.2
    """The same for the choice of an anchor, which is always trained."""
    choice_entropy_coef: NonNegative = 0.0
    """Weight of the entropy of the choice of an anchor, in nats; it keeps anchors that a reward does not ask for."""
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
        trained, count = len(targets.discounts), len(targets.advantages)
        lr = self.learning_rate(iteration)
        sums, steps, stopped = torch.zeros(3 + 3 * targets.choices, dtype=torch.float64), 0, False

        def loss(share: Share) -> tuple[Tensor, Tensor]:
            return self.loss(learner, experience, targets, share)

        for _ in range(self.epochs):
            epoch, rows = torch.zeros_like(sums), 0
            for pairs in torch.randperm(trained * count, generator=generator).split(self.batch):
                means = learner.gradient_step(pairs, loss, lr)
                sums += means
                steps += 1
                epoch += means * len(pairs)
                rows += len(pairs)
            logs = name_means(epoch / rows)
            if max(logs["kl_step"], logs.get("kl_choice_step", 0.0)) > self.stop_kl:
                stopped = True
                break
        return {**name_means(sums / steps), "stopped_early": float(stopped)}

    def targets(self, learner: Learner, experience: Experience) -> Targets:
        """Scaled advantages, discounts and reference means of an iteration."""
        chain = learner.chain
        first = chain.first_trained(self.ft_denoising_steps)
        clipped = clip_quantiles(experience.advantages, self.clip_advantage_quantile)
        advantages = self.scale_advantages(learner, clipped)
        trajectory, reference, choice = experience.trajectory, experience.reference_means, experience.reference_choice
        choices = int(trajectory.choice is not None)
        each = denoising_discounts(choices + chain.steps, self.denoise_gamma).to(experience.advantages)
        discounts = torch.cat([each[:choices], each[choices + first :]])
        if not self.kl:
            reference, choice = trajectory.means, None
        elif reference is None:
            reference, choice = step_means(chain, learner.reference, experience), reference_choice(learner, experience)
        return Targets(first, advantages, discounts, reference, choices, None if choice is None else choice[0])

    def loss(self, learner: Learner, experience: Experience, targets: Targets, share: Share) -> tuple[Tensor, Tensor]:
        """The mean loss of rows ``s * M + m``: step s of trajectory m, where step 0 is the choice, if there is one, and
        the others are the trained denoising steps.

        Also returns means for :func:`name_means`, float64 ``[3]``, or ``[6]`` if there is a choice.
        """
        count = len(targets.advantages)
        s, m = share.rows // count, share.rows % count
        if targets.choices:
            is_choice = s == 0
            fraction = float(is_choice.double().mean())
            loss, means = torch.zeros((), device=m.device), torch.zeros(6, dtype=torch.float64)
            if fraction > 0:
                part, choice_means = self.choice_loss(learner, experience, targets, m[is_choice])
                loss, means[3:] = loss + fraction * part, fraction * choice_means
            if fraction < 1:
                k = s[~is_choice] - 1 + targets.first
                part, own_means = self.step_loss(learner, experience, targets, k, m[~is_choice])
                loss, means[:3] = loss + (1 - fraction) * part, (1 - fraction) * own_means
        else:
            loss, means = self.step_loss(learner, experience, targets, s + targets.first, m)
        if self.bc_coef:
            loss = loss + self.bc_coef * share.bc_loss(self.bc_batch)
        return loss, means

    def choice_loss(
        self, learner: Learner, experience: Experience, targets: Targets, m: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean loss of the choices before the first step of trajectories ``m``, Int [B].

        Also returns, float64 ``[3]``, 1, the mean KL divergence from the choices when drawn, and the mean of whether a
        ratio was clipped.
        """
        cond = {name: v[m] for name, v in experience.cond.items()}
        assert experience.trajectory.choice is not None
        old = experience.trajectory.choice[0, m]
        log_probs = learner.objective.choice_log_probs(learner.state.nets, cond, experience.trajectory.xs[0, m])
        ratio = (learner.chosen(log_probs, cond) - learner.chosen(old, cond)).exp()
        advantages = targets.advantages[m] * targets.discounts[0]
        loss = -clipped_surrogate(ratio, advantages, self.choice_clip).mean()
        if self.kl and targets.reference_choice is not None:
            loss = loss + self.kl * categorical_kl(log_probs, targets.reference_choice[m]).mean()
        if self.choice_entropy_coef:
            loss = loss - self.choice_entropy_coef * categorical_entropy(log_probs).mean()
        with torch.no_grad():
            kl = categorical_kl(log_probs, old).mean().cpu().double()
            clipped = ((ratio - 1).abs() > self.choice_clip).cpu().double().mean()
            return loss, torch.stack([torch.ones_like(kl), kl, clipped])

    def step_loss(
        self, learner: Learner, experience: Experience, targets: Targets, k: Tensor, m: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean loss of denoising steps ``k`` Int [B] of trajectories ``m`` Int [B].

        Also returns, ``[3]``, means of the surrogate, of the KL divergence from the policy that drew the rows,
        and of whether a ratio was clipped.
        """
        chain, trajectory = learner.chain, experience.trajectory
        cond = {name: v[m] for name, v in experience.cond.items()}
        x, following, old_mean = trajectory.xs[k, m], trajectory.xs[k + 1, m], trajectory.means[k, m]
        mean, std = chain.mean_at(learner.denoiser, x, k, cond), chain.std_at(x, k, cond)
        old_std = std if trajectory.stds is None else trajectory.stds[k, m]
        log_prob = chain.density(following, mean, k, experience.used, std)
        ratio = (log_prob - chain.density(following, old_mean, k, experience.used, old_std)).exp()
        advantages = targets.advantages[m] * targets.discounts[k - targets.first + targets.choices]
        surrogate = clipped_surrogate(ratio, advantages, self.clip).mean()
        loss = -surrogate
        if self.kl:
            fixed_std = std.detach()
            loss = loss + self.kl * gaussian_kl(mean, fixed_std, targets.reference[k, m], fixed_std).mean()
        with torch.no_grad():
            kl = gaussian_kl(mean, std, old_mean, old_std).mean()
            clipped = ((ratio - 1).abs() > self.clip).to(surrogate).mean()
            return loss, torch.stack([surrogate, kl.to(surrogate), clipped])
