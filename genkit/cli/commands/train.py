"""`genkit train`: one loop for every objective."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from genkit import __version__, config
from genkit.backbones import lora
from genkit.cli.commands.encode import coded
from genkit.config import parse, to_yaml
from genkit.core import Batch, Codec, Data, Spec, pictures
from genkit.data import Stream
from genkit.data.text import examples
from genkit.diffusion.samplers import Seeds, bind
from genkit.objectives.matching.couplings import given
from genkit.training import run as runs
from genkit.training.distributed import join_ranks, lost_ranks, start_ranks
from genkit.training.first_stage import Latent, OfCache
from genkit.training.loop import Diverged, State, fast_bf16, fit, sample_rows, share, start

if TYPE_CHECKING:
    from genkit.evaluation.periodic import PeriodicEvaluation

GRID = 80  # samples of the pictures made while training: eight of each of ten classes
PAIRS = 32  # samples that are shown beside their reconstructions
SMALL = 1 << 16  # numbers in a batch, 64 images of 32x32: with fewer a second thread costs more than it brings
NAMED = ("data", "objective", "backbone")  # what a run's directory is named after
console = Console(highlight=False, soft_wrap=True)


def main(argv: list[str]) -> int:
    if (num := lost_ranks()) > 1:
        start_ranks(num, "train", argv)
    resumed = option(argv, "--resume")
    if resumed:
        if option(argv, "--config"):
            raise ValueError("resume: a run continues with its own config.yaml; leave --config out")
        if option(argv, "--init"):
            raise ValueError("init: a resumed run goes on with its own weights; leave --init out")
        argv = ["--config", str(runs.find(resumed) / "config.yaml"), *argv]
    init = None if resumed else option(argv, "--init") or stored_init(argv)
    under = runs.suggested(init) if init else None
    cfg = parse(config.Train, argv, prog="genkit train", description="Train an objective on data.", under=under)
    return train(cfg, runs.find(cfg.resume) if cfg.resume else None)


def stored_init(argv: list[str]) -> str | None:
    """What ``--config FILE`` says of ``init``."""
    file = option(argv, "--config")
    found = config.load_yaml(file).get("init") if file else None
    return found if isinstance(found, str) else None


def option(argv: list[str], flag: str) -> str | None:
    """The value of ``flag``, needed before the rest can be parsed."""
    for here, after in zip(argv, [*argv[1:], None], strict=False):  # which is one longer where there are none
        if here == flag:
            return after
        if here.startswith(f"{flag}="):
            return here.partition("=")[2]
    return None


def train(cfg: config.Train, resumed: File | None = None) -> int:
    """Train ``cfg``, in a new run directory or on from the newest checkpoint of ``resumed``; the exit code."""
    device = runs.pick_device(cfg.device)
    accelerator = join_ranks(device)
    device = accelerator.device
    with accelerator.main_process_first():
        loaded = cfg.data.load("train")
    data = coded(cfg, loaded, accelerator, resumed)
    threads = cfg.threads or pick_threads(share(cfg.batch, accelerator.num_processes) * math.prod(data.spec.shape))
    cfg = replace(cfg, precision=pick_precision(cfg.precision, device, data.spec), threads=threads, resume=None)
    torch.set_num_threads(threads)
    torch.manual_seed(cfg.seed)
    nets = {k: v.to(device) for k, v in networks(cfg, data).items()}
    begun = None
    if cfg.codec and not resumed:
        cfg = replace(cfg, codec=runs.name_of_stage(cfg.codec))
    notes: list[str] = []
    if cfg.lora.active and not cfg.init:
        raise ValueError("lora: changes weights that are there already; say whose: --init RUN")
    if cfg.init and not resumed:
        cfg = replace(cfg, init=runs.name_of_init(cfg.init))
        begun = runs.begin(nets, str(cfg.init), notes.append)
        notes += runs.remarks(str(cfg.init), cfg.objective)
    elif cfg.lora.active and resumed:
        runs.rebase(nets, resumed)
    if cfg.lora.active:
        lora.adapt(nets, cfg.lora)
    state = start(cfg.objective, nets, cfg)
    stream = Stream(loaded, cfg.batch, cfg.seed, device, cfg.workers)
    if cfg.objective.paired:
        given(stream(0, 0, 0, 1))
    if resumed:
        runs.restore(runs.checkpoint_of(resumed), state, cfg.objective)
    if state.step >= cfg.steps:
        console.print(f"already at step {state.step}; to go further: --resume {resumed} --steps N", markup=False)
        return 0
    watched = None
    if cfg.eval_every:
        from genkit.evaluation.periodic import PeriodicEvaluation  # lazy: metrics take a second to import

        watched = PeriodicEvaluation.create(cfg, state, data, accelerator)
    run = open_run(cfg, accelerator, state, resumed, begun, data.codec)
    session = Session(cfg, accelerator, data.spec, data.codec, grid_conditions(data.spec, stream), run, watched)
    count = sum(p.numel() for net in nets.values() for p in net.parameters())
    for note in notes:
        session.say(f"note     {note}")
    session.say(
        f"{run}  {count / 1e6:.2f}M parameters, {len(data)} samples of {'x'.join(map(str, data.spec.shape))}, "
        f"{device}, {cfg.precision}" + (f", {accelerator.num_processes} ranks" if accelerator.num_processes > 1 else "")
    )
    with listening() as asked, session.bar(state.step) as progress, session.tensorboard(state.step):
        try:
            done = fit(
                cfg.objective,
                state,
                stream,
                data.codec,
                cfg,
                accelerator,
                log=session.log,
                sample=session.sample if cfg.objective.draws else partial(session.reconstruct, first_rows(stream)),
                evaluate=session.evaluate,
                save=session.save,
                progress=progress,
                stop=lambda: bool(asked),
            )
        except Diverged as e:
            raise ValueError(f"{e}; the last good checkpoint stays in {run}") from e
    session.close(state, done)
    return 0 if done else 130


def networks(cfg: config.Train, data: Data) -> dict[str, nn.Module]:
    """New ones. ``ValueError`` where they cannot serve the data, which may be latents."""
    try:
        cfg.objective.prepare(data.spec)
        return cfg.objective.networks(cfg.backbone, data.spec)
    except ValueError as e:
        if not isinstance(data.codec, Latent):
            raise
        raise ValueError(
            f"codec: {data.codec.stage.name} gives latents {data.spec.shape}, which do not fit: {e}"
        ) from e


def open_run(
    cfg: config.Train,
    accelerator: Accelerator,
    state: State,
    resumed: File | None,
    begun: dict[str, str] | None,
    codec: Codec,
) -> File:
    """The run's directory, which the main process makes or takes up again; every rank learns its name."""
    run = resumed
    if accelerator.is_main_process:
        if run is None:
            block = config.dump(cfg)
            run = runs.create(cfg.out, cfg.name or "-".join(slug(block[k]["name"]) for k in NAMED))
            (run / "env.json").write_text(json.dumps({**environment(accelerator), "init": begun}, indent=1))
            if isinstance(codec, Latent):
                codec.stage.write(run / "codec")
            if cfg.lora.active and begun:
                runs.write_base(run, begun)
        else:
            runs.rewind_log(run, state.step)
            runs.point(run.parent / "latest", run.name)
        (run / "config.yaml").write_text(to_yaml(cfg))
    named = broadcast_object_list([run])[0]
    assert named is not None
    return named


