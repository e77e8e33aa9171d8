"""Schedules: the learning rate as a function of the step, by name (``--schedule``)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from genkit.config.numbers import Count, Fraction, Natural, NonNegative

if TYPE_CHECKING:
    from genkit.training.settings import TrainSettings

LONGEST_WARMUP = 100  # steps, unless more are asked for


@dataclass(frozen=True)
class Schedule(ABC):
    """The learning rate after the warm-up, as a share of the peak."""

    validates: ClassVar[bool] = False
    """whether it also depends on losses of held-out samples (:class:`PlateauTracker`)"""

    @abstractmethod
    def share(self, done: int, steps: int, warmup: int) -> float:
        """The share of the peak ``done`` steps after the warm-up, of ``steps`` from there to the end."""


@dataclass(frozen=True)
class ConstantRate(Schedule):
    """The peak throughout."""

    def share(self, done: int, steps: int, warmup: int) -> float:
        return 1.0


@dataclass(frozen=True)
class CosineDecay(Schedule):
    """Half a cosine down to the floor (Loshchilov & Hutter 2017)."""

    floor: Fraction = 0.0
    """share of the peak at the end"""

    def share(self, done: int, steps: int, warmup: int) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress(done, steps)))


@dataclass(frozen=True)
class LinearDecay(Schedule):
    """A line down to the floor."""

    floor: Fraction = 0.0
    """share of the peak at the end"""

    def share(self, done: int, steps: int, warmup: int) -> float:
        return 1 - (1 - self.floor) * progress(done, steps)


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay (Hu et al. 2024): the peak, and a decay in the last part of training."""

    decay: Annotated[float, Gt(0), Le(1)] = 0.2
    """share of the steps, after the warm-up, in which the rate decays"""
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """of the decay: 1 - x, half a cosine, or 1 - sqrt(x) (Haegele et al. 2024)"""
    floor: Fraction = 0.0
    """share of the peak at the end"""

    def share(self, done: int, steps: int, warmup: int) -> float:
        x = max(0.0, 1 - (1 - progress(done, steps)) / self.decay)
        fall = {"linear": x, "cosine": 0.5 * (1 - math.cos(math.pi * x)), "sqrt": math.sqrt(x)}[self.shape]
        return 1 - (1 - self.floor) * fall


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """``sqrt(s / (s + n))``, n steps after the warm-up of s (Vaswani et al. 2017, eq. 3, with the peak as a setting).

    It does not depend on the number of steps.
    """

    timescale: Count | None = None
    """s, the steps after which the rate has fallen to 0.71. None: those of the warm-up"""

    def share(self, done: int, steps: int, warmup: int) -> float:
        scale = self.timescale or max(1, warmup)
        return math.sqrt(scale / (scale + done))


@dataclass(frozen=True)
class Restarts(Schedule):
    """Half cosines that begin anew (SGDR, Loshchilov & Hutter 2017, eq. 5)."""

    period: Count = 500
    """steps of the first one"""
    growth: Annotated[float, Ge(1), Le(100)] = 2.0
    """how much longer each one is than the one before"""
    floor: Fraction = 0.0
    """share of the peak at the end of each"""

    def share(self, done: int, steps: int, warmup: int) -> float:
        begin, length = 0.0, float(self.period)
        while done >= begin + length:
            begin, length = begin + length, length * self.growth
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * (done - begin) / length))


@dataclass(frozen=True)
class Plateau(Schedule):
    """The peak, multiplied by a factor whenever the loss of held-out samples (``--val-every``) stops improving."""

    validates: ClassVar[bool] = True
    factor: Annotated[float, Gt(0), Lt(1)] = 0.5
    """of each reduction"""
    patience: Natural = 5
    """validations without a better loss that are borne; one more reduces the rate"""
    threshold: NonNegative = 1e-4
    """least improvement that counts, relative to the best loss"""
    cooldown: Natural = 0
    """validations after a reduction that do not count"""
    floor: Fraction = 0.0
    """smallest share of the peak"""

    def share(self, done: int, steps: int, warmup: int) -> float:
        return 1.0


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": ConstantRate,
    "cosine": CosineDecay,
    "linear": LinearDecay,
    "wsd": WSD,
    "inverse-sqrt": InverseSqrt,
    "restarts": Restarts,
    "plateau": Plateau,
}


def progress(done: int, steps: int) -> float:
    """The share of the steps that are done, at most 1."""
    return min(1.0, done / max(1, steps))


def warmup_steps(settings: TrainSettings) -> int:
    """The steps of the warm-up: those that are set, else a quarter of all, at most ``LONGEST_WARMUP``."""
    return min(LONGEST_WARMUP, settings.steps // 4) if settings.warmup is None else settings.warmup


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The rate of ``step``: a linear warm-up to the peak, then that of the schedule."""
    warmup = warmup_steps(settings)
    if step < warmup:
        return settings.lr * ((step + 1) / warmup)
    return settings.lr * settings.schedule.share(step - warmup, settings.steps - warmup, warmup)


@dataclass
class PlateauTracker:
    """The reductions of :class:`Plateau` so far: a function of the log, so a resumed run needs no other record."""

    schedule: Plateau
    metric: str
    """name in the log, such as val/loss"""
    best: float = math.inf
    worse: int = 0
    cooling: int = 0
    share: float = 1.0
    """the rate, as a share of the schedule's"""

    @classmethod
    def create(cls, settings: TrainSettings) -> PlateauTracker | None:
        """The tracker of a run; None for other schedules. ``ValueError`` if no losses will be measured."""
        if not isinstance(settings.schedule, Plateau):
            return None
        if not settings.val_every:
            raise ValueError("schedule: plateau follows the loss of held-out samples; give --val-every, say 100")
        return cls(settings.schedule, "val/loss")

    def update(self, record: Mapping[str, Any]) -> bool:
        """Count a validation, and return whether it reduces the rate; a loss that is not finite (None) is not better.

        It is the rule of ``torch.optim.lr_scheduler.ReduceLROnPlateau``.
        """
        if self.metric not in record:
            return False
        value, schedule = record[self.metric], self.schedule
        # as torch, relative to the best loss, which may be negative
        bound = self.best * (1 - schedule.threshold) if math.isfinite(self.best) else math.inf
        if value is not None and value < bound:
            self.best, self.worse = value, 0
        else:
            self.worse += 1
        if self.cooling:
            self.cooling, self.worse = self.cooling - 1, 0
        if self.worse <= schedule.patience:
            return False
        self.share = max(schedule.floor, self.share * schedule.factor)
        self.cooling, self.worse = schedule.cooldown, 0
        return True
