"""`genkit rollout RUN`: a trained policy in its environment, with success, return and time per action chunk."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields

from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import parse
from genkit.config.paths import PathText
from genkit.rl.policies.rollout import RolloutSettings, rollout


@dataclass(frozen=True)
class Rollout(RolloutSettings):
    """Let a policy act in its environment, and measure success and return."""

    run: Positional[PathText]
    """The run's folder, such as runs/latest."""
    picture: bool = True
    """Draw the paths taken, if the environment can, and the actions that the policy would take in the first episode."""
    out: PathText | None = None
    """Folder for the results; None: rollouts in the run's folder."""
    json: bool = False
    """Print JSON only."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Rollout, argv, prog="genkit rollout", description="Let a policy act in its environment.")
    settings = RolloutSettings(**{f.name: getattr(command, f.name) for f in fields(RolloutSettings)})
    if command.json:
        logging.getLogger("genkit").setLevel(logging.WARNING)
    rollouts = rollout(command.run, settings, out=command.out)
    files = rollouts.save(draw=command.picture)
    if command.json:
        print(json.dumps(rollouts.summary()))
        return 0
    for text in (rollouts, *files):
        console.print(str(text), markup=False)
    return 0
