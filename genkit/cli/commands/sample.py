"""`genkit sample RUN`: draw from a model, as a grid, PNG files or an npz."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from tyro.conf import Positional

from genkit import config
from genkit.cli.output import console
from genkit.cli.sample_output import SampleFolder, destination, require_free, write_samples
from genkit.config import parse
from genkit.config.numbers import Count
from genkit.config.paths import PathText
from genkit.core.device import pick_device
from genkit.core.progress import reporting
from genkit.data import text
from genkit.training.distributed import join_ranks
from genkit.training.ranks import Ranks
from genkit.training.run import Run, load_run
from genkit.training.sampling import LoadOptions, Sampling, grid_size

NUM_IMAGES, NUM_VECTORS = 64, 512


@dataclass(frozen=True)
class Sample(Sampling, LoadOptions):
    """Draw samples from a run."""

    run: Positional[PathText]
    """Run directory, such as runs/latest."""
    n: Count | None = None
    """Number of samples, of each prompt. None: about 64, so that the rows of the grid are full; fewer large images;
    512 vectors; one of each of several prompts."""
    label: str | int | None = None
    """Class to draw, by name or number (genkit info RUN lists them). None: all classes in turn."""
    prompt: tuple[str, ...] = ()
    """Prompts, for a model trained with captions. None: captions of its data in turn."""
    lora: PathText | None = None
    """Add the adapter of this LoRA run (--lora.rank), trained from this run or from another with the same layers; or of
    a LoRA file (.safetensors) for a network of a diffusers pipeline."""
    lora_scale: float | None = None
    """Strength of that adapter, or of a LoRA run's own. None: 1; 0: the base model."""
    format: Literal["grid", "png", "npz"] = "grid"
    """One picture, one file a sample, or arrays."""
    out: PathText | None = None
    """Output path. None: in the run's samples directory."""
    trajectory: bool = False
    """Also write a GIF of the trajectory from noise to sample."""


def default_number(command: Sample, run: Run) -> int:
    """The number of samples if none is given: a picture's worth of them."""
    if len(command.prompt) > 1:
        return 1
    spec = run.data_spec if command.label is None and not command.prompt else replace(run.data_spec, cond={})
    return NUM_VECTORS if len(spec.shape) == 1 else grid_size(spec, NUM_IMAGES)


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Sample, argv, prog="genkit sample", description="Draw samples from a run.")
    accelerator = join_ranks(pick_device(command.device))
    ranks = Ranks.of(accelerator)
    run = load_run(command.run, ema=command.ema, step=command.step, device=accelerator.device.type,
                   adapter=command.lora, adapter_scale=command.lora_scale)  # fmt: skip
    if run.config.threads:
        torch.set_num_threads(run.config.threads)
    command = replace(command, n=command.n or default_number(command, run))
    n = (command.n or 1) * max(1, len(command.prompt))
    out = destination(command, run)
    ranks.once(require_free, command, run, out)
    began = time.perf_counter()
    with SampleFolder(out, ranks) if command.format == "png" else nullcontext() as folder:
        with reporting(None, ranks.is_main) as progress:
            samples = run.sample(n, config.narrow(command, Sampling), label=command.label, prompt=command.prompt,
                                 trajectory=command.trajectory, progress=progress, ranks=ranks,
                                 consume=folder.write if folder else None)  # fmt: skip
        captions = command.prompt or (text.caption_examples(run.spec) if command.label is None else ())
        paths = ranks.once(write_samples, command, run, samples, captions, out, folder)
    if ranks.is_main:
        for path in paths:
            console.print(path, markup=False)
        seconds = time.perf_counter() - began
        console.print(f"{n} samples, {samples.evaluations} evaluations each, in {seconds:.1f} s from {run.weights}",
                      markup=False)  # fmt: skip
    return 0
