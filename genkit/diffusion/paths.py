"""Paths between data and noise, ``x = alpha(t) x0 + sigma(t) x1``, and the chart in which they are all the same.

With ``tau = sigma / (alpha + sigma)`` and ``u = x / (alpha + sigma)`` every path becomes ``u = (1 - tau) x0 + tau x1``:
rectified flow (Liu et al. 2023, eq. 1). Its probability-flow ODE is ``du/dtau = E[x1 - x0 | u]`` on every path, so a
solver is written once, needs no derivative of the schedule, and its grids are grids of tau.

Every path has ``alpha(0) = 1, sigma(0) = 0``; alpha does not increase, sigma does. Each follows a curve in the (alpha,
sigma) plane; ``norm(a, s)`` is the number by which ``(a, s)`` has to be divided to lie on that curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Annotated, Literal, Protocol

import torch
from annotated_types import Gt, Lt
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from genkit.config.numbers import Count, Positive
from genkit.core import ProbabilityPath, expand


@dataclass(frozen=True)
class Linear:
    """Rectified flow / optimal-transport conditional paths: Liu et al. 2023, eq. 1; Lipman et al. 2023, eq. 20."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def norm(self, a: Tensor, s: Tensor) -> Tensor:
        return a + s


@dataclass(frozen=True)
class Cosine:
    """Trigonometric interpolant, "GVP": Albergo & Vanden-Eijnden 2023, eq. 8; Ma et al. 2024 (SiT), eq. 8."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin((1 - t) * (math.pi / 2))  # not cos(t pi/2), which is not 0 at t = 1 in floating point

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def norm(self, a: Tensor, s: Tensor) -> Tensor:
        return (a**2 + s**2).sqrt()


@dataclass(frozen=True)
class VP:
    """Variance preserving: the discrete DDPM table, reproduced exactly at ``t = k / timesteps``, k = 0 .. timesteps.

    ``alpha(k / T)^2 = prod_{i <= k} (1 - beta_i)`` (Ho et al. 2020, eq. 4), ``log alpha`` linear in between. Betas:
    "linear" from beta_min to beta_max (Ho et al. 2020, section 4); "scaled-linear", with linear square roots (the
    latent diffusion of Rombach et al. 2022); "cosine" (Nichol & Dhariwal 2021, eq. 17).

    ``zero_snr`` shifts and scales the table of ``alpha_k``, k = 1 .. T, so that the last is 0 and the first stays
    (Lin et al. 2024, algorithm 1); alpha is then linear in the old alpha between them, and the old one below k = 1.
    """

    betas: Literal["linear", "scaled-linear", "cosine"] = "linear"
    """the noise schedule"""
    timesteps: Count = 1000
    """T, the number of discrete times"""
    beta_min: Annotated[float, Gt(0), Lt(1)] = 1e-4
    """first beta of the linear schedules"""
    beta_max: Annotated[float, Gt(0), Lt(1)] = 0.02
    """last beta of the linear schedules"""
    zero_snr: bool = False
    """rescale the schedule to end in pure noise"""

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < 1:
            raise ValueError(f"betas: given {self.beta_min} .. {self.beta_max}; allowed 0 < beta_min <= beta_max < 1")
        if self.zero_snr and self.timesteps < 2:
            raise ValueError("zero_snr: given true with one timestep, which would be pure noise; allowed from two")

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """``log alpha(t)^2`` before ``zero_snr``, float64, in the shape of t."""
        table = _vp_table(self, t.device)
        k = t.double() * self.timesteps
        low = k.detach().floor().long().clamp(0, self.timesteps - 1)
        return table[low] + (table[low + 1] - table[low]) * (k - low)

    def alpha(self, t: Tensor) -> Tensor:
        if self.zero_snr:
            return self._rescaled(t)[0].to(t.dtype)
        return (0.5 * self.log_alpha_bar(t)).exp().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        if self.zero_snr:
            return self._rescaled(t)[1].to(t.dtype)
        return (-torch.expm1(self.log_alpha_bar(t))).sqrt().to(t.dtype)

    def _rescaled(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table, old = _vp_table(self, t.device), self.log_alpha_bar(t)
        first, last, alpha = (0.5 * table[1]).exp(), (0.5 * table[-1]).exp(), (0.5 * old).exp()
        new = (alpha - last) * (first / (first - last))
        early = t.double() * self.timesteps <= 1
        return torch.where(early, alpha, new), torch.where(early, -torch.expm1(old), 1 - new**2).sqrt()

    def norm(self, a: Tensor, s: Tensor) -> Tensor:
        return (a**2 + s**2).sqrt()


@lru_cache(maxsize=32)
def _vp_table(path: VP, device: torch.device) -> Tensor:
    """``log alpha_bar_k``, k = 0 .. T, float64."""
    betas = BETAS[path.betas](path)
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)]).to(device)


def _power_betas(path: VP, power: int) -> Tensor:
    ends = path.beta_min ** (1 / power), path.beta_max ** (1 / power)
    return torch.linspace(*ends, path.timesteps, dtype=torch.float64) ** power


def _cosine_betas(path: VP) -> Tensor:
    k = torch.arange(path.timesteps + 1, dtype=torch.float64) / path.timesteps
    f = torch.cos((k + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


BETAS: Mapping[str, Callable[[VP], Tensor]] = {
    "linear": partial(_power_betas, power=1),
    "scaled-linear": partial(_power_betas, power=2),
    "cosine": _cosine_betas,
}


@dataclass(frozen=True)
class SubVP:
    """Sub-VP: ``alpha`` of the VP SDE and ``sigma = 1 - alpha^2`` (Song et al. 2021, eq. 29), less noise than VP.

    ``beta(t)`` grows linearly from beta_min to beta_max; the defaults are the paper's (appendix C).
    """

    beta_min: Positive = 0.1
    """beta(0)"""
    beta_max: Positive = 20.0
    """beta(1)"""

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(f"betas: given {self.beta_min} .. {self.beta_max}; allowed 0 < beta_min <= beta_max")

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """``log alpha(t)^2``, which is minus the integral of beta."""
        return -t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2)

    def alpha(self, t: Tensor) -> Tensor:
        return (0.5 * self.log_alpha_bar(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(self.log_alpha_bar(t))

    def norm(self, a: Tensor, s: Tensor) -> Tensor:
        return (s + (s**2 + 4 * a**2).sqrt()) / 2  # from s / n = 1 - (a / n)^2


@dataclass(frozen=True)
class VE:
    """Variance exploding, ``alpha = 1``: ``sigma(t)^2 = sigma_min^2 ((sigma_max / sigma_min)^(2t) - 1)``.

    That is the kernel of the VE SDE (Song et al. 2021, eq. 29) with ``sigma(0) = 0``. Defaults: Karras et al. 2022,
    table 1.
    """

    sigma_min: Positive = 0.002
    """noise level from which sigma grows geometrically"""
    sigma_max: Positive = 80.0
    """noise level at t = 1"""

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma: given {self.sigma_min} .. {self.sigma_max}; allowed 0 < sigma_min < sigma_max")

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.expm1(2 * math.log(self.sigma_max / self.sigma_min) * t).sqrt()

    def time_of(self, sigma: Tensor) -> Tensor:
        """The inverse of ``sigma(t)``; 1 past the path's end."""
        t = torch.log1p((sigma / self.sigma_min) ** 2) / (2 * math.log(self.sigma_max / self.sigma_min))
        return t.clamp(max=1)

    def norm(self, a: Tensor, s: Tensor) -> Tensor:
        return a


