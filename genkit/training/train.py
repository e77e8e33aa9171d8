"""Training a run from its settings: :func:`train`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from genkit import config
from genkit.backbones import lora
from genkit.config.blocks import load as load_object
from genkit.core import Batch, Codec, Data, Spec
from genkit.core.device import pick_device
from genkit.core.progress import Progress, reporting
from genkit.data import Stream
from genkit.objectives.matching.couplings import given
from genkit.training.checkpoint import find_checkpoint, restore
from genkit.training.directory import create_run, find_run, rewind_log, symlink
from genkit.training.distributed import join_ranks
from genkit.training.first_stage import Latent
from genkit.training.init_sources import canonical_init, init_defaults, init_notes
from genkit.training.latents import encode_data
from genkit.training.loop import Diverged, State, fast_bf16, fit, initial_state, local_batch_size
from genkit.training.run import Run, canonical_first_stage, init_from, load_lora_base, write_lora_base
from genkit.training.sampling import sample_conditions
from genkit.training.session import GRID_SIZE, Evaluate, Recorder, Session, environment, logger, stop_signals
from genkit.training.settings import TrainSettings

RECONSTRUCTIONS = 32  # samples that are shown beside their reconstructions
SMALL_BATCH = 1 << 16  # numbers in a batch, 64 images of 32x32: with fewer a second thread costs more than it brings
NAME_PARTS = ("data", "objective", "backbone")  # a run directory's default name
EVALUATOR = "genkit.cli.commands.watch:watch"  # of a higher room, imported if --eval-every asks for it


def train(
    settings: TrainSettings | None = None,
    *,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Run:
    """Train a model and return it; ``run.step < run.config.steps`` if a signal stopped it early (it can be resumed).

    ``changes`` are settings by name, in the form of YAML: ``train(objective="flow", data="moons", steps=500)``, or
    ``train(objective={"name": "ddpm", "prediction": "v"})``. ``resume`` continues a run directory from its newest
    checkpoint, bit-identically, with its own settings and these changes. Messages go to the logger ``genkit``.
    Raises ``ValueError`` for settings that do not fit together, and if training diverged.
    """
    if resume is not None:
        settings = settings or config.from_dict(TrainSettings, config.load_yaml(find_run(resume) / "config.yaml"))
    elif settings is None and isinstance(changes.get("init"), str):
        changes = {**init_defaults(changes["init"]), **changes}
    settings = config.override(settings, **changes) if settings else config.from_dict(TrainSettings, changes)
    return Trainer(settings, find_run(resume) if resume is not None else None).run(progress)


@dataclass
class Trainer:
    """One training run, from data to checkpoints."""

    settings: TrainSettings
    resumed: Path | None = None

    def run(self, progress: Progress | None) -> Run:
        """Set up, train, and return the model."""
        accelerator = join_ranks(pick_device(self.settings.device))
        with accelerator.main_process_first():
            dataset = self.settings.data.load("train")
        data = encode_data(self.settings, dataset, accelerator, self.resumed)
        self.resolve(accelerator, data)
        notes: list[str] = []
        nets, origin = self.networks(accelerator, data, notes)
        settings = self.settings
        state = initial_state(settings.objective, nets, settings)
        stream = Stream(dataset, settings.batch, settings.seed, accelerator.device, settings.workers)
        if settings.objective.needs_pairs:
            given(stream(0, 0, 0, 1))
        if self.resumed:
            restore(find_checkpoint(self.resumed), state, settings.objective)
            if state.step >= settings.steps:
                logger.info(f"already at step {state.step}; to go further: --resume {self.resumed} --steps N")
                return self.trained(self.resumed, state, data, accelerator)
        evaluator = self.evaluator(state, data, accelerator)
        directory = self.open_directory(accelerator, state, origin, data.codec)
        recorder = Recorder(directory, accelerator)
        cond = grid_conditions(data.spec, stream)
        session = Session(settings, accelerator, data.spec, data.codec, cond, recorder, evaluator)
        for note in notes:
            recorder.say(f"note     {note}")
        recorder.say(self.summary(directory, nets, data, accelerator))
        self.fit(session, state, stream, progress)
        return self.trained(directory, state, data, accelerator)

    def resolve(self, accelerator: Accelerator, data: Data) -> None:
        """Decide what the settings leave open, once: a resumed run must stay as it was."""
        settings = self.settings
        rows = local_batch_size(settings.batch, accelerator.num_processes)
        threads = settings.threads or pick_threads(rows * math.prod(data.spec.shape))
        precision = pick_precision(settings.precision, accelerator.device, data.spec)
        if settings.lora.active and not settings.init:
            raise ValueError("lora: changes weights that are there already; say whose: --init RUN")
        codec, init = settings.codec, settings.init
        if codec and not self.resumed:
            codec = canonical_first_stage(codec)
        if init and not self.resumed:
            init = canonical_init(init)
        self.settings = replace(
            settings, precision=precision, threads=threads, codec=codec, init=init, resume=None
        )  # fmt: skip
        torch.set_num_threads(threads)

    def networks(
        self, accelerator: Accelerator, data: Data, notes: list[str]
    ) -> tuple[dict[str, nn.Module], dict[str, str] | None]:
        """The networks on their device, with the weights of ``--init``, whose origin is returned too."""
        settings, origin = self.settings, None
        torch.manual_seed(settings.seed)
        nets = {k: v.to(accelerator.device) for k, v in make_networks(settings, data).items()}
        if settings.init and not self.resumed:
            origin = init_from(nets, settings.init, notes.append)
            notes += init_notes(settings.init, settings.objective)
        elif settings.lora.active and self.resumed:
            load_lora_base(nets, self.resumed)
        if settings.lora.active:
            lora.adapt(nets, settings.lora)
        return nets, origin

    def evaluator(self, state: State, data: Data, accelerator: Accelerator) -> Evaluate | None:
        """The evaluation that ``--eval-every`` asks for."""
        if not self.settings.eval_every:
            return None
        return load_object(EVALUATOR)(self.settings, state, data, accelerator)

    def fit(self, session: Session, state: State, stream: Stream, progress: Progress | None) -> None:
        """Run the loop with the session's callbacks."""
        settings, accelerator = self.settings, session.accelerator
        draw = session.sample if settings.objective.is_generative else partial(session.reconstruct, first_rows(stream))
        with (
            stop_signals() as signals,
            reporting(progress, accelerator.is_main_process) as report,
            session.recorder.tensorboard(settings.tensorboard, state.step),
        ):
            try:
                fit(
                    settings.objective,
                    state,
                    stream,
                    session.codec,
                    settings,
                    accelerator,
                    log=session.log,
                    sample=draw,
                    evaluate=session.evaluate,
                    save=session.save,
                    progress=session.progress(report),
                    stop=lambda: bool(signals),
                )
            except Diverged as e:
                raise ValueError(f"{e}; the last good checkpoint stays in {session.run}") from e

    def open_directory(
        self, accelerator: Accelerator, state: State, origin: dict[str, str] | None, codec: Codec
    ) -> Path:
        """The run directory, which the main process makes or reopens; every rank learns its name."""
        settings, run = self.settings, self.resumed
        if accelerator.is_main_process:
            if run is None:
                blocks = config.dump(settings)
                run = create_run(settings.out, settings.name or "-".join(slug(blocks[k]["name"]) for k in NAME_PARTS))
                (run / "env.json").write_text(json.dumps({**environment(accelerator), "init": origin}, indent=1))
                if isinstance(codec, Latent):
                    codec.stage.write(run / "codec")
                if settings.lora.active and origin:
                    write_lora_base(run, origin)
            else:
                rewind_log(run, state.step)
                symlink(run.parent / "latest", run.name)
            (run / "config.yaml").write_text(config.to_yaml(settings))
        shared = broadcast_object_list([run])[0]
        assert shared is not None
        return shared

    def summary(self, run: Path, nets: dict[str, nn.Module], data: Data, accelerator: Accelerator) -> str:
        """One line: directory, size of the model and data, device."""
        count = sum(p.numel() for net in nets.values() for p in net.parameters())
        shape = "x".join(map(str, data.spec.shape))
        ranks = f", {accelerator.num_processes} ranks" if accelerator.num_processes > 1 else ""
        size = f"{count / 1e6:.2f}M parameters, {len(data)} samples of {shape}"
        return f"{run}  {size}, {accelerator.device}, {self.settings.precision}{ranks}"

    def trained(self, directory: Path, state: State, data: Data, accelerator: Accelerator) -> Run:
        """The model as it is used: its slowest average, in evaluation mode."""
        nets = state.slowest_average
        for net in nets.values():
            net.eval().requires_grad_(False)
        file = f"ema-{max(state.emas)}.safetensors" if state.emas else "nets.safetensors"
        weights = f"checkpoints/step-{state.step:07d}/{file}"
        return Run(directory, self.settings, nets, data.spec, data.codec, state.step, weights, accelerator.device)


