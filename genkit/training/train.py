"""Training a run from its settings: :func:`train`."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from genkit import config
from genkit.backbones.compressed import require_package
from genkit.config.command import merge_trees
from genkit.core import Codec, Data, Draw, mean_flat
from genkit.core.device import pick_device
from genkit.core.durations import parse_duration
from genkit.core.files import sweep, write_text
from genkit.core.links import set_link
from genkit.core.progress import Progress, reporting
from genkit.data import Stream
from genkit.data.text import release_encoders
from genkit.objectives.matching.couplings import paired_source
from genkit.training.annotations import annotate
from genkit.training.base_weights import write_base
from genkit.training.best import BestCheckpoint, choose_metric
from genkit.training.checkpoint import point_latest, restore
from genkit.training.defaults import read_with_defaults
from genkit.training.descriptions import describe_start, summary
from genkit.training.directory import create_run, find_run, list_checkpoints, read_state, rewind_log, slug
from genkit.training.distributed import create_sharding, join_ranks
from genkit.training.first_stage import LatentCodec, canonical_first_stage
from genkit.training.init_sources import canonical_init, find_source, require_start
from genkit.training.initial_networks import initial_networks, require_shapes
from genkit.training.latents import encode_data
from genkit.training.lock import RunLock
from genkit.training.loop import Diverged, fit, initial_state, local_batch_size
from genkit.training.measurements import (
    MEASUREMENTS,
    PeriodicMeasurement,
    create_measurements,
    interval,
    measurement_hooks,
    missing_measurements,
)
from genkit.training.optimizers.modes import take_evaluation
from genkit.training.pipelines import pipeline_of_init, write_pipeline
from genkit.training.post_hoc_ema import FOLDER, forget_snapshots
from genkit.training.precision import pick_precision
from genkit.training.prior import MixedStream, Preservation, choose_preservation, make_stream
from genkit.training.ranks import Ranks
from genkit.training.resume import (
    compare_fingerprints,
    continued_settings,
    data_fingerprint,
    find_resumable,
    keep_old_config,
    note_schedule,
    resume_point,
    settings_difference,
)
from genkit.training.run import Run, load_run
from genkit.training.sampling import require_same_units
from genkit.training.schedules import warmup_steps
from genkit.training.session import Recorder, Session, Watch, environment, tracker_names
from genkit.training.settings import TrainSettings, stored_settings
from genkit.training.shown import choose_shown
from genkit.training.state import State
from genkit.training.stopping import stop_signals
from genkit.training.validation import Validation, validation_metrics

STD_ROWS = 1024  # samples by which the standard deviation of the data is measured
RECONSTRUCTIONS = 32  # samples that are shown beside their reconstructions
SMALL_BATCH = 1 << 16  # numbers in a batch, 64 images of 32x32: with fewer a second thread costs more than it brings
NAME_PARTS = ("data", "objective", "backbone")  # a run directory's default name


Ending = Literal["complete", "signal", "max_time", "patience", "watch"]


@dataclass(frozen=True)
class TrainedRun(Run):
    """A trained model, and why its training ended."""

    ending: Ending = "complete"
    """complete: all steps are done; signal, max_time: stopped, to be resumed; patience: no better for too long; watch:
    the function ``watch`` has stopped it"""
    best: BestCheckpoint | None = None
    """the best checkpoint by ``keep_best``, if one was chosen"""


def train(
    settings: TrainSettings | None = None,
    *,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    **changes: Any,
) -> TrainedRun:
    """Train a model and return it, with the reason why training ended (``run.ending``): it may be stopped early.

    ``changes`` are settings by name, in the form of YAML: ``train(objective="flow", data="moons", steps=500)``, or
    ``train(objective={"name": "ddpm", "prediction": "v"})``. ``resume`` continues a run directory from its newest
    intact checkpoint (or that of ``step``), bit-identically, with its own settings and these changes; "auto" continues
    the newest run that these settings began. ``watch`` is called with the numbers of each validation, evaluation and
    rollout by name, also with those of a resumed run again, and stops the training by returning True. Messages go to
    the logger ``genkit``. Raises ``ValueError`` for settings that do not fit together or cannot change when a run is
    resumed, and if training diverged.
    """
    if resume is not None and resume != "auto":
        settings = settings or stored_settings(find_run(resume))
    settings = change_settings(settings, changes)
    if settings.dry_run:
        raise ValueError("dry_run: genkit.train trains; estimate with genkit.estimate_training(settings)")
    began = time.monotonic()
    resumed = find_resumable(settings) if resume == "auto" else find_run(resume) if resume else None
    if resumed and (resumed / "finetune.yaml").is_file():
        raise ValueError(
            f"resume: {resumed} was improved by a reward; continue that with genkit finetune --resume {resumed}, or "
            f"train on from its weights with --init {resumed}"
        )
    with contextlib.ExitStack() as locks:
        job = prepare(settings, resumed, locks, watch)
        ending = run_job(job, progress, began)
    return job.trained_run(ending)


def change_settings(settings: TrainSettings | None, changes: Mapping[str, Any]) -> TrainSettings:
    """``settings`` with changes by name; or those that ``changes`` describe, with the defaults that suit them."""
    if settings:
        return config.override(settings, **changes)
    init, codec = (changes[k] if isinstance(changes.get(k), str) else None for k in ("init", "codec"))
    return read_with_defaults(
        lambda defaults: config.from_dict(TrainSettings, merge_trees(defaults, changes)), init, codec
    )


def run_job(job: Job, progress: Progress | None, began: float) -> Ending:
    """Train until the last step, or until something ends it earlier: a signal, ``max_time`` after the time ``began``,
    or ``patience``. ``ValueError`` if training diverges."""
    session, settings, accelerator = job.session, job.settings, job.accelerator
    with (
        stop_signals() as signals,
        reporting(progress, accelerator.is_main_process, stages=False) as report,
        session.recorder.tracking(settings, job.state.step),
        session.writer,
    ):
        limit = began + parse_duration(settings.max_time) if settings.max_time else math.inf
        session.stopped = lambda: bool(signals) or time.monotonic() > limit
        try:
            session.catch_up(job.state)
            fit(
                settings.objective,
                job.state,
                job.stream,
                job.data.codec,
                settings,
                accelerator,
                log=session.log,
                sample=session.sample if settings.objective.is_generative else job.draw_reconstructions,
                validate=session.validate,
                measurements=measurement_hooks(settings, session.measure),
                save=session.save,
                snapshot=session.snapshot,
                progress=session.progress(report, job.state.step),
                stop=session.stopped,
                is_best=session.is_best,
                is_over=session.is_over,
                preserve=job.preservation,
                rate_share=session.rate_share,
            )
        except Diverged as e:
            session.writer.wait()
            kept = "the last good checkpoint stays" if list_checkpoints(session.run) else "no checkpoint was saved"
            raise ValueError(f"{e}; {kept} in {session.run}") from e
        stopped: Ending = "signal" if signals else "max_time"
        if session.is_stale():
            stopped = "watch" if session.given_up else "patience"
    return "complete" if job.state.step >= settings.steps else stopped


@dataclass
class Job:
    """A training run that is ready to start."""

    settings: TrainSettings
    """with all that depends on the machine or the data resolved"""
    accelerator: Accelerator
    data: Data
    stream: Stream | MixedStream
    state: State
    session: Session
    preservation: Preservation | None = None

    def draw_reconstructions(self, state: State) -> None:
        """The pictures of an objective that draws no samples."""
        rows = self.stream(0, 0, 0, min(RECONSTRUCTIONS, self.stream.batch_size))
        self.session.reconstruct(rows, state)

    def trained_run(self, ending: Ending) -> TrainedRun:
        """The model as it is used: its slowest average, in evaluation mode, with the weights of evaluation."""
        for optimizer in self.state.optimizers.values():
            take_evaluation(optimizer)
        state = self.state.gather()
        nets = state.slowest_average
        for net in nets.values():
            net.eval().requires_grad_(False)
        file = "nets.safetensors" if state.slowest is None else f"ema-{state.slowest}.safetensors"
        weights = f"checkpoints/step-{state.step:07d}/{file}"
        return TrainedRun(self.session.run, self.settings, nets, self.data.spec, self.data.codec, state.step, weights,
                          self.accelerator.device, ending, self.session.best)  # fmt: skip


def prepare(
    settings: TrainSettings, resumed: Path | None, locks: contextlib.ExitStack, watch: Watch | None = None
) -> Job:
    """Set up ranks, data, networks, state and run directory, before the first step. Wrong settings raise here.

    ``locks`` gets the run directory's lock, in the main process.
    """
    accelerator = join_ranks(pick_device(settings.device), settings.rank_timeout)
    main, notes = accelerator.is_main_process, []
    tracker_names(settings)
    if resumed and main:
        locks.enter_context(RunLock(resumed))
    checkpoint, stored, given = None, settings, settings
    if resumed:
        step, stored = settings.step, stored_settings(resumed)
        settings = continued_settings(resumed, settings, notes.append)
        checkpoint = Ranks.of(accelerator).once(resume_point, resumed, step, notes.append)
    elif settings.step is not None:
        raise ValueError(f"step: given {settings.step}, which has no effect without --resume; leave it out")
    else:
        settings = replace(settings, data=settings.data.with_decisions())
    model = build_model(settings, accelerator, notes, resumed, checkpoint)
    settings, dataset, data, state, stream = model.settings, model.dataset, model.data, model.state, model.stream
    preservation = choose_preservation(settings.prior, settings.objective, settings.lora, data)
    shown = choose_shown(settings, data, stream)
    fingerprint = data_fingerprint(dataset)
    if resumed and checkpoint:
        compare_fingerprints(read_state(checkpoint).get("data", {}), fingerprint, notes.append)
        restore(checkpoint, state, settings.objective)
        if main:
            point_latest(resumed, checkpoint)
        note_schedule(stored, settings, state.step, notes.append)
    missing = Ranks.of(accelerator).once(missing_measurements, resumed, settings, state.step) if checkpoint else []
    finished = checkpoint is not None and state.step >= settings.steps and not missing
    measurements = {} if finished else create_measurements(settings, state, data, accelerator)
    validation = None
    if settings.val_every and not finished:
        validation = Validation.create(settings, dataset, data.codec, accelerator)
    best = None if finished else choose_best(settings, measurements)
    if finished:
        notes.append(f"already at step {state.step}; to go further: --resume {resumed} --steps N")
    directory = open_directory(settings, accelerator, state, resumed, model.origin, data.codec, notes)
    if main and not resumed:
        locks.enter_context(RunLock(directory))
    if main and (given.note or given.tags):
        annotate(directory, given.note, tags=given.tags)
    recorder = Recorder(directory, accelerator)
    session = Session(settings, accelerator, data.spec, data.codec, shown, recorder,
                      measurements, fingerprint, validation, best, None if finished else watch, missing)  # fmt: skip
    if settings.sample_guidance != 1:
        session.generator(state.nets)
    if resumed:
        session.recall(notes.append)
    for note in notes:
        recorder.say(note)
    if not finished:
        for line in describe_start(settings, model, shown, validation, measurements):
            recorder.say(line)
        recorder.say(summary(settings, directory, state.nets, data, accelerator))
    release_encoders()
    return Job(settings, accelerator, data, stream, state, session, preservation)


@dataclass
class UntrainedModel:
    """What training starts with, before anything is written."""

    settings: TrainSettings
    """with all that depends on the machine or the data resolved"""
    dataset: Data
    data: Data
    """the data set as the model sees it: latents, for a model of latents"""
    state: State
    stream: Stream | MixedStream
    origin: dict[str, str] | None
    """where the weights of ``--init`` are from"""


def build_model(
    settings: TrainSettings,
    accelerator: Accelerator,
    notes: list[str],
    resumed: Path | None = None,
    checkpoint: Path | None = None,
) -> UntrainedModel:
    """Load the data and make the networks and optimizers. A resumed run keeps the codec of its ``checkpoint``."""
    with accelerator.main_process_first():
        dataset = settings.data.load("train")
    data = encode_data(settings, dataset, accelerator, resumed if checkpoint else None)
    settings = resolve(settings, accelerator, data, resumed)
    if not resumed:
        require_reference_samples(settings, data)
    nets, origin = initial_networks(settings, accelerator.device, data, resumed if checkpoint else None, notes)
    require_shapes(settings, dataset, data.codec, nets, accelerator.device)
    state = initial_state(settings.objective, nets, settings, create_sharding(settings, accelerator))
    with accelerator.main_process_first():
        stream = make_stream(settings, dataset, accelerator.device)
    if settings.objective.needs_pairs:
        paired_source(stream(0, 0, 0, 1))
    return UntrainedModel(settings, dataset, data, state, stream, origin)


def require_reference_samples(settings: TrainSettings, data: Data) -> None:
    """``ValueError`` if a run that the objective learns from models other samples than ``data``, so that its
    predictions would mean something else."""
    references = dict(settings.objective.reference_runs)
    if settings.objective.starts_from and settings.init and find_source(settings.init)[0] is None:
        references["init"] = settings.init
    for option, name in references.items():
        run = load_run(name, device="cpu")
        require_same_units(option, (data.spec, data.codec), (run.spec, run.codec))


def choose_best(settings: TrainSettings, measurements: Mapping[str, PeriodicMeasurement]) -> BestCheckpoint | None:
    """The record of the best checkpoint that ``keep_best`` asks for. ``ValueError`` if its metric is never measured."""
    if settings.keep_best is None:
        if settings.patience is not None:
            raise ValueError(f"patience: given {settings.patience}, but no metric to improve; give --keep-best, say "
                             "--keep-best val/loss --val-every 100")  # fmt: skip
        return None
    known = validation_metrics(settings)
    for prefix, measurement in measurements.items():
        known |= {f"{prefix}/{name}": direction for name, direction in measurement.directions.items()}
    intervals = {name: interval(settings, name) for name in MEASUREMENTS}
    return choose_metric(settings.keep_best, known, {"val": settings.val_every, **intervals})


def resolve(settings: TrainSettings, accelerator: Accelerator, data: Data, resumed: Path | None) -> TrainSettings:
    """Decide what the settings leave open, once: a resumed run must stay as it was. Sets the number of threads."""
    rows = local_batch_size(settings.batch, accelerator.num_processes)
    threads = settings.threads or pick_threads(rows * math.prod(data.spec.shape))
    precision = pick_precision(settings.precision, accelerator.device, data.spec)
    if settings.lora.active and not settings.init:
        raise ValueError("lora: adapts the weights of a trained run; name it with --init RUN")
    require_start(settings)
    require_package(settings.weight_format.quantize)
    torch.set_num_threads(threads)
    source = settings.data.with_absolute_root()
    prior = replace(settings.prior, data=settings.prior.data.with_absolute_root())
    objective = settings.objective
    if not resumed:
        objective = objective.decide(lambda: encoded_std(data), lambda: encoded_radius(data))
    settings = replace(settings, precision=precision, threads=threads, data=source, prior=prior, objective=objective,
                       warmup=warmup_steps(settings))  # fmt: skip
    settings = replace(settings, resume=None, dry_run=False, note=None, tags=())  # what to do now, not how it trains
    if resumed:
        return settings
    codec = canonical_first_stage(settings.codec) if settings.codec else None
    return replace(settings, codec=codec, init=canonical_init(settings.init) if settings.init else None)


def encoded_std(data: Data) -> float:
    """The standard deviation of the samples in the model's units, of evenly spaced ones, to four digits."""
    return float(f"{float(spaced_samples(data).std(correction=0)):.4g}")


