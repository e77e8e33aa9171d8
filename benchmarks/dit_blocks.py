"""Do the blocks of newer transformers help a small DiT? The held-out loss at equal CPU seconds, on the digits.

    genkit bench dit-blocks [--seeds 3] [--seconds 20] [--only NAME ...] [--out FILE.json]

Every variant is the same DiT with one option switched on, or with several together, and is trained as rectified flow
with a cosine schedule for as many steps as take ``--seconds`` of CPU time (one thread; the time of a step is measured
first). The loss is that of the slowest average on held-out digits, the same ones with the same noise for all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.results import MAX_SEEDS, ResultsFile, check_ranges, format_mean_sd, make_console, make_table
from genkit.cli.scripts import ScriptParser
from genkit.training.directory import read_log
from genkit.training.train import train

BASE = {"name": "dit", "width": 64, "depth": 4, "head_size": 32}
MODERN = {"norm": "rms", "qk_norm": True, "mlp": "swiglu", "rope": True}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "qk-norm": {"qk_norm": True},
    "rms-norm": {"norm": "rms"},
    "swiglu": {"mlp": "swiglu"},
    "rope": {"rope": True},
    "registers": {"registers": 4},
    "class-tokens": {"class_tokens": 4, "class_tokens_start": 1},
    "modern": MODERN,
}
PILOT = 10, 50  # steps between which the time of a step is measured
HELD_OUT = 300


def train_for(variant: str, seed: int, steps: int, out: Path, **options: Any) -> Path:
    """Train a variant; returns the run's directory."""
    run = train(
        objective="flow", data="digits", backbone={**BASE, **VARIANTS[variant]}, steps=steps, batch=64, seed=seed,
        workers=0, threads=1, precision="fp32", device="cpu", sample_every=0, save_every=10**9, log_every=1000,
        tensorboard=False, out=str(out), **options,
    )  # fmt: skip
    return run.directory


def step_seconds(variant: str, out: Path) -> float:
    """CPU seconds of a step."""
    ends: dict[int, float] = {}

    def report(task: str, done: int, total: int | None) -> None:
        ends[done] = time.process_time()

    first, last = PILOT
    train_for(variant, 0, last, out, progress=report)
    return (ends[last - 1] - ends[first]) / (last - 1 - first)


def measure(variant: str, seeds: int, seconds: float) -> dict[str, Any]:
    """The held-out losses of all seeds, and what they cost."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        steps = max(1, round(seconds / step_seconds(variant, out)))
        losses, spent = [], []
        for seed in range(seeds):
            began = time.process_time()
            run = train_for(variant, seed, steps, out, val_every=steps, val_n=HELD_OUT)
            spent.append(round(time.process_time() - began, 2))
            losses.append(next(r["val/loss"] for r in read_log(run) if "val/loss" in r))
    return {"loss": losses, "steps": steps, "cpu_seconds": spent}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = ScriptParser(__doc__, "genkit bench dit-blocks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds of a training")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=[], metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--out", type=Path, help="results, to which a second call adds")
    args = parser.parse_args(argv)
    check_ranges(args, seeds=MAX_SEEDS, seconds=10**5)
    return args


def print_table(console: Console, results: ResultsFile) -> None:
    """One row for each variant."""
    table = make_table("variant", "held-out loss", "against default", "steps")
    base = np.array(results.cells.get("default", {}).get("loss", []))
    for variant in VARIANTS:
        if variant in results:
            cell = results.cells[variant]
            losses = np.array(cell["loss"])
            change = f"{np.mean(losses - base):+.4f}" if len(base) == len(losses) else ""
            table.add_row(variant, format_mean_sd(list(losses)), change, str(cell["steps"]))
    console.print(table)


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    args = parse_arguments(argv)
    console = make_console()
    results = ResultsFile(args.out, {"seeds": args.seeds, "seconds": args.seconds}, ["dit-blocks", *argv])
    for variant in args.only or VARIANTS:
        if variant not in results:
            results.add(variant, measure(variant, args.seeds, args.seconds))
    print_table(console, results)
    if args.out:
        console.print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
