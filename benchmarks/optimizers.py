"""Optimizers at equal CPU seconds: the loss of held-out samples, on data and networks of four kinds.

    genkit bench optimizers [--tasks moons digits] [--optimizers adamw muon muon:wsd] [--seconds 20] [--seeds 3]
                            [--rates 0.33 1 3] [--out FILE.json]

Each contender is an optimizer with a schedule, ``NAME`` or ``NAME:SCHEDULE``; ``wsd`` decays over the last 30 % of the
steps. All train a rectified flow of the same network and batch in one thread. Seconds are turned into steps by the CPU
time of a step, the median of rounds in which the contenders take turns, so they are the same for all rates and seeds.

The learning rate is chosen for each contender and task: of ``--rates`` times its default, the one with the lowest loss
by a seed of its own (``--choice-seed``). The trainings of the other seeds, which are reported, have this rate. The loss
is the objective's, of the average of the weights, over the samples that are held out, with the same times and noise for
all contenders of a seed. Lower is better; a difference in it says nothing about samples by itself (``genkit bench
race`` measures these). A training that ``--out`` has is not run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import MAX_SEEDS, ResultsFile, check_ranges, format_mean_sd, make_console, make_table
from benchmarks.timed_training import QUIET, measure_held_out, step_seconds
from genkit.cli.scripts import ScriptParser
from genkit.training.optimizers import OPTIMIZERS
from genkit.training.schedules import SCHEDULES

TASKS: Mapping[str, Mapping[str, Any]] = {
    "moons": {"data": "moons", "backbone": {"name": "mlp", "width": 128}, "batch": 256},
    "four-ways": {"data": "four-ways", "backbone": {"name": "mlp", "width": 128}, "batch": 256,
                  "objective": {"name": "flow", "prediction": "x0", "loss_space": "x0", "cond_dropout": 0.0}},
    "digits": {"data": "digits", "backbone": {"name": "unet", "width": 16}, "batch": 64},
    "digits-dit": {"data": "digits", "backbone": {"name": "dit", "width": 96, "depth": 4, "patch": 1}, "batch": 64},
}  # fmt: skip
DECAYS: Mapping[str, Mapping[str, Any]] = {"wsd": {"name": "wsd", "decay": 0.3}}  # what a schedule's name stands for
DEFAULT = ("adamw", "adamw:wsd", "muon", "muon:wsd", "soap", "lion", "nadam", "schedule-free", "prodigy")
ROUNDS, PILOT = 3, (4, 16)  # turns of a pilot, and the steps between which it takes the time


class Contender(NamedTuple):
    """An optimizer, and a schedule; without one, the optimizer's own default."""

    optimizer: str
    schedule: str | None

    @classmethod
    def parse(cls, text: str) -> Contender:
        """``NAME`` or ``NAME:SCHEDULE``; ``ValueError`` for names that do not exist."""
        name, _, schedule = text.partition(":")
        if name not in OPTIMIZERS:
            raise ValueError(f"optimizers: given {name}; allowed: {', '.join(OPTIMIZERS)}")
        if schedule and schedule not in SCHEDULES:
            raise ValueError(f"optimizers: given {text}; schedules: {', '.join(SCHEDULES)}")
        return cls(name, schedule or None)

    def options(self, task: str, rate: float) -> dict[str, Any]:
        """The settings of a training with ``rate`` times the default learning rate."""
        lr = OPTIMIZERS[self.optimizer].default_settings.get("lr", 1e-3)
        schedule = {"schedule": DECAYS.get(self.schedule, self.schedule)} if self.schedule else {}
        common = {"objective": "flow", "device": "cpu", "threads": 1, **QUIET}
        return {**common, **TASKS[task], **schedule, "optimizer": self.optimizer, "lr": lr * rate}


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    parser = ScriptParser(__doc__, "genkit bench optimizers")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="data and network")
    parser.add_argument("--optimizers", nargs="+", default=list(DEFAULT), help="NAME or NAME:SCHEDULE")
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds of each training")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.33, 1.0, 3.0], help="times the default rate")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each contender")
    parser.add_argument("--choice-seed", type=int, default=1000, help="the seed by which rates are chosen")
    parser.add_argument("--out", type=Path, help="JSON; a training that it has is not run again")
    args = parser.parse_args(argv)
    check_ranges(args, seeds=MAX_SEEDS)
    if not 0 < args.seconds < math.inf or not all(0 < rate < math.inf for rate in args.rates):
        raise ValueError(f"seconds, rates: given {args.seconds}, {args.rates}; allowed above 0")
    if args.choice_seed in range(args.seeds):
        raise ValueError(f"choice-seed: given {args.choice_seed}, which is reported; allowed from {args.seeds} on")
    contenders = {text: Contender.parse(text) for text in args.optimizers}
    settings = {"seconds": args.seconds, "choice_seed": args.choice_seed, "tasks": {t: dict(TASKS[t]) for t in TASKS}}
    results, console = ResultsFile(args.out, settings, ["optimizers", *argv]), make_console()
    for task in args.tasks:
        measure_task(task, contenders, args, results)
        console.print(make_rows(task, results.cells, args))
    if args.out:
        console.print(str(args.out), markup=False)
    return 0


