"""`genkit sweep RUN`: which averages, guidance, samplers and steps draw well and fast. Its cards make it resumable."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from genkit.cli.commands.evaluate import VECTORS, bar, draw, reference_of, together
from genkit.config import parse
from genkit.config.blocks import suggest
from genkit.core import pictures
from genkit.evaluation import Drawn, Ranks, Ruler, cards, is_picture, ruler
from genkit.evaluation.metrics import METRICS
from genkit.evaluation.settings import Sweep
from genkit.evaluation.shards import key_of
from genkit.training.distributed import missing_ranks, start_ranks
from genkit.training.run import Run, load_run
from genkit.training.sampling import Sampling

console = Console(highlight=False, soft_wrap=True)
LARGE = {"precision": "prdc", "recall": "prdc", "density": "prdc", "coverage": "prdc", "accuracy": "accuracy",
         "is": "is"}  # fmt: skip  # what is better when larger, and the metric that gives it
SMALL = {k: k for k in METRICS if k not in (*LARGE, "prdc")}


@dataclass(frozen=True, kw_only=True)
class Candidate(Sampling):
    """One combination of a sweep."""

    ema: str | None = None
    """averaged weights, by decay; None: the slowest"""
    step: int | None = None
    """checkpoint; None: the newest"""


@dataclass(frozen=True)
class Point:
    """One combination, measured."""

    sampling: Candidate
    card: cards.Card
    metric: str

    @property
    def passes(self) -> float:
        """Samples that went through the network for one that came out: the NFE, guidance's second pass counted."""
        return self.card["settings"]["passes"]

    @property
    def value(self) -> float:
        return self.card["metrics"][self.metric]["value"]

    @property
    def cost(self) -> float:
        """The value, small when good."""
        return -self.value if self.metric in LARGE else self.value


def main(argv: list[str]) -> int:
    if (num := missing_ranks()) > 1:
        start_ranks(num, "sweep", argv)
    asked = parse(Sweep, argv, prog="genkit sweep", description=Sweep.__doc__)
    return together(asked.device, lambda accelerator, ranks: sweep(asked, accelerator, ranks))


def sweep(asked: Sweep, accelerator: Accelerator, ranks: Ranks) -> int:
    samples = combinations(asked, accelerator.device)
    first = samples[0][1]
    metric = asked.metric or ("fid" if is_picture(first.spec) else "w2")
    known = {**SMALL, **LARGE}
    if metric not in known:
        raise ValueError(f"metric: given {metric!r}; allowed: {', '.join(known)}{suggest(metric, known)}")
    with accelerator.main_process_first():
        against = reference_of(asked.reference, first, asked.data)
    with bar("reference", ranks) as progress:
        held = ruler(
            first,
            against,
            {known[metric]: METRICS[known[metric]]},
            asked.features,
            mode=asked.mode,
            weights=asked.weights,
            settings=asked.settings,
            reference_n=None if is_picture(first.spec) else max(asked.confirm, VECTORS),
            batch=asked.batch,
            device=accelerator.device,
            ranks=ranks,
            progress=progress,
        )
    held.also = frozenset({"features"})
    screened = measured(samples, held, asked.n, metric, ranks, "screening")
    if not screened:
        raise ValueError(f"sweep: none of {len(samples)} combinations gave finite samples; the run has diverged")
    found = screened
    if asked.confirm > asked.n:
        wanted = [p.sampling for p in promising(screened, asked.spare)]
        again = [(s, drawn) for s, drawn in samples if s in wanted]
        found = measured(again, held, asked.confirm, metric, ranks, "confirming")
    if ranks.main:
        tell(asked, first.run, screened, found, metric)
    return 0


def combinations(asked: Sweep, device: torch.device) -> list[tuple[Candidate, Drawn]]:
    """Every combination once; what the run cannot do is refused here, before anything is drawn."""
    loaded: dict[str | None, Run] = {}
    out: dict[Candidate, Drawn] = {}
    intervals = [interval_of(text) for text in asked.interval]
    product = itertools.product(asked.ema or (None,), asked.guidance, intervals, asked.sampler or (None,), asked.steps)
    for ema, guidance, interval, sampler, steps in product:
        if ema not in loaded:
            loaded[ema] = load_run(asked.run, ema=ema, step=asked.step, device=device.type)
        sampling = Candidate(
            ema=ema,
            step=asked.step,
            guidance=guidance,
            guidance_interval=interval if guidance != 1 else None,  # which has no effect there
            sampler=sampler,
            steps=steps,
            grid=asked.grid,
            seed=asked.seed,
            batch=asked.batch,
        )
        if sampling not in out:
            out[sampling] = draw(loaded[ema], sampling)
    run = next(iter(loaded.values()))
    if run.config.threads:
        torch.set_num_threads(run.config.threads)
    return list(out.items())


def interval_of(text: str) -> tuple[float, float] | None:
    if text == "all":
        return None
    try:
        low, high = map(float, text.split("-"))
    except ValueError:
        raise ValueError(f"interval: given {text!r}; allowed: all, or LOW-HIGH such as 0.2-0.8") from None
    return low, high


