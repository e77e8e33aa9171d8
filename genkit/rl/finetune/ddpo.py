"""Denoising diffusion policy optimization (Black et al. 2024): PPO on the denoising chain with settings that suit
one-step tasks such as images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from genkit.config.numbers import Count, NonNegative, Positive
from genkit.rl.finetune.dppo import DPPO
from genkit.rl.finetune.learner import Learner
from genkit.rl.finetune.reward_method import UnitInterval


@dataclass(frozen=True, kw_only=True)
class DDPO(DPPO):
    """DPPO with all steps trained alike, no demonstrations, and a penalty for leaving the pretrained model: an image is
    made by all of its steps. With --group it is GRPO (Shao et al. 2024; for flows Liu et al. 2025).

    Rewards stay in units of their first standard deviation. Normalized anew in every iteration, as PPO does, a reward
    that cannot rise any further would push as hard as at the beginning, and nothing would hold the images
    (docs/log.md).
    """

    lr: Positive = 1e-4
    """Learning rate of the networks."""
    batch: Count = 256
    """Rows of a gradient step, each one denoising step of a trajectory."""
    epochs: Count = 1
    """Passes over the trajectories of an iteration; drawing new ones costs a third of a pass."""
    ft_denoising_steps: Count | None = None
    """Train only this many last steps; None: all."""
    denoise_gamma: UnitInterval = 1.0
    """Discount from one denoising step to the one before."""
    bc_coef: NonNegative = 0.0
    """Weight of the objective's own loss on the data."""
    kl: NonNegative = 0.05
    """Price of one nat of KL divergence from the model before any reward, in standard deviations of the first rewards:
    the optimum is that model's density times ``exp(R / (kl deviation))``."""
    stop_kl: Positive = 0.3
    """End an iteration early after an epoch in which the KL divergence of a step from its distribution when drawn
    is larger than this on average, in nats."""

    def scale_advantages(self, learner: Learner, advantages: Tensor) -> Tensor:
        learner.reward_std = learner.reward_std or max(1e-8, float(advantages.std(correction=0)))
        return advantages / learner.reward_std
