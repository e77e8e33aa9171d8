"""`genkit push RUN OWNER/NAME`: upload a run to the Hugging Face Hub, with a model card."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import narrow, parse
from genkit.config.paths import PathText
from genkit.evaluation.publishing import PushSettings, push


@dataclass(frozen=True)
class Push(PushSettings):
    """Upload a run to the Hugging Face Hub: one checkpoint, the newest picture of its samples, its evaluations and a
    model card that is written from them."""

    run: Positional[PathText]
    """The run's directory, such as runs/latest."""
    name: Positional[str]
    """OWNER/NAME on the hub; made if it is new."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Push, argv, prog="genkit push", description=Push.__doc__)
    pushed = push(command.run, command.name, narrow(command, PushSettings))
    console.print(f"{pushed.url}  {len(pushed.files)} files", markup=False)
    if pushed.local_paths:
        console.print(
            f"  note: config.yaml names folders of this machine: {' '.join(pushed.local_paths)}", markup=False
        )
    console.print(f"  genkit pull {command.name}", markup=False)
    return 0