class ShiftablePath(ProbabilityPath, Protocol):
    """A path that can be shifted along its own curve."""

    def norm(self, a: Tensor, s: Tensor) -> Tensor:
        """The divisor that brings ``(a, s)`` onto the path's curve, in their shape."""
        ...


@dataclass(frozen=True)
class Shifted:
    """``path`` with its noise level ``sigma / alpha`` multiplied by ``shift``.

    Neighbouring pixels of larger pictures are more alike, so more noise is needed to hide as much. On the linear path
    this is Esser et al. 2024, eq. 23, with shift ``sqrt(m / n)`` for m pixels instead of n; on VP it is the shifted
    log-SNR of Hoogeboom et al. 2023, section 3.1, with shift ``d / 64`` for pictures d wide.
    """

    path: ShiftablePath = field(default_factory=Linear, metadata={"table": "genkit.diffusion.paths:PATHS"})
    """the path that is shifted"""
    shift: Positive = 3.0
    """factor of the noise level in training; the default grid of sampling is uniform in chart time whatever the shift,
    and --grid trailing has the shifted times; 3 is Esser et al.'s choice for 1024 x 1024, compared with 256 x 256"""

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift: given {self.shift}; allowed above 0")

    def alpha(self, t: Tensor) -> Tensor:
        return self._shifted(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self._shifted(t)[1]

    def _shifted(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a, s = self.path.alpha(t), self.shift * self.path.sigma(t)
        n = self.norm(a, s)
        return a / n, s / n

    def norm(self, a: Tensor, s: Tensor) -> Tensor:
        return self.path.norm(a, s)


@dataclass(frozen=True)
class ODEOnlyPath:
    """The ``path`` of a flow whose source is not normal noise drawn independently of the data.

    The ODE of such a flow is right, but its expected noise at x is not a multiple of the score, so SDE samplers,
    variational bounds and guidance by Bayes' rule are not. :func:`require_diffusion` refuses it.
    """

    path: ProbabilityPath
    model: str = field(default="this flow", compare=False)
    """what error messages call the model"""

    def alpha(self, t: Tensor) -> Tensor:
        return self.path.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.path.sigma(t)


@dataclass(frozen=True)
class TruncatedPath:
    """``path`` without its noisiest part: samplers start at the time ``end``, from noise alone.

    Made by :func:`genkit.diffusion.parametrization.usable_path`. The coefficients at all times are those of ``path``.
    """

    path: ProbabilityPath
    end: float

    def alpha(self, t: Tensor) -> Tensor:
        return self.path.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.path.sigma(t)


def end_time(path: ProbabilityPath) -> float:
    """The time at which samplers start: 1, unless the path is a :class:`TruncatedPath`."""
    if isinstance(path, ODEOnlyPath):
        return end_time(path.path)
    return path.end if isinstance(path, TruncatedPath) else 1.0


def whole_path(path: ProbabilityPath) -> ProbabilityPath:
    """The path up to t = 1: without a :class:`TruncatedPath` around it."""
    if isinstance(path, ODEOnlyPath):
        return replace(path, path=whole_path(path.path))
    return path.path if isinstance(path, TruncatedPath) else path


def require_diffusion(name: str, path: ProbabilityPath) -> None:
    """``ValueError`` if ``name`` needs the score and ``path`` is that of a flow which has none."""
    if isinstance(path, ODEOnlyPath):
        raise ValueError(
            f"{name}: given a flow whose source or coupling makes it no diffusion, so that it has no score; allowed: "
            "models of --objective.source=normal and --objective.coupling=independent"
        )


PATHS: Mapping[str, type] = {
    "linear": Linear,
    "cosine": Cosine,
    "vp": VP,
    "sub-vp": SubVP,
    "ve": VE,
    "shifted": Shifted,
}


def mix(path: ProbabilityPath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """The point ``alpha(t) x0 + sigma(t) x1`` of the path, ``[B, *S]`` like ``x0`` and ``x1``, at t ``[B]``."""
    return expand(path.alpha(t), x0) * x0 + expand(path.sigma(t), x0) * x1


class SharedTime(Tensor):
    """One time for all rows of a batch, ``[B]``, that also knows it as a Python number, ``value``.

    :func:`coefficients` needs the number, and reading it back from a tensor takes as long as a kernel on a small sample
    and makes a GPU wait. Every operation on it returns a plain tensor, so no other time can carry this one's number.
    """

    value: float
    # as in nn.Parameter: operations cost nothing extra and return plain tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]


@lru_cache(maxsize=256)
def shared_time(t: float, rows: int, dtype: torch.dtype, device: torch.device) -> SharedTime:
    """``t`` for each of ``rows`` samples, for samplers."""
    time = torch.full((1,), t, dtype=dtype, device=device).expand(rows).as_subclass(SharedTime)  # a kernel, no copy
    time.value = t
    return time


def repeated(t: Tensor, times: int) -> Tensor:
    """A time of each sample, ``[B]``, for a batch that is repeated: ``[times * B]``, shared if ``t`` is."""
    if isinstance(t, SharedTime):
        return shared_time(t.value, times * len(t), t.dtype, t.device)
    return torch.cat([t] * times)


def within_path(path: ProbabilityPath, t: Tensor, last: float) -> Tensor:
    """``t`` ``[B]``, but no later than ``last`` where alpha(t) is 0, shared if ``t`` is."""
    if isinstance(t, SharedTime):
        return t if _at(path, t.value)[0] > 0 else shared_time(min(t.value, last), len(t), t.dtype, t.device)
    return torch.where(path.alpha(t) > 0, t, t.clamp(max=last))


def coefficients(path: ProbabilityPath, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
    """``(alpha(t), sigma(t))`` as factors of ``like`` ``[B, *S]``.

    For one time of the whole batch, a :class:`SharedTime` or on the CPU an expanded tensor (its stride is 0), they are
    two numbers, which are cached: a path's functions cost more than a solver's step. For other times they are tensors
    ``[B, 1, ..., 1]``.
    """
    if isinstance(t, SharedTime):
        return _at(path, t.value)
    shared = t.device.type == "cpu" and (len(t) == 1 or t.stride(0) == 0)
    if shared and not t.requires_grad and unpack_dual(t).tangent is None:
        return _at(path, t[0].item())
    return expand(path.alpha(t), like), expand(path.sigma(t), like)


def weighted(p: Tensor | float, x: Tensor, q: Tensor | float, y: Tensor) -> Tensor:
    """``p x + q y`` with factors from :func:`coefficients`, in as few kernels as possible."""
    if not isinstance(p, Tensor) and p == 0:
        return y if not isinstance(q, Tensor) and q == 1 else q * y
    first = x if not isinstance(p, Tensor) and p == 1 else p * x
    return torch.addcmul(first, q, y) if isinstance(q, Tensor) else torch.add(first, y, alpha=q)


@lru_cache(maxsize=4096)
def _at(path: ProbabilityPath, t: float) -> tuple[float, float]:
    one = torch.tensor([t], dtype=torch.float64)
    return path.alpha(one).item(), path.sigma(one).item()


def chart(path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
    """Chart time ``tau = sigma / (alpha + sigma)`` and ``scale = alpha + sigma``, so that ``u = x / scale``."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    scale = alpha + sigma
    return sigma / scale, scale


def times_at(path: ProbabilityPath, tau: Tensor, halvings: int = 110) -> Tensor:
    """The times at which the path has chart times ``tau`` (any shape): the inverse of :func:`chart`, by bisection.

    Returns float64. For a tau past the path's own end (VP and VE stop short of 1) it is :func:`end_time`. The default
    bisects to 2^-110, because sigma grows as sqrt(t) on VP and VE: tau is then right to 1e-16.
    """
    tau, end = tau.double(), end_time(path)
    low, high = torch.zeros_like(tau), torch.ones_like(tau)
    for _ in range(halvings):
        middle = (low + high) / 2
        above = chart(path, middle)[0] > tau
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    first, last = (sigma / (alpha + sigma) for alpha, sigma in (_at(path, 0.0), _at(path, end)))
    t = torch.where(tau <= first, torch.zeros_like(tau), (low + high) / 2)
    return torch.where(tau >= last, torch.full_like(tau, end), t)
