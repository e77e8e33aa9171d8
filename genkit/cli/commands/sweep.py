"""`genkit sweep RUN`: which averages, guidance, samplers and steps draw well and fast."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import parse
from genkit.config.paths import PathText
from genkit.evaluation import SweepResult, SweepSettings, sweep
from genkit.training.distributed import is_main_process, missing_ranks, start_ranks


@dataclass(frozen=True)
class Sweep(SweepSettings):
    """Find the averages, guidance, samplers and steps that draw well and fast: screen with few samples, confirm with
    many."""

    run: Positional[PathText]
    """The run's directory, such as runs/latest."""
    json: bool = False
    """Print only JSON."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    if (num := missing_ranks()) > 1:
        start_ranks(num, "sweep", argv)
    command = parse(Sweep, argv, prog="genkit sweep", description=Sweep.__doc__)
    result = sweep(command.run, command)
    if not is_main_process():
        return 0
    picture = result.save_plot()
    if command.json:
        print(json.dumps({**result.to_dict(), "picture": str(picture)}))
    else:
        print_result(result, command.n, picture)
    return 0


def print_result(result: SweepResult, screened_n: int, picture: Path) -> None:
    """Print the table of the measured points, by passes."""
    for failure in result.failures:
        console.print(f"left out: {failure}", markup=False)
    front = result.front
    table = Table("NFE", "passes", result.title, "sampler", "steps", "guidance", "interval", "ema", "Pareto")
    for point in sorted(result.points, key=lambda p: (p.passes, p.cost)):
        s = point.settings
        interval = "–" if s["guidance_interval"] is None else "{:g}–{:g}".format(*s["guidance_interval"])
        table.add_row(
            f"{point.card.nfe:g}",
            f"{point.passes:g}",
            str(point.card.metrics[result.metric]),
            str(s["sampler"]),
            str(s["steps"]),
            f"{s['guidance']:g}",
            interval,
            s["ema"],
            "*" if point in front else "",
        )
    console.print(table)
    console.print(
        f"{len(result.screened)} combinations screened with {screened_n} samples each, {len(result.points)} measured "
        f"with {result.n}; *: no other is both faster and better",
        markup=False,
    )
    console.print(picture, markup=False)