def measure_task(
    task: str, contenders: Mapping[str, Contender], args: argparse.Namespace, results: ResultsFile
) -> None:
    """Train every contender on a task: once with each rate, then each seed with the best one."""
    missing = [text for text in contenders if f"{task}/{text}/cost" not in results]
    rounds: dict[str, list[float]] = {text: [] for text in missing}
    for _ in range(ROUNDS):
        for text in missing:
            rounds[text].append(step_seconds(contenders[text].options(task, 1.0), PILOT))
    for text in missing:
        cost = statistics.median(rounds[text])
        results.add(f"{task}/{text}/cost", {"step": cost, "steps": max(1, round(args.seconds / cost))})
    for text, contender in contenders.items():
        train = partial(train_once, results, task, text, contender)
        for rate in args.rates:
            train(rate, args.choice_seed)
        best = best_rate(results.cells, task, text, args.choice_seed)
        for seed in range(args.seeds):
            train(best, seed)


def train_once(results: ResultsFile, task: str, text: str, contender: Contender, rate: float, seed: int) -> None:
    """Train a contender and keep its loss, unless the results have it."""
    if (cell := f"{task}/{text}/{rate:g}/{seed}") not in results:
        steps = results.cells[f"{task}/{text}/cost"]["steps"]
        results.add(cell, measure_held_out({**contender.options(task, rate), "steps": steps, "seed": seed})._asdict())


def losses_of(cells: Mapping[str, Mapping[str, Any]], task: str, text: str) -> dict[tuple[float, int], float]:
    """The losses of a contender on a task, by rate and seed."""
    names = [key.split("/") for key in cells if key.startswith(f"{task}/{text}/")]
    return {(float(n[2]), int(n[3])): cells["/".join(n)]["loss"] for n in names if len(n) == 4}


def best_rate(cells: Mapping[str, Mapping[str, Any]], task: str, text: str, choice_seed: int) -> float:
    """The rate, times the default, with the lowest loss by the seed of the choice."""
    tried = {rate: loss for (rate, seed), loss in losses_of(cells, task, text).items() if seed == choice_seed}
    return min(tried, key=lambda rate: tried[rate])


def reported(cells: Mapping[str, Mapping[str, Any]], task: str, text: str, choice_seed: int) -> list[float]:
    """The losses of the other seeds with that rate, seed by seed."""
    best = best_rate(cells, task, text, choice_seed)
    found = {s: loss for (rate, s), loss in losses_of(cells, task, text).items() if rate == best and s != choice_seed}
    return [found[seed] for seed in sorted(found)]


def make_rows(task: str, cells: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> Any:
    """The table of a task: steps, the chosen rate, the loss, and its difference to the first contender's, seed by seed
    (other seeds have other times and noise)."""
    head = ("", "steps", "rate", "held-out loss", "against the first")
    table = make_table(*head, title=f"{task}, {args.seconds:g} CPU s")
    first = reported(cells, task, args.optimizers[0], args.choice_seed)
    for text in args.optimizers:
        losses = reported(cells, task, text, args.choice_seed)
        lr = Contender.parse(text).options(task, best_rate(cells, task, text, args.choice_seed))["lr"]
        difference = format_mean_sd([b - a for a, b in zip(first, losses, strict=False)])
        steps = str(cells[f"{task}/{text}/cost"]["steps"])
        table.add_row(text, steps, f"{lr:g}", format_mean_sd(losses), "" if text == args.optimizers[0] else difference)
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
