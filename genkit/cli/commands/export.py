"""`genkit export RUN DIR`: a run as others can use it: a pipeline of diffusers, or a run that stands alone."""

from __future__ import annotations

import copy
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from rich.console import Console
from torch import nn
from tyro.conf import Positional

from genkit.backbones.diffusers import Diffusers, DiffusersDenoiser, Model, class_of
from genkit.backbones.lora import LoRA
from genkit.config import parse, table, to_yaml
from genkit.core import Objective
from genkit.data.codecs import LearnedCodec
from genkit.diffusion.paths import Linear
from genkit.integrations.weights import BETAS, PREDICTIONS, retold
from genkit.objectives import DDPM, Flow
from genkit.training.checkpoint import save_checkpoint
from genkit.training.loop import initial_state
from genkit.training.run import Run, load_run

console = Console(highlight=False, soft_wrap=True)


class Format(ABC):
    """One way to write a run into an empty folder."""

    @abstractmethod
    def write(self, run: Run, out: Path) -> list[str]:
        """Fill the folder; the lines that tell a person what to do with it."""


# --------------------------------------------------------------------------------------------------------- a whole run
@dataclass(frozen=True)
class WholeRun(Format):
    """A run with one checkpoint, of the exported weights alone; a LoRA is merged into its base's."""

    def write(self, run: Run, out: Path) -> list[str]:
        cfg = replace(run.config, ema=(), lora=LoRA(), init=None)
        state = initial_state(cfg.objective, run.nets, cfg)
        state.step = run.step
        save_checkpoint(out, state, cfg.objective, run.spec, run.codec, seed=cfg.seed, keep=1)
        if isinstance(run.codec, LearnedCodec):
            shutil.copytree(run.directory / "codec", out / "codec")
        (out / "config.yaml").write_text(to_yaml(cfg))
        return ["genkit sample {out}", "python -c \"from genkit import runs; run = load_run('{out}')\""]


# --------------------------------------------------------------------------------------------------------- diffusers
@dataclass(frozen=True)
class ToDiffusers(Format):
    """A folder that ``DiffusionPipeline.from_pretrained`` loads, of a run of --backbone=diffusers by ddpm or flow.

    diffusers has pipelines for unet2d without classes. What has none (classes, dit, unet2d-condition, latents) is
    written as network and scheduler, with the loop that draws.

    The same seed is the same noise z. diffusers begins with z, genkit with sigma(1) z: they are 2e-5 of it apart with
    linear betas, 4e-4 with scaled-linear ones, and nothing with cosine betas, zero_snr or a flow.
    """

    label: Annotated[int, Ge(0)] | None = None
    """Of a network with classes: this class alone, in a network without; None: all of them."""

    def write(self, run: Run, out: Path) -> list[str]:
        denoiser, family = network(run), run.config.backbone
        assert isinstance(family, Diffusers)
        kind = SCHEDULES.get(type(run.objective))
        if kind is None:
            name = type(run.objective).__name__
            raise refused(f"diffusers has no scheduler that draws as {name} does; allowed: ddpm, flow")
        schedule = kind(run.objective, family)
        net, classes = copy.deepcopy(denoiser.model), denoiser.classes
        if self.label is not None:
            net, classes = one_class(denoiser, family.model, self.label), None
        if schedule.later:
            net.load_state_dict(net.state_dict() | retold(net, schedule.later))
        plain = not (classes or isinstance(run.codec, LearnedCodec) or family.learned_sigma)
        drawn = plain and family.model.alone
        part = "transformer" if family.model.kind.startswith("DiT") else "unet"
        if family.model.alone and not isinstance(run.codec, LearnedCodec):
            class_of(schedule.pipeline)(unet=net, scheduler=schedule.scheduler).save_pretrained(out)
        else:
            net.save_pretrained(out / part)  # type: ignore[operator]  # of diffusers, not of nn.Module
            schedule.scheduler.save_pretrained(out / "scheduler")
        told = schedule.told(part, drawn, classes)
        latent = ["What it draws are latents, normalised; genkit decodes them (run.codec.decode)."]
        words = ["It has a learned null and, of texts, an encoder that diffusers has no place for: they are left out."]
        told += latent * isinstance(run.codec, LearnedCodec) + words * (denoiser.sequences is not None)
        (out / "README.md").write_text(card(run, told))
        return told


def refused(why: str) -> ValueError:
    return ValueError(f"export: {why}; to use it with genkit elsewhere: --to run")


def network(run: Run) -> DiffusersDenoiser:
    """The run's network. ``ValueError`` where it is none of diffusers' own."""
    found = [net for net in run.nets.values() if isinstance(net, DiffusersDenoiser)]
    if len(found) != 1:
        name = type(run.config.backbone).__name__
        learned = " with --objective.learn-variance" if isinstance(run.config.backbone, Diffusers) else ""
        raise refused(f"diffusers has no network such as {name}{learned}; train with --backbone=diffusers")
    return found[0]


def one_class(denoiser: DiffusersDenoiser, model: Model, label: int) -> nn.Module:
    """The network of one class, without a table: its row is added to what the time's last layer adds."""
    if denoiser.classes is None or not model.alone:
        what = "has no classes" if denoiser.classes is None else f"is a {model.kind}, which cannot be without"
        raise ValueError(f"to.label: given {label}; this network {what}; leave it out")
    num = denoiser.classes[1]
    if label >= num:
        raise ValueError(f"to.label: given {label}; allowed 0..{num - 1}")
    settings = {k: v for k, v in dict(denoiser.model.config).items() if not k.startswith("_")}  # type: ignore[call-overload]
    net = class_of(model.kind)(**{**settings, "num_class_embeds": None})
    weights = denoiser.model.state_dict()
    row = weights.pop("class_embedding.weight")[label]
    last = "time_embedding.linear_2.bias"
    net.load_state_dict({**weights, last: weights[last] + row})
    return net.eval()


