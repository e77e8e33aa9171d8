"""What a person can set: one frozen dataclass per command, the same thing as a YAML file and as a command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from tyro.conf import Positional

from genkit.config.blocks import ConfigError, dump, from_dict, load, load_yaml, to_yaml
from genkit.config.command import parse

if TYPE_CHECKING:
    from genkit.core import Backbones, Objective

__all__ = ["ConfigError", "Sample", "Train", "dump", "from_dict", "load_yaml", "parse", "table", "to_yaml"]

Count = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0), Lt(1)]


def table(registry: str, name: str, **metadata: str) -> Any:
    """A field that holds an object of a dataclass in ``registry`` ("module:NAME"), by default ``name``'s."""
    return field(default_factory=lambda: load(registry)[name](), metadata={"table": registry, **metadata})


@dataclass(frozen=True)
class Train:
    """Train a model."""

    objective: Objective = table("genkit.objectives:OBJECTIVES", "flow", kind="genkit.core:Objective")
    """What is learned."""
    backbone: Backbones = table(
        "genkit.backbones:BACKBONES", "unet", kind="genkit.core:Backbones", follows="data.suits"
    )
    """The family of networks; without a NAME, the one that suits the data."""
    data: Any = table("genkit.data:DATA", "digits", fallback="genkit.data:source")
    """What is learned from: a NAME, or a path to a folder of images."""
    steps: Count = 2000
    """Optimiser steps; the default learns the digits in some minutes on two CPU cores."""
    batch: Count = 64
    """Samples per step, over all ranks together."""
    micro: Count | None = None
    """Samples per forward pass on one rank, to save memory; None: all at once. The result does not depend on it."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Peak learning rate of AdamW; 1e-3 suits networks of about a million parameters, 1e-4 large ones."""
    warmup: Annotated[int, Ge(0)] = 100
    """Steps over which the learning rate rises from 0: Adam's second moment is not to be trusted before."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """The learning rate after the warmup: constant, or down to 0 along half a cosine."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay (AdamW)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """Adam's decay rates; 0.99 forgets an early, large gradient ten times as fast as the usual 0.999."""
    clip: Annotated[float, Ge(0)] = 1.0
    """Largest norm of a gradient; 0: no clipping."""
    ema: tuple[Fraction, ...] = (0.999,)
    """Decay rates per step of the averaged weights, one copy of the networks each."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; auto: bf16 where the device multiplies in it and the samples are not mere vectors."""
    compile: bool = False
    """torch.compile the networks: a minute at the start, then faster steps."""
    seed: Annotated[int, Ge(0)] = 0
    """Every random number depends on it, the step and the row alone."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    threads: Count | None = None
    """CPU threads of a rank; None: one for small batches, where more only wait for each other, else all."""
    out: str = "runs"
    """The folder in which the run's own folder is made."""
    name: str | None = None
    """The run's name; None: data-objective-backbone."""
    save_every: Count = 500
    """Steps from one checkpoint to the next."""
    sample_every: Annotated[int, Ge(0)] = 500
    """Steps from one grid of samples to the next; 0: none."""
    log_every: Count = 50
    """Steps from one line of the log to the next."""
    keep: Count = 3
    """The newest checkpoints that are kept."""
    workers: Annotated[int, Ge(0)] = 2
    """Processes that load data; 0: none but this one."""
    bad_steps: Count = 10
    """Steps in a row with a loss or gradient that is not finite, after which training stops."""
    tensorboard: bool = True
    """Write scalars and images for TensorBoard, besides log.jsonl."""
    resume: str | None = None
    """A run's folder to go on with."""


@dataclass(frozen=True)
class Sample:
    """Draw samples from a run."""

    run: Positional[str]
    """The run's folder, such as runs/latest."""
    n: Count = 64
    """How many samples."""
    label: Annotated[int, Ge(0)] | None = None
    """The class to draw; None: all in turn."""
    sampler: str | None = None
    """A name in genkit.sampling.SAMPLERS; None: the objective's usual one (heun)."""
    steps: Count = 20
    """Steps of the sampler."""
    guidance: float = 1.0
    """From the unconditional prediction (or that of --autoguide) through the model's own; 1: none."""
    guidance_rule: Any = table("genkit.guidance:RULES", "linear", kind="genkit.guidance:Rule")
    """How: linear, rescale (the deviation brought back) or apg (projected, limited)."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only at noise in here, LOW HIGH in sigma / (alpha + sigma); elsewhere one pass is saved. None: always."""
    guidance_passes: Literal["together", "apart"] | None = None
    """With and without the condition as one batch, or one after the other in half the memory; None: together."""
    autoguide: str | None = None
    """Guide away from a weaker model, not from the unconditional: a run, ema:DECAY or step:N of this run."""
    classifier: str | None = None
    """Guide by the gradient of this classifier: a run of --objective=classifier on the same path."""
    classifier_scale: float | None = None
    """Weight of that gradient; None: 1, which is Bayes' rule."""
    grid: str = "uniform"
    """Where the steps lie: a name in genkit.sampling.GRIDS."""
    clip: bool = False
    """Keep predicted data in [-1, 1] at every step."""
    seed: Annotated[int, Ge(0)] = 0
    """Sample i has seed + i, whatever the batch size."""
    format: Literal["grid", "png", "npz"] = "grid"
    """One picture, a file a sample, or arrays."""
    out: str | None = None
    """Where to; None: into the run's samples folder."""
    trajectory: bool = False
    """Also a GIF of the way from noise to sample."""
    ema: str | None = None
    """Which averaged weights, by decay; None: the slowest; "none": the weights themselves."""
    step: Annotated[int, Ge(0)] | None = None
    """Which checkpoint; None: the newest."""
    batch: Count = 64
    """Samples at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
