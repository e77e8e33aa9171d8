"""Flow matching in the plane with and without optimal transport, beside the numbers of the papers.

    genkit bench toy [--seeds 5] [--steps N] [--only OT-CFM] [--out FILE.json] [--picture FILE.png]

W2 is the exact 2-Wasserstein distance between samples of the model and of the data; NPE the normalised path energy
``|E int |v|^2 dt - W2^2(p0, p1)| / W2^2(p0, p1)`` (Tong et al. 2024, section 5.1): 0 where every sample takes the
shortest way. Published: Tong et al. 2023, "Simulation-free Schrödinger bridges via score and flow matching", table 2.

The network is theirs, three hidden layers of 64 with SELU and the time joined to the input. So are the shapes and their
scales, as the configurations of torchcfm's runner have them; the plan of a minibatch is `--objective.coupling=ot`'s.
What differs: no noise about the lines (they have 0.1), a batch of 128 (512), fewer steps with a cosine at their end.

W2 is above 0 for finite draws of one law, so how the points are drawn matters, and the papers do not say how many they
took. Here sources are Sobol' points and the data spread evenly over modes and arcs; "data to data" is what that leaves.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.stack import Each, Record, Stack, mean_sd, rows, train
from genkit.core import NO_COND
from genkit.core.files import atomic_write
from genkit.data.toy import Points, Toy
from genkit.diffusion.samplers import bind
from genkit.evaluation.metrics import wasserstein2 as w2
from genkit.objectives.matching.couplings import Coupling, Independent, OptimalTransport
from genkit.objectives.matching.flow import Flow
from genkit.objectives.matching.sources import DatasetSource, Normal, Source

BATCH, LR, EULER, TEST = 128, 4e-3, 100, 2048


# ------------------------------------------------------------------------------------------------------- the shapes
@dataclass(frozen=True, kw_only=True)
class Ring(Toy):
    """Eight Gaussians of deviation ``noise`` about a circle of ``radius``, of as many points each."""

    noise: Annotated[float, Ge(0)] = 1.0
    radius: float = 5.0

    def shape(self, rng: np.random.Generator) -> Points:
        k = np.arange(self.n) * 8 // self.n
        return self.radius * np.stack([np.cos(k * np.pi / 4), np.sin(k * np.pi / 4)], axis=1), None


@dataclass(frozen=True, kw_only=True)
class HalfMoons(Toy):
    """Two half circles of radius ``size``, the points at equal angles, moved by ``move``."""

    noise: Annotated[float, Ge(0)] = 0.1
    size: float = 2.0
    move: tuple[float, float] = (-1.0, 0.0)

    def shape(self, rng: np.random.Generator) -> Points:
        from sklearn.datasets import make_moons

        return self.size * np.asarray(make_moons(self.n, shuffle=False)[0]) + self.move, None


@dataclass(frozen=True, kw_only=True)
class SCurve(Toy):
    """The letter S, two arcs of radius ``size``, the points at equal angles (scikit-learn's are at random ones)."""

    noise: Annotated[float, Ge(0)] = 0.075
    size: float = 1.5

    def shape(self, rng: np.random.Generator) -> Points:
        t = 3 * np.pi * (np.arange(self.n) + 0.5) / self.n - 1.5 * np.pi
        return self.size * np.stack([np.sin(t), np.sign(t) * (np.cos(t) - 1)], axis=1), None


def normals(n: int, seed: int) -> Tensor:
    """Standard normals ``[n, 2]`` that fill the plane evenly: scrambled Sobol' points through the inverse of ndtr."""
    u = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    return torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)).float()


@dataclass(frozen=True)
class Column:
    """Source and data, and what the paper reports for ``(W2, its sd, NPE, its sd)`` by method."""

    data: Toy
    source: Source
    published: Mapping[str, tuple[float, float, float, float | None]]


