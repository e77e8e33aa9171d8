"""Quality for seconds of training: the loops of diffusers, denoising-diffusion-pytorch and torchcfm, and genkit.

    genkit bench race --data fashion-mnist cifar10 --root DIR [--seconds 240] [--marks 5] [--seeds 3] [--samples 1000]
                      [--contenders genkit diffusers] [--device cpu] [--out FILE.json] [--page FILE.html]

Each contender trains on the same pictures with classes for the same CPU seconds of this process (seconds of the GPU, if
there is one), in a batch of 64 (torchcfm: 128) and one thread, and is measured ``--marks`` times, each at twice the
seconds of the time before. At the end it says in which share of its seconds genkit reaches what another library has.
The networks are those of each library's example, of 1 to 2 million parameters; see ``benchmarks/race_loops.py``. The
measure is the Frechet distance of ``--samples`` pictures, drawn in ``--evaluations`` network evaluations by a
deterministic sampler of the library's kind, from the test split, in the features of a small classifier that genkit
trains on the same data. Drawing and measuring are not timed. "genkit" has the defaults (AdamW, cosine), but a warm-up
of a tenth; "genkit-recipe" Muon at a constant rate. genkit trains in bf16 where the machine has it, the others in fp32,
as their examples do. Two contenders are optional packages. A seed that ``--out`` has is not measured again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks.race_loops import CONTENDERS, GENKIT, LOOPS, TITLES, RaceData, data_of, source_of, train_contender
from benchmarks.results import (
    MAX_SEEDS,
    ResultsFile,
    check_ranges,
    format_mean_sd,
    make_console,
    make_table,
    student_interval,
)
from genkit.cli.scripts import ScriptParser
from genkit.core.device import pick_device
from genkit.core.files import write_text
from genkit.evaluation.metrics import Estimate, Moments, frechet_from_features
from genkit.evaluation.metrics.features import Classifier, Extractor

REFERENCE = 10_000  # pictures of the test split
MAX_SAMPLES = 100_000
MAX_MARKS = 8  # genkit saves a checkpoint at each multiple of the first: 128
SMALLEST = 1e-9  # distance, which an estimate may be below
SMALLER = ("lucidrains", "torchcfm")  # libraries of one loop each, of which the better one counts
DATA_SETS = ("fashion-mnist", "cifar10", "digits")


class Judge:
    """The measure of a data set: features, and the moments of its test split."""

    def __init__(self, name: str, race: RaceData, root: Path):
        self.features: Extractor = Classifier().load(race.device, source_of(name, root).load("train"))
        test = data_of(name, root, REFERENCE, race.device, "test").pixels
        self.reference = Moments.of(self.features(test).features)

    def distance(self, pictures: torch.Tensor) -> Estimate:
        """The Frechet distance of pictures, with its interval."""
        return frechet_from_features(self.features(pictures).features, self.reference)


def measure(judge: Judge, race: RaceData, name: str, marks: Sequence[float], seed: int, args: Any) -> dict[str, Any]:
    """A contender of one seed: its distance at each mark, with seconds and steps."""
    labels = torch.arange(args.samples) % (int(race.labels.max()) + 1)
    found = []
    for mark, model in zip(marks, train_contender(name, race, marks, seed), strict=True):
        pictures = torch.cat([
            model.sample(part, 10_000 * (seed + 1) + i, args.evaluations) for i, part in enumerate(labels.split(256))
        ])  # fmt: skip
        e = judge.distance(pictures)
        found.append({"mark": mark, "seconds": round(model.seconds, 2), "steps": model.steps, **e._asdict()})
    return {"marks": found}


# --------------------------------------------------------------------------------------------------------- what it says
def curves(cells: Mapping[str, Mapping[str, Any]], data: str) -> dict[str, dict[float, list[float]]]:
    """The distances of all seeds by contender and mark."""
    found: dict[str, dict[float, list[float]]] = {}
    for cell, values in cells.items():
        own, name, _ = cell.split("/")
        if own == data:
            for entry in values["marks"]:
                found.setdefault(name, {}).setdefault(entry["mark"], []).append(entry["value"])
    return found


class Crossing(NamedTuple):
    """When a curve reaches a distance."""

    seconds: float
    is_bound: bool
    """whether it had reached it at its first mark already, so that these are the most seconds that it may need"""


def find_crossing(points: Sequence[tuple[float, float]], target: float) -> Crossing | None:
    """When the curve of ``(seconds, distance)`` is first at most ``target``; None if it never is.

    Between two marks, the logarithm of the distance is taken as linear in that of the seconds.
    """
    before: tuple[float, float] | None = None
    target = max(target, SMALLEST)
    for seconds, value in sorted(points):
        if value <= target:
            if before is None:
                return Crossing(seconds, True)
            last, above = before
            share = math.log(above / target) / math.log(above / max(value, SMALLEST))
            return Crossing(last * (seconds / last) ** share, False)
        before = seconds, value
    return None


def geometric_estimate(values: Sequence[float]) -> Estimate:
    """The geometric mean, and Student's interval of the logarithms (none for one value)."""
    mean, half = student_interval([math.log(max(value, SMALLEST)) for value in values])
    return Estimate(math.exp(mean), *(() if math.isnan(half) else (math.exp(mean - half), math.exp(mean + half))))


