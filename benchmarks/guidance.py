"""Guidance in one pass, by `genkit distill`, against classifier-free guidance in two.

    genkit bench guidance [--seeds 3] [--only digits] [--root DIR] [--out FILE.json]

For each seed a class-conditional flow is trained, its guidance is distilled, and both draw from the same noise by
Euler's method. "digits": scikit-learn's, the default U-Net; "fashion": Fashion-MNIST at 28x28, a transformer with
patches of 4x4. Accuracy is the share of samples that a classifier takes for their class, the Fréchet distance is that
to the training data in its features. Scale 1 is no guidance. The difference, one pass minus two, is that of the same
seed; its interval is Student's over the seeds. "missed" is the mean squared difference between samples of one pass and
of two, over that between unguided samples and those of two.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import genkit
from benchmarks.results import (
    MAX_SEEDS,
    MAX_STEPS,
    ResultsFile,
    check_ranges,
    format_mean_sd,
    make_console,
    make_table,
    student_interval,
)
from genkit.cli.scripts import ScriptParser
from genkit.training.run import Run
from genkit.training.sampling import Sampling

SCALES, RANGE = (2.0, 4.0), (1.0, 6.0)
SAMPLER, STEPS, SAMPLES, COMPARED = "ddim", 10, 2000, 500
METRICS = {"accuracy": "accuracy", "fid": "Fréchet distance"}
ARMS = ("two passes", "one pass")


@dataclass(frozen=True)
class Part:
    """One of the two data sets."""

    data: Mapping[str, Any]
    backbone: Mapping[str, Any]
    steps: int
    """of the model's training"""
    distillation: int
    """steps of the distillation"""


PARTS = {
    "digits": Part({"name": "digits"}, {"name": "unet"}, 1500, 500),
    "fashion": Part(
        {"name": "fashion-mnist"}, {"name": "dit", "width": 96, "depth": 4, "patch": 4, "head_size": 32}, 1500, 300
    ),
}


def measure(part: Part, seed: int, root: Path | None, out: Path) -> dict[str, Any]:
    """One seed of a data set: values by scale and arm, and CPU seconds."""
    data = {**part.data, **({"root": str(root)} if root else {})}
    common = {"seed": seed, "workers": 0, "threads": 1, "device": "cpu", "out": str(out)}
    start = time.process_time()
    base = genkit.train(
        objective="flow", data=data, backbone=dict(part.backbone), steps=part.steps, sample_every=0, tensorboard=False,
        save_every=part.steps, **common,
    )  # fmt: skip
    trained = time.process_time()
    one = genkit.distill(base, guidance=RANGE, steps=part.distillation, save_every=part.distillation, **common)
    distilled = time.process_time()
    values: dict[str, dict[str, dict[str, float]]] = {"1": {"unguided": evaluate(base, 1.0, seed)}}
    for scale in SCALES:
        values[f"{scale:g}"] = dict(zip(ARMS, (evaluate(run, scale, seed) for run in (base, one)), strict=True))
    seconds = {"training": round(trained - start, 1), "distillation": round(distilled - trained, 1)}
    return {"values": values, "missed": {f"{s:g}": missed(base, one, s) for s in SCALES}, "cpu_seconds": seconds}


def missed(base: Run, one: Run, scale: float) -> float:
    """The share of guidance's effect on samples from the same noise that one pass misses, in mean squares."""
    plain = Sampling(sampler=SAMPLER, steps=STEPS)
    guided = replace(plain, guidance=scale)
    none, two, single = (run.sample(COMPARED, how).x for run, how in ((base, plain), (base, guided), (one, guided)))
    return float((single.float() - two.float()).square().mean() / (none.float() - two.float()).square().mean())


def evaluate(run: Run, scale: float, seed: int) -> dict[str, float]:
    """The metrics of a run's samples, the evaluations of the network for one sample, and the CPU seconds of drawing."""
    start = time.process_time()
    card = genkit.evaluate(
        run, metrics=",".join(METRICS), features="classifier", n=SAMPLES, sampler=SAMPLER, steps=STEPS, guidance=scale,
        seed=seed * SAMPLES, device="cpu",
    )  # fmt: skip
    values = {name: card.metrics[name].value for name in METRICS}
    return {**values, "cpu_seconds": round(time.process_time() - start, 1)}


def difference(cells: Sequence[Mapping[str, Any]], scale: str, metric: str) -> tuple[float, float]:
    """One pass minus two passes: mean over the seeds, and half the width of its interval (NaN for one seed)."""
    pairs = [[cell["values"][scale][arm][metric] for arm in ARMS] for cell in cells]
    return student_interval([one - two for two, one in pairs])


def cells_of(results: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The measured seeds of a data set."""
    return [cell for key, cell in results.items() if key.startswith(f"{name}/")]


def print_table(console: Console, name: str, cells: Sequence[Mapping[str, Any]]) -> None:
    """Mean and standard deviation over the seeds, and the difference of the two arms with its interval."""
    for metric, title in METRICS.items():
        table = make_table("scale", *ARMS, "difference", title=f"{name}, {title}")
        plain = [cell["values"]["1"]["unguided"][metric] for cell in cells]
        table.add_row("1", format_mean_sd(plain), "", "")
        for scale in (f"{s:g}" for s in SCALES):
            arms = [format_mean_sd([cell["values"][scale][arm][metric] for cell in cells]) for arm in ARMS]
            mean, half = difference(cells, scale, metric)
            table.add_row(scale, *arms, f"{mean:+.3f}±{half:.3f}")
        console.print(table)


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    parser = ScriptParser(__doc__, "genkit bench guidance")
    parser.add_argument("--seeds", type=int, default=3, help="models of each data set")
    parser.add_argument("--only", choices=PARTS, help="one of the two")
    parser.add_argument("--root", type=Path, help="folder of Fashion-MNIST's files; else as in genkit train")
    parser.add_argument("--steps", type=int, help="training steps; else those of the data set")
    parser.add_argument("--distillation", type=int, help="steps of the distillation; else those of the data set")
    parser.add_argument("--out", type=Path, help="JSON; a seed that it has is not measured again")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in ("steps", "distillation") if getattr(args, name) is not None}
    check_ranges(args, seeds=MAX_SEEDS, **dict.fromkeys(given, MAX_STEPS))
    torch.set_num_threads(1)
    budget = {name: [part.steps, part.distillation] for name, part in PARTS.items()}
    settings = {"scales": SCALES, "range": RANGE, "sampler": SAMPLER, "sampler_steps": STEPS, "samples": SAMPLES}
    results = ResultsFile(args.out, {**settings, "steps": budget, **given}, ["guidance", *argv])
    console = make_console()
    for name, part in PARTS.items():
        if args.only not in (None, name):
            continue
        chosen = Part(part.data, part.backbone, args.steps or part.steps, args.distillation or part.distillation)
        for seed in range(args.seeds):
            if f"{name}/{seed}" in results:
                continue
            with tempfile.TemporaryDirectory() as out:
                root = args.root if name != "digits" else None
                results.add(f"{name}/{seed}", measure(chosen, seed, root, Path(out)))
    for name in PARTS:
        if cells := cells_of(results.cells, name):
            print_table(console, name, cells)
    if args.out:
        console.print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