COLUMNS: Mapping[str, Column] = {
    "N->8gaussians": Column(
        Ring(), Normal(), {"I-CFM": (0.373, 0.103, 0.202, None), "OT-CFM": (0.303, 0.043, 0.031, 0.027)}
    ),
    "moons->8gaussians": Column(
        Ring(radius=12.0, noise=1.5),
        DatasetSource(HalfMoons(size=9.67, noise=0.967, move=(-3.63, -3.63), seed=1)),
        {"I-CFM": (1.557, 0.407, 2.680, None), "OT-CFM": (0.601, 0.027, 0.015, 0.010)},
    ),
    "N->moons": Column(
        HalfMoons(), Normal(), {"I-CFM": (0.178, 0.014, 0.891, None), "OT-CFM": (0.130, 0.016, 0.083, 0.009)}
    ),
    "N->scurve": Column(
        SCurve(), Normal(), {"I-CFM": (0.242, 0.141, 0.856, None), "OT-CFM": (0.144, 0.028, 0.027, 0.012)}
    ),
}
METHODS: Mapping[str, Coupling] = {"I-CFM": Independent(), "OT-CFM": OptimalTransport()}


# -------------------------------------------------------------------------------------------------------- measuring
def held(data: Toy, n: int, seed: int = 0) -> Tensor:
    """``n`` held-out points, spread evenly, in random order (scipy's assignment takes ten times as long in theirs)."""
    x = replace(data, n=n, seed=seed).load("test").x
    return x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


@torch.no_grad()
def flow(objective: Flow, net: Stack, z: Tensor, steps: int = EULER) -> tuple[Tensor, Tensor, Tensor]:
    """From normals ``z`` ``[rows, 2]`` by Euler's method: the ends ``[rows, 2]``, each way's energy ``int |v|^2 dt``
    ``[rows]``, and the way itself, ``[steps + 1, rows, 2]``.
    """
    energy, way = torch.zeros(len(z)), [objective.source(z, NO_COND)]

    def look(i: int, x: Tensor, prediction: Any) -> None:
        energy.add_(prediction.velocity.square().sum(1) / steps)
        way.append(x)

    x = objective.generator({"net": net}, bind("ddim", steps, callback=look))(z, NO_COND)
    return x, energy, torch.stack(way)


