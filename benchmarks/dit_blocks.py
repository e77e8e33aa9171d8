"""Do the blocks of newer transformers help a small DiT? The held-out loss at equal CPU seconds, on the digits.

    genkit bench dit-blocks [--seeds 3] [--seconds 20] [--only NAME ...] [--out FILE.json]

Every variant is the same DiT with one option switched on, or with several together, and is trained as rectified flow
with a cosine schedule for as many steps as take ``--seconds`` of CPU time (one thread; the time of a step is measured
first). The loss is that of the slowest average on held-out digits, the same ones with the same noise for all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.results import MAX_SEEDS, ResultsFile, check_ranges, format_mean_sd, make_console, make_table
from benchmarks.timed_training import QUIET, measure_held_out, step_seconds
from genkit.cli.scripts import ScriptParser

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
HELD_OUT = 300


def settings_of(variant: str) -> dict[str, Any]:
    """The settings of a variant's training, but for its steps and its seed."""
    return {
        "objective": "flow", "data": "digits", "backbone": {**BASE, **VARIANTS[variant]}, "batch": 64, "threads": 1,
        "precision": "fp32", "device": "cpu", **QUIET,
    }  # fmt: skip


def measure(variant: str, seeds: int, seconds: float) -> dict[str, Any]:
    """The held-out losses of all seeds, and what they cost."""
    options = settings_of(variant)
    steps = max(1, round(seconds / step_seconds(options)))
    found = [measure_held_out({**options, "steps": steps, "seed": s, "val_n": HELD_OUT}) for s in range(seeds)]
    return {"loss": [f.loss for f in found], "steps": steps, "cpu_seconds": [f.cpu_seconds for f in found]}


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
