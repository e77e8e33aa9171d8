"""What the pages about scaling say of CPUs, measured in CPU seconds, one thread a process.

    genkit bench scale [--only steps ...] [--out FILE.json]

steps: a training step outside the passes through its networks. folder: the first batch of 200,000 files. decode: JPEGs
a second. memory: two processes that draw latents of 0.1 and 1 GB. ranks: encoding and sampling on one and two ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import make_console, make_table
from benchmarks.scale.files import measure_decoding, measure_folder, measure_memory
from benchmarks.scale.ranks import measure_ranks
from benchmarks.scale.steps import measure_steps
from genkit import __version__
from genkit.cli.scripts import ScriptParser
from genkit.core.files import write_text

PARTS: Mapping[str, Callable[[], list[dict[str, Any]]]] = {
    "steps": measure_steps, "folder": measure_folder, "decode": measure_decoding, "memory": measure_memory,
    "ranks": measure_ranks,
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    parser = ScriptParser(__doc__, "genkit bench scale")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="these parts")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON; parts that are not run stay in it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    stored = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    for part in args.only:
        rows = PARTS[part]()
        stored[part] = rows
        print_rows(part, rows)
        if args.out:
            stored["settings"] = {"genkit": __version__, "torch": torch.__version__}
            write_text(args.out, json.dumps(stored, indent=1) + "\n")
    return 0


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """The rows of a part as a table."""
    table = make_table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    make_console().print(table)