@dataclass(frozen=True)
class Schedule:
    """A scheduler of diffusers, the pipeline that runs it on a unet2d, and by how much later it tells the time."""

    scheduler: Any
    pipeline: Literal["DDIMPipeline", "DDPMPipeline"]
    later: float
    same: str
    """the same picture by genkit"""
    steps: int
    grid: str
    """the loop's own steps, in Python"""

    def told(self, part: str, drawn: bool, classes: tuple[str, int] | None) -> list[str]:
        if drawn:
            return [
                "pipe = diffusers.DiffusionPipeline.from_pretrained('{out}')",
                f"pipe(num_inference_steps={self.steps}, generator=[torch.Generator().manual_seed(0)]).images[0]",
                f"draws the picture of: genkit sample RUN --n 1 {self.same}",
            ]
        kind = type(self.scheduler).__name__
        label = f", class_labels=labels  # {classes[1]} is the null class" if classes else ""
        return [
            f"No pipeline of diffusers draws with it; {part} and scheduler are there, and this loop draws:",
            f"scheduler = diffusers.{kind}.from_pretrained('{{out}}/scheduler'); {self.grid}",
            f"for t in scheduler.timesteps: x = scheduler.step(net(x, t, ...).sample, t, x).prev_sample{label}",
        ]


def ddpm_schedule(objective: Objective, family: Diffusers) -> Schedule:
    assert isinstance(objective, DDPM)
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if objective.prediction not in names:
        raise refused(f"diffusers knows no prediction {objective.prediction}; allowed: {', '.join(names)}")
    if objective.timesteps != family.timesteps:
        counts = f"the network counts {family.timesteps} times, the objective {objective.timesteps}"
        raise refused(f"{counts}; train with --backbone.timesteps {objective.timesteps}")
    scheduler = class_of("DDIMScheduler")(
        num_train_timesteps=objective.timesteps,
        beta_start=objective.beta_min,
        beta_end=objective.beta_max,
        beta_schedule={ours: theirs for theirs, ours in BETAS.items()}[objective.betas],
        prediction_type=names[objective.prediction],
        rescale_betas_zero_snr=objective.zero_snr,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    steps = min(50, objective.timesteps)
    same = f"--sampler ddim --grid trailing --steps {steps}"
    return Schedule(scheduler, "DDIMPipeline", 0.0, same, steps, f"scheduler.set_timesteps({steps})")


def flow_schedule(objective: Objective, family: Diffusers) -> Schedule:
    assert isinstance(objective, Flow)
    fits = {"path": isinstance(objective.path, Linear), "prediction": objective.prediction == "velocity",
            "source": objective.source.is_normal}  # fmt: skip
    if odd := [k for k, v in fits.items() if not v]:
        allowed = {"path": "linear", "prediction": "velocity", "source": "normal"}[odd[0]]
        raise refused(f"diffusers' flow matching has another {odd[0]} than this run; allowed: {allowed}")
    scheduler = class_of("FlowMatchEulerDiscreteScheduler")(num_train_timesteps=family.timesteps)
    grid = "scheduler.set_timesteps(sigmas=[1 - i / 20 for i in range(20)])  # --sampler ddim --steps 20"
    return Schedule(scheduler, "DDPMPipeline", 1.0, "--sampler ddim --grid linspace --steps 28", 28, grid)


SCHEDULES: Mapping[type, Callable[[Objective, Diffusers], Schedule]] = {DDPM: ddpm_schedule, Flow: flow_schedule}


def card(run: Run, told: list[str]) -> str:
    code = "\n".join(f"    {line}" for line in told).replace("{out}", "DIR")
    weights = f"{run.directory.name}/{run.weights}"
    return f"# {run.directory.name}\n\nExported by genkit from {weights}.\n\n{code}\n"


FORMATS: dict[str, type[Format]] = {"diffusers": ToDiffusers, "run": WholeRun}


# ------------------------------------------------------------------------------------------------------- the command
@dataclass(frozen=True)
class Export:
    """Write a run as others can use it."""

    run: Positional[str]
    """The run's folder, such as runs/latest."""
    out: Positional[str]
    """The new folder."""
    to: Any = table("genkit.cli.commands.export:FORMATS", "diffusers")
    """As what: diffusers, a pipeline; run, a run of the exported weights alone."""
    ema: str | None = None
    """Which averaged weights, by decay; None: the slowest; "none": the weights themselves."""
    step: Annotated[int, Ge(0)] | None = None
    """Which checkpoint; None: the newest."""
    lora: str | None = None
    """Merge the change that this run of --lora.rank learned into the weights."""
    lora_scale: float | None = None
    """How much of that change, or of a LoRA run's own; None: 1, all."""


def main(argv: list[str]) -> int:
    asked = parse(Export, argv, prog="genkit export", description="Write a run as others can use it.")
    out = Path(asked.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: given {out}, which is there already; name a new folder")
    run = load_run(
        asked.run, ema=asked.ema, step=asked.step, device="cpu", adapter=asked.lora, adapter_scale=asked.lora_scale
    )
    part = out.parent / f".{out.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with torch.no_grad():
            told = asked.to.write(run, part)
        os.replace(part, out)  # a folder that is there and empty gives way
    finally:
        shutil.rmtree(part, ignore_errors=True)
    console.print(f"{out}  from {run.directory.name}/{run.weights}", markup=False)
    for line in told:
        console.print("  " + line.replace("{out}", str(out)), markup=False)
    return 0