def pick_precision(name: str, device: torch.device, spec: Spec) -> str:
    """``auto`` is bf16 where the device is fast at it, but fp32 for vectors, whose small networks gain nothing.

    Resolved once and written to config.yaml, so that a resumed run stays what it was.
    """
    if name != "auto":
        return name
    return "bf16" if len(spec.shape) > 1 and fast_bf16(device) else "fp32"


def pick_threads(numbers: int) -> int:
    """CPU threads for a batch of so many numbers. Like the precision it is resolved once: sums depend on it."""
    return 1 if numbers < SMALL else torch.get_num_threads()


def first_rows(stream: Stream) -> Batch:
    """Some samples to reconstruct."""
    return stream(0, 0, 0, min(PAIRS, stream.batch_size))


def grid_conditions(spec: Spec, stream: Stream) -> dict[str, torch.Tensor]:
    """Conditions of the pictures: classes, or captions, in turn; other kinds come from the first batch of data."""
    try:
        return runs.labels(spec, GRID)
    except ValueError:
        cond = stream(0, 0, 0, min(GRID, stream.batch_size)).cond
        return {k: torch.cat([v.cpu()] * -(-GRID // len(v)))[:GRID] for k, v in cond.items()}


@contextlib.contextmanager
def listening() -> Iterator[list[int]]:
    """The signals that asked us to stop. The first lets the step end and saves; a second Ctrl-C ends at once."""
    asked: list[int] = []

    def hear(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {s: signal.signal(s, hear) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@dataclass
class Session:
    """What a training run writes and shows. Only the main process writes; every rank draws its share of pictures."""

    cfg: config.Train
    accelerator: Accelerator
    spec: Spec
    codec: Codec
    cond: dict[str, torch.Tensor]
    run: File
    watch: PeriodicEvaluation | None = None
    writer: Any = None
    remark: str | None = None

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            console.print(text, markup=False)

    @contextlib.contextmanager
    def tensorboard(self, step: int) -> Iterator[None]:
        if not (self.cfg.tensorboard and self.accelerator.is_main_process):
            yield
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.run / "tensorboard"), purge_step=step + 1) as self.writer:
            yield

    @contextlib.contextmanager
    def bar(self, step: int) -> Iterator[Any]:
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} samples/s"),
            TimeRemainingColumn(),
        )
        shown = self.accelerator.is_main_process and console.is_terminal
        with Progress(*columns, console=console, disable=not shown) as bar:
            task = bar.add_task("train", total=self.cfg.steps, completed=step, loss="–", rate="–")

            def update(step: int, loss: float | None) -> None:
                speed = bar.tasks[0].speed
                rate = f"{speed * self.cfg.batch:.0f}" if speed else "–"
                bar.update(task, completed=step, loss="–" if loss is None else f"{loss:.4f}", rate=rate)

            yield update

    def log(self, record: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        runs.append_log(self.run, record)
        before, self.remark = self.remark, self.cfg.objective.remark(record)
        if self.remark and not before:
            self.say(f"step {record['step']}: {self.remark}")
        if self.writer:
            for key, value in record.items():
                if key not in ("step", "samples", "seconds") and value is not None:
                    self.writer.add_scalar(key, value, record["step"])
        if not console.is_terminal and (record["step"] // self.cfg.log_every) % 5 == 0:
            losses = "  ".join(f"{k} {v:.4f}" for k, v in record.items() if k.endswith("/loss") and v is not None)
            console.print(f"step {record['step']}/{self.cfg.steps}  {losses}  {record['samples_per_s']:.0f} samples/s")

    def sample(self, state: State) -> None:
        """A picture of the same seeds and conditions each time, from the slowest average; each rank draws its rows."""
        rows = list(sample_rows(GRID, self.accelerator))
        nets = state.emas[max(state.emas)] if state.emas else state.nets
        objective, device = self.cfg.objective, self.accelerator.device
        generate = objective.generator(nets, bind(objective.sampler, 20) if objective.sampler else None)
        for net in nets.values():
            net.eval()
        noise = Seeds(rows, device)
        cond = {k: v[rows].to(device) for k, v in self.cond.items()}
        with torch.no_grad():
            mine = self.codec.decode(generate(noise(objective.noise_shape(self.spec)), cond, noise))
        drawn = self.accelerator.gather(mine)[:GRID].cpu()  # type: ignore[index]
        for net in state.nets.values():
            net.train()
        self.show(drawn, self.cond, state.step)

    def reconstruct(self, batch: Batch, state: State) -> None:
        """For what draws no samples: some of the data, and below or in another colour what its code keeps of them."""
        nets = state.emas[max(state.emas)] if state.emas else state.nets
        for net in nets.values():
            net.eval()
        encoded = self.codec.encode(batch.to(self.accelerator.device))
        with torch.no_grad():
            back = self.cfg.objective.reconstruct(nets, encoded)
        for net in state.nets.values():
            net.train()
        if back is not None:
            kind = torch.arange(2).repeat_interleave(len(back))
            given = self.codec.decode(encoded.x) if isinstance(self.codec, OfCache) else batch.x
            self.show(torch.cat([given, self.codec.decode(back)]).cpu(), {"label": kind}, state.step)

    def show(self, x: torch.Tensor, cond: dict[str, torch.Tensor], step: int) -> None:
        if self.accelerator.is_main_process:
            image = pictures.picture(x, cond)
            if self.writer:
                self.writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")
            pictures.save(image, self.run / "samples" / f"step-{step:07d}.png")

    def evaluate(self, state: State) -> None:
        """A card, a line of the log and scalars. A model that cannot be measured now goes on training."""
        assert self.watch is not None
        try:
            card = self.watch(state, self.run)
        except ValueError as e:
            self.say(f"step {state.step}: not evaluated: {e}")
            return
        if card is None:
            return
        ends = {"": "value", "_low": "low", "_high": "high"}
        found = {f"eval/{k}{end}": getattr(e, part) for k, e in card.metrics.items() for end, part in ends.items()}
        runs.append_log(self.run, {"step": state.step, **{k: v for k, v in found.items() if v is not None}})
        values = {k: e.value for k, e in card.metrics.items()}
        if self.writer:
            for key, value in values.items():
                self.writer.add_scalar(f"eval/{key}", value, state.step)
        self.say(f"step {state.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def save(self, state: State) -> None:
        if self.accelerator.is_main_process:
            cfg = self.cfg
            runs.save(self.run, state, cfg.objective, self.spec, self.codec, seed=cfg.seed, keep=cfg.keep)
            records = runs.read_log(self.run)
            if records:
                pictures.loss_plot(records, self.run / "loss.png")
        self.accelerator.wait_for_everyone()

    def close(self, state: State, done: bool) -> None:
        if not done:
            self.say(f"stopped at step {state.step}, saved; continue with: genkit train --resume {self.run}")
            return
        newest = sorted((self.run / "samples").glob("*.png"))[-1:]
        self.say(f"trained {state.step} steps" + (f", {state.skipped} skipped" if state.skipped else ""))
        for path in [*newest, self.run / "loss.png"]:
            self.say(f"picture  {path}")
        label = " --label 1" if "label" in self.spec.cond else ""
        label += f' --prompt "{said[0]}"' if (said := examples(self.spec)) else ""
        if self.remark:
            self.say(f"note     {self.remark}")
        use = getattr(type(self.cfg.data), "use", self.cfg.objective.use)  # policies are tried, not looked at
        self.say("next     " + use.format(run=self.run, label=label))


def slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name.rpartition(":")[2])


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, device and command: what a number may hang on."""
    from importlib.metadata import version

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=File(__file__).parent, capture_output=True, text=True)
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
    }
