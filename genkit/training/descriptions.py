"""The lines that a training begins with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import nn

from genkit.core import Data
from genkit.core.tensors import count_parameters
from genkit.data import InMemory, OnDisk
from genkit.data.classes import describe_classes
from genkit.training.measurements import PeriodicMeasurement
from genkit.training.prior import MixedStream
from genkit.training.settings import TrainSettings
from genkit.training.shown import Shown
from genkit.training.validation import Validation

if TYPE_CHECKING:
    from genkit.training.train import UntrainedModel


def summary(
    settings: TrainSettings, run: Path, nets: dict[str, nn.Module], data: Data, accelerator: Accelerator
) -> str:
    """One line: directory, size of the model and data, device."""
    count = sum(map(count_parameters, nets.values()))
    shape = "x".join(map(str, data.spec.shape))
    ranks = f", {accelerator.num_processes} ranks" if accelerator.num_processes > 1 else ""
    size = f"{count / 1e6:.2f}M parameters, {len(data)} samples of {shape}"
    return f"{run}  {size}, {accelerator.device}, {settings.precision}{ranks}"


def describe_start(
    settings: TrainSettings,
    model: UntrainedModel,
    shown: Shown,
    validation: Validation | None,
    measurements: Mapping[str, PeriodicMeasurement],
) -> Iterator[str]:
    """The lines that training begins with, before its :func:`summary`."""
    yield from settings.backbone.notes(model.data.spec)
    yield from settings.objective.notes()
    if held_out := describe_held_out(model.dataset):
        yield held_out
    if classes := describe_classes(model.dataset):
        yield f"classes  {classes}"
    if isinstance(model.dataset, OnDisk) and model.dataset.buckets:
        yield f"buckets  {model.dataset.buckets.describe(settings.batch)}"
    if settings.sample_every and (pictures := shown.describe(settings)):
        yield pictures
    if isinstance(model.stream, MixedStream):
        yield f"prior    {model.stream.describe()}"
    if validation:
        yield f"val      {validation.n} held-out samples, every {settings.val_every} steps"
    yield from filter(None, (measurement.describe() for measurement in measurements.values()))


def describe_held_out(data: Data) -> str | None:
    """One line on the samples that are kept for evaluation; None if there are none."""
    if not isinstance(data, InMemory | OnDisk) or not data.num_held_out:
        return None
    total = len(data) + data.num_held_out
    return (
        f"held out {data.num_held_out} of {total} samples for evaluation; {len(data)} are trained on "
        "(--data.held-out 0: all)"
    )
