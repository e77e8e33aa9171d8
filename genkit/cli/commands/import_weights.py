"""`genkit import KIND FILE OUT`: make a run of weights of another project."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import narrow, parse
from genkit.config.paths import PathText
from genkit.integrations.importing import ImportSettings, import_run


@dataclass(frozen=True)
class Import(ImportSettings):
    """Make a run of weights of another project."""

    kind: Positional[str]
    """Layout of the weights: dit, sit, edm (their authors' state dicts) or torchcfm (its U-Net)."""
    file: Positional[PathText]
    """The weights: .safetensors, or .pt, of which only tensors are read."""
    out: Positional[PathText]
    """The new run directory."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Import, argv, prog="genkit import", description=Import.__doc__)
    imported = import_run(command.kind, command.file, command.out, narrow(command, ImportSettings))
    console.print(str(imported.path), markup=False)
    for note in imported.notes:
        console.print(f"note     {note}", markup=False)
    console.print(f"  genkit sample {imported.path} --n 16", markup=False)
    return 0