def measured(
    samples: Sequence[tuple[Candidate, Drawn]], held: Ruler, n: int, metric: str, ranks: Ranks, what: str
) -> list[Point]:
    """The combinations at ``n`` samples each: the cards that exist are read, the others made."""
    points = []
    with bar(what, ranks, len(samples) * n) as progress:
        for i, (sampling, drawn) in enumerate(samples):
            path = drawn.run.directory / "eval" / cards.name_of(held.plan(drawn, n))
            card = ranks.once(lambda path=path: cards.read(path) if path.is_file() else None)
            if card is None:
                try:
                    found = held.look(drawn, n, lambda done, i=i: progress(i * n + done))
                    card = ranks.once(lambda drawn=drawn, found=found: held.card(drawn, n, found))
                except ValueError as e:  # too few steps for this sampler, say: the others may be well
                    if ranks.main:
                        console.print(f"left out: {words(sampling, drawn)}: {e}", markup=False)
                    continue
                if ranks.main:
                    cards.write(card, path)
            progress((i + 1) * n)
            points.append(Point(sampling, card, metric))
    return points


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other equals or beats in passes and value both, by passes."""
    front: list[Point] = []
    for p in sorted(points, key=lambda p: (p.passes, p.cost)):
        if not front or p.cost < front[-1].cost:
            front.append(p)
    return front


def promising(points: Sequence[Point], spare: int) -> list[Point]:
    """The Pareto list, and beside it the next best."""
    front = pareto(points)
    rest = sorted((p for p in points if p not in front), key=lambda p: p.cost)
    return front + rest[:spare]


# --------------------------------------------------------------------------------------------------- what is shown
def words(s: Candidate, drawn: Drawn | None = None) -> str:
    where = "" if s.guidance_interval is None else " in {:g}-{:g}".format(*s.guidance_interval)
    return f"{s.sampler or 'usual sampler'} {s.steps} steps, guidance {s.guidance:g}{where}, ema {s.ema or 'slowest'}"


def tell(asked: Sweep, run: Run, screened: list[Point], found: list[Point], metric: str) -> None:
    """The table, and the picture."""
    front = pareto(found)
    key = key_of([sorted(cards.name_of(p.card["settings"]) for p in [*screened, *found]), metric])[:8]
    path = run.directory / "eval" / f"sweep-{run.step:07d}-{metric}-{key}.png"
    draw_points(screened, found, front, metric, path)
    if asked.json:
        rows = [{"pareto": p in front, "passes": p.passes, "nfe": p.card["settings"]["nfe"], metric: p.value,
                 **settings(p)} for p in found]  # fmt: skip
        print(json.dumps({"metric": metric, "n": found[0].card["settings"]["n"], "points": rows, "picture": str(path)}))
        return
    table = Table("NFE", "passes", metric, "sampler", "steps", "guidance", "interval", "ema", "Pareto")
    for p in sorted(found, key=lambda p: (p.passes, p.cost)):
        s = p.card["settings"]
        interval = "–" if s["guidance_interval"] is None else "{:g}–{:g}".format(*s["guidance_interval"])
        table.add_row(f"{s['nfe']:g}", f"{p.passes:g}", cards.text(cards.estimate(p.card["metrics"][metric])),
                      str(s["sampler"]), str(s["steps"]), f"{s['guidance']:g}", interval, s["ema"],
                      "*" if p in front else "")  # fmt: skip
    console.print(table)
    console.print(f"{len(screened)} combinations screened with {asked.n} samples each, "
                  f"{len(found)} measured with {found[0].card['settings']['n']}; *: none is both faster and better",
                  markup=False)  # fmt: skip
    console.print(path, markup=False)


def settings(p: Point) -> dict[str, Any]:
    names = ("sampler", "steps", "guidance", "guidance_interval", "ema")
    return {k: p.card["settings"][k] for k in names}


def draw_points(screened: list[Point], found: list[Point], front: list[Point], metric: str, path: Path) -> Path:
    """Quality against passes: faint, what was only screened; the line, the Pareto list."""

    def draw(axes: Any) -> None:
        axes.scatter([p.passes for p in screened], [p.value for p in screened], s=12, c="0.75", label="screened")
        for p in found:
            e = cards.estimate(p.card["metrics"][metric])
            if e.low is not None and e.high is not None:
                axes.plot([p.passes, p.passes], [e.low, e.high], c="C0", lw=1)
        axes.scatter([p.passes for p in found], [p.value for p in found], s=20, c="C0", label="confirmed")
        axes.step([p.passes for p in front], [p.value for p in front], where="post", c="C1", label="Pareto list")
        for p in front:
            s = p.card["settings"]
            text = f"{s['sampler']} {s['steps']}" + (f", {s['guidance']:g}" if s["guidance"] != 1 else "")
            axes.annotate(text, (p.passes, p.value), xytext=(3, 5), textcoords="offset points", fontsize=7)
        axes.set_xlabel("passes of the network for one sample")
        axes.set_ylabel(metric)
        axes.set_xscale("log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()

    return pictures.save(pictures.figure(draw, (7, 4.5)), path)
