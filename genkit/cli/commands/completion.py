"""`genkit completion SHELL`: print a script that completes the commands, their options and the names of choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from genkit.cli.main import COMMANDS
from genkit.config import parse
from genkit.config.blocks import load_object
from genkit.config.command import format_completion


@dataclass(frozen=True)
class Completion:
    """Print a script that completes genkit's commands and options."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """The shell that the script is for."""


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code."""
    command = parse(Completion, argv, prog="genkit completion", description=Completion.__doc__)
    classes = {name: load_object(entry.settings) if entry.settings else None for name, entry in COMMANDS.items()}
    print(format_completion(classes, command.shell, prog="genkit"))
    return 0
