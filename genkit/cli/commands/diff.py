"""`genkit diff RUN RUN`: what differs between runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from genkit.cli.escape import printable
from genkit.cli.output import SafeConsole
from genkit.config import parse
from genkit.config.paths import PathText
from genkit.evaluation.cards import to_text
from genkit.evaluation.differences import MetricRow, RunDifferences, diff_runs

PIPE_WIDTH = 200  # columns if the output is no terminal
TITLES = {
    "short_settings": "configuration",
    "data": "training data",
    "parameters": "parameters",
    "environment": "code and machine",
    "progress": "progress",
}
MAX_TEXT = 60  # characters of a value


@dataclass(frozen=True)
class Diff:
    """Show what differs between runs: configuration, training data, number of parameters, code, progress, and the
    metrics of cards that were measured in the same way."""

    runs: Positional[tuple[PathText, ...]]
    """Directories of two or more runs."""
    json: bool = False
    """Print only JSON."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Diff, argv, prog="genkit diff", description=Diff.__doc__)
    differences = diff_runs(*command.runs)
    if command.json:
        print(json.dumps(differences.to_dict()))
    else:
        print_differences(differences, SafeConsole(width=None if sys.stdout.isatty() else PIPE_WIDTH))
    return 0


def print_differences(differences: RunDifferences, console: SafeConsole) -> None:
    """A table of what differs, one of the metrics, and what cannot be compared."""
    table = new_table("", differences)
    for part, title in TITLES.items():
        entries: Mapping[str, tuple[Any, ...]] = getattr(differences, part)
        if not entries:
            table.add_row(Text(title, "bold"), *(Text("the same") for _ in differences.runs), end_section=True)
            continue
        table.add_row(Text(title, "bold"))
        for i, (name, values) in enumerate(entries.items()):
            cells = [Text(show_value(name, value)) for value in values]
            table.add_row(Text("  " + printable(name)), *cells, end_section=i == len(entries) - 1)
    console.print(table)
    by_measurement: dict[str, list[MetricRow]] = {}
    for row in differences.metrics:
        by_measurement.setdefault(row.measurement, []).append(row)
    for measurement, rows in by_measurement.items():
        table = new_table("metric", differences)
        for row in rows:
            marks = [row.best.mark(i) if row.best and e else "" for i, e in enumerate(row.estimates)]
            cells = [f"{e or '–'} {mark}".strip() for e, mark in zip(row.estimates, marks, strict=True)]
            table.add_row(Text(row.title), *map(Text, cells))
        console.print("\n" + printable(measurement), markup=False)
        console.print(table)
    for line in differences.incomparable:
        console.print(f"note: {printable(line)}", markup=False)


def new_table(corner: str, differences: RunDifferences) -> Table:
    """A table with a column for each run."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in (corner, *(run.name for run in differences.runs)):
        table.add_column(Text(printable(head)), overflow="fold")
    return table


def show_value(name: str, value: Any) -> str:
    """A value in one cell; hashes are cut."""
    if value is None:
        return "–"
    text = f"{value:.6g}" if isinstance(value, float) else printable(to_text(value))
    if name.endswith(("sha256", "git")):
        return text[:12]
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
