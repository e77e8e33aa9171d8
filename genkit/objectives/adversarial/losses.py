"""GAN losses: what generator and discriminator minimise, and the penalties that keep the discriminator smooth.

Scores are logits: ``D = sigmoid(score)`` is the probability that a sample is real, if a loss has probabilities. Each
function takes scores ``[B]`` and returns a loss for each sample, ``[B]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from genkit.config.numbers import Count, NonNegative


@dataclass(frozen=True)
class GANLoss(ABC):
    """The losses of both networks and the penalties that they need; defaults are those of each loss's own paper.

    R1 is ``gamma / 2 |grad D(x)|^2`` at real samples, R2 the same at generated ones (Mescheder et al. 2018, eq. 9, 10).
    """

    r1: NonNegative = 0.0
    """gamma of R1, on real samples"""
    r2: NonNegative = 0.0
    """gamma of R2, on generated samples"""
    gp: NonNegative = 0.0
    """weight of (|grad D| - 1)^2 between real and generated samples (Gulrajani et al. 2017, eq. 3)"""
    penalty_every: Count = 1
    """steps between penalties, whose weight is multiplied by as much (Karras et al. 2020, section 3.1)"""
    discriminator_steps: Count = 1
    """steps of the discriminator for one of the generator"""

    uses_real: ClassVar[bool] = False
    """whether the generator's loss uses the scores of real samples too"""
    is_unbounded: ClassVar[bool] = False
    """whether nothing but a penalty or spectral norm keeps the scores finite"""

    def __post_init__(self) -> None:
        for name in ("r1", "r2", "gp"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: given {getattr(self, name)}; a penalty's weight is 0 or more")
        for name in ("penalty_every", "discriminator_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: given {getattr(self, name)}; needs 1 or more")
        if self.penalty_every not in (1, type(self).penalty_every) and not self.penalties:
            raise ValueError(
                f"penalty_every: given {self.penalty_every}, but r1, r2 and gp are 0, so there is no penalty"
            )

    @property
    def penalties(self) -> Mapping[str, float]:
        """The weights that are not 0."""
        return {name: weight for name in PENALTIES if (weight := getattr(self, name))}

    def penalty_factor(self, step: int | None) -> float:
        """The factor of all penalties at a step of training: 0 or ``penalty_every``; outside training (None), 1.

        Penalties are terms of the discriminator's own loss rather than a phase of theirs: Adam divides each phase's
        gradient by its size, so the weight of a penalty with an optimizer of its own would mean nothing.
        """
        if not self.penalties or (step is not None and step % self.penalty_every):
            return 0.0
        return 1.0 if step is None else float(self.penalty_every)

    @abstractmethod
    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the discriminator minimises, from the scores of real and generated samples."""

    @abstractmethod
    def generator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        """What the generator minimises; only losses with ``uses_real`` use the scores ``real``."""


def cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    """``-log D(x) - log(1 - D(G(z)))`` (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real) + F.softplus(fake)


@dataclass(frozen=True)
class Minimax(GANLoss):
    """The zero-sum game of Goodfellow et al. (2014, eq. 1); the generator's gradient vanishes if it loses."""

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return cross_entropy(real, fake)

    def generator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        return -F.softplus(fake)  # log(1 - D(G(z)))


@dataclass(frozen=True)
class NonSaturating(GANLoss):
    """The generator maximises ``log D(G(z))`` (Goodfellow et al. 2014, section 3), with R1 (Mescheder et al. 2018)."""

    r1: NonNegative = 1.0
    """gamma of R1, on real samples"""

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return cross_entropy(real, fake)

    def generator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        return F.softplus(-fake)


@dataclass(frozen=True)
class Hinge(GANLoss):
    """Scores beyond the margin of 1 cost nothing (Lim & Ye 2017, eq. 8; Miyato et al. 2018, eq. 16 and 17)."""

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - real) + F.relu(1 + fake)

    def generator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        return -fake


@dataclass(frozen=True)
class Wasserstein(GANLoss):
    """The dual of W1, over functions of slope 1 (Arjovsky et al. 2017, eq. 2), with the gradient penalty."""

    gp: NonNegative = 10.0
    """weight of (|grad D| - 1)^2 between real and generated samples; 10 is the paper's lambda"""
    discriminator_steps: Count = 5
    """steps of the discriminator for one of the generator; 5 is the paper's number"""

    is_unbounded: ClassVar[bool] = True

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake - real

    def generator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        return -fake


