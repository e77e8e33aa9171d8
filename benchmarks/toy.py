"""Flows in the plane with and without optimal transport, beside the numbers of the papers.

    genkit bench toy [--seeds 5] [--steps N] [--only OT-CFM] [--out FILE.json] [--picture FILE.png]

W2 is the exact 2-Wasserstein distance between samples of the model and of the data; NPE the normalised path energy
``|E int |v|^2 dt - W2^2(p0, p1)| / W2^2(p0, p1)`` (Tong et al. 2024, section 5.1): 0 if every sample takes the shortest
way. Published: Tong et al. 2023, "Simulation-free Schrödinger bridges via score and flow matching", table 2.

The network is theirs: three hidden layers of 64 with SELU and the time as an additional input. So are the shapes and
their scales, as in the configurations of torchcfm's runner; the plan of a minibatch is `--objective.coupling=ot`'s. The
differences: no noise around the lines (they have 0.1), a batch of 128 (512), fewer steps with a cosine at their end.

W2 is above 0 for finite draws of one distribution, so it matters how the points are drawn, and the papers do not say
how many they took. Here sources are Sobol points and the data are spread evenly over modes and arcs; "data to data" is
the distance that remains.
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
from torch import Tensor

from benchmarks.ensemble import EnsembleMLP, PerMember, draw_rows, train
from benchmarks.results import MAX_SEEDS, MAX_STEPS, ResultsFile, check_ranges, format_mean_sd, make_console, make_table
from genkit.cli.scripts import ScriptParser
from genkit.core import NO_COND
from genkit.core.files import atomic_write
from genkit.data.toy import Points, Toy
from genkit.diffusion.samplers import bind
from genkit.evaluation.metrics import wasserstein2
from genkit.objectives.matching.couplings import Coupling, Independent, OptimalTransport
from genkit.objectives.matching.flow import Flow
from genkit.objectives.matching.sources import DatasetSource, Normal, Source

BATCH, LR = 128, 4e-3
EULER_STEPS = 100
TEST_SAMPLES, MAX_TEST_SAMPLES = 2048, 10_000


# ------------------------------------------------------------------------------------------------------- the shapes
@dataclass(frozen=True, kw_only=True)
class Ring(Toy):
    """Eight Gaussians of standard deviation ``noise`` on a circle of ``radius``, with equal numbers of points."""

    noise: Annotated[float, Ge(0)] = 1.0
    radius: float = 5.0

    def shape(self, rng: np.random.Generator) -> Points:
        """The centre of each point."""
        k = np.arange(self.n) * 8 // self.n
        return self.radius * np.stack([np.cos(k * np.pi / 4), np.sin(k * np.pi / 4)], axis=1), None


@dataclass(frozen=True, kw_only=True)
class HalfMoons(Toy):
    """Two half circles of radius ``size``, with points at equal angles, shifted by ``move``."""

    noise: Annotated[float, Ge(0)] = 0.1
    size: float = 2.0
    move: tuple[float, float] = (-1.0, 0.0)

    def shape(self, rng: np.random.Generator) -> Points:
        """The points without noise."""
        from sklearn.datasets import make_moons  # lazy: slow to import

        return self.size * np.asarray(make_moons(self.n, shuffle=False)[0]) + self.move, None


@dataclass(frozen=True, kw_only=True)
class SCurve(Toy):
    """The letter S, two arcs of radius ``size``, with points at equal angles (scikit-learn's are at random angles)."""

    noise: Annotated[float, Ge(0)] = 0.075
    size: float = 1.5

    def shape(self, rng: np.random.Generator) -> Points:
        """The points without noise."""
        t = 3 * np.pi * (np.arange(self.n) + 0.5) / self.n - 1.5 * np.pi
        return self.size * np.stack([np.sin(t), np.sign(t) * (np.cos(t) - 1)], axis=1), None


def sobol_normals(n: int, seed: int) -> Tensor:
    """Standard normals ``[n, 2]`` that fill the plane evenly: scrambled Sobol points through the inverse of ndtr."""
    u = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    return torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)).float()


@dataclass(frozen=True)
class Column:
    """Source and data, and what the paper reports by method: ``(W2, its sd, NPE, its sd)``."""

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
def load_held_out(data: Toy, n: int, seed: int = 0) -> Tensor:
    """``n`` held-out points ``[n, 2]``, spread evenly, in random order (scipy's assignment needs it to be fast)."""
    x = replace(data, n=n, seed=seed).load("test").x
    return x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


@torch.no_grad()
def integrate(objective: Flow, net: EnsembleMLP, z: Tensor, steps: int = EULER_STEPS) -> tuple[Tensor, Tensor, Tensor]:
    """Samples from normals ``z`` ``[rows, 2]`` by Euler's method.

    Returns the samples ``[rows, 2]``, the energies of their trajectories ``int |v|^2 dt`` ``[rows]``, and the
    trajectories ``[steps + 1, rows, 2]``.
    """
    energy, trajectory = torch.zeros(len(z)), [objective.source(z, NO_COND)]

    def record(i: int, x: Tensor, prediction: Any) -> None:
        energy.add_(prediction.velocity.square().sum(1) / steps)
        trajectory.append(x)

    x = objective.generator({"net": net}, bind("ddim", steps, callback=record))(z, NO_COND)
    return x, energy, torch.stack(trajectory)


