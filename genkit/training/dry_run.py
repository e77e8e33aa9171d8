"""What a training run will take, from a few of its steps: :func:`estimate_training`. Nothing is written."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from genkit import config
from genkit.core.device import pick_device
from genkit.core.durations import estimate_duration, format_step, parse_duration
from genkit.core.memory import format_bytes, peak_memory, reset_peak_memory
from genkit.core.tensors import count_parameters, local_rows
from genkit.training.checkpoint import checkpoint_files
from genkit.training.distributed import join_ranks
from genkit.training.loop import fit
from genkit.training.measurements import PeriodicMeasurement, create_measurements, interval
from genkit.training.optimizers.state_files import flatten
from genkit.training.sampling import default_steps
from genkit.training.session import Recorder, Session
from genkit.training.settings import TrainSettings
from genkit.training.shown import choose_shown
from genkit.training.state import State
from genkit.training.train import UntrainedModel, build_model, change_settings, choose_best
from genkit.training.validation import Validation

LEAST_STEPS, MOST_STEPS = 5, 200  # that are timed
SECONDS, PATIENCE = 3.0, 60.0  # timing ends after so long and LEAST_STEPS, or after so long and one step


@dataclass(frozen=True)
class TrainingEstimate:
    """What a training run will take."""

    settings: TrainSettings
    """the settings as training resolves them"""
    samples: int
    """of the training split"""
    networks: Mapping[str, int]
    """parameters of each network"""
    memory: Mapping[str, int]
    """bytes of the weights, gradients, optimizer and averages on each rank, and the peak with them and all else"""
    steps_timed: int
    step_seconds: float
    """median time of a step"""
    seconds: Mapping[str, float]
    """of the whole training: its steps, pictures, validations, the sampling of evaluations, and rollouts"""
    checkpoint_bytes: int
    disk_bytes: int
    """of all checkpoints that exist at the same time, one being written"""
    notes: tuple[str, ...] = field(default=())

    @property
    def total_seconds(self) -> float:
        """Of the whole training."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        cfg, memory = self.settings, self.memory
        counts = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in self.networks.items())
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.items() if name != "peak")
        spent = ", ".join(f"{name} {estimate_duration(s)[len('about ') :]}" for name, s in self.seconds.items() if s)
        lines = {
            "data": f"{self.samples} samples to train on",
            "networks": f"{counts} parameters",
            "memory": f"{parts}; {format_bytes(memory['peak'])} at the peak of a step",
            "step": f"{format_step(self.step_seconds)} (median of {self.steps_timed})",
            "time": f"{estimate_duration(self.total_seconds)} for {cfg.steps:,} steps ({spent})",
            "disk": f"{format_bytes(self.checkpoint_bytes)} a checkpoint, {format_bytes(self.disk_bytes)} in all",
        }
        return "\n".join([*(f"{key:<9}{text}" for key, text in lines.items()), *(f"note     {n}" for n in self.notes)])

    def to_yaml(self) -> str:
        """The settings as YAML that ``--config`` reads, below the estimate in comments."""
        comments = "\n".join(f"# {line}" for line in ["dry run: nothing was written", *str(self).splitlines()])
        return f"{comments}\n{config.to_yaml(self.settings)}"


def estimate_training(settings: TrainSettings | None = None, **changes: Any) -> TrainingEstimate:
    """Estimate what ``train`` with the same arguments will take, by a few real steps on networks that are thrown away.

    The first step is not timed. Pictures and validations are timed once; evaluations are taken to cost what drawing
    their samples costs. Raises ``ValueError`` for settings that do not fit together, as ``train`` does.
    """
    settings = change_settings(settings, changes)
    for name in ("resume", "step"):
        if getattr(settings, name) is not None:
            raise ValueError(f"{name}: given {getattr(settings, name)} with dry_run, which estimates a new run; give "
                             "--config RUN/config.yaml instead")  # fmt: skip
    settings = replace(settings, data=settings.data.with_decisions())
    accelerator = join_ranks(pick_device(settings.device), settings.rank_timeout)
    model = build_model(settings, accelerator, [])
    settings, state = model.settings, model.state
    validation = None
    if settings.val_every:
        validation = Validation.create(settings, model.dataset, model.data.codec, accelerator)
    # metrics of samples are known only once their features are, which are kept on disk
    measurements = create_measurements(replace(settings, eval_every=0), state, model.data, accelerator)
    if not settings.eval_every:
        choose_best(settings, measurements)

    timed, peak = time_steps(model, accelerator)
    seconds = {
        "steps": settings.steps * statistics.median(timed),
        **time_hooks(model, accelerator, validation, measurements),
    }
    checkpoint = checkpoint_size(settings, state)
    disk = checkpoint * (settings.keep_checkpoints + 1 + (settings.keep_best is not None))
    return TrainingEstimate(
        settings=settings,
        samples=len(model.dataset),
        networks={name: count_parameters(net) for name, net in state.nets.items()},
        memory={**memory_parts(model), "peak": peak},
        steps_timed=len(timed),
        step_seconds=statistics.median(timed),
        seconds=seconds,
        checkpoint_bytes=checkpoint,
        disk_bytes=disk,
        notes=tuple(warnings(settings, disk, sum(seconds.values()))),
    )


