"""Trainings that benchmarks compare at equal seconds: the time of a step, and the loss of held-out samples."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from genkit.training.directory import read_log
from genkit.training.loop import Diverged
from genkit.training.run import Run
from genkit.training.train import train

QUIET: Mapping[str, Any] = {"workers": 0, "sample_every": 0, "tensorboard": False}
"""settings of a training that writes nothing but its checkpoints and its log"""
PILOT = 10, 50  # steps between which the time of a step is measured


class HeldOut(NamedTuple):
    """What a training ends with, and what it took."""

    loss: float
    """of the slowest average of the weights; infinite if the training diverged"""
    cpu_seconds: float


def run_timed(
    options: Mapping[str, Any], clock: Callable[[], float] = time.process_time
) -> tuple[Run, dict[int, float]]:
    """The run of a training with ``options``, and when each of its steps had ended."""
    ends: dict[int, float] = {}

    def note(what: str, done: int, total: int | None) -> None:
        ends[done] = clock()

    return train(**options, progress=note), ends


def step_seconds(
    options: Mapping[str, Any], pilot: tuple[int, int] = PILOT, clock: Callable[[], float] = time.process_time
) -> float:
    """Seconds of a step of a training with ``options``: the mean between the steps of ``pilot``."""
    first, last = pilot
    with tempfile.TemporaryDirectory() as folder:
        _, ends = run_timed({**options, "steps": last, "save_every": last, "out": folder}, clock)
    return (ends[last - 1] - ends[first]) / (last - 1 - first)


def measure_held_out(options: Mapping[str, Any]) -> HeldOut:
    """The loss of held-out samples after a training with ``options``, among them ``steps``."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        every = options["steps"]
        try:
            run = train(**options, val_every=every, save_every=every, out=folder)
        except ValueError as e:
            if not isinstance(e.__cause__, Diverged):
                raise
            return HeldOut(math.inf, round(time.process_time() - began, 2))
        losses = [record["val/loss"] for record in read_log(run.directory) if "val/loss" in record]
    loss = math.inf if losses[-1] is None else losses[-1]
    return HeldOut(loss, round(time.process_time() - began, 2))
