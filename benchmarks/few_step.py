"""One to eight steps: flow maps by every rule, drifting, reflow with distillation, and a plain flow, at equal CPU time.

    genkit bench few-step [--seeds 3] [--seconds 60] [--only plane] [--ways improved drift] [--out FILE.json]

Every row has the same network, data, optimizer and CPU seconds of training: each first times some steps, then trains as
many as the budget allows. "plane": eight Gaussians of standard deviation 0.1 on a circle of radius 2; the
2-Wasserstein distance of 1,000 samples to 1,000 new points; MLPs with three hidden layers of 128 that see the times
themselves; all seeds share the budget, because they are trained at once. "digits": scikit-learn's, class-conditional;
the Fréchet distance to held-out digits in the class scores of an SVM, as in `genkit bench reflow`, and the share of
samples that the SVM takes for their class; an ``MLP`` backbone, 192 wide; the budget is that of each seed. The row
"real" is the distance of real data.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.ensemble import EnsembleMLP, draw_rows, train
from benchmarks.reflow import DigitScores, cycle_labels, load_digits
from benchmarks.results import MAX_SEEDS, ResultsFile, check_ranges, format_mean_sd
from genkit.backbones import MLP
from genkit.cli.scripts import ScriptParser
from genkit.core import NO_COND, Batch, Generator, Noise, Objective
from genkit.data.standard_images import Digits
from genkit.diffusion.flow_map import SPAN
from genkit.diffusion.samplers import bind
from genkit.evaluation.metrics import wasserstein2
from genkit.objectives import Distillation, Drift, Flow, FlowMap
from genkit.objectives.flow_map.rules import RULES, Alpha, Consistency, Rule
from genkit.objectives.matching.couplings import GivenPairs

STEPS = (1, 2, 4, 8)
TIMED, NUM_PAIRS, NUM_TEST, NUM_TRAIN = 20, 20_000, 1000, 50_000
RADIUS, STD = 2.0, 0.1

DrawBatch = Callable[[int], Batch]


@dataclass(frozen=True)
class Setting:
    """What all rows of one experiment share."""

    make_net: Callable[[int, Objective], nn.Module]
    """a new network for a seed and an objective"""
    draw: DrawBatch
    """training rows"""
    draw_members: DrawBatch
    """the same with the member of an ensemble as a class, for an objective whose rows interact within a class"""
    test: Callable[[int], tuple[Tensor, Mapping[str, Tensor]]]
    """noise and conditions to sample from, for a seed"""
    score: Callable[[Tensor], dict[str, list[float]]]
    """values of samples"""
    noise: Callable[[int], Noise]
    """further noise, for a seed"""
    seeds: Sequence[int]
    """seeds that are trained one after the other"""
    batch: int
    lr: float


def scheduled_rule(name: str, steps: int) -> Rule:
    """A rule with its curriculum, if it has one, spread over ``steps``."""
    curricula = {
        "alpha": lambda: Alpha(start=steps // 10, end=max(steps // 10 + 1, 7 * steps // 10)),
        "consistency": lambda: Consistency(stage_steps=max(1, steps // 10)),
    }
    return curricula[name]() if name in curricula else RULES[name]()


def make_objective(way: str, steps: int, rate: float | None) -> Objective:
    """The objective of a row that is one training."""
    if way == "flow":
        return Flow()
    return Drift() if way == "drift" else FlowMap(rule=scheduled_rule(way, steps), time_rate=rate)


WAYS = ("flow", *RULES, "drift", "reflow")


@dataclass
class Trainer:
    """Training by CPU seconds: the cost of a step is measured first."""

    setting: Setting
    seconds: float
    seed: int
    rate: float | None
    used: float = 0.0
    steps: int = 0

    def fit(self, make: Callable[[int], Objective], net: nn.Module, draw: DrawBatch, share: float = 1.0) -> Objective:
        """Train ``net`` for a share of the budget; the objective, made for its number of steps."""
        options = {"batch": self.setting.batch, "lr": self.setting.lr, "seed": self.seed}
        trial = self.setting.make_net(self.seed, make(TIMED))
        train(make(TIMED), trial, draw, steps=3, **options)  # what only the first steps cost
        start = time.process_time()
        train(make(TIMED), trial, draw, steps=TIMED, **options)
        steps = max(TIMED, int(TIMED * share * self.seconds / (time.process_time() - start)))
        objective, start = make(steps), time.process_time()
        train(objective, net, draw, steps=steps, **options)
        self.used, self.steps = self.used + time.process_time() - start, self.steps + steps
        return objective


def generators(trainer: Trainer, way: str) -> dict[int, Generator]:
    """Train a row; its generators by number of steps."""
    setting = trainer.setting
    if way == "reflow":
        return reflow_generators(trainer)
    make = lambda steps: make_objective(way, steps, trainer.rate)  # noqa: E731
    torch.manual_seed(trainer.seed)
    net = setting.make_net(trainer.seed, make(TIMED))
    draw = setting.draw_members if make(TIMED).rows_interact else setting.draw
    objective = trainer.fit(make, net, draw)
    if objective.sampler is None:
        return {1: objective.generator({"net": net})}
    sampler = "ddim" if way == "flow" else objective.sampler
    return {k: objective.generator({"net": net}, bind(sampler, k)) for k in STEPS}


def reflow_generators(trainer: Trainer) -> dict[int, Generator]:
    """A third of the budget each for a flow, its reflow, and the distillation of that (Liu et al. 2023)."""
    setting = trainer.setting
    torch.manual_seed(trainer.seed)
    net = setting.make_net(trainer.seed, Flow())
    flow = trainer.fit(lambda steps: Flow(), net, setting.draw, 1 / 3)
    draw = pairs_of(flow.generator({"net": net}, bind("heun", 25)), setting)
    trainer.fit(lambda steps: Flow(coupling=GivenPairs()), net, draw, 1 / 3)
    straight = Flow().generator({"net": net}, bind("heun", 25))
    trainer.fit(lambda steps: Distillation(), net, pairs_of(straight, setting), 1 / 3)
    return {1: Distillation().generator({"net": net})}


def pairs_of(generate: Generator, setting: Setting) -> DrawBatch:
    """Rows of pairs that a model made. In the plane each member of an ensemble has its own."""
    z, cond = setting.test(-1)
    with torch.no_grad():
        x = generate(z, cond)
    members = len(z) // NUM_PAIRS
    first = torch.arange(members)[:, None] * NUM_PAIRS

    def draw(count: int) -> Batch:
        i = (first + torch.randint(NUM_PAIRS, (members, count // members))).flatten()
        return Batch(x[i], {k: v[i] for k, v in cond.items()}, x1=z[i])

    return draw


def measure(setting: Setting, way: str, seconds: float, rate: float | None) -> dict[str, object]:
    """One row: values by number of steps, CPU seconds and training steps of each seed."""
    values: dict[str, dict[str, list[float]]] = {}
    used, steps = [], []
    for seed in setting.seeds:
        trainer = Trainer(setting, seconds, seed, rate)
        z, cond = setting.test(seed)
        for k, generate in generators(trainer, way).items():
            with torch.no_grad():
                x = generate(z, cond, setting.noise(seed))
            for name, numbers in setting.score(x).items():
                values.setdefault(name, {}).setdefault(str(k), []).extend(numbers)
        used.append(round(trainer.used, 1))
        steps.append(trainer.steps)
    return {"values": values, "cpu_seconds": used, "steps": steps}


# -------------------------------------------------------------------------------------------------------- the plane
def draw_ring(n: int, seed: int) -> Tensor:
    """Points ``[n, 2]`` of the eight Gaussians, drawn independently."""
    g = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (n,), generator=g) * (math.pi / 4)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1) + STD * torch.randn(n, 2, generator=g)


def normals_of(shape: Sequence[int], seed: int) -> Tensor:
    """Normals of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plane(seeds: int, offset: int = 0) -> Setting:
    """The eight Gaussians, all seeds at once. Test points are those of seeds from ``1000 + offset``."""

    def score(x: Tensor) -> dict[str, list[float]]:
        parts = enumerate(x.chunk(seeds))
        return {"W2": [wasserstein2(p, draw_ring(NUM_TEST, 1000 + offset + i)) for i, p in parts]}

    def make_net(seed: int, objective: Objective) -> nn.Module:
        torch.manual_seed(seed)
        return EnsembleMLP(seeds, 2, 128, 3, F.silu, (SPAN,) if isinstance(objective, FlowMap) else ())

    rows, points = {True: NUM_PAIRS, False: NUM_TEST}, draw_ring(NUM_TRAIN, 1)

    def draw_members(count: int) -> Batch:
        member = torch.arange(seeds).repeat_interleave(count // seeds)
        return Batch(points[torch.randint(len(points), (count,))], {"member": member})

    return Setting(
        make_net=make_net,
        draw=draw_rows(points),
        draw_members=draw_members,
        test=lambda seed: (normals_of((seeds * rows[seed < 0], 2), 2000 + offset), NO_COND),
        score=score,
        noise=lambda seed: lambda shape: normals_of((seeds * NUM_TEST, *shape), 3000 + offset),
        seeds=[0],
        batch=256 * seeds,
        lr=1e-3,
    )


# ------------------------------------------------------------------------------------------------------- the digits
def digits(seeds: int, offset: int = 0) -> Setting:
    """Scikit-learn's digits, one seed after the other."""
    real = load_digits("train")
    scores, spec = DigitScores(real, load_digits("test")), Digits().load("train").spec

    def score(x: Tensor) -> dict[str, list[float]]:
        right = scores.svm.predict(scores.pixels(x)) == cycle_labels(len(x))["label"].numpy()
        return {"Fréchet": [scores.distance(x)], "accuracy": [float(right.mean())]}

    def draw(count: int) -> Batch:
        i = torch.randint(len(real), (count,))
        return Batch(real.x[i], {"label": real.cond["label"][i]})

    def make_net(seed: int, objective: Objective) -> nn.Module:
        torch.manual_seed(seed)
        return objective.networks(MLP(width=192, depth=4), spec)["net"]

    def test(seed: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        n = NUM_PAIRS if seed < 0 else NUM_TEST
        return normals_of((n, 1, 8, 8), 2000 + offset + seed), cycle_labels(n)

    return Setting(
        make_net=make_net,
        draw=draw,
        draw_members=draw,
        test=test,
        score=score,
        noise=lambda seed: lambda shape: normals_of((NUM_TEST, *shape), 3000 + offset + seed),
        seeds=range(seeds),
        batch=64,
        lr=1e-3,
    )


def real_values(part: str, seeds: int) -> dict[str, object]:
    """The values of real data in the place of samples."""
    if part == "plane":
        pairs = [(draw_ring(NUM_TEST, 4000 + i), draw_ring(NUM_TEST, 1000 + i)) for i in range(seeds)]
        return {"values": {"W2": {"1": [wasserstein2(a, b) for a, b in pairs]}}}
    real = load_digits("train")
    return {"values": {"Fréchet": {"1": [DigitScores(real, load_digits("test")).distance(real.x)]}}}


# --------------------------------------------------------------------------------------------------------- the command
@dataclass(frozen=True)
class Part:
    """One of the two experiments."""

    make: Callable[[int], Setting]
    rate: float | None
    """factor of the networks' time label: theirs is the time itself in the plane"""
    title: str


PARTS = {"plane": Part(plane, 1.0, "eight Gaussians"), "digits": Part(digits, None, "digits")}


def print_tables(console: Console, title: str, rows: Mapping[str, dict]) -> None:
    """Mean and standard deviation over the seeds, for each number of steps: a table for each value."""
    for name in dict.fromkeys(name for row in rows.values() for name in row["values"]):
        table = Table("", *(f"{k} step{'s' * (k > 1)}" for k in STEPS), "CPU s", "training", title=f"{title}, {name}")
        for row, cell in rows.items():
            values = [cell["values"].get(name, {}).get(str(k)) for k in STEPS]
            cost = (f"{sum(cell[k]) / len(cell[k]):.0f}" if k in cell else "" for k in ("cpu_seconds", "steps"))
            table.add_row(row, *(format_mean_sd(v) if v else "" for v in values), *cost)
        console.print(table)


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    parser = ScriptParser(__doc__, "genkit bench few-step")
    parser.add_argument("--seeds", type=int, default=3, help="models of each row")
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds of training")
    parser.add_argument("--only", choices=PARTS, help="one of the two")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="rows; all if left out")
    parser.add_argument("--out", type=Path, help="JSON; a row that it has is not measured again")
    args = parser.parse_args(argv)
    check_ranges(args, seeds=MAX_SEEDS)
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"seconds: given {args.seconds}; allowed above 0")
    torch.set_num_threads(1)
    results = ResultsFile(args.out, {"seeds": args.seeds, "seconds": args.seconds}, ["few-step", *argv])
    console = Console()
    for name, part in PARTS.items():
        if args.only not in (None, name):
            continue
        if f"{name}/real" not in results:
            results.add(f"{name}/real", real_values(name, args.seeds))
        for way in args.ways:
            if f"{name}/{way}" not in results:
                results.add(f"{name}/{way}", measure(part.make(args.seeds), way, args.seconds, part.rate))
    for name, part in PARTS.items():
        rows = {k.partition("/")[2]: cell for k, cell in results.cells.items() if k.startswith(f"{name}/")}
        if rows:
            print_tables(console, part.title, rows)
    if args.out:
        console.print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
