"""`genkit report RUN ...`: one page that shows what a run did, or several runs side by side."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import parse
from genkit.config.paths import PathText
from genkit.evaluation.report import write_report


@dataclass(frozen=True)
class Report:
    """One HTML page of a run: quality, rollouts, fine-tuning, samples, curves, settings and, of an autoencoder, its
    latent space; or of several runs side by side. The page needs no network and no other file."""

    runs: Positional[tuple[PathText, ...]]
    """Directories of runs, such as runs/latest; directories that hold runs; cards or folders of cards."""
    out: PathText | None = None
    """The page, FILE.html; None: report.html in the run's directory, or a name of the runs in that of the first."""
    open: Literal["no", "yes"] = "no"
    """Show it in a browser."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Report, argv, prog="genkit report")
    path = write_report(*command.runs, out=command.out)
    console.print(path, markup=False)
    if command.open == "yes":
        webbrowser.open(path.resolve().as_uri())
    return 0
