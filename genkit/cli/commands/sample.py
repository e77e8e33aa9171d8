"""`genkit sample RUN`: draw from a model, as a grid, PNG files or an npz."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge
from rich.console import Console
from tyro.conf import Positional

from genkit import __version__, config
from genkit.config import parse
from genkit.core import pictures, seed_of
from genkit.core.files import atomic_write
from genkit.core.progress import reporting
from genkit.data import text
from genkit.training.run import Run, Samples, load_run
from genkit.training.sampling import LoadOptions, Sampling

console = Console(highlight=False, soft_wrap=True)
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Sample(Sampling, LoadOptions):
    """Draw samples from a run."""

    run: Positional[str]
    """Run directory, such as runs/latest."""
    n: Count | None = None
    """Number of samples, of each prompt. None: 64, or one of each of several prompts."""
    label: str | int | None = None
    """Class to draw, by name or number (genkit info RUN lists them). None: all classes in turn."""
    prompt: tuple[str, ...] = ()
    """Prompts, for a model trained with captions. None: captions of its data in turn."""
    lora: str | None = None
    """Add the adapter of this LoRA run (--lora.rank), trained from this run or from another with the same layers."""
    lora_scale: float | None = None
    """Strength of that adapter, or of a LoRA run's own. None: 1; 0: the base model."""
    format: Literal["grid", "png", "npz"] = "grid"
    """One picture, one file a sample, or arrays."""
    out: str | None = None
    """Output path. None: in the run's samples directory."""
    trajectory: bool = False
    """Also write a GIF of the trajectory from noise to sample."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Sample, argv, prog="genkit sample", description="Draw samples from a run.")
    run = load_run(command.run, ema=command.ema, step=command.step, device=command.device,
                   adapter=command.lora, adapter_scale=command.lora_scale)  # fmt: skip
    if run.config.threads:
        torch.set_num_threads(run.config.threads)
    command = replace(command, n=command.n or (1 if len(command.prompt) > 1 else 64))
    n = (command.n or 1) * max(1, len(command.prompt))
    out = destination(command, run)
    began = time.perf_counter()
    with reporting(None) as progress:
        samples = run.sample(n, config.narrow(command, Sampling), label=command.label, prompt=command.prompt,
                             trajectory=command.trajectory, progress=progress)  # fmt: skip
    for path in FORMATS[command.format](samples, out):
        console.print(path, markup=False)
    captions = command.prompt or (text.caption_examples(run.spec) if command.label is None else ())
    if command.format == "png" and captions:
        write_captions(captions, n, out)
    if command.trajectory:
        gif = out.with_suffix(".gif") if out.suffix else out / "trajectory.gif"
        console.print(samples.animation(gif), markup=False)
    write_settings(command, run, samples, out)
    seconds = time.perf_counter() - began
    console.print(f"{n} samples, {samples.evaluations} evaluations each, in {seconds:.1f} s from {run.weights}",
                  markup=False)  # fmt: skip
    return 0


def write_settings(command: Sample, run: Run, samples: Samples, out: Path) -> None:
    """Everything that the samples depend on, as JSON beside them."""
    settings = config.dump(command) | {"sampler": command.sampler or run.objective.sampler, "nfe": samples.evaluations}
    settings |= {"rows_per_sample": samples.network_rows, "weights": run.weights, "genkit": __version__}
    if command.label is not None and "label" in samples.cond:
        settings["label"] = int(samples.cond["label"][0])
    path = out.with_suffix(".json") if out.suffix else out / "samples.json"
    path.write_text(json.dumps(settings, indent=1) + "\n")


def destination(command: Sample, run: Run) -> Path:
    """``--out``, or a name in the run's samples directory that says how the samples were drawn."""
    suffix = SUFFIX[command.format]
    if command.out:
        out = Path(command.out)
        return out if not suffix or out.suffix else out.with_name(out.name + suffix)
    label = "" if command.label is None else f"-label{command.label}"
    label += f"-{Path(command.lora).resolve().name}" if command.lora else ""
    label += "" if command.lora_scale is None else f"-lora{command.lora_scale:g}"
    label += f"-{slug(command.prompt)}" if command.prompt else ""
    guided = "" if command.guidance == 1 else f"-guidance{command.guidance:g}"
    sampler = command.sampler or run.objective.sampler
    method = f"{sampler}{command.steps}{guided}" if sampler else "one-pass"
    name = f"sample-step{run.step}-{method}{label}-seed{command.seed}-n{command.n}"
    return run.directory / "samples" / (name + suffix)  # not with_suffix: the name may hold a point


def slug(prompts: tuple[str, ...]) -> str:
    """Prompts as part of a file name: cut if they are long, with a hash of them all."""
    joined = "-".join(re.sub("[^a-z0-9]+", "-", p.lower()) for p in prompts)
    return joined if joined == prompts[0][:40] else f"{joined[:40]}-{seed_of(*repr(prompts).encode()) % 16**8:08x}"


def write_grid(samples: Samples, out: Path) -> list[Path]:
    """All samples as one picture."""
    return [pictures.save_image(samples.grid(), out)]


def write_png(samples: Samples, out: Path) -> list[Path]:
    """One file a sample, `000000.png` and so on, with `labels.txt` if there are classes."""
    if samples.x.ndim != 4:
        raise ValueError(f"format: given png for samples of shape {tuple(samples.x.shape[1:])}; allowed: grid, npz")
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(samples.images):
        image.save(out / f"{i:06d}.png")
    if "label" in samples.cond:
        lines = (f"{i:06d}.png {int(c)}\n" for i, c in enumerate(samples.cond["label"]))
        (out / "labels.txt").write_text("".join(lines))
    return [out]


def write_captions(captions: Sequence[str], n: int, out: Path) -> None:
    """The prompts beside the pictures, as `--data.captions files` reads them."""
    lines = [json.dumps({"file_name": f"{i:06d}.png", "text": captions[i % len(captions)]}) for i in range(n)]
    (out / "captions.jsonl").write_text("\n".join(lines) + "\n")


def write_npz(samples: Samples, out: Path) -> list[Path]:
    """The layout of guided-diffusion: `arr_0` uint8 NHWC (floats as they are), `arr_1` labels."""
    x = samples.x
    array = x.permute(0, 2, 3, 1).numpy() if x.ndim == 4 else x.numpy()
    arrays = [array, samples.cond["label"].numpy()] if "label" in samples.cond else [array]
    with atomic_write(out) as part, open(part, "wb") as f:
        np.savez(f, *arrays)
    return [out]


SUFFIX = {"grid": ".png", "npz": ".npz", "png": ""}
FORMATS = {"grid": write_grid, "png": write_png, "npz": write_npz}
