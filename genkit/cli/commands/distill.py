"""`genkit distill RUN`: learn an adapter that guides in one pass a step."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from genkit.cli.commands.train import conclude
from genkit.config import narrow, parse
from genkit.config.paths import PathText
from genkit.training.distillation import DistillSettings, distill
from genkit.training.distributed import is_main_process


@dataclass(frozen=True)
class Distill(DistillSettings):
    """Distil the guidance of a run into an adapter that takes the scale as an input."""

    run: Positional[PathText]
    """Run directory, such as runs/latest."""


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code, 130 if a signal stopped the training."""
    command = parse(Distill, argv, prog="genkit distill", description=Distill.__doc__)
    run = distill(command.run, narrow(command, DistillSettings))
    if is_main_process():
        conclude(run)
    return 130 if run.ending == "signal" else 0
