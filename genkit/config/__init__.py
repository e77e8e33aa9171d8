"""What a person can set: one frozen dataclass per command, the same thing as a YAML file and as a command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from tyro.conf import Positional

from genkit.config.blocks import ConfigError, dump, from_dict, load, load_yaml, override, to_yaml
from genkit.config.command import parse

if TYPE_CHECKING:
    from genkit.core import Backbones, Objective

__all__ = [
    "ConfigError",
    "Sample",
    "Sampling",
    "Train",
    "dump",
    "from_dict",
    "load_yaml",
    "override",
    "parse",
    "table",
    "to_yaml",
]

Count = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0), Lt(1)]


def table(registry: str, name: str, **metadata: str) -> Any:
    """A field that holds an object of a dataclass in ``registry`` ("module:NAME"), by default ``name``'s."""
    return field(default_factory=lambda: load(registry)[name](), metadata={"table": registry, **metadata})


def by_objective(default: Any) -> Any:
    """A field whose default the objective may have an opinion on (``Objective.suits``)."""
    return field(default=default, metadata={"follows": "objective.suits"})


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
    warmup: Annotated[int, Ge(0)] = by_objective(100)
    """Steps over which the learning rate rises from 0: Adam's second moment is not to be trusted before."""
    schedule: Literal["constant", "cosine"] = by_objective("cosine")
    """The learning rate after the warmup: constant, or down to 0 along half a cosine."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay (AdamW)."""
    betas: tuple[Fraction, Fraction] = by_objective((0.9, 0.99))
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
    eval_every: Annotated[int, Ge(0)] = 0
    """Steps from one evaluation of the slowest average to the next; 0: none."""
    eval_n: Annotated[int, Ge(2)] = 1000
    """Samples of an evaluation, shared by the ranks."""
    eval_metrics: str | None = None
    """Names with commas between, as of genkit eval; None: those that suit the data."""
    eval_steps: Count = 20
    """Steps of the objective's usual sampler."""
    eval_features: str = "auto"
    """What samples are measured in: auto, classifier, inception or raw."""
    eval_weights: str | None = None
    """The file of Inception's weights; None: where clean-fid or genkit keeps it."""
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
    codec: str | None = None
    """Learn the latents of this run (of vae, ae, vq or autoencoder), not the samples; or diffusers:DIR. Their deviation
    is 1: give edm --objective.sigma-data 1."""
    codec_posterior: Literal["draw", "mean"] = "draw"
    """What of a VAE's posterior is learned: a draw, a new one each time, or its mean."""
    init: str | None = None
    """A run whose weights, its slowest average, this one begins with, and whose objective and backbone it has where
    none are given; or diffusers:DIR, a model or pipeline of diffusers, or diffusers:OWNER/NAME of the hub."""
    lora: Any = table("genkit.backbones.lora:LORA", "lora")
    """Train a small change of the weights of --init, by --lora.rank."""
    resume: str | None = None
    """A run's folder to go on with."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are drawn from a run."""

    sampler: str | None = None
    """A name in genkit.diffusion.samplers.SAMPLERS; None: the objective's usual one (heun)."""
    steps: Count = 20
    """Steps of the sampler."""
    guidance: float = 1.0
    """From the unconditional prediction (or that of --autoguide) through the model's own; 1: none."""
    guidance_rule: Any = table("genkit.diffusion.guidance:RULES", "linear", kind="genkit.diffusion.guidance:Rule")
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
    """Where the steps lie: a name in genkit.diffusion.samplers.GRIDS."""
    clip: bool = False
    """Keep predicted data in [-1, 1] at every step."""
    seed: Annotated[int, Ge(0)] = 0
    """Sample i has seed + i, whatever the batch size."""
    ema: str | None = None
    """Which averaged weights, by decay; None: the slowest; "none": the weights themselves."""
    step: Annotated[int, Ge(0)] | None = None
    """Which checkpoint; None: the newest."""
    batch: Count = 64
    """Samples at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""


@dataclass(frozen=True)
class Sample(Sampling):
    """Draw samples from a run."""

    run: Positional[str]
    """The run's folder, such as runs/latest."""
    n: Count | None = None
    """How many samples, of each prompt; None: 64, or one of each of several prompts."""
    label: Annotated[int, Ge(0)] | None = None
    """The class to draw; None: all in turn."""
    prompt: tuple[str, ...] = ()
    """What to draw, in words, for a model trained with captions; none: captions of its data in turn."""
    lora: str | None = None
    """Draw with the change that this run of --lora.rank learned, of this run or of another with the same layers."""
    lora_scale: float | None = None
    """How much of that change, or of a LoRA run's own; None: 1, all; 0: the base."""
    format: Literal["grid", "png", "npz"] = "grid"
    """One picture, a file a sample, or arrays."""
    out: str | None = None
    """Where to; None: into the run's samples folder."""
    trajectory: bool = False
    """Also a GIF of the way from noise to sample."""
