"""Rules by which a flow map is learned. Each is one class, and its weighting is part of it.

All are stated in the chart, for the average velocity ``u = u(z, r, t)`` of the jump from ``z = (1 - tau) x0 + tau x1``
at t to r, with the velocity ``v = x1 - x0`` and ``gap = tau_t - tau_r``. ``sg`` is a constant for the gradient. A rule
gives an error ``[B, *S]`` and turns it into a loss ``[B]``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from genkit.core import Batch, ProbabilityPath, expand, mean_flat
from genkit.diffusion.paths import chart, times_at
from genkit.objectives.flow_map.learned import Jumps, LearnedMap
from genkit.objectives.matching.times import SMALLEST

DrawTimes = Callable[[], Tensor]  # () -> times [B] in (0, 1], new ones at each call


class Rule(ABC):
    """How a flow map is learned."""

    differentiates_time: ClassVar[bool] = False
    """whether the network is differentiated by t, which it should then depend on slowly"""
    jumps_to_data: ClassVar[bool] = False
    """whether only jumps to the data are learned"""
    share: float
    """share of the samples with r = t, which learn the velocity itself"""

    def times(self, batch: Batch, draw: DrawTimes, path: ProbabilityPath) -> tuple[Tensor, Tensor]:
        """``(r, t)``, each ``[B]``: two times in order, the same one for a ``share`` of the samples."""
        a, b = draw(), draw()
        t = torch.maximum(a, b)
        return torch.where(batch.uniform() < self.share, t, torch.minimum(a, b)), t

    @abstractmethod
    def error(self, u: LearnedMap, jumps: Jumps, step: int | None) -> Tensor:
        """The error ``[B, *S]``, zero in the mean where the map is right, at training step ``step`` (None: the end)."""

    @abstractmethod
    def weigh(self, error: Tensor) -> Tensor:
        """The loss ``[B]`` of errors ``[B, *S]``."""


def adaptive(error: Tensor, power: float, floor: float) -> Tensor:
    """``m / sg(m + floor)^power`` with m the mean squared error, ``[B]`` (Geng et al. 2025, eq. 22). Power 0: m."""
    squared = mean_flat(error.square())
    return squared / (squared.detach() + floor) ** power


@dataclass(frozen=True)
class Adaptive(Rule):
    """A rule whose squared errors are divided by a power of themselves."""

    share: Annotated[float, Ge(0), Lt(1)] = 0.5
    """share of the samples with r = t, which learn the velocity itself"""
    power: Annotated[float, Ge(0), Le(1)] = 1.0
    """power of the mean squared error that divides it (p of Geng et al. 2025); 0: plain squares"""
    floor: Annotated[float, Gt(0)] = 1e-3
    """added to the mean squared error before the power"""

    def weigh(self, error: Tensor) -> Tensor:
        return adaptive(error, self.power, self.floor)


@dataclass(frozen=True)
class Improved(Adaptive):
    """Improved MeanFlow (Geng et al. 2025b, section 4): regress ``u + gap sg(du/dtau)`` onto v.

    The derivative is taken along the model's own velocity ``u(z, t, t)``, so the prediction depends on z alone and the
    loss is that of a regression.
    """

    differentiates_time: ClassVar[bool] = True

    def error(self, u: LearnedMap, jumps: Jumps, step: int | None) -> Tensor:
        z, r, t, v = jumps[:4]
        direction = v if jumps.exact else u.velocity(z, t)
        derivative = u.derivative(z, r, t, direction)
        return u(z, r, t) + u.gap(r, t, z) * derivative - v


@dataclass(frozen=True)
class Mean(Adaptive):
    """MeanFlow (Geng et al. 2025, eq. 9 to 11): ``u`` onto ``sg(v - gap du/dtau)``, the derivative along v."""

    share: Annotated[float, Ge(0), Lt(1)] = 0.75
    """share of the samples with r = t, which learn the velocity itself"""
    differentiates_time: ClassVar[bool] = True

    def error(self, u: LearnedMap, jumps: Jumps, step: int | None) -> Tensor:
        z, r, t, v = jumps[:4]
        target = v - u.gap(r, t, z) * u.derivative(z, r, t, v)
        return u(z, r, t) - target


@dataclass(frozen=True)
class Lagrangian(Adaptive):
    """Lagrangian self-distillation (Boffi et al. 2025): the jump's end moves at the velocity that is found there.

    ``u - gap du/dtau_r`` onto ``sg u(X, r, r)`` at ``X = z - gap u``: the derivative has no tangent in z or t. With any
    adaptive weight it diverged in a test, so plain squares are the default.

    A network that predicts the data has the velocity ``(z - x0) / tau``, so an error of x0 at r asks x0 at t to move
    ``tau_t / tau_r`` as far. The error of the jump is multiplied by the inverse (1 where the network predicts the
    velocity), without which nothing was learned: the velocities of short times lost their own, smaller, error in it.
    """

    power: Annotated[float, Ge(0), Le(1)] = 0.0
    """power of the mean squared error that divides it; 0: plain squares"""

    def error(self, u: LearnedMap, jumps: Jumps, step: int | None) -> Tensor:
        z, r, t, v = jumps[:4]
        gap = u.gap(r, t, z)
        average, derivative = u.with_end_derivative(z, r, t)
        arrival = (z - gap * average).detach()
        target = torch.where(expand(r == t, z), v, u.velocity(arrival, r))
        ratio = torch.where(expand(r == t, z), 1.0, u.sensitivity(t, z) / u.sensitivity(r, z)).clamp(max=1)
        return ratio * (average - gap * derivative - target)


@dataclass(frozen=True)
class Shortcut(Adaptive):
    """Shortcut models (Frans et al. 2025, eq. 5): one jump onto the mean of two of half the length.

    Lengths are 1, 1/2, 1/4, ... of the path, and a jump starts at a multiple of its length. The others learn v.
    """

    share: Annotated[float, Ge(0), Lt(1)] = 0.75
    """share of the samples with r = t, which learn the velocity itself"""
    power: Annotated[float, Ge(0), Le(1)] = 0.0
    """power of the mean squared error that divides it; 0: plain squares, as in the paper"""
    halvings: Annotated[int, Ge(1)] = 7
    """the shortest jump has length 2^-halvings; the paper's is 1/128"""

    def times(self, batch: Batch, draw: DrawTimes, path: ProbabilityPath) -> tuple[Tensor, Tensor]:
        length = 2.0 ** -(batch.uniform() * self.halvings).floor()
        start = ((batch.uniform() / length).floor() + 1) * length
        bootstrap, t = batch.uniform() >= self.share, draw()
        return torch.where(bootstrap, start - length, t), torch.where(bootstrap, start, t)

    def error(self, u: LearnedMap, jumps: Jumps, step: int | None) -> Tensor:
        z, r, t, v = jumps[:4]
        middle = (r + t) / 2
        first, second = u.gap(middle, t, z), u.gap(r, middle, z)
        a = u.frozen(z, middle, t)
        b = u.frozen(z - first * a, r, middle)
        jump = (first * a + second * b) / (first + second).clamp(min=SMALLEST)
        return u(z, r, t) - torch.where(expand(r == t, z), v, jump)


