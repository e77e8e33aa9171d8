"""`genkit likelihood RUN`: the likelihood of held-out samples under a model, in bits per dimension."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import parse
from genkit.config.paths import PathText
from genkit.evaluation import LikelihoodSettings, likelihood


@dataclass(frozen=True)
class Likelihood(LikelihoodSettings):
    """Bits per dimension of held-out samples: an upper bound on their code length."""

    run: Positional[PathText]
    """The run's directory, such as runs/latest."""
    json: bool = False
    """Print only JSON."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Likelihood, argv, prog="genkit likelihood", description=Likelihood.__doc__)
    result = likelihood(command.run, command)
    if command.json:
        print(json.dumps(result.to_dict()))
    else:
        console.print(result.summary(), markup=False)
    return 0
