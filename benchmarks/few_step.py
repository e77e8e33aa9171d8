"""One to eight steps: flow maps by every rule, drifting, a GAN, students of a flow, and a flow, at equal CPU time.

    genkit bench few-step [--seeds 3] [--seconds 60] [--only plane] [--ways shortcut drift]
                          [--out FILE.json] [--picture FILE.png]

Every row has the same network, data, optimizer and CPU seconds of training: each first times some steps, then trains as
many as the budget allows. "plane": eight Gaussians of standard deviation 0.1 on a circle of radius 2; the
2-Wasserstein distance of 1,000 samples to 1,000 new points; MLPs with three hidden layers of 128 that see the times
themselves; all seeds share the budget, because they are trained at once. "digits": scikit-learn's, class-conditional;
the Fréchet distance to held-out digits in the class scores of an SVM, as in `genkit bench reflow`, and the share of
samples that the SVM takes for their class; an ``MLP`` backbone, 192 wide; the budget is that of each seed. "fashion":
Fashion-MNIST in ``--root``, 28x28, class-conditional; the Fréchet distance to held-out pictures in the features of
genkit's own classifier, and its accuracy; an ``MLP`` backbone, 256 wide, which predicts the picture (the noise of 784
pixels does not pass through it). "guided" and "guided-fashion": both at guidance 2, whose scale is an input (one pass)
or by classifier-free guidance (two). The row "real" is the distance of real data; "resampled" of as many training
digits as samples, drawn with replacement.

"reflow" is half a budget of a flow and half of its reflow, "distilled" a third each and one of distillation; drawing
10,000 pairs of each is part of it. "progressive" is half a budget of a flow and half of its progressive distillation,
in rounds of equal shares from twice the most steps down to one; "dmd" half of a flow and half of distribution matching,
with a discriminator in "dmd-gan".
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks import few_step_data as experiments
from benchmarks.ensemble import train
from benchmarks.few_step_data import DrawBatch, Setting
from benchmarks.few_step_picture import save_picture
from benchmarks.results import MAX_SEEDS, ResultsFile, check_ranges, format_mean_sd, make_console, make_table
from genkit.cli.scripts import ScriptParser
from genkit.core import Batch, Generator, Guidance, Objective
from genkit.diffusion.guidance import classifier_free, scale_input
from genkit.diffusion.samplers import bind
from genkit.objectives import DMD, Distillation, Drift, Flow, FlowMap, ProgressiveDistillation
from genkit.objectives.distillation.student import Student
from genkit.objectives.flow_map.rules import RULES, Alpha, Consistency, Rule
from genkit.objectives.matching.couplings import GivenPairs
from genkit.training.loop import Diverged

STEPS = (1, 2, 4, 8)
MAX_SAMPLES = 10**6
TIMED = 40
GAN_WEIGHT = 0.01  # of a discriminator beside distribution matching
SCALE, LARGEST = 2.0, 4.0


def scheduled_rule(name: str, steps: int) -> Rule:
    """A rule with its curriculum, if it has one, spread over ``steps``."""
    curricula = {
        "alpha": lambda: Alpha(start=steps // 10, end=max(steps // 10 + 1, 7 * steps // 10)),
        "consistency": lambda: Consistency(stage_steps=max(1, steps // 10)),
    }
    return curricula[name]() if name in curricula else RULES[name]()


@dataclass(frozen=True)
class Way:
    """A row that is one training: its objective, and how it is sampled."""

    make: Callable[[Setting, int, float | None], Objective]
    """the objective for a number of training steps and a rate of the time label"""
    sampler: str | None = None
    """None: the objective's own"""
    guidance: Guidance | None = None


def plain_flow(setting: Setting, **options: Any) -> Flow:
    """Rectified flow, without guidance."""
    return Flow(prediction=setting.prediction, cond_dropout=0.0, **options)