@dataclass(frozen=True)
class Alpha(Adaptive):
    """Alpha-Flow (Zhang et al. 2025, eq. 9): ``u`` onto ``sg(a v + (1 - a) u(z_s, r, s))``, z_s a step of v from z.

    ``a`` is the share of the gap from t to s. It falls from 1, flow matching, towards 0, MeanFlow, along a sigmoid
    between two training steps, and no derivative is taken.
    """

    share: Annotated[float, Ge(0), Lt(1)] = 0.5
    """share of the samples with r = t, which learn the velocity itself"""
    start: Annotated[int, Ge(0)] = 500
    """training step before which it is flow matching"""
    end: Annotated[int, Ge(1)] = 3000
    """training step from which the share of the gap is the smallest"""
    smallest: Annotated[float, Gt(0), Lt(1)] = 0.05
    """smallest share of the gap"""

    def __post_init__(self) -> None:
        if not self.start < self.end:
            raise ValueError(f"alpha: given start {self.start} and end {self.end}; allowed start < end")

    def ratio(self, step: int | None) -> float:
        """``a`` at a training step (None: the end)."""
        if step is None or step >= self.end:
            return self.smallest
        progress = (step - self.start) / (self.end - self.start)
        return 1.0 if progress <= 0 else max(self.smallest, 1 / (1 + math.exp(12 * (progress - 0.5))))

    def error(self, u: LearnedMap, jumps: Jumps, step: int | None) -> Tensor:
        z, r, t, v = jumps[:4]
        s = t - self.ratio(step) * (t - r)
        first, second = u.gap(s, t, z), u.gap(r, s, z)
        total = (first + second).clamp(min=SMALLEST)
        target = (first * v + second * u.frozen(z - first * v, r, s)) / total
        return u(z, r, t) - torch.where(expand(r == t, z), v, target)


