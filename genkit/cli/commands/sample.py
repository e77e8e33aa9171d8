"""`genkit sample RUN`: draw from a model, as a grid, PNG files or an npz."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from genkit import __version__, config
from genkit.config import Sample, Sampling, parse
from genkit.core import Denoiser, Prediction, pictures, seed_of
from genkit.core.files import whole
from genkit.data import text
from genkit.diffusion.samplers import CountingDenoiser
from genkit.training import run as runs

console = Console(highlight=False, soft_wrap=True)


def main(argv: list[str]) -> int:
    asked = parse(Sample, argv, prog="genkit sample", description="Draw samples from a run.")
    run = runs.load(asked.run, ema=asked.ema, step=asked.step, device=asked.device,
                    adapter=asked.lora, adapter_scale=asked.lora_scale)  # fmt: skip
    if run.config.threads:
        torch.set_num_threads(run.config.threads)
    asked = replace(asked, n=asked.n or (1 if len(asked.prompt) > 1 else 64))
    n = (asked.n or 1) * max(1, len(asked.prompt))
    said = asked.prompt or (text.examples(run.spec) if asked.label is None else ())
    out = destination(asked, run)
    if asked.trajectory and n > asked.batch:
        raise ValueError(f"trajectory: given --n {n} in batches of {asked.batch}; take --batch {n}")
    frames: list[Tensor] = []
    asks: list[CountingDenoiser] = []

    def watch(step: int, x: Tensor, prediction: Prediction) -> None:
        frames.append(run.codec.decode(x.float()).cpu())

    def count(denoise: Denoiser) -> Denoiser:
        asks.append(CountingDenoiser(denoise))
        return asks[-1]

    began = time.perf_counter()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("sampling", total=n)
        x, cond = run.sample(
            n,
            label=asked.label,
            prompt=asked.prompt,
            seed=asked.seed,
            batch=asked.batch,
            progress=lambda done: bar.update(task, completed=done),
            callback=watch if asked.trajectory else None,
            watch=count,
            **how(asked, run),
        )
    for path in FORMATS[asked.format](x, cond, out):
        console.print(path, markup=False)
    if asked.format == "png" and said:
        write_captions(said, n, out)
    if asked.trajectory:
        gif = out.with_suffix(".gif") if out.suffix else out / "trajectory.gif"
        console.print(pictures.save_gif([pictures.picture(f, cond) for f in frames], gif), markup=False)
    seconds = time.perf_counter() - began
    nfe = asks[0].calls if asks else 1  # a one-pass model has no denoiser to ask
    settings = config.dump(asked) | {"sampler": asked.sampler or run.objective.sampler, "nfe": nfe}
    settings |= {"rows_per_sample": sum(a.rows for a in asks) / n, "weights": run.weights, "genkit": __version__}
    beside_it = out.with_suffix(".json") if out.suffix else out / "samples.json"
    beside_it.write_text(json.dumps(settings, indent=1) + "\n")
    console.print(f"{n} samples, {nfe} evaluations each, in {seconds:.1f} s from {run.weights}", markup=False)
    return 0


def how(asked: Sampling, run: runs.Run) -> dict[str, Any]:
    """What :meth:`genkit.training.run.Run.generator` is asked for."""
    beside = lambda name: runs.beside(run, name) if name else None  # noqa: E731
    return {
        "sampler": asked.sampler,
        "steps": asked.steps,
        "grid": asked.grid,
        "guidance": asked.guidance,
        "rule": asked.guidance_rule,
        "interval": asked.guidance_interval,
        "passes": asked.guidance_passes,
        "weak": beside(asked.autoguide),
        "classifier": beside(asked.classifier),
        "classifier_scale": asked.classifier_scale,
        "clip": asked.clip,
    }


def destination(asked: Sample, run: runs.Run) -> File:
    suffix = SUFFIX[asked.format]
    if asked.out:
        out = File(asked.out)
        return out if not suffix or out.suffix else out.with_name(out.name + suffix)
    label = "" if asked.label is None else f"-label{asked.label}"
    label += f"-{File(asked.lora).resolve().name}" if asked.lora else ""
    label += "" if asked.lora_scale is None else f"-lora{asked.lora_scale:g}"
    label += f"-{slug(asked.prompt)}" if asked.prompt else ""
    guided = "" if asked.guidance == 1 else f"-guidance{asked.guidance:g}"
    sampler = asked.sampler or run.objective.sampler
    how = f"{sampler}{asked.steps}{guided}" if sampler else "one-pass"
    name = f"sample-step{run.step}-{how}{label}-seed{asked.seed}-n{asked.n}"
    return run.directory / "samples" / (name + suffix)  # not with_suffix: the name may hold a point


def slug(prompts: tuple[str, ...]) -> str:
    """Prompts as a part of a file's name; cut where they are long, with a hash of all."""
    joined = "-".join(re.sub("[^a-z0-9]+", "-", p.lower()) for p in prompts)
    return joined if joined == prompts[0][:40] else f"{joined[:40]}-{seed_of(*repr(prompts).encode()) % 16**8:08x}"


def write_grid(x: Tensor, cond: dict[str, Tensor], out: File) -> list[File]:
    return [pictures.save(pictures.picture(x, cond), out)]


def write_png(x: Tensor, cond: dict[str, Tensor], out: File) -> list[File]:
    """One file a sample, `000000.png` and so on, with `labels.txt` where there are classes."""
    if x.ndim != 4:
        raise ValueError(f"format: given png for samples of shape {tuple(x.shape[1:])}; allowed: grid, npz")
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(x.permute(0, 2, 3, 1).numpy()):
        pictures.pil(image).save(out / f"{i:06d}.png")
    if "label" in cond:
        (out / "labels.txt").write_text("".join(f"{i:06d}.png {int(c)}\n" for i, c in enumerate(cond["label"])))
    return [out]


def write_captions(said: Sequence[str], n: int, out: File) -> None:
    """What was asked for, beside the pictures, as `--data.captions files` reads it."""
    lines = [json.dumps({"file_name": f"{i:06d}.png", "text": said[i % len(said)]}) for i in range(n)]
    (out / "captions.jsonl").write_text("\n".join(lines) + "\n")


def write_npz(x: Tensor, cond: dict[str, Tensor], out: File) -> list[File]:
    """The layout of guided-diffusion: `arr_0` uint8 NHWC (floats as they are), `arr_1` labels."""
    array = x.permute(0, 2, 3, 1).numpy() if x.ndim == 4 else x.numpy()
    arrays = [array, cond["label"].numpy()] if "label" in cond else [array]
    with whole(out) as part, open(part, "wb") as f:
        np.savez(f, *arrays)
    return [out]


SUFFIX = {"grid": ".png", "npz": ".npz", "png": ""}
FORMATS = {"grid": write_grid, "png": write_png, "npz": write_npz}
