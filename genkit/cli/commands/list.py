"""`genkit list`: a table of runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from genkit.cli.escape import printable
from genkit.cli.formats import format_age, format_bytes
from genkit.cli.output import SafeConsole
from genkit.config import parse
from genkit.config.paths import PathText
from genkit.evaluation.listing import FIELDS, incomparable, list_runs
from genkit.evaluation.run_records import RunRecord

PIPE_WIDTH = 240  # columns if the output is no terminal


@dataclass(frozen=True)
class List:
    """List the runs in directories: name, state, settings, progress, last loss, best metrics, age, size, tags, note."""

    directories: Positional[tuple[PathText, ...]] = ("runs",)
    """Directories of runs; those below them are listed too."""
    sort: str = "name"
    """Field to sort by: name, objective, backbone, data, state, step, steps, loss, parameters, age, size, a setting
    such as backbone.width, or a metric such as fid, the best first."""
    reverse: bool = False
    """Sort in the other direction."""
    where: tuple[str, ...] = ()
    """List only runs that meet all of these: FIELD=VALUE, !=, <, >, <=, >=, such as objective=flow tag=baseline
    "age<2d" backbone.width=64 "fid<20"."""
    json: bool = False
    """Print only JSON."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(List, argv, prog="genkit list", description=List.__doc__)
    runs = list_runs(*command.directories, where=command.where, sort=command.sort, reverse=command.reverse)
    if command.json:
        print(json.dumps([run.to_dict() for run in runs]))
        return 0
    console = SafeConsole(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    if not runs:
        of = " that meet the conditions" if command.where else ""
        console.print(f"no runs{of} in {', '.join(command.directories)}", markup=False)
        return 0
    console.print(make_table(runs))
    for run in runs:
        if run.problem:
            console.print(f"note: {run.path}: {printable(run.problem)}", markup=False)
    if command.sort not in FIELDS and (reason := incomparable(runs, command.sort)):
        console.print(f"note: the order by {command.sort} says little: {reason}", markup=False)
    return 0


def make_table(runs: Sequence[RunRecord]) -> Table:
    """One row a run; columns that are empty in all rows are left out."""
    rows = [make_row(run) for run in runs]
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        right = head in ("step", "age", "size", "parameters")
        table.add_column(head, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(row[head])) for head in heads))
    return table


def make_row(run: RunRecord) -> dict[str, str]:
    """What the table shows of a run."""
    steps = "/".join("?" if number is None else str(number) for number in (run.step or 0, run.steps))
    short = run.headlines[:1]
    best = [f"{h.title} {h.estimate} n {h.card.settings.get('n')}{format_mark(h)}" for h in short]
    more = f" (+{len(run.headlines) - len(short)})" if len(run.headlines) > len(short) else ""
    notes = run.annotations.notes
    return {
        "name": run.name,
        "state": run.state,
        "objective": run.objective,
        "backbone": run.backbone,
        "data": run.data,
        "step": steps if run.config else "",
        "loss": ", ".join(f"{short_key(k, run)}{v:.4g}" for k, v in run.losses.items()),
        "best metrics": "; ".join(best) + more,
        "age": format_age(run.modified),
        "size": format_bytes(run.size),
        "tags": " ".join(run.annotations.tags),
        "last note": notes[-1].text.splitlines()[0] if notes else "",
    }


def format_mark(headline: object) -> str:
    """``, tied`` if the data do not tell the best card from another."""
    best = getattr(headline, "best", None)
    return ", tied" if best and best.ties else ""


def short_key(key: str, run: RunRecord) -> str:
    """The name of a loss before its value; nothing if there is only one."""
    return "" if len(run.losses) == 1 and key.endswith("/loss") else key.removesuffix("/loss") + " "
