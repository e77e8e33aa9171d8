"""`genkit export RUN DIR`: write a run for use elsewhere, as a diffusers pipeline or as a standalone run."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import narrow, parse
from genkit.config.paths import PathText
from genkit.integrations.export import ExportSettings, export


@dataclass(frozen=True)
class Export(ExportSettings):
    """Write a run for use elsewhere."""

    run: Positional[PathText]
    """The run's folder, such as runs/latest."""
    out: Positional[PathText]
    """The new folder."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Export, argv, prog="genkit export", description="Write a run for use elsewhere.")
    exported = export(command.run, command.out, narrow(command, ExportSettings))
    run = exported.run
    console.print(f"{exported.path}  from {run.directory.name}/{run.weights}", markup=False)
    for line in exported.instructions:
        console.print(f"  {line}", markup=False)
    return 0