def encoded_radius(data: Data) -> float:
    """The largest root mean square of a sample in the model's units, of evenly spaced ones, to four digits."""
    return float(f"{float(mean_flat(spaced_samples(data).square()).max().sqrt()):.4g}")


def spaced_samples(data: Data) -> Tensor:
    """Evenly spaced samples in the model's units, float64 ``[N, *S]``."""
    rows = torch.linspace(0, len(data) - 1, min(STD_ROWS, len(data))).round().long()
    return data.codec.encode(data.batch(rows, Draw((0,), 0, len(rows)))).x.double()


def open_directory(
    settings: TrainSettings,
    accelerator: Accelerator,
    state: State,
    resumed: Path | None,
    origin: dict[str, str] | None,
    codec: Codec,
    notes: list[str],
) -> Path:
    """The run directory, which the main process makes or reopens; every rank learns its name."""

    def open_here() -> Path:
        run = resumed
        if run is None:
            blocks = config.dump(settings)
            run = create_run(settings.out, settings.name or "-".join(slug(blocks[k]["name"]) for k in NAME_PARTS))
            record_origin(run, settings, accelerator, origin, codec)
        elif state.step < settings.steps:
            reopen(run, settings, state.step, notes)
        write_text(run / "config.yaml", config.to_yaml(settings))
        return run

    return Ranks.of(accelerator).once(open_here)


def record_origin(
    run: Path, settings: TrainSettings, accelerator: Accelerator, origin: dict[str, str] | None, codec: Codec
) -> None:
    """What a new run directory keeps of where it comes from: environment, first stage, base weights."""
    write_text(run / "env.json", json.dumps({**environment(accelerator), "init": origin}, indent=1))
    write_pipeline(run, pipeline_of_init(settings.init, settings.objective))
    if isinstance(codec, LatentCodec):
        codec.stage.write(run / "codec")
    if settings.lora.active and origin:
        write_base(run, origin)


def reopen(run: Path, settings: TrainSettings, step: int, notes: list[str]) -> None:
    """Bring the files of a run back to ``step``: its log, its leftovers, a copy of settings that change."""
    for folder in (run, run / "checkpoints", run / "samples", run / FOLDER):
        sweep(folder)
    forget_snapshots(run, step)
    rewind_log(run, step, note=notes.append)
    if settings_difference(stored_settings(run), settings):
        keep_old_config(run, step)
    set_link(run.parent / "latest", run.name)


def pick_threads(numbers: int) -> int:
    """CPU threads for a batch of this many numbers; sums depend on it in the last bits."""
    return 1 if numbers < SMALL_BATCH else torch.get_num_threads()