def measure(
    column: Column,
    coupling: Coupling,
    seeds: int,
    steps: int,
    test: int,
    progress: Callable[[int], None] = lambda step: None,
) -> tuple[dict[str, Any], np.ndarray]:
    """W2 and energy of each seed; and the ways of the first, ``[21, 128, 2]``."""
    data, held_out = column.data.load("train").x, held(column.data, test)
    objective = Flow(source=column.source, coupling=Each(coupling, seeds))
    torch.manual_seed(0)
    net = Stack(seeds, 2, 64, 3, F.selu)
    begin = time.process_time()
    train(objective, net, rows(data), steps=steps, batch=BATCH * seeds, lr=LR, progress=progress)
    trained = time.process_time() - begin
    z = torch.cat([normals(test, seed) for seed in range(seeds)])
    x, energy, way = flow(objective, net, z)
    parts = zip(x.chunk(seeds), energy.chunk(seeds), strict=True)
    found = [(w2(a, held_out), float(e.mean())) for a, e in parts]
    values = {"w2": [w for w, _ in found], "energy": [e for _, e in found], "training_seconds": round(trained, 1)}
    return values, way[:: EULER // 20, :128].numpy().astype(np.float32)


def limits(column: Column, test: int) -> dict[str, Any]:
    """What to compare with: ``floor``, the W2 of data to data at this size; and ``cost``, W2^2 of source and data."""
    held_out, other = held(column.data, test), held(column.data, test, seed=1)
    return {"floor": [w2(other, held_out)], "cost": w2(column.source(normals(test, 1000), NO_COND), held_out) ** 2}


def picture(ways: Mapping[str, np.ndarray], path: Path) -> None:
    """The ways of some samples: a row a method, a column a pair of distributions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(3 * len(COLUMNS), 3 * len(METHODS)), dpi=80, layout="constrained")
    axes = fig.subplots(len(METHODS), len(COLUMNS), squeeze=False)
    for i, method in enumerate(METHODS):
        for j, name in enumerate(COLUMNS):
            ax, way = axes[i, j], ways.get(f"{method} {name}")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_aspect("equal")
            ax.set_title(f"{method}, {name}", fontsize=9)
            if way is not None:
                ax.plot(way[..., 0], way[..., 1], color="0.75", lw=0.4, zorder=1)
                ax.scatter(*way[0].T, s=4, color="C0", zorder=2)
                ax.scatter(*way[-1].T, s=4, color="C3", zorder=3)
    FigureCanvasAgg(fig)
    with atomic_write(path) as part:
        fig.savefig(part, format="png")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="genkit bench toy", description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="networks of each cell, trained side by side")
    parser.add_argument("--steps", type=int, default=10_000, help="training steps")
    parser.add_argument("--test", type=int, default=TEST, help="samples of each W2; the time grows with the cube")
    parser.add_argument("--only", action="append", default=[], help="a method or a column; may be repeated")
    parser.add_argument("--out", type=Path, help="JSON; cells that are there are not measured again")
    parser.add_argument("--picture", type=Path, help="PNG of the ways")
    args = parser.parse_args(argv)
    known = [*METHODS, *COLUMNS]
    for name in args.only:
        if name not in known:
            raise ValueError(f"only: given {name!r}; allowed: {', '.join(known)}")
    for name, most in (("seeds", 100), ("steps", 10**7), ("test", 10_000)):
        if not 1 <= getattr(args, name) <= most:
            raise ValueError(f"{name}: given {getattr(args, name)}; allowed 1 to {most}")
    torch.set_num_threads(1)
    console = Console()
    settings = {"seeds": args.seeds, "steps": args.steps, "test": args.test, "batch": BATCH, "lr": LR, "euler": EULER}
    record = Record(args.out, settings, ["toy", *argv])
    methods = [m for m in METHODS if m in args.only] or list(METHODS)
    columns = [c for c in COLUMNS if c in args.only] or list(COLUMNS)
    cells = [(m, c) for c in columns for m in methods]
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        whole_task, task = bar.add_task("cells", total=len(cells)), bar.add_task("steps", total=args.steps)
        for method, name in cells:
            bar.update(task, description=f"{method} {name}", completed=0)
            if name not in record:
                record.add(name, limits(COLUMNS[name], args.test))
            if f"{method} {name}" not in record:
                found, ways = measure(
                    COLUMNS[name], METHODS[method], args.seeds, args.steps, args.test,
                    lambda step: bar.update(task, completed=step),
                )  # fmt: skip
                cost = record.cells[name]["cost"]
                found["npe"] = [abs(e - cost) / cost for e in found["energy"]]
                record.add(f"{method} {name}", found, ways)
            bar.advance(whole_task)
    show(console, record, methods, columns)
    if args.out:
        console.print(args.out)
    if args.picture:
        picture(record.arrays, args.picture)
        console.print(args.picture)
    return 0


def show(console: Console, record: Record, methods: list[str], columns: list[str]) -> None:
    for key, title in (("w2", "W2 to the data"), ("npe", "normalised path energy")):
        table = Table("", *columns, title=title)
        for method in methods:
            table.add_row(method, *[mean_sd(record.cells[f"{method} {c}"][key]) for c in columns])
            published = [COLUMNS[c].published[method][0 if key == "w2" else 2 :][:2] for c in columns]
            table.add_row("  published", *[f"{v:.3f}" + (f"±{sd:.3f}" if sd else "") for v, sd in published])
        if key == "w2":
            table.add_row("data to data", *[mean_sd(record.cells[c]["floor"]) for c in columns])
        console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
