"""`genkit reflow RUN`: draw the pairs (source, sample) of a model, to train a straighter one on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import narrow, parse
from genkit.config.paths import PathText
from genkit.core import Objective
from genkit.diffusion.paths import Linear
from genkit.objectives import Flow
from genkit.training.reflow import ReflowSettings, reflow


@dataclass(frozen=True)
class Reflow(ReflowSettings):
    """Draw pairs (source, sample) from a run, for training with --objective.coupling=given."""

    run: Positional[PathText]
    """The run's folder, such as runs/latest."""
    out: PathText | None = None
    """The .npz file; None: pairs-step<N>.npz in the run's folder."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Reflow, argv, prog="genkit reflow", description="Make the pairs of a reflow.")
    pairs = reflow(command.run, narrow(command, ReflowSettings), out=command.out)
    run = pairs.run
    console.print(f"{pairs.num_pairs} pairs  {pairs.path}", markup=False)
    directory, path = shlex.quote(str(run.directory)), shlex.quote(str(pairs.path))
    train = f"genkit train --config {directory}/config.yaml --data=pairs --data.root {path}"
    init = f" --init {directory}" if isinstance(run.objective, Flow) else ""
    flow = "--objective.coupling=given" if init else "--objective=flow --objective.coupling=given"
    console.print(f"straighten  {train} {flow}{init}", markup=False)
    fits = init if predicts_velocity(run.objective) else ""
    console.print(f"one step    {train} --objective=distillation{fits}", markup=False)
    return 0


def predicts_velocity(objective: Objective) -> bool:
    """Whether a distilled flow can start from its weights: both predict the velocity on straight paths."""
    return isinstance(objective, Flow) and (objective.path, objective.prediction) == (Linear(), "velocity")