def guided_flow_map(setting: Setting, guidance: float) -> FlowMap:
    """A flow map by shortcuts; its classes can be guided by a scale up to ``guidance`` as an input, or (1) in two
    passes.
    """
    return FlowMap(prediction=setting.prediction, guidance=guidance, data_radius=setting.radius)


def flow_map(rule: str) -> Way:
    """The row of a rule. Consistency models cannot predict the data (they have no boundary condition then): v, which is
    the data at t = 1.
    """
    boundary = RULES[rule].jumps_to_data
    return Way(
        lambda setting, steps, rate: FlowMap(
            rule=scheduled_rule(rule, steps),
            prediction="v" if boundary and setting.prediction == "x0" else setting.prediction,
            time_rate=rate,
            cond_dropout=0.0,
            data_radius=setting.radius,
        )
    )


TRAININGS: Mapping[str, Way] = {
    "flow": Way(lambda setting, steps, rate: plain_flow(setting), sampler="ddim"),
    **{rule: flow_map(rule) for rule in RULES},
    "drift": Way(lambda setting, steps, rate: Drift()),
    "gan": Way(lambda setting, steps, rate: setting.gan),
    "one-pass": Way(
        lambda setting, steps, rate: guided_flow_map(setting, LARGEST),
        guidance=scale_input(SCALE, 1.0, LARGEST),
    ),
    "two-passes": Way(lambda setting, steps, rate: guided_flow_map(setting, 1.0), guidance=classifier_free(SCALE)),
}
GUIDED = ("one-pass", "two-passes")


@dataclass
class Trainer:
    """Training by CPU seconds: the cost of a step is measured first."""

    setting: Setting
    seconds: float
    seed: int
    rate: float | None
    used: float = 0.0
    steps: int = 0

    def fit(
        self, make: Callable[[int], Objective], nets: Mapping[str, nn.Module], draw: DrawBatch, trainings: int = 1
    ) -> Objective:
        """Train ``nets``, for all that is left of the budget or, of several ``trainings`` to come, an equal share.

        The result is the objective, made for its number of steps.
        """
        rows = self.setting.interacting if make(TIMED).rows_interact else self.setting.batch
        options = {"batch": rows, "lr": self.setting.lr, "seed": self.seed}
        trial = self.setting.make_nets(self.seed, make(TIMED))
        train(make(TIMED), trial, draw, steps=3, **options)  # what only the first steps cost
        start = time.process_time()
        train(make(TIMED), trial, draw, steps=TIMED, **options)
        share = (self.seconds - self.used) / trainings
        steps = max(TIMED, int(TIMED * share / (time.process_time() - start)))
        objective, start = make(steps), time.process_time()
        train(objective, nets, draw, steps=steps, **options)
        self.used, self.steps = self.used + time.process_time() - start, self.steps + steps
        return objective


def generators(trainer: Trainer, way: str, counts: Sequence[int]) -> dict[int, Generator]:
    """Train a row; its generators by number of steps."""
    if way in LADDERS:
        return LADDERS[way](trainer, counts)
    setting, row = trainer.setting, TRAININGS[way]
    make = lambda steps: row.make(setting, steps, trainer.rate)  # noqa: E731
    torch.manual_seed(trainer.seed)
    nets = setting.make_nets(trainer.seed, make(TIMED))
    draw = setting.draw_members if make(TIMED).rows_interact else setting.draw
    objective = trainer.fit(make, nets, draw)
    if objective.sampler is None:
        return {1: objective.generator(nets)}
    sampler = row.sampler or objective.sampler
    return {k: objective.generator(nets, bind(sampler, k, row.guidance)) for k in counts}


# ----------------------------------------------------------------------------------------- rows of several trainings
def train_flow(trainer: Trainer, trainings: int) -> tuple[Flow, Mapping[str, nn.Module]]:
    """A flow, the first of ``trainings`` of equal shares, and its network."""
    torch.manual_seed(trainer.seed)
    flow = plain_flow(trainer.setting)
    nets = trainer.setting.make_nets(trainer.seed, flow)
    trainer.fit(lambda steps: flow, nets, trainer.setting.draw, trainings)
    return flow, nets


