"""What is measured while training besides losses: drawn samples by metrics, a policy by its episodes.

A measurement is a class of a higher room, by its name in :data:`MEASUREMENTS`; the training loop calls it every few
steps, on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from accelerate import Accelerator

from genkit.config import load_object
from genkit.core import Data, Direction
from genkit.training.directory import read_log
from genkit.training.settings import TrainSettings
from genkit.training.state import State

if TYPE_CHECKING:
    from genkit.training.loop import Hook

MEASUREMENTS: Mapping[str, str] = {  # prefix in the log -> "module:Class.create"; taken every PREFIX_every steps
    "eval": "genkit.evaluation.periodic:PeriodicEvaluation.create",
    "rollout": "genkit.rl.policies.periodic:PeriodicRollouts.create",
}


class MeasurementStopped(Exception):  # control flow, not an error
    """A measurement was not finished because training is to stop."""


@dataclass(frozen=True)
class Measured:
    """The result of a measurement."""

    values: Mapping[str, float | None]
    """by their names in the log, without the prefix; intervals as ``fid_low`` and ``fid_high``"""
    shown: Mapping[str, float] = field(default_factory=dict)
    """what the terminal and trackers show, by title"""


class PeriodicMeasurement(Protocol):
    """A measurement of the current model."""

    @property
    def directions(self) -> Mapping[str, Direction]:
        """The numbers that it gives, and which values are better."""
        ...

    def describe(self) -> str | None:
        """One line about it, for the start of training."""
        ...

    def __call__(self, state: State, run: Path, stop: Callable[[], bool]) -> Measured | None:
        """The result on the main process; None on the others. All ranks call it.

        ``ValueError``, on all ranks, if the model cannot be measured now; :class:`MeasurementStopped` if ``stop()``.
        """
        ...


def interval(settings: TrainSettings, name: str) -> int:
    """Steps from one measurement ``name`` to the next; 0: it is never taken."""
    return getattr(settings, f"{name}_every")


def missing_measurements(run: Path, settings: TrainSettings, step: int) -> list[str]:
    """The measurements, ``val`` among them, that are due at ``step`` and that the log of the run does not have."""
    intervals = {"val": settings.val_every, **{name: interval(settings, name) for name in MEASUREMENTS}}
    due = [name for name, every in intervals.items() if every and (step % every == 0 or step == settings.steps)]
    logged = {key.partition("/")[0] for record in read_log(run) if record["step"] == step for key in record}
    return [name for name in due if name not in logged]


def create_measurements(
    settings: TrainSettings, state: State, data: Data, accelerator: Accelerator
) -> dict[str, PeriodicMeasurement]:
    """The measurements that ``settings`` ask for. ``ValueError`` for settings that do not suit the model or data."""
    due = [name for name in MEASUREMENTS if interval(settings, name)]
    return {name: load_object(MEASUREMENTS[name])(settings, state, data, accelerator) for name in due}


def measurement_hooks(settings: TrainSettings, measure: Callable[[str, State], None]) -> list[tuple[int, Hook]]:
    """``(steps between, hook)`` of each measurement, for the training loop."""

    def hook(name: str) -> Hook:
        return lambda state: measure(name, state)

    return [(interval(settings, name), hook(name)) for name in MEASUREMENTS]
