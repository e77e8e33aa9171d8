"""`genkit report RUN`: one page that shows what a run did."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path as File
from typing import Annotated, Literal

import tyro
from rich.console import Console

from genkit import report, runs
from genkit.config import parse

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Report:
    """One HTML page of a run: curves, samples, quality, settings. It needs no network and no other file."""

    run: Annotated[str, tyro.conf.Positional]
    """A run directory, such as runs/latest."""
    out: str | None = None
    """The page, FILE.html; None: report.html in the run's folder."""
    open: Literal["no", "yes"] = "no"
    """Show it in a browser."""


def main(argv: list[str]) -> int:
    asked = parse(Report, argv, prog="genkit report")
    out = File(asked.out) if asked.out else runs.find(asked.run) / "report.html"
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ValueError(f"out: given {asked.out}; allowed: a file that ends in .html")
    report.write(report.run_page(asked.run), out)
    console.print(out, markup=False)
    if asked.open == "yes":
        webbrowser.open(out.resolve().as_uri())
    return 0