@dataclass(frozen=True)
class SecondsShare:
    """The share of the seconds of others in which a contender reaches the distance that they have at their end."""

    shares: Sequence[float]
    """one for each seed that reaches it"""
    seeds: int
    is_bound: bool
    """whether some seed had reached it at its first mark, so that its share may be smaller"""

    @property
    def estimate(self) -> Estimate:
        """The geometric mean, and Student's interval of the logarithms (none for one seed)."""
        return geometric_estimate(self.shares)

    def __str__(self) -> str:
        if len(self.shares) < self.seeds:
            return f"reached by {len(self.shares)} of {self.seeds} seeds"
        if self.is_bound:
            return f"at most {max(self.shares):.3g}"  # an interval of bounds would say nothing
        value, low, high = self.estimate
        return f"{value:.3g}" if low is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"


def share_of_seconds(
    cells: Mapping[str, Mapping[str, Any]], data: str, own: str, others: Sequence[str]
) -> SecondsShare | None:
    """How much of the seconds of ``others`` the contender ``own`` needs to reach the best of their ends, seed by seed.

    None if there is no seed that all of them have.
    """
    seeds = [s for s in range(MAX_SEEDS) if all(f"{data}/{name}/{s}" in cells for name in (own, *others))]
    shares, is_bound = [], False
    for seed in seeds:
        ends = [cells[f"{data}/{name}/{seed}"]["marks"][-1] for name in others]
        end = min(ends, key=lambda entry: entry["value"])
        points = [(entry["seconds"], entry["value"]) for entry in cells[f"{data}/{own}/{seed}"]["marks"]]
        if found := find_crossing(points, end["value"]):
            shares.append(found.seconds / end["seconds"])
            is_bound |= found.is_bound
    return SecondsShare(shares, len(seeds), is_bound) if seeds else None


def all_shares(cells: Mapping[str, Mapping[str, Any]], data: str) -> dict[tuple[str, str], SecondsShare]:
    """The shares of each contender of genkit, against each other library and against the best of two of them."""
    named = {name: (name,) for name in LOOPS} | {" or ".join(SMALLER): SMALLER}
    pairs = [(own, title, others) for title, others in named.items() for own in GENKIT]
    found = {(own, title): share_of_seconds(cells, data, own, others) for own, title, others in pairs}
    return {pair: share for pair, share in found.items() if share is not None}


def rows_of_means(found: Mapping[str, Mapping[float, Sequence[float]]]) -> tuple[list[str], list[list[str]]]:
    """The heads of a table, without the first one, and a row for each contender: its distances and its seeds."""
    marks = sorted({mark for curve in found.values() for mark in curve})
    rows = [
        [name, *(format_mean_sd(curve[m]) if m in curve else "" for m in marks),
         str(max(len(values) for values in curve.values()))]
        for name, curve in found.items()
    ]  # fmt: skip
    return [*(f"{mark:g} s" for mark in marks), "seeds"], rows