def time_steps(model: UntrainedModel, accelerator: Accelerator) -> tuple[list[float], int]:
    """Seconds of some steps after the first one, and the peak of memory in bytes."""
    device, ends = accelerator.device, [time.perf_counter()]

    def finish(step: int, loss: float | None) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())

    def is_enough() -> bool:
        timed, seconds = len(ends) - 2, ends[-1] - ends[1]
        return timed >= MOST_STEPS or (timed >= LEAST_STEPS and seconds > SECONDS) or (timed > 0 and seconds > PATIENCE)

    settings = model.settings
    never = 10**12
    settings = replace(settings, log_every=never, save_every=never, val_every=0, sample_every=0, eval_every=0)
    reset_peak_memory(device)
    fit(settings.objective, model.state, model.stream, model.data.codec, settings, accelerator,
        progress=finish, stop=is_enough)  # fmt: skip
    peak = peak_memory(device)
    first = 1 if len(ends) > 2 else 0
    return [b - a for a, b in zip(ends[first:], ends[first + 1 :], strict=False)], peak


def time_hooks(
    model: UntrainedModel,
    accelerator: Accelerator,
    validation: Validation | None,
    measurements: Mapping[str, PeriodicMeasurement],
) -> dict[str, float]:
    """Seconds that pictures, validations, the sampling of evaluations and ``measurements`` take in all of the
    training."""
    settings, state = model.settings, model.state.gather()

    def count(every: int) -> int:
        return -(-settings.steps // every) if every else 0

    times = {"pictures": 0.0, "validations": 0.0, "evaluations": 0.0}
    if settings.objective.is_generative and (settings.sample_every or settings.eval_every):
        recorder = SilentRecorder(Path(os.devnull), accelerator)
        shown = choose_shown(settings, model.data, model.stream)
        session = Session(settings, accelerator, model.data.spec, model.data.codec, shown, recorder)
        drawing = time_call(lambda: session.sample(state))
        times["pictures"] = drawing * count(settings.sample_every)
        drawn_steps = default_steps(settings.objective)
        more_steps = settings.eval_steps / drawn_steps if settings.eval_steps and drawn_steps else 1
        share = settings.eval_n / session.shown.n * more_steps
        times["evaluations"] = drawing * share * count(settings.eval_every)
    if validation is not None:
        times["validations"] = time_call(lambda: validation(state)) * count(settings.val_every)
    for name, measurement in measurements.items():
        seconds = time_call(partial(measurement, state, Path(os.devnull), lambda: False))
        times[f"{name}s"] = seconds * count(interval(settings, name))
    return times


class SilentRecorder(Recorder):
    """A recorder that writes nothing."""

    @property
    def main(self) -> bool:
        return False


def time_call(function: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """The size of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def memory_parts(model: UntrainedModel) -> dict[str, int]:
    """Bytes that stay for all of the training on each rank."""
    state, trained = model.state, {name for phase in model.settings.objective.phases for name in phase.trains}

    def tensors(nets: Mapping[str, nn.Module], names: Iterable[str]) -> list[Tensor]:
        return [local_rows(t) for name in names for t in (*nets[name].parameters(), *nets[name].buffers())]

    slots: dict[str, Tensor] = {}
    for i, slot in enumerate(slot for optimizer in state.optimizers.values() for slot in optimizer.state.values()):
        flatten(slot, str(i), slots)
    averages = [t for ema in state.emas.values() for t in tensors(ema, ema)]
    return {
        "weights": count_bytes(tensors(state.nets, state.nets)),
        "gradients": count_bytes(local_rows(p) for name in trained for p in state.nets[name].parameters()),
        "optimizer": count_bytes(slots.values()),
        "averages": count_bytes(averages),
    }


def checkpoint_size(settings: TrainSettings, state: State) -> int:
    """Bytes of the tensors of one checkpoint."""
    files = checkpoint_files(state, settings.objective)
    return sum(piece.num_bytes for pieces in files.values() for piece in pieces.values())


def warnings(settings: TrainSettings, disk: int, seconds: float) -> Iterable[str]:
    """What will not fit: into the disk, or into ``max_time``."""
    place = Path(settings.out).absolute()
    while not place.exists():
        place = place.parent
    if disk > (free := shutil.disk_usage(place).free):
        yield f"{place} has {format_bytes(free)} free: too little for the checkpoints; try --keep-checkpoints 1"
    if settings.max_time and seconds > (limit := parse_duration(settings.max_time)):
        yield f"--max-time {settings.max_time} ends it after about {100 * limit / seconds:.0f} % of the steps"