@dataclass(frozen=True)
class Consistency(Rule):
    """Easy consistency tuning (Geng et al. 2024, section 3): ``f(z_t)`` onto ``sg f(z_s)``, with ``f = z - tau u``.

    Both points lie on the line from x0 to x1, or on the teacher's trajectory by a step of Heun's method; s starts near
    0, where this is denoising, and approaches t as training goes on. The error is divided by the gap between the two,
    which is the paper's weight. Only jumps to the data are learned. On the path ``cosine`` this is the consistency
    model of Lu & Song 2025 (TrigFlow), discretised.
    """

    base: Annotated[float, Gt(1)] = 2.0
    """base q of the step ``1 - s / t``, which is about q^-stage"""
    stage_steps: Annotated[int, Ge(1)] = 1000
    """training steps of a stage"""
    last_stage: Annotated[int, Ge(0)] = 8
    """the stage that does not end"""
    huber: Annotated[float, Gt(0)] = 0.03
    """root mean square error, in velocities, at which squares turn into absolute values"""
    share: ClassVar[float] = 0.0  # pyright: ignore[reportIncompatibleVariableOverride]
    jumps_to_data: ClassVar[bool] = True

    def times(self, batch: Batch, draw: DrawTimes, path: ProbabilityPath) -> tuple[Tensor, Tensor]:
        t = draw()
        return torch.zeros_like(t), t

    def earlier(self, path: ProbabilityPath, t: Tensor, step: int | None) -> Tensor:
        """The time s ``[B]`` below t, in noise levels ``t (1 - q^-(stage + 1) (1 + 8 / (1 + e^t)))``, or 0 if less."""
        stage = self.last_stage if step is None else min(step // self.stage_steps, self.last_stage)
        tau = chart(path, t)[0].double()
        level = tau / (1 - tau).clamp(min=1e-12)
        ratio = 1 - self.base ** -(stage + 1) * (1 + 8 * torch.sigmoid(-level))
        level = level * ratio.clamp(min=0)
        return times_at(path, level / (1 + level), halvings=50).to(t)

    def error(self, u: LearnedMap, jumps: Jumps, step: int | None) -> Tensor:
        z, r, t, v = jumps[:4]
        s = self.earlier(u.path, t, step).clamp(min=SMALLEST)  # at 0, where f is the identity, nothing is evaluated
        lower = z - u.gap(s, t, z) * v
        if jumps.exact:
            lower = z - u.gap(s, t, z) * (v + u.velocity(lower, s)) / 2
        tau_t, tau_s = u.gap(r, t, z), u.gap(r, s, z)
        target = lower - tau_s * u.frozen(lower, r, s)
        error = z - tau_t * u(z, r, t) - torch.where(expand(s <= SMALLEST, z), lower, target)
        return error / u.gap(s, t, z).clamp(min=SMALLEST)

    def weigh(self, error: Tensor) -> Tensor:
        return (mean_flat(error.square()) + self.huber**2).sqrt() - self.huber


RULES: Mapping[str, type[Rule]] = {
    "improved": Improved,
    "mean": Mean,
    "lagrangian": Lagrangian,
    "shortcut": Shortcut,
    "consistency": Consistency,
    "alpha": Alpha,
}