def make_networks(settings: TrainSettings, data: Data) -> dict[str, nn.Module]:
    """New networks. ``ValueError`` if they cannot serve the data, which may be latents."""
    try:
        settings.objective.setup(data.spec)
        return settings.objective.networks(settings.backbone, data.spec)
    except ValueError as e:
        if not isinstance(data.codec, Latent):
            raise
        stage = data.codec.stage.name
        raise ValueError(f"codec: {stage} gives latents {data.spec.shape}, which do not fit: {e}") from e


def pick_precision(name: str, device: torch.device, spec: Spec) -> str:
    """``auto`` is bf16 if the device is fast at it, but fp32 for vectors, whose small networks gain nothing."""
    if name != "auto":
        return name
    return "bf16" if len(spec.shape) > 1 and fast_bf16(device) else "fp32"


def pick_threads(numbers: int) -> int:
    """CPU threads for a batch of this many numbers; sums depend on it in the last bits."""
    return 1 if numbers < SMALL_BATCH else torch.get_num_threads()


def first_rows(stream: Stream) -> Batch:
    """Some samples to reconstruct."""
    return stream(0, 0, 0, min(RECONSTRUCTIONS, stream.batch_size))


def grid_conditions(spec: Spec, stream: Stream) -> dict[str, Tensor]:
    """Conditions of the pictures: classes or captions in turn; other kinds come from the first batch of data."""
    try:
        return sample_conditions(spec, GRID_SIZE)
    except ValueError:
        cond = stream(0, 0, 0, min(GRID_SIZE, stream.batch_size)).cond
        return {k: torch.cat([v.cpu()] * -(-GRID_SIZE // len(v)))[:GRID_SIZE] for k, v in cond.items()}


def slug(name: str) -> str:
    """A block's name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name.rpartition(":")[2])