def train_reflow(trainer: Trainer, trainings: int) -> tuple[Flow, Mapping[str, nn.Module]]:
    """A flow and its reflow (Liu et al. 2023), the first two of ``trainings``. The budget is for drawing pairs too."""
    flow, nets = train_flow(trainer, trainings)
    reflow = plain_flow(trainer.setting, coupling=GivenPairs())
    trainer.fit(lambda steps: reflow, nets, draw_pairs(trainer, flow, nets), trainings - 1)
    return reflow, nets


def reflow_generators(trainer: Trainer, counts: Sequence[int]) -> dict[int, Generator]:
    """Half of the budget for a flow, and half for its reflow."""
    reflow, nets = train_reflow(trainer, 2)
    return {k: reflow.generator(nets, bind("ddim", k)) for k in counts}


def distilled_generators(trainer: Trainer, counts: Sequence[int]) -> dict[int, Generator]:
    """A third of the budget each for a flow, its reflow, and the distillation of that (Liu et al. 2023)."""
    reflow, nets = train_reflow(trainer, 3)
    distillation = Distillation(prediction=trainer.setting.prediction)
    trainer.fit(lambda steps: distillation, nets, draw_pairs(trainer, reflow, nets))
    return {1: distillation.generator(nets)}


def progressive_generators(trainer: Trainer, counts: Sequence[int]) -> dict[int, Generator]:
    """Half of the budget for a flow, and equal shares of the rest for rounds, which halve the steps down to one.

    The first round's teacher takes twice the most steps (Salimans & Ho 2022); each number of ``counts`` is a round.
    """
    flow, teacher = train_flow(trainer, 2)
    found: dict[int, Generator] = {}
    for rounds_left in range(round(math.log2(max(counts))) + 1, 0, -1):
        steps = 2 ** (rounds_left - 1)
        objective = ProgressiveDistillation(of=flow, teacher_steps=2 * steps, steps=steps)
        teacher = start_student(trainer, objective, teacher)
        trainer.fit(lambda _, objective=objective: objective, teacher, trainer.setting.draw, rounds_left)
        found[steps] = objective.generator(teacher)
    return {k: found[k] for k in counts if k in found}


def dmd_generators(trainer: Trainer, counts: Sequence[int], gan_weight: float) -> dict[int, Generator]:
    """Half of the budget for a flow, and half for one step by distribution matching (DMD2; Yin et al. 2024)."""
    flow, teacher = train_flow(trainer, 2)
    objective = DMD(of=flow, gan_weight=gan_weight)
    nets = start_student(trainer, objective, teacher)
    trainer.fit(lambda steps: objective, nets, trainer.setting.draw)
    return {1: objective.generator(nets)}


