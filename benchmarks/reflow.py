"""Straighter with each reflow: one Euler step of 1-, 2- and 3-rectified flow, and of the last one distilled.

    genkit bench reflow [--seeds 3] [--only plane] [--plane-steps N] [--digits-steps N] [--samples N] [--out FILE.json]

Liu et al. 2023, "Flow Straight and Fast" (section 2.2 and table 1a): k-rectified flow is trained on the pairs
(noise, sample) of the (k-1)th, from whose weights it starts here; distillation learns the one step from the last pairs.

"plane": eight Gaussians, the 2-Wasserstein distance to held-out points, MLPs with three hidden layers of 64. "digits":
scikit-learn's, class-conditional; the Fréchet distance to held-out digits in the ten class scores of an SVM trained on
the real ones; an ``MLP`` backbone, 192 wide. "many" is Heun's method with 25 steps. The last row is the distance of the
real training data.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks.ensemble import EnsembleMLP, draw_rows, train
from benchmarks.results import MAX_SEEDS, MAX_STEPS, ResultsFile, check_ranges, format_mean_sd, make_console, make_table
from genkit.backbones import MLP
from genkit.cli.scripts import ScriptParser
from genkit.core import NO_COND, Batch, Draw, Generator
from genkit.data.standard_images import Digits
from genkit.data.toy import EightGaussians
from genkit.diffusion.samplers import bind
from genkit.evaluation.metrics import Moments, frechet_distance, wasserstein2
from genkit.objectives.matching.couplings import GivenPairs
from genkit.objectives.matching.distillation import Distillation
from genkit.objectives.matching.flow import Flow

HEUN_STEPS, ROUNDS = 25, 3
MAX_SAMPLES = 10**6
NUM_TEST = {"plane": 1024, "digits": 1000}
NUM_PAIRS = {"plane": 20_000, "digits": 20_000}
LR = {"plane": 2e-3, "digits": 1e-3}

DrawBatch = Callable[[int], Batch]
Evaluate = Callable[[Generator], list[float]]
Rows = dict[str, dict[str, list[float]]]  # row -> "one" or "many" -> values


def train_ladder(
    net: nn.Module,
    draw: DrawBatch,
    make_pairs: Callable[[Generator], DrawBatch],
    evaluate: Evaluate,
    rounds: int = ROUNDS,
    **options: Any,
) -> Rows:
    """Train ``net``, reflow it ``rounds - 1`` times and distil it; the values of one step and of many after each.

    ``options`` are those of :func:`benchmarks.ensemble.train`.
    """
    rows: Rows = {}
    objective = Flow()
    for k in range(1, rounds + 1):
        train(objective, {"net": net}, draw, **options)
        many = objective.generator({"net": net}, bind("heun", HEUN_STEPS))
        one = objective.generator({"net": net}, bind("ddim", 1))
        rows[f"{k}-RF"] = {"one": evaluate(one), "many": evaluate(many)}
        objective, draw = Flow(coupling=GivenPairs()), make_pairs(many)
    train(Distillation(), {"net": net}, draw, **options)
    rows[f"{rounds}-RF distilled"] = {"one": evaluate(Distillation().generator({"net": net}))}
    return rows


# -------------------------------------------------------------------------------------------------------- the plane
def measure_plane(
    seeds: int,
    steps: int,
    progress: Callable[[int], None] = lambda step: None,
    test: int = NUM_TEST["plane"],
    pairs: int = NUM_PAIRS["plane"],
) -> Rows:
    """All seeds at once, as an :class:`EnsembleMLP`; each is measured by W2 and reflowed on its own pairs."""
    shape, n = EightGaussians(), test
    held_out, data = shape.load("test").x, shape.load("train").x
    torch.manual_seed(0)
    net = EnsembleMLP(seeds, 2, 64, 3, F.silu)
    z = torch.randn(seeds * n, 2, generator=torch.Generator().manual_seed(1))

    def evaluate(generate: Generator) -> list[float]:
        with torch.no_grad():
            parts = generate(z, NO_COND).chunk(seeds)
        return [wasserstein2(p, held_out[i * n : (i + 1) * n]) for i, p in enumerate(parts)]

    def make_pairs(generate: Generator) -> DrawBatch:
        x1 = torch.randn(seeds * pairs, 2)
        with torch.no_grad():
            x = generate(x1, NO_COND)
        first = torch.arange(seeds)[:, None] * pairs  # index of each seed's own pairs

        def draw(count: int) -> Batch:
            i = (first + torch.randint(pairs, (seeds, count // seeds))).flatten()
            return Batch(x[i], x1=x1[i])

        return draw

    options: dict[str, Any] = {"steps": steps, "batch": 128 * seeds, "lr": LR["plane"], "progress": progress}
    rows = train_ladder(net, draw_rows(data), make_pairs, evaluate, **options)
    real = [wasserstein2(data[i * n : (i + 1) * n], held_out[i * n : (i + 1) * n]) for i in range(seeds)]
    return rows | {"real": {"one": real}}


# ------------------------------------------------------------------------------------------------------- the digits
def load_digits(split: Any) -> Batch:
    """All digits of a split, in the model's own numbers."""
    data = Digits().load(split)
    return data.codec.encode(data.batch(torch.arange(len(data)), Draw((0,), 0, len(data))))


def cycle_labels(count: int) -> Mapping[str, Tensor]:
    """The ten classes in turn."""
    return {"label": torch.arange(count) % 10}


