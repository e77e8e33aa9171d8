"""Loss weights: functions ``(alpha, sigma) -> weight`` of the squared error, each in the space it is stated for.

Each paper states its weight for the error of one quantity. A weight is refused if the loss is taken in another space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from genkit.config.numbers import NonNegative, Positive

SIGMA_DATA = 0.5  # of images in [-1, 1] (Karras et al. 2022, table 1), if it was neither given nor measured
LossSpace = Literal["x0", "eps", "v", "velocity"]


class LossWeight(Protocol):
    """The weight of each time in the loss."""

    space: ClassVar[LossSpace | None]
    """the quantity whose squared error it multiplies; None: any"""

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The weight at ``(alpha, sigma)``, in their shape."""
        ...


@dataclass(frozen=True)
class Constant:
    """Weight 1 at all times, in the space of the loss: ``L_simple`` (Ho et al. 2020, eq. 14) for eps."""

    space: ClassVar[LossSpace | None] = None

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)


@dataclass(frozen=True)
class MinSNR:
    """``min(SNR, gamma)`` on the error of x0 (Hang et al. 2023, section 3.4), SNR = alpha^2 / sigma^2."""

    gamma: Positive = 5.0
    """SNR at which the weight stops growing; 5 is the paper's choice"""
    space: ClassVar[LossSpace | None] = "x0"

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha / sigma).square().clamp(max=self.gamma)


@dataclass(frozen=True)
class P2:
    """``1 / (k + SNR)^gamma`` on the error of eps (Choi et al. 2022): less weight at low noise."""

    gamma: NonNegative = 1.0
    """exponent; the paper uses 0.5 and 1"""
    k: Positive = 1.0
    """keeps the weight finite in pure noise"""
    space: ClassVar[LossSpace | None] = "eps"

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (self.k + (alpha / sigma).square()) ** -self.gamma


@dataclass(frozen=True)
class EDMWeight:
    """EDM's ``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2`` on the error of x0 (Karras et al. 2022, table 1).

    Sigma is the noise level, here ``sigma / alpha``. Outputs of Karras' preconditioning then have weight 1.
    """

    sigma_data: Positive | None = None
    """standard deviation of the data; None: the objective's"""
    space: ClassVar[LossSpace | None] = "x0"

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        std = self.sigma_data or SIGMA_DATA
        return (sigma**2 + (alpha * std) ** 2) / (sigma * std) ** 2


LOSS_WEIGHTS: Mapping[str, type[LossWeight]] = {"constant": Constant, "min-snr": MinSNR, "p2": P2, "edm": EDMWeight}


def refuse_loss_weight(weight: LossWeight, space: LossSpace) -> None:
    """``ValueError`` if the loss is taken in another space than the one that the weight is stated for."""
    if weight.space not in (None, space):
        name = next((k for k, v in LOSS_WEIGHTS.items() if type(weight) is v), type(weight).__name__)
        raise ValueError(
            f"loss_space: given {space}, but {name} weights the error of {weight.space}; allowed: {weight.space}"
        )