def start_student(trainer: Trainer, objective: Student, teacher: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """New networks of a student, those that start from the teacher's with its weights."""
    nets = trainer.setting.make_nets(trainer.seed, objective)
    for name, source in {"net": "net", **objective.starts_from}.items():
        if name in nets and source is not None:
            nets[name].load_state_dict(teacher[source].state_dict())
    return nets


LADDERS: Mapping[str, Callable[[Trainer, Sequence[int]], dict[int, Generator]]] = {
    "reflow": reflow_generators,
    "distilled": distilled_generators,
    "progressive": progressive_generators,
    "dmd": partial(dmd_generators, gan_weight=0.0),
    "dmd-gan": partial(dmd_generators, gan_weight=GAN_WEIGHT),
}
UNGUIDED = tuple(name for name in (*TRAININGS, *LADDERS) if name not in GUIDED)


def draw_pairs(trainer: Trainer, flow: Flow, nets: Mapping[str, nn.Module]) -> DrawBatch:
    """Rows of pairs that a flow makes by Heun's method. In the plane each member of an ensemble has its own."""
    start, (z, cond) = time.process_time(), trainer.setting.test(-1, None)
    with torch.no_grad():
        x = flow.generator(nets, bind("heun", 25))(z, cond)
    trainer.used += time.process_time() - start
    pairs = experiments.NUM_PAIRS
    members = len(z) // pairs
    first = torch.arange(members)[:, None] * pairs

    def draw(count: int) -> Batch:
        i = (first + torch.randint(pairs, (members, count // members))).flatten()
        return Batch(x[i], {k: v[i] for k, v in cond.items()}, x1=z[i])

    return draw


def measure(settings: Sequence[Setting], way: str, seconds: float, part: Part) -> dict[str, object]:
    """One row: values by number of steps, CPU seconds and training steps of each training that does not diverge.

    ``diverged`` are the seeds of those that do, if any.
    """
    values: dict[str, dict[str, list[float]]] = {}
    used, steps, diverged = [], [], []
    for setting in settings:
        for seed in setting.seeds:
            trainer = Trainer(setting, seconds / len(settings), seed, part.rate)
            shape = setting.gan.latent if way == "gan" else None
            z, cond = setting.test(seed, shape)
            try:
                drawn = generators(trainer, way, part.counts)
            except Diverged:
                diverged.append(seed)
                continue
            for k, generate in drawn.items():
                with torch.no_grad():
                    x = generate(z, cond, setting.noise(seed))
                for name, numbers in setting.score(x).items():
                    values.setdefault(name, {}).setdefault(str(k), []).extend(numbers)
            used.append(round(trainer.used, 1))
            steps.append(trainer.steps)
    row: dict[str, object] = {"values": values, "cpu_seconds": used, "steps": steps}
    return {**row, "diverged": diverged} if diverged else row


# --------------------------------------------------------------------------------------------------------- the command
@dataclass(frozen=True)
class Part:
    """One of the experiments."""

    make: Callable[[Path, int, int, int | None], Setting]
    """the setting for a root of data sets, a number of seeds, the first test seed and a number of samples"""
    real: Callable[[int, Path], Mapping[str, list[float]]]
    title: str
    rate: float | None = None
    """factor of the networks' time label: theirs is the time itself in the plane"""
    ways: tuple[str, ...] = UNGUIDED
    counts: tuple[int, ...] = STEPS
    at_once: bool = False
    """whether all seeds are trained at once"""
    resampled: Callable[[int | None], Mapping[str, list[float]]] | None = None
    """values of a number of training rows drawn with replacement, where few samples make the distance larger"""

    def settings(self, root: Path, seeds: int, way: str, samples: int | None = None) -> Sequence[Setting]:
        """The settings of a row. The two networks of a GAN are trained for one seed after the other."""
        if self.at_once and way == "gan":
            return [replace(self.make(root, 1, i, samples), seeds=[i]) for i in range(seeds)]
        return [self.make(root, seeds, 0, samples)]


PARTS = {
    "plane": Part(
        lambda root, seeds, first, samples: experiments.plane(seeds, first),
        experiments.real_plane,
        "eight Gaussians",
        rate=1.0,
        at_once=True,
    ),
    "digits": Part(
        lambda root, seeds, first, samples: experiments.digits(seeds, first, samples),
        experiments.real_digits,
        "digits",
        resampled=experiments.resampled_digits,
    ),
    "fashion": Part(experiments.fashion, experiments.real_fashion, "Fashion-MNIST", counts=(*STEPS, 20)),
    "guided": Part(
        lambda root, seeds, first, samples: experiments.digits(seeds, first, samples),
        experiments.real_digits,
        "digits at guidance 2",
        ways=GUIDED,
    ),
    "guided-fashion": Part(experiments.fashion, experiments.real_fashion, "Fashion-MNIST at guidance 2", ways=GUIDED),
}


def require_budget(results: ResultsFile, part: str, seconds: float) -> None:
    """``ValueError`` if rows of an experiment were measured with another budget."""
    for cell, values in results.cells.items():
        if cell.startswith(f"{part}/") and values.get("budget", seconds) != seconds:
            raise ValueError(
                f"out: given {results.out}, whose {cell} was measured with seconds {values['budget']}, not {seconds}; "
                "give another file or that budget"
            )


def print_tables(console: Console, title: str, rows: Mapping[str, dict]) -> None:
    """Mean and standard deviation over the seeds, for each number of steps: a table for each value."""
    for name in dict.fromkeys(name for row in rows.values() for name in row["values"]):
        found = [row["values"].get(name, {}) for row in rows.values()]
        counts = sorted({int(k) for values in found for k in values})
        table = make_table(
            "", *(f"{k} step{'s' * (k > 1)}" for k in counts), "CPU s", "training", title=f"{title}, {name}"
        )
        for (row, cell), values in zip(rows.items(), found, strict=True):
            cost = (f"{sum(cell[k]) / len(cell[k]):.0f}" if cell.get(k) else "" for k in ("cpu_seconds", "steps"))
            numbers = (values.get(str(k)) for k in counts)
            lost = f" ({len(cell['diverged'])} diverged)" if "diverged" in cell else ""
            table.add_row(row + lost, *(format_mean_sd(v) if v else "" for v in numbers), *cost)
        console.print(table)


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    parser = ScriptParser(__doc__, "genkit bench few-step")
    parser.add_argument("--seeds", type=int, default=3, help="models of each row")
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds of training")
    parser.add_argument("--only", choices=PARTS, help="one of the experiments")
    parser.add_argument("--ways", nargs="+", choices=(*UNGUIDED, *GUIDED), help="rows; all if left out")
    parser.add_argument("--samples", type=int, help="pictures of each model that are measured; 1000 if left out")
    parser.add_argument("--root", type=Path, default=Path("data"), help="the folder of FashionMNIST/raw")
    parser.add_argument("--out", type=Path, help="JSON; a row that it has is not measured again")
    parser.add_argument("--picture", type=Path, help="PNG of the distances against evaluations")
    args = parser.parse_args(argv)
    given = {} if args.samples is None else {"samples": args.samples}
    check_ranges(args, seeds=MAX_SEEDS, **dict.fromkeys(given, MAX_SAMPLES))
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"seconds: given {args.seconds}; allowed above 0")
    torch.set_num_threads(1)
    results = ResultsFile(args.out, {"seeds": args.seeds, **given}, ["few-step", *argv])
    console = make_console()
    for name, part in PARTS.items():
        if args.only not in (None, name):
            continue
        require_budget(results, name, args.seconds)
        if f"{name}/real" not in results:
            results.add(f"{name}/real", {"values": {k: {"1": v} for k, v in part.real(args.seeds, args.root).items()}})
        if part.resampled and f"{name}/resampled" not in results:
            values = {k: {"1": v} for k, v in part.resampled(args.samples).items()}
            results.add(f"{name}/resampled", {"values": values})
        for way in part.ways:
            if f"{name}/{way}" not in results and way in (args.ways or part.ways):
                settings = part.settings(args.root, args.seeds, way, args.samples)
                results.add(f"{name}/{way}", {"budget": args.seconds, **measure(settings, way, args.seconds, part)})
    shown: dict[str, dict] = {}
    for name, part in PARTS.items():
        rows = {k.partition("/")[2]: cell for k, cell in results.cells.items() if k.startswith(f"{name}/")}
        if rows:
            print_tables(console, part.title, rows)
            shown[part.title] = rows
    if args.picture:
        save_picture({title: rows for title, rows in shown.items() if len(rows) > 1}, args.picture)
    for file in filter(None, (args.out, args.picture)):
        console.print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