@dataclass
class DigitScores:
    """Fréchet distance to held-out digits in the class scores of an SVM that is trained on the real ones."""

    real: Batch
    held_out: Batch

    def __post_init__(self) -> None:
        from sklearn.svm import SVC  # lazy: slow to import

        labels = self.real.cond["label"].numpy()
        self.svm = SVC(gamma=0.001).fit(self.pixels(self.real.x), labels)  # pyright: ignore[reportArgumentType]
        self.reference = self.moments(self.held_out.x)

    @staticmethod
    def pixels(x: Tensor) -> Any:
        """``[N, 64]`` in 0..16, as scikit-learn has them."""
        return (x.flatten(1) + 1).mul(8).numpy()

    def moments(self, x: Tensor) -> Moments:
        """The moments of the class scores."""
        return Moments.of(torch.from_numpy(self.svm.decision_function(self.pixels(x))))

    def distance(self, x: Tensor) -> float:
        """The Fréchet distance of ``x`` ``[N, 1, 8, 8]``."""
        return frechet_distance(self.moments(x), self.reference)


def measure_digits(
    seeds: int,
    steps: int,
    progress: Callable[[int], None] = lambda step: None,
    samples: int = NUM_TEST["digits"],
) -> Rows:
    """One seed after the other, class-conditional; the distance is that of so many ``samples``."""
    real = load_digits("train")
    scores = DigitScores(real, load_digits("test"))
    n, pairs = samples, NUM_PAIRS["digits"]

    def evaluate(generate: Generator) -> list[float]:
        z = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return [scores.distance(generate(z, cycle_labels(n)))]

    def draw_real(count: int) -> Batch:
        i = torch.randint(len(real), (count,))
        return Batch(real.x[i], {"label": real.cond["label"][i]})

    def make_pairs(generate: Generator) -> DrawBatch:
        x1, cond = torch.randn(pairs, 1, 8, 8), cycle_labels(pairs)
        with torch.no_grad():
            x = generate(x1, cond)

        def draw(count: int) -> Batch:
            i = torch.randint(pairs, (count,))
            return Batch(x[i], {"label": cond["label"][i]}, x1=x1[i])

        return draw

    rows: Rows = {}
    spec = Digits().load("train").spec
    for seed in range(seeds):
        torch.manual_seed(seed)
        net = Flow().networks(MLP(width=192, depth=4), spec)["net"]
        options: dict[str, Any] = {"steps": steps, "batch": 64, "lr": LR["digits"], "seed": seed, "progress": progress}
        for row, values in train_ladder(net, draw_real, make_pairs, evaluate, **options).items():
            for key, v in values.items():
                rows.setdefault(row, {}).setdefault(key, []).extend(v)
    return rows | {"real": {"one": [scores.distance(real.x)]}}


# --------------------------------------------------------------------------------------------------------- the command
@dataclass(frozen=True)
class Part:
    """One of the two experiments."""

    measure: Callable[..., Rows]
    steps: int
    trainings: int
    """trainings of each stage, one after the other"""
    title: str


def print_table(console: Console, title: str, rows: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """One experiment's values, mean and standard deviation over the seeds."""
    table = make_table("", "one step", f"Heun, {HEUN_STEPS} steps", title=title)
    for row, values in rows.items():
        many = format_mean_sd(values["many"]) if "many" in values else ""
        table.add_row(row, format_mean_sd(values["one"]), many)
    console.print(table)


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    parser = ScriptParser(__doc__, "genkit bench reflow")
    parser.add_argument("--seeds", type=int, default=3, help="models of each row")
    parser.add_argument("--plane-steps", type=int, default=1000, help="training steps of each stage, in the plane")
    parser.add_argument("--digits-steps", type=int, default=1000, help="the same, on the digits")
    parser.add_argument("--samples", type=int, default=NUM_TEST["digits"], help="samples of each model of the digits")
    parser.add_argument("--only", choices=("plane", "digits"), help="one of the two")
    parser.add_argument("--out", type=Path, help="JSON; a part that it has is not measured again")
    args = parser.parse_args(argv)
    check_ranges(args, seeds=MAX_SEEDS, plane_steps=MAX_STEPS, digits_steps=MAX_STEPS, samples=MAX_SAMPLES)
    torch.set_num_threads(1)
    console = make_console()
    settings = {"seeds": args.seeds, "plane_steps": args.plane_steps, "digits_steps": args.digits_steps}
    settings |= {"pairs": NUM_PAIRS, "lr": LR, "heun": HEUN_STEPS, "test": NUM_TEST | {"digits": args.samples}}
    results = ResultsFile(args.out, settings, ["reflow", *argv])
    parts = {
        "plane": Part(measure_plane, args.plane_steps, 1, "eight Gaussians, W2"),
        "digits": Part(
            partial(measure_digits, samples=args.samples), args.digits_steps, args.seeds, "digits, Fréchet distance"
        ),
    }
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        for name, part in parts.items():
            if name in results or args.only not in (None, name):
                continue
            task = bar.add_task(name, total=(ROUNDS + 1) * part.steps * part.trainings)
            start = time.process_time()
            rows = part.measure(args.seeds, part.steps, lambda step, task=task: bar.advance(task))
            results.add(name, {"rows": rows, "seconds": round(time.process_time() - start, 1)})
    for name, part in parts.items():
        if name in results:
            print_table(console, part.title, results.cells[name]["rows"])
    if args.out:
        console.print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
