"""What a run writes while it trains: log, trackers, pictures, evaluation cards and checkpoints.

Only the main process writes; every rank draws its share of the pictures.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor, nn

from genkit import __version__, config
from genkit.config import load_object
from genkit.core import Batch, Codec, Generator, Spec, pictures
from genkit.core.progress import Progress
from genkit.diffusion.samplers import Seeds
from genkit.training.best import BestCheckpoint
from genkit.training.checkpoint import CheckpointWriter, checkpoint_files, checkpoint_record, write_checkpoint
from genkit.training.directory import append_log, list_checkpoints, read_log, step_of
from genkit.training.first_stage import CachedLatentCodec
from genkit.training.loop import sample_rows
from genkit.training.measurements import MEASUREMENTS, MeasurementStopped, PeriodicMeasurement
from genkit.training.optimizers.modes import evaluation_weights
from genkit.training.pace import Pace
from genkit.training.post_hoc_ema import is_snapshot_due, save_snapshot, thin_snapshots
from genkit.training.precision import Precision, network_precision, use_codec_precision
from genkit.training.run import Run
from genkit.training.sampling import Sampling
from genkit.training.schedules import PlateauTracker
from genkit.training.settings import TrackerName, TrainSettings
from genkit.training.shown import Shown
from genkit.training.state import State
from genkit.training.validation import Validation

TRACKERS = "genkit.integrations.trackers:Trackers"  # in a higher room, imported when a run is tracked
REQUIRE_TRACKERS = "genkit.integrations.trackers:require_trackers"
logger = logging.getLogger("genkit")


Watch = Callable[[Mapping[str, Any]], bool]
"""What a caller of the training sees of it: a line of the log with the ``step`` and the numbers of a validation or
another measurement, None where they are not finite. Training stops when it returns True."""


class TrackedSettings(Protocol):
    """Settings of a run that trackers may follow."""

    @property
    def tensorboard(self) -> bool:
        """Whether TensorBoard is one of the trackers."""
        ...

    @property
    def trackers(self) -> tuple[TrackerName, ...]:
        """The names of trackers."""
        ...

    @property
    def tracker_project(self) -> str:
        """Project or experiment of the run."""
        ...


def tracker_names(settings: TrackedSettings) -> list[TrackerName]:
    """The trackers that the settings ask for. ``ValueError`` if one of them is not installed."""
    default: tuple[TrackerName, ...] = ("tensorboard",) if settings.tensorboard else ()
    names = list(dict.fromkeys((*default, *settings.trackers)))
    if names:
        load_object(REQUIRE_TRACKERS)(names)
    return names


def flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted name."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten_tree(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class DrawingStopped(Exception):  # control flow, not an error
    """A picture was not finished because training is to stop."""


class Recorder:
    """Scalars and pictures of a run, to ``log.jsonl`` and trackers. Silent on all but the main process."""

    def __init__(self, run: Path, accelerator: Accelerator):
        self.run, self.accelerator = run, accelerator
        self.trackers: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        """Send a message for the user to the logger ``genkit``."""
        if self.main:
            logger.info(text)

    def note(self, text: str) -> None:
        """Send a line of progress, which a terminal with its bar does not show, to the logger."""
        if self.main:
            logger.debug(text)

    @contextlib.contextmanager
    def tracking(self, settings: TrackedSettings, step: int) -> Iterator[None]:
        """Pass scalars and pictures on to the trackers of ``settings``, from ``step`` on."""
        names = tracker_names(settings)
        if not (names and self.main):
            yield
            return
        values = {k: str(v) if isinstance(v, (list, type(None))) else v for k, v in flatten_tree(config.dump(settings))}
        self.trackers = load_object(TRACKERS)(names, self.run, settings.tracker_project, step, values)
        try:
            yield
        finally:
            self.trackers.close()
            self.trackers = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record of scalars, which has a ``step``."""
        if not self.main:
            return
        append_log(self.run, record)
        self.scalars({k: v for k, v in record.items() if k not in ("step", "samples", "seconds")}, record["step"])

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Scalars for the trackers alone."""
        if self.trackers:
            self.trackers.log({name: value for name, value in values.items() if value is not None}, step)

    def picture(self, x: Tensor, cond: Mapping[str, Tensor], step: int, names: Sequence[str] = ()) -> None:
        """Decoded samples ``[n, *S]`` as ``samples/step-N.png``; ``names`` of their classes or prompts."""
        if not self.main:
            return
        self.save_picture(pictures.draw_samples(x, cond, names), step)

    def save_picture(self, image: Image.Image, step: int) -> None:
        """A picture as ``samples/step-N.png``, and for the trackers."""
        path = pictures.save_image(image, self.run / "samples" / f"step-{step:07d}.png")
        if self.trackers:
            self.trackers.log_picture(image, path, step)


@dataclass
class Session:
    """The callbacks that the training loop runs with."""

    settings: TrainSettings
    accelerator: Accelerator
    spec: Spec
    codec: Codec
    shown: Shown
    """the samples that are drawn while training"""
    recorder: Recorder
    measurements: Mapping[str, PeriodicMeasurement] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """of the data, stored with each checkpoint"""
    validation: Validation | None = None
    best: BestCheckpoint | None = None
    watch: Watch | None = None
    missing: Sequence[str] = ()
    """the measurements that are still to be taken at the step that training resumes from"""
    given_up: bool = False
    """whether ``watch`` has stopped the training"""
    stopped: Callable[[], bool] = lambda: False
    """whether a signal or the clock has asked to stop: pictures are not finished then"""
    interrupted: bool = False
    """whether a measurement was not finished because training is to stop: it is taken when the run is resumed"""
    warning: str | None = None
    plotted_step: int | None = None
    """the step at which ``loss.png`` was last drawn"""
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)

    def __post_init__(self) -> None:
        self.plateau = PlateauTracker.create(self.settings)

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.recorder.run

    @property
    def network_precision(self) -> Precision:
        """The precision of pictures: that of training."""
        return "fp32" if self.settings.precision == "auto" else self.settings.precision

    def log(self, record: dict[str, Any]) -> None:
        """One line of the log, and the objective's warning about it, once."""
        self.recorder.log(record)
        previous, self.warning = self.warning, self.settings.objective.warning(record)
        if self.warning and not previous:
            self.recorder.say(f"step {record['step']}: {self.warning}")

    def generator(self, nets: dict[str, nn.Module], step: int = 0) -> Generator:
        """The generator of pictures, as ``genkit sample`` has it. ``ValueError`` for guidance that does not fit."""
        current = Run(self.run, self.settings, nets, self.spec, self.codec, step, "", self.accelerator.device)
        sampling = Sampling(guidance=self.settings.sample_guidance, precision=self.network_precision)
        # ranks wait for each other, and a model that draws in one pass has no steps to stop between
        stoppable = self.accelerator.num_processes == 1 and self.settings.objective.sampler is not None
        return current.generator(sampling, callback=self.stop_drawing if stoppable else None)

    def sample(self, state: State) -> None:
        """Draw the same seeds and conditions each time, from the slowest average; each rank draws its share."""
        rows = list(sample_rows(self.shown.n, self.accelerator))
        nets, device = state.slowest_average, self.accelerator.device
        generate = self.generator(nets, state.step)
        for net in nets.values():
            net.eval()
        noise = Seeds(rows, device)
        cond = {k: v[rows].to(device) for k, v in self.shown.cond.items()}
        try:
            with torch.no_grad():
                z = generate(noise(self.settings.objective.noise_shape(self.spec)), cond, noise)
                with use_codec_precision(self.network_precision, device):
                    share = self.codec.decode(z)
        except DrawingStopped:
            return
        finally:
            for net in state.nets.values():
                net.train()
        samples = self.accelerator.gather(share)[: self.shown.n].cpu()  # type: ignore[index]
        self.recorder.picture(samples, self.shown.cond, state.step, self.shown.names)

    def stop_drawing(self, *_: Any) -> None:
        """A sampler's callback that ends it if a signal has come."""
        if self.stopped():
            raise DrawingStopped

    def reconstruct(self, batch: Batch, state: State) -> None:
        """For objectives that draw no samples: some data and their reconstructions (below, or in another colour)."""
        nets = state.slowest_average
        for net in nets.values():
            net.eval()
        device = self.accelerator.device
        encoded = self.codec.encode(batch.to(device))
        with torch.no_grad(), network_precision(nets, self.network_precision, device):
            decoded = self.settings.objective.reconstruct(nets, encoded)
        for net in state.nets.values():
            net.train()
        if decoded is not None and self.recorder.main:
            originals = self.codec.decode(encoded.x) if isinstance(self.codec, CachedLatentCodec) else batch.x
            image = pictures.draw_pairs(originals.cpu(), self.codec.decode(decoded).cpu())
            self.recorder.save_picture(image, state.step)

    def validate(self, state: State) -> None:
        """Write the losses of held-out samples to the log."""
        assert self.validation is not None
        values = self.validation(state)
        record = {"step": state.step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        self.recorder.log(record)
        best = "  (the best so far)" if self.track_best(record) else ""
        self.recorder.note(f"step {state.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()) + best)
        if self.plateau and self.plateau.update(record):
            self.recorder.say(f"step {state.step}: no better loss; the rate is {self.plateau.share:.3g} of the peak")
        if state.step == self.plotted_step and self.recorder.main:  # before this validation
            self.plot_loss()

    def measure(self, name: str, state: State) -> None:
        """Write the measurement ``name`` to the log and the trackers. A model that cannot be measured now goes on
        training; one whose measurement is interrupted is saved, and measured when it is resumed."""
        # nobody waits to go on after the last step, and ranks wait for each other
        stoppable = state.step < self.settings.steps and self.accelerator.num_processes == 1
        try:
            measured = self.measurements[name](state, self.run, self.stopped if stoppable else lambda: False)
        except MeasurementStopped:
            self.interrupted = True
            return
        except ValueError as e:
            self.recorder.say(f"step {state.step}: not evaluated: {e}")
            return
        record: dict[str, Any] = {}
        if measured is not None:
            values = {f"{name}/{k}": v for k, v in measured.values.items() if v is not None}
            record = {"step": state.step, **values}
            append_log(self.run, record)
        best = "  (the best so far)" if self.track_best(broadcast_object_list([record])[0] or {}) else ""
        if measured is not None:
            self.recorder.scalars({f"{name}/{k}": v for k, v in measured.shown.items()}, state.step)
            text = "  ".join(f"{k} {v:.4g}" for k, v in measured.shown.items())
            self.recorder.say(f"step {state.step}: {text}{best}")

    def rate_share(self) -> float:
        """The learning rate, as a share of the schedule's."""
        return self.plateau.share if self.plateau else 1.0

    def recall(self, note: Callable[[str], None]) -> None:
        """Find the best checkpoint, and reductions of the learning rate, of a run that is resumed, from its log."""
        if self.plateau is not None:
            for record in read_log(self.run):
                self.plateau.update(record)
        for record in read_log(self.run):
            self.consult(record)
        if self.best is None:
            return
        self.best.replay(read_log(self.run))
        if self.recorder.main:
            self.best.write(self.run)
        if self.best.step is not None and self.best.step not in map(step_of, list_checkpoints(self.run)):
            note(f"note     the best so far, {self.best}, was not kept; a better one will be")

    def track_best(self, record: Mapping[str, Any]) -> bool:
        """Whether an evaluation is the best one so far, which is recorded; every rank has the same record."""
        self.consult(record)
        if self.best is None or self.best.metric not in record:
            return False
        improved = self.best.update(record["step"], record[self.best.metric])
        if self.recorder.main:
            self.best.write(self.run)
        return improved

    def consult(self, record: Mapping[str, Any]) -> None:
        """Show ``watch`` the numbers of a measurement; every rank follows the first one's answer."""
        prefixes = {name.partition("/")[0] for name in record}
        if self.watch and not prefixes.isdisjoint(("val", *MEASUREMENTS)) and not self.given_up:
            self.given_up = broadcast_object_list([self.accelerator.is_main_process and self.watch(record)])[0]

    def is_best(self, step: int) -> bool:
        """Whether the best checkpoint so far is that of ``step``."""
        return self.best is not None and self.best.step == step

    def is_stale(self) -> bool:
        """Whether evaluations have not improved for ``patience`` times in a row, or ``watch`` says to stop."""
        return self.given_up or (self.best is not None and self.best.is_stale(self.settings.patience))

    def is_over(self) -> bool:
        """Whether training ends here, before its last step: it is stale, or a measurement was interrupted."""
        return self.interrupted or self.is_stale()

    def catch_up(self, state: State) -> None:
        """Take the measurements that a stop or a kill came before, at the step that training resumes from."""
        if not self.missing:  # whole networks of shares, and copies of weights, are for these alone
            return
        with evaluation_weights(state.optimizers.values()):
            whole = state.gather()
            for name in self.missing:
                self.validate(whole) if name == "val" else self.measure(name, whole)

    def save(self, state: State) -> None:
        """Begin to write a checkpoint, of a copy of the state, and the plot of the loss."""
        if self.recorder.main or state.sharding:
            settings = self.settings
            files = checkpoint_files(state, settings.objective)
            record = checkpoint_record(self.run, state, self.spec, self.codec, settings.seed, self.fingerprint)
            best = self.best.step if self.best else None
            exchange = state.sharding.exchange if state.sharding else None
            self.writer.start(
                lambda: write_checkpoint(
                    self.run, files, record, keep=settings.keep_checkpoints, best=best, exchange=exchange
                )
            )
        if self.recorder.main:
            self.plot_loss()
            self.plotted_step = state.step

    def snapshot(self, state: State) -> None:
        """Store the power-function averages, from which others can be reconstructed."""
        if is_snapshot_due(state.step, self.settings):
            whole = state.gather(all_averages=True)
            if self.recorder.main:
                save_snapshot(self.run, whole, self.settings)
        if self.recorder.main:
            thin_snapshots(self.run, state.step, self.settings)
        self.accelerator.wait_for_everyone()

    def plot_loss(self) -> None:
        """Draw ``loss.png`` from the log."""
        if records := read_log(self.run):
            pictures.plot_loss(records, self.run / "loss.png")

    def progress(self, report: Progress, start: int) -> Callable[[int, float | None], None]:
        """What the loop calls after each step, ``(step, loss)``: passed on to ``report``, and to lines of progress."""
        settings, recorder = self.settings, self.recorder
        pace = Pace(start, settings.steps, self.accelerator.device, recorder.say, recorder.note)

        def update(step: int, loss: float | None) -> None:
            text = "" if loss is None else f"loss {loss:.4f}"
            report(text or "training", step, settings.steps)
            pace(step, text, settings.batch)

        return update


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, device and command line: what a number may depend on."""
    from importlib.metadata import version  # lazy: only when a run begins

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    packages = ("torch", "accelerate", "numpy", "diffusers")
    return {
        "genkit": __version__,
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        "packages": {p: version(p) for p in packages},
        "device": str(accelerator.device),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else None,
        "world_size": accelerator.num_processes,
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