@dataclass(frozen=True)
class Relativistic(GANLoss):
    """Which of a real and a generated sample is real? With R1 and R2 this is R3GAN (Huang et al. 2024, eq. 2 and 3)."""

    r1: NonNegative = 0.3
    """gamma of R1, on real samples; 0.3 was chosen on digits: less for points, more for larger pictures"""
    r2: NonNegative = 0.3
    """gamma of R2, on generated samples"""
    penalty_every: Count = 4
    """steps between penalties; 4 halves the time of a step of the default U-Net"""

    uses_real: ClassVar[bool] = True

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(fake - real)

    def generator_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        return F.softplus(real - fake)


GAN_LOSSES: Mapping[str, type[GANLoss]] = {
    "relativistic": Relativistic,
    "non-saturating": NonSaturating,
    "wasserstein": Wasserstein,
    "hinge": Hinge,
    "minimax": Minimax,
}


# ------------------------------------------------------------------------------------------------------ penalties
def squared_gradient_norm(scores: Tensor, x: Tensor) -> Tensor:
    """``|grad D(x)|^2`` of each sample ``[B]``, from scores ``[B]`` that depend on ``x`` row by row."""
    return torch.autograd.grad(scores.sum(), x, create_graph=True)[0].square().flatten(1).sum(1)


def zero_centred(squared: Tensor) -> Tensor:
    """``|grad D|^2 / 2``, from ``|grad D|^2``."""
    return squared / 2


def one_centred(squared: Tensor) -> Tensor:
    """``(|grad D| - 1)^2``, from ``|grad D|^2``; its own slope stays finite where D is flat."""
    return ((squared + 1e-12).sqrt() - 1).square()


class Penalty(NamedTuple):
    """``function(|grad D|^2)`` at the samples of a ``group``: 0 real, 1 generated, 2 interpolated."""

    group: int
    function: Callable[[Tensor], Tensor]


PENALTIES: Mapping[str, Penalty] = {
    "r1": Penalty(0, zero_centred),
    "r2": Penalty(1, zero_centred),
    "gp": Penalty(2, one_centred),
}


# -------------------------------------------------------------------------------------------------- spectral norm
class SpectralNorm(nn.Module):
    """``W / max(1, sigma(W))``, sigma the largest singular value (Miyato et al. 2018, eq. 8 and 12).

    Weights under 1 stay as they are (Gouk et al. 2021, eq. 9), since residual blocks start at 0. The power iteration
    advances in :meth:`iterate`, once a step, and not in the forward pass as in ``torch.nn.utils``, so the result does
    not depend on how a batch is split.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        flat = weight.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn(flat.shape[0]), dim=0))
        self.register_buffer("v", torch.zeros(flat.shape[1]))
        self.iterate(weight, 20)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            sigma = self.u.clone() @ (weight.flatten(1) @ self.v.clone())
            return weight / sigma.clamp(min=1)

    @torch.no_grad()
    def iterate(self, weight: Tensor, times: int) -> None:
        """``v = W^T u / |W^T u|``, ``u = W v / |W v|``; a weight of zeros leaves u, from which it starts again."""
        flat = weight.detach().flatten(1)
        for _ in range(times):
            self.v.copy_(F.normalize(flat.T @ self.u, dim=0))
            u = flat @ self.v
            self.u.copy_(torch.where(u.norm() > 0, F.normalize(u, dim=0), self.u))


def add_spectral_norm(net: nn.Module) -> None:
    """Put :class:`SpectralNorm` on the weight of every linear map, convolution and table of ``net``."""
    for layer in list(net.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)):
            parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))


def iterate_spectral_norm(net: nn.Module, times: int) -> None:
    """Advance the power iteration of all weights of ``net`` that have a spectral norm."""
    for layer in net.modules():
        if parametrize.is_parametrized(layer, "weight"):
            parametrization: nn.Module = layer.parametrizations["weight"]  # type: ignore[index]
            weight: Any = parametrization.original
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # of a sharded network
            parametrization[0].iterate(whole, times)  # type: ignore[index]