def measure(
    column: Column,
    coupling: Coupling,
    seeds: int,
    steps: int,
    test: int,
    progress: Callable[[int], None] = lambda step: None,
) -> tuple[dict[str, Any], np.ndarray]:
    """W2 and energy of each seed, and some trajectories of the first, ``[21, 128, 2]``."""
    data, held_out = column.data.load("train").x, load_held_out(column.data, test)
    objective = Flow(source=column.source, coupling=PerMember(coupling, seeds))
    torch.manual_seed(0)
    net = EnsembleMLP(seeds, 2, 64, 3, F.selu)
    start = time.process_time()
    train(objective, {"net": net}, draw_rows(data), steps=steps, batch=BATCH * seeds, lr=LR, progress=progress)
    seconds = time.process_time() - start
    z = torch.cat([sobol_normals(test, seed) for seed in range(seeds)])
    x, energy, trajectories = integrate(objective, net, z)
    values = {
        "w2": [wasserstein2(samples, held_out) for samples in x.chunk(seeds)],
        "energy": [float(e.mean()) for e in energy.chunk(seeds)],
        "training_seconds": round(seconds, 1),
    }
    return values, trajectories[:: EULER_STEPS // 20, :128].numpy().astype(np.float32)


def measure_limits(column: Column, test: int) -> dict[str, Any]:
    """``floor``, the W2 of data to data at this number; and ``cost``, the W2^2 of source and data."""
    held_out, other = load_held_out(column.data, test), load_held_out(column.data, test, seed=1)
    source = column.source(sobol_normals(test, 1000), NO_COND)
    return {"floor": [wasserstein2(other, held_out)], "cost": wasserstein2(source, held_out) ** 2}


# ----------------------------------------------------------------------------------------------------------- output
def save_picture(trajectories: Mapping[str, np.ndarray], path: Path) -> None:
    """Some trajectories: a row for each method, a column for each pair of distributions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # lazy: slow to import
    from matplotlib.figure import Figure

    fig = Figure(figsize=(3 * len(COLUMNS), 3 * len(METHODS)), dpi=80, layout="constrained")
    axes = fig.subplots(len(METHODS), len(COLUMNS), squeeze=False)
    for i, method in enumerate(METHODS):
        for j, name in enumerate(COLUMNS):
            ax, lines = axes[i, j], trajectories.get(f"{method} {name}")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_aspect("equal")
            ax.set_title(f"{method}, {name}", fontsize=9)
            if lines is not None:
                ax.plot(lines[..., 0], lines[..., 1], color="0.75", lw=0.4, zorder=1)
                ax.scatter(*lines[0].T, s=4, color="C0", zorder=2)
                ax.scatter(*lines[-1].T, s=4, color="C3", zorder=3)
    FigureCanvasAgg(fig)
    with atomic_write(path) as part:
        fig.savefig(part, format="png")


def print_tables(console: Console, results: ResultsFile, methods: list[str], columns: list[str]) -> None:
    """W2 and path energy, each beside the published numbers."""
    for key, title in (("w2", "W2 to the data"), ("npe", "normalised path energy")):
        table = make_table("", *columns, title=title)
        for method in methods:
            table.add_row(method, *[format_mean_sd(results.cells[f"{method} {c}"][key]) for c in columns])
            published = [COLUMNS[c].published[method][0 if key == "w2" else 2 :][:2] for c in columns]
            table.add_row("  published", *[f"{v:.3f}" + (f"±{sd:.3f}" if sd else "") for v, sd in published])
        if key == "w2":
            table.add_row("data to data", *[format_mean_sd(results.cells[c]["floor"]) for c in columns])
        console.print(table)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = ScriptParser(__doc__, "genkit bench toy")
    parser.add_argument("--seeds", type=int, default=5, help="networks of each cell, trained together")
    parser.add_argument("--steps", type=int, default=10_000, help="training steps")
    parser.add_argument("--test", type=int, default=TEST_SAMPLES, help="samples of each W2; the time grows cubically")
    parser.add_argument("--only", action="append", default=[], help="a method or a column; may be repeated")
    parser.add_argument("--out", type=Path, help="JSON; cells that it has are not measured again")
    parser.add_argument("--picture", type=Path, help="PNG of the trajectories")
    args = parser.parse_args(argv)
    known = [*METHODS, *COLUMNS]
    for name in args.only:
        if name not in known:
            raise ValueError(f"only: given {name!r}; allowed: {', '.join(known)}")
    check_ranges(args, seeds=MAX_SEEDS, steps=MAX_STEPS, test=MAX_TEST_SAMPLES)
    return args


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    console = make_console()
    settings = {"seeds": args.seeds, "steps": args.steps, "test": args.test}
    results = ResultsFile(args.out, {**settings, "batch": BATCH, "lr": LR, "euler": EULER_STEPS}, ["toy", *argv])
    methods = [method for method in METHODS if method in args.only] or list(METHODS)
    columns = [column for column in COLUMNS if column in args.only] or list(COLUMNS)
    cells = [(method, column) for column in columns for method in methods]
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        all_cells, task = bar.add_task("cells", total=len(cells)), bar.add_task("steps", total=args.steps)

        def report(step: int) -> None:
            bar.update(task, completed=step)

        for method, name in cells:
            bar.update(task, description=f"{method} {name}", completed=0)
            if name not in results:
                results.add(name, measure_limits(COLUMNS[name], args.test))
            if f"{method} {name}" not in results:
                values, trajectories = measure(
                    COLUMNS[name], METHODS[method], args.seeds, args.steps, args.test, report
                )
                cost = results.cells[name]["cost"]
                values["npe"] = [abs(energy - cost) / cost for energy in values["energy"]]
                results.add(f"{method} {name}", values, trajectories)
            bar.advance(all_cells)
    print_tables(console, results, methods, columns)
    if args.out:
        console.print(args.out)
    if args.picture:
        save_picture(results.arrays, args.picture)
        console.print(args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
