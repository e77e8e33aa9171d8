"""Denoising diffusion policy optimisation (Black et al. 2024): what one-step decisions, pictures above all, want of
PPO on the chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt
from torch import Tensor

from genkit.rl.finetune.dppo import DPPO
from genkit.rl.finetune.learner import Learner, Share


@dataclass(frozen=True, kw_only=True)
class DDPO(DPPO):
    """DPPO with all steps trained alike, no demonstrations, and a penalty for leaving the pretrained model: a picture
    is made by all of its steps. With --group it is GRPO (Shao et al. 2024; of flows Liu et al. 2025).

    Rewards stay in units of their first deviation. Normalised anew in every iteration, as PPO does, a reward that can
    rise no more would go on to push as hard as at the beginning, and nothing would hold the pictures (docs/log.md).
    """

    lr: Annotated[float, Gt(0)] = 1e-4
    """learning rate of the networks"""
    batch: Annotated[int, Ge(1)] = 256
    """rows of a gradient step: steps of walks"""
    epochs: Annotated[int, Ge(1)] = 1
    """passes over an iteration's walks; drawing new ones costs a third of a pass"""
    last: Annotated[int, Ge(1)] | None = None
    """train the last so many steps only; None: all"""
    denoise_gamma: Share = 1.0
    """discount from one denoising step to the one before"""
    clone: Annotated[float, Ge(0)] = 0.0
    """weight of the objective's own loss on the data"""
    kl: Annotated[float, Ge(0)] = 0.05
    """price of a nat of divergence from the model as it was, in deviations of the first rewards: the optimum is that
    model's law times ``exp(R / (kl deviation))``"""
    stop_kl: Annotated[float, Gt(0)] = 0.3
    """divergence of a step from its law when it was drawn, in nats, after which an iteration ends early"""

    def scaled(self, learner: Learner, advantages: Tensor) -> Tensor:
        learner.spread = learner.spread or max(1e-8, float(advantages.std(correction=0)))
        return advantages / learner.spread
