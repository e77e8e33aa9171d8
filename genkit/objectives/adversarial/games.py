"""The games of a generator and a discriminator: what each side wants, and how steep the discriminator may be.

Scores are logits: ``D = sigmoid(score)`` is the probability that a sample is real, where a game has probabilities.
Each function is one of scores ``[B]`` and gives a loss for each sample ``[B]``, which its side makes small.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.utils import parametrize

Weight = Annotated[float, Ge(0)]
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Game(ABC):
    """Two losses and the penalties that they need; the defaults are those of each game's own paper, or as said there.

    R1 is ``gamma / 2 |grad D(x)|^2`` at real samples, R2 the same at drawn ones (Mescheder et al. 2018, eq. 9 and 10).
    """

    r1: Weight = 0.0
    """gamma of R1, on real samples"""
    r2: Weight = 0.0
    """gamma of R2, on drawn samples"""
    gp: Weight = 0.0
    """weight of (|grad D| - 1)^2 between real and drawn samples (Gulrajani et al. 2017, eq. 3)"""
    every: Count = 1
    """penalties come only every so many steps, as many times as heavy (Karras et al. 2020, section 3.1)"""
    critic_steps: Count = 1
    """steps of the discriminator for one of the generator"""

    against_real: ClassVar[bool] = False
    """whether the generator's loss sees scores of real samples too"""
    unbounded: ClassVar[bool] = False
    """whether nothing but a penalty or spectral norm keeps the scores finite"""

    def __post_init__(self) -> None:
        for name in ("r1", "r2", "gp"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: given {getattr(self, name)}; a penalty's weight is 0 or more")
        for name in ("every", "critic_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: given {getattr(self, name)}; needs 1 or more")
        if self.every not in (1, type(self).every) and not self.penalties:
            raise ValueError(f"every: given {self.every}, but r1, r2 and gp are 0: there is no penalty to put off")

    @property
    def penalties(self) -> Mapping[str, float]:
        """The weights that are not 0."""
        return {name: size for name in PENALTIES if (size := getattr(self, name))}

    def due(self, step: int | None) -> float:
        """How many times the penalties count at a step of training; outside training (None), once.

        They stand in the discriminator's own loss and not in a phase of theirs: Adam divides each phase's gradient by
        its size, so that the weight of a penalty with an optimiser of its own would mean nothing.
        """
        if not self.penalties or (step is not None and step % self.every):
            return 0.0
        return 1.0 if step is None else float(self.every)

    @abstractmethod
    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the discriminator makes small."""

    @abstractmethod
    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        """What the generator makes small; ``real`` is of use only ``against_real``."""


def log_odds_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``-log D(x) - log(1 - D(G(z)))`` (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real) + F.softplus(fake)


@dataclass(frozen=True)
class Minimax(Game):
    """The zero-sum game of Goodfellow et al. (2014, eq. 1): the generator's gradient fades as the other side wins."""

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return log_odds_loss(real, fake)

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        return -F.softplus(fake)  # log(1 - D(G(z)))


@dataclass(frozen=True)
class NonSaturating(Game):
    """The generator raises ``log D(G(z))`` (Goodfellow et al. 2014, section 3), with R1 (Mescheder et al. 2018)."""

    r1: Weight = 1.0  # gamma of R1, on real samples

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return log_odds_loss(real, fake)

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        return F.softplus(-fake)


@dataclass(frozen=True)
class Hinge(Game):
    """Scores beyond the margin of 1 count no more (Lim & Ye 2017, eq. 8; Miyato et al. 2018, eq. 16 and 17)."""

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - real) + F.relu(1 + fake)

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        return -fake


@dataclass(frozen=True)
class Wasserstein(Game):
    """The dual of W1, over functions of slope 1 (Arjovsky et al. 2017, eq. 2), with the gradient penalty."""

    gp: Weight = 10.0  # weight of (|grad D| - 1)^2 between real and drawn samples; the paper's lambda
    critic_steps: Count = 5  # steps of the discriminator for one of the generator; the paper's number

    unbounded: ClassVar[bool] = True

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake - real

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        return -fake


@dataclass(frozen=True)
class Relativistic(Game):
    """Which of a real and a drawn sample is real? With R1 and R2 this is R3GAN (Huang et al. 2024, eq. 2 and 3)."""

    r1: Weight = 0.3  # gamma of R1, on real samples; chosen on digits: less for points, more for larger pictures
    r2: Weight = 0.3  # gamma of R2, on drawn samples
    every: Count = 4  # penalties come only every so many steps: half the time of a step of the default U-Net

    against_real: ClassVar[bool] = True

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(fake - real)

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        return F.softplus(real - fake)


GAMES: Mapping[str, type[Game]] = {
    "relativistic": Relativistic,
    "non-saturating": NonSaturating,
    "wasserstein": Wasserstein,
    "hinge": Hinge,
    "minimax": Minimax,
}


# ------------------------------------------------------------------------------------------------------ penalties
def slopes(scores: Tensor, x: Tensor) -> Tensor:
    """``|grad D(x)|^2`` of each sample ``[B]``, from scores ``[B]`` that depend on ``x`` row by row."""
    return torch.autograd.grad(scores.sum(), x, create_graph=True)[0].square().flatten(1).sum(1)


def half(squared: Tensor) -> Tensor:
    return squared / 2


def from_one(squared: Tensor) -> Tensor:
    """``(|grad D| - 1)^2`` of its square; where D is flat, with a finite slope of its own."""
    return ((squared + 1e-12).sqrt() - 1).square()


class Penalty(NamedTuple):
    """``of(|grad D|^2)`` at the samples of a ``group``: 0 the real, 1 the drawn, 2 those between."""

    group: int
    of: Callable[[Tensor], Tensor]


PENALTIES: Mapping[str, Penalty] = {"r1": Penalty(0, half), "r2": Penalty(1, half), "gp": Penalty(2, from_one)}


class Spectral(nn.Module):
    """``W / max(1, sigma(W))``, sigma the largest singular value (Miyato et al. 2018, eq. 8 and 12).

    Weights under 1 stay as they are (Gouk et al. 2021, eq. 9), since residual blocks start at 0. The power iteration
    moves in :meth:`after_step`, once a step, and not in the forward pass as in ``torch.nn.utils``: so the answer does
    not depend on how a batch is cut.
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


def bound(net: nn.Module) -> None:
    """Put :class:`Spectral` on the weight of every linear map, convolution and table of ``net``."""
    for layer in list(net.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)):
            parametrize.register_parametrization(layer, "weight", Spectral(layer.weight))


def power_iteration(net: nn.Module, times: int) -> None:
    """Steps of the power iteration of all bounded weights of ``net``."""
    for layer in net.modules():
        if parametrize.is_parametrized(layer, "weight"):
            kept: nn.Module = layer.parametrizations["weight"]  # type: ignore[index]
            kept[0].iterate(kept.original, times)  # type: ignore[index]
