"""`genkit sweep RUN`: which averages, guidance, samplers and steps draw well and fast."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import parse
from genkit.config.paths import PathText
from genkit.evaluation import SweepResult, SweepSettings, sweep
from genkit.evaluation.sweeps import SweepPoint
from genkit.training.distributed import is_main_process

TABLE_WIDTH = 160  # characters that a table may take rather than cut off a number or a column
SETTINGS = ("sampler", "steps", "guidance", "interval", "ema")  # columns that are left out if all points have the same


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
    command = parse(Sweep, argv, prog="genkit sweep", description=Sweep.__doc__)
    result = sweep(command.run, command)
    if not is_main_process():
        return 0
    picture = result.save_plot()
    if command.json:
        print(json.dumps({**result.to_dict(), "picture": str(picture)}))
    else:
        print_result(result, result.screened[0].card.settings["n"], picture)
    return 0


def describe_point(point: SweepPoint, metric: str) -> dict[str, str]:
    """The cells of a point in the table, by the names of their columns."""
    s = point.settings
    interval = "–" if s["guidance_interval"] is None else "{:g}–{:g}".format(*s["guidance_interval"])
    settings = (str(s["sampler"]), str(s["steps"]), f"{s['guidance']:g}", interval, str(s["ema"]))
    cost = {"NFE": f"{point.card.nfe:g}", "passes": f"{point.passes:g}", "value": str(point.card.metrics[metric])}
    return cost | dict(zip(SETTINGS, settings, strict=True))


def print_result(result: SweepResult, screened_n: int, picture: Path) -> None:
    """Print the table of the measured points, by passes; settings that all of them share are below it."""
    for failure in result.failures:
        console.print(f"left out: {failure}", markup=False)
    front, points = result.front, sorted(result.points, key=lambda p: (p.passes, p.cost))
    rows = [describe_point(point, result.metric) for point in points]
    swept = [name for name in rows[0] if name not in SETTINGS or len({row[name] for row in rows}) > 1]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in swept:
        table.add_column(result.title if name == "value" else name, no_wrap=True)
    table.add_column("Pareto")
    for point, row in zip(points, rows, strict=True):
        table.add_row(*(row[name] for name in swept), "*" if point in front else "")
    console.print(table, width=max(console.width, TABLE_WIDTH), crop=False)
    if common := ", ".join(f"{name} {rows[0][name]}" for name in SETTINGS if name not in swept):
        console.print(f"all with {common}", markup=False)
    console.print(
        f"{len(result.screened)} combinations screened with {screened_n} samples each, {len(result.points)} measured "
        f"with {result.n}; *: no other is both faster and better",
        markup=False,
    )
    console.print(picture, markup=False)