def rows_of_shares(
    cells: Mapping[str, Mapping[str, Any]], data: str, order: Iterable[str]
) -> tuple[list[str], list[list[str]]]:
    """The heads of a table, without the first one, of genkit's contenders in this ``order``, and a row for each of the
    others; no rows without two that can be compared."""
    shares = all_shares(cells, data)
    own = [name for name in order if any(pair[0] == name for pair in shares)]
    rows = []
    for others in dict.fromkeys(others for _, others in shares):
        names = [TITLES[name] for name in others.split(" or ")]
        title = " or ".join(names) + (", the better" if len(names) > 1 else "")
        rows.append([title, *(str(shares.get((name, others), "")) for name in own)])
    return [TITLES[name] for name in own], rows


def print_table(console: Console, data: str, cells: Mapping[str, Mapping[str, Any]]) -> None:
    """Mean and standard deviation over the seeds at each mark, and the share of the others' seconds."""
    head, rows = rows_of_means(curves(cells, data))
    table = make_table("", *head, title=f"{data}: Fréchet distance")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for (own, others), share in all_shares(cells, data).items():
        text = f"{own}: share of the seconds in which it has what {others} has at the end: {share}"
        console.print(text, markup=False, soft_wrap=True)


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    parser = ScriptParser(__doc__, "genkit bench race")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=["fashion-mnist", "cifar10"], help="data sets")
    parser.add_argument("--root", type=Path, default=Path("data"), help="the folder of the data sets")
    parser.add_argument("--seconds", type=float, default=240.0, help="seconds of each training")
    parser.add_argument(
        "--marks", type=int, default=5, help="times that models are measured, each at twice the seconds"
    )
    parser.add_argument("--seeds", type=int, default=3, help="models of each contender")
    parser.add_argument("--samples", type=int, default=1000, help="pictures of each model")
    parser.add_argument("--evaluations", type=int, default=20, help="network evaluations of a picture")
    parser.add_argument("--limit", type=int, help="training pictures; all if left out")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="who takes part")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--out", type=Path, help="JSON; a seed that it has is not measured again")
    parser.add_argument("--page", type=Path, help="HTML page of the results")
    args = parser.parse_args(argv)
    check_ranges(args, seeds=MAX_SEEDS, samples=MAX_SAMPLES, marks=MAX_MARKS, evaluations=1000)
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"seconds: given {args.seconds}; allowed above 0")
    if args.samples < 2:
        raise ValueError(f"samples: given {args.samples}; a distance needs 2 or more")
    if args.page and args.page.suffix != ".html":
        raise ValueError(f"page: given {args.page}; allowed: a file that ends in .html")
    device = pick_device(args.device)
    torch.set_num_threads(1)
    clock = "seconds of the GPU" if device.type == "cuda" else "CPU seconds"
    settings = {name: getattr(args, name) for name in ("seconds", "marks", "samples", "evaluations", "limit")}
    results = ResultsFile(args.out, {**settings, "clock": clock}, ["race", *argv])
    marks = [args.seconds / 2**i for i in reversed(range(args.marks))]
    console = make_console()
    for data in args.data:
        todo = [(name, seed) for seed in range(args.seeds) for name in args.contenders]
        todo = [(name, seed) for name, seed in todo if f"{data}/{name}/{seed}" not in results]
        if todo:
            race = data_of(data, args.root, args.limit, device)
            judge = Judge(data, race, args.root)
            for name, seed in todo:
                results.add(f"{data}/{name}/{seed}", measure(judge, race, name, marks, seed, args))
        print_table(console, data, results.cells)
    if args.page:
        from benchmarks.race_page import render_race  # lazy: slow to import

        write_text(args.page, render_race(results, args.data, (__doc__ or "").split("\n\n", 2)[2]))
    for file in filter(None, (args.out, args.page)):
        console.print(str(file), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
