"""Parametrisations: what a network predicts. Each makes a :class:`~genkit.core.Prediction` from its output.

All follow from ``x = alpha x0 + sigma x1`` by linear algebra, so both ends, and what a solver computes from them, are
sums ``p x + q out`` of the network's input and output (:class:`Affine`). A parametrisation that divides by alpha is
refused on a path with ``alpha(1) = 0``, because the network's output would not determine the data there. If alpha(1) is
tiny, a prediction of the noise multiplies the network's error by ``sigma / alpha``, so samplers start where alpha is
``MIN_ALPHA`` (:func:`usable_path`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from genkit.core import Cond, Parametrization, Prediction, ProbabilityPath, expand
from genkit.diffusion.paths import TruncatedPath, coefficients, end_time, weighted

Factor = Tensor | float  # a number, or one for each row
MIN_ALPHA = 0.01  # where samplers of a prediction of the noise start, if the path ends below it


class Affine(Prediction):
    """``x0 = p x + q out`` with ``clean = (p, q)``, and ``x1`` with ``noise``, computed on demand.

    A step of a solver is then one sum of two tensors, while computing the ends and their sum would take three.
    """

    def __init__(self, x: Tensor, out: Tensor, clean: tuple[Factor, Factor], noise: tuple[Factor, Factor]):
        self.x, self.out, self.clean, self.noise = x, out, clean, noise

    def at(self, alpha: float, sigma: float) -> Tensor:
        (p, q), (r, s) = self.clean, self.noise
        return weighted(alpha * p + sigma * r, self.x, alpha * q + sigma * s, self.out)

    @cached_property
    def x0(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The predicted data, ``[B, *S]``."""
        return weighted(self.clean[0], self.x, self.clean[1], self.out)

    @cached_property
    def x1(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The predicted noise, ``[B, *S]``."""
        return weighted(self.noise[0], self.x, self.noise[1], self.out)


class Unscaled:
    """The network sees ``x`` and ``t`` unchanged."""

    divides_by_alpha: ClassVar[bool] = False
    predicts_noise: ClassVar[bool] = False

    def inputs(self, path: ProbabilityPath, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, t


@dataclass(frozen=True)
class Velocity(Unscaled):
    """``v = x1 - x0``, the velocity of rectified flow (Liu et al. 2023, eq. 1); on other paths, that in the chart.

    Well conditioned at both ends: ``x0 = (x - sigma v) / (alpha + sigma)``, ``x1 = (x + alpha v) / (alpha + sigma)``.
    """

    def target(self, path: ProbabilityPath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        return x1 - x0

    def predict(self, path: ProbabilityPath, x: Tensor, t: Tensor, out: Tensor) -> Prediction:
        a, s = coefficients(path, t, x)
        return Affine(x, out, (1 / (a + s), -s / (a + s)), (1 / (a + s), a / (a + s)))


@dataclass(frozen=True)
class Epsilon(Unscaled):
    """The noise, ``x1`` (Ho et al. 2020, eq. 11)."""

    divides_by_alpha: ClassVar[bool] = True
    predicts_noise: ClassVar[bool] = True

    def target(self, path: ProbabilityPath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        return x1

    def predict(self, path: ProbabilityPath, x: Tensor, t: Tensor, out: Tensor) -> Prediction:
        a, s = coefficients(path, t, x)
        return Affine(x, out, (1 / a, -s / a), (0.0, 1.0))


@dataclass(frozen=True)
class Data(Unscaled):
    """The clean sample, ``x0`` (Salimans & Ho 2022, section 4; Li & He 2025)."""

    def target(self, path: ProbabilityPath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        return x0

    def predict(self, path: ProbabilityPath, x: Tensor, t: Tensor, out: Tensor) -> Prediction:
        a, s = coefficients(path, t, x)
        return Affine(x, out, (0.0, 1.0), (1 / s, -a / s))


@dataclass(frozen=True)
class V(Unscaled):
    """``v = alpha x1 - sigma x0`` (Salimans & Ho 2022, appendix D), on any path."""

    def target(self, path: ProbabilityPath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        a, s = coefficients(path, t, x0)
        return a * x1 - s * x0

    def predict(self, path: ProbabilityPath, x: Tensor, t: Tensor, out: Tensor) -> Prediction:
        a, s = coefficients(path, t, x)
        r = a**2 + s**2
        return Affine(x, out, (a / r, -s / r), (s / r, a / r))


@dataclass(frozen=True)
class Score(Unscaled):
    """``grad log p_t(x) = -x1 / sigma`` (Song et al. 2021, eq. 7)."""

    divides_by_alpha: ClassVar[bool] = True
    predicts_noise: ClassVar[bool] = True

    def target(self, path: ProbabilityPath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        return -x1 / expand(path.sigma(t), x1)

    def predict(self, path: ProbabilityPath, x: Tensor, t: Tensor, out: Tensor) -> Prediction:
        a, s = coefficients(path, t, x)
        return Affine(x, out, (1 / a, s**2 / a), (0.0, -s))


@dataclass(frozen=True)
class Karras:
    """EDM's preconditioning (Karras et al. 2022, table 1), at noise level ``sigma / alpha`` on any path.

    ``x0 = c_skip x / alpha + c_out F(c_in x / alpha, log(sigma / alpha) / 4)``, multiplied out so that only the
    time label divides by alpha.
    """

    sigma_data: float = 0.5
    """standard deviation of the data"""
    divides_by_alpha: ClassVar[bool] = True  # in the time label only
    predicts_noise: ClassVar[bool] = False

    def _scales(
        self, path: ProbabilityPath, t: Tensor, like: Tensor
    ) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        a, s = coefficients(path, t, like)
        norm = (s**2 + (a * self.sigma_data) ** 2) ** 0.5
        return 1 / norm, a * (self.sigma_data / norm) ** 2, s * self.sigma_data / norm  # in, skip, out

    def inputs(self, path: ProbabilityPath, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._scales(path, t, x)[0] * x, (path.sigma(t) / path.alpha(t)).log() / 4

    def target(self, path: ProbabilityPath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        a, s = coefficients(path, t, x0)
        _, skip, out = self._scales(path, t, x0)
        return (x0 - skip * (a * x0 + s * x1)) / out

    def predict(self, path: ProbabilityPath, x: Tensor, t: Tensor, out: Tensor) -> Prediction:
        a, s = coefficients(path, t, x)
        inner, skip, scale = self._scales(path, t, x)
        return Affine(x, out, (skip, scale), (s * inner**2, -a * self.sigma_data * inner))


PARAMETRIZATIONS: Mapping[str, type] = {
    "velocity": Velocity,
    "eps": Epsilon,
    "x0": Data,
    "v": V,
    "score": Score,
    "karras": Karras,
}


def refuse_singular(parametrization: Parametrization, path: ProbabilityPath) -> None:
    """``ValueError`` if the prediction cannot determine the data at t = 1."""
    one = torch.ones(1, dtype=torch.float64)
    if parametrization.divides_by_alpha and float(path.alpha(one)) == 0:
        name = next(k for k, v in PARAMETRIZATIONS.items() if type(parametrization) is v)
        raise ValueError(
            f"{name}-prediction on the path {type(path).__name__}: alpha(1) = 0, so at t = 1 it says nothing about the "
            "data; allowed here: velocity, x0, v; or take a path that keeps some signal, such as vp"
        )


@lru_cache(maxsize=64)
def usable_path(path: ProbabilityPath, parametrization: Parametrization) -> ProbabilityPath:
    """The path on which samplers can use these predictions: truncated at alpha = ``MIN_ALPHA`` if they are of noise.

    ``x0 = (x - sigma x1) / alpha`` multiplies an error of x1 by ``sigma / alpha``: 20,000 at the end of cosine betas,
    where an error of 0.05 makes samples of standard deviation 1,000. (The linear betas of Ho et al. 2020 end at alpha =
    0.006.)
    """

    def alpha(t: float) -> float:
        return float(path.alpha(torch.tensor([t], dtype=torch.float64)))

    if not parametrization.predicts_noise or alpha(end_time(path)) >= MIN_ALPHA:
        return path
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if alpha(middle) >= MIN_ALPHA else (low, middle)
    return TruncatedPath(path, low)


@dataclass(frozen=True)
class NetDenoiser:
    """A network with its path and parametrisation: a :class:`~genkit.core.Denoiser`.

    Its path is the :func:`usable_path` of the one that is given.
    """

    net: nn.Module
    path: ProbabilityPath
    parametrization: Parametrization

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", usable_path(self.path, self.parametrization))

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        x_in, label = self.parametrization.inputs(self.path, x, t)
        return self.parametrization.predict(self.path, x, t, self.net(x_in, label, cond))

    def features(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The features ``[B, D]`` in which the network sees ``x`` at ``t``, if it hands them out."""
        x_in, label = self.parametrization.inputs(self.path, x, t)
        return self.net(x_in, label, cond, features=True)
