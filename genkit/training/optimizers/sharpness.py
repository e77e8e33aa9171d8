"""Sharpness-aware minimisation: the gradient at the worst weights nearby."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genkit.config.numbers import Positive
from genkit.training.optimizers.family import Group, Networks, OptimizerFamily, PhaseRates

EPS = 1e-12  # added to the norm of the gradient


@dataclass(frozen=True)
class SAMFamily(OptimizerFamily):
    """SAM (Foret et al. 2021) with AdamW: each step takes the gradient twice, and so twice the time."""

    target: ClassVar[str] = "torch.optim:AdamW"
    rho: Positive = 0.05
    """distance to the weights at which the second gradient is taken"""
    adaptive: bool = False
    """measure the distance relative to each weight (ASAM, Kwon et al. 2021)"""

    def create(self, groups: Sequence[Group], rates: PhaseRates, nets: Networks) -> torch.optim.Optimizer:
        return SAM([*groups], rates, self.rho, self.adaptive)


class SAM(torch.optim.AdamW):
    """AdamW by the gradient at the weights that :meth:`perturb` has moved to."""

    def __init__(self, groups: list[Group], rates: PhaseRates, rho: float, adaptive: bool):
        super().__init__(groups, rates.lr, rates.betas, weight_decay=rates.weight_decay, fused=True)
        self.rho, self.adaptive = rho, adaptive
        self.before: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def perturb(self) -> None:
        """Move ``rho`` up the gradient (eq. 2), and clear it. :meth:`restore` goes back.

        A gradient that is not finite moves nothing: that of the second pass is not finite either, and skips the step.
        """
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        slopes = [p.grad * p.abs() if self.adaptive else p.grad for p in trained]
        norm = nn.utils.get_total_norm(slopes)
        scale = torch.where(torch.isfinite(norm), self.rho / (norm + EPS), 0.0)
        self.before = [(p, p.detach().clone()) for p in trained]
        for p, slope in zip(trained, slopes, strict=True):
            direction = slope * p.abs() if self.adaptive else slope
            p.add_(torch.nan_to_num(direction, 0.0, 0.0, 0.0) * scale)
        self.zero_grad(set_to_none=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the weights before :meth:`perturb`."""
        for p, weight in self.before:
            p.copy_(weight)
        self.before = []

    def step(self, closure: Any = None) -> Any:
        """Step from the weights before :meth:`perturb`."""
        self.restore()
        return super().step(closure)
