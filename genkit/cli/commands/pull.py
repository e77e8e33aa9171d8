"""`genkit pull OWNER/NAME`: download a run from the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import parse
from genkit.config.paths import PathText
from genkit.evaluation.publishing import pull


@dataclass(frozen=True)
class Pull:
    """Download a run from the Hugging Face Hub: configuration, weights, evaluations and card, and no code."""

    name: Positional[str]
    """OWNER/NAME, or OWNER/NAME@REVISION, of the hub."""
    out: Positional[PathText | None] = None
    """The new directory. None: runs/NAME."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Pull, argv, prog="genkit pull", description=Pull.__doc__)
    run = pull(command.name, command.out)
    console.print(str(run), markup=False)
    console.print(f"  genkit sample {run} --n 16", markup=False)
    return 0
