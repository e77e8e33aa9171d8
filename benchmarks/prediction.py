"""What should the network predict? Data on a plane in D dimensions, and the same small network for all predictions.

    genkit bench prediction [--seeds 3] [--steps N] [--only D] [--out FILE.json] [--picture FILE.png]

The toy of Li & He 2025, "Back to Basics: Let Denoising Generative Models Denoise" (section 3, figure 2): a spiral in
the plane, mapped into D = 2, 8, 16, 512 dimensions by a fixed random matrix with orthonormal columns; an MLP of five
layers, 256 wide, with ReLU; it predicts x0, eps or the velocity, and the loss is always the velocity's. Data are on the
plane, noise and velocity are not: 256 numbers cannot carry 512 of noise, so at D = 512 only x0-prediction works.

"W2" is the exact 2-Wasserstein distance to the data in the plane, of samples projected onto it; "off" the mean squared
distance of samples from the plane, beside the data's own mean square, which is 2.

eps-prediction divides by alpha, which is kept at 0.05 or more for all three alike, where the paper clips.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks.ensemble import EnsembleMLP, draw_rows, train
from benchmarks.results import MAX_SEEDS, MAX_STEPS, ResultsFile, check_ranges, format_mean_sd, make_console, make_table
from genkit.cli.scripts import ScriptParser
from genkit.core import NO_COND
from genkit.core.files import atomic_write
from genkit.data.toy import SwissRoll
from genkit.diffusion.samplers import bind
from genkit.evaluation.metrics import wasserstein2
from genkit.objectives.matching.flow import Flow
from genkit.objectives.matching.matching import PredictionName

PREDICTIONS: tuple[PredictionName, ...] = ("x0", "eps", "velocity")
DIMS = (2, 8, 16, 512)
BATCH, LR = 128, 2e-3
EULER_STEPS, TEST_SAMPLES = 50, 1000


@dataclass(frozen=True)
class BoundedPath:
    """The linear path up to the time at which ``alpha = least``."""

    least: float = 0.05

    def alpha(self, t: Tensor) -> Tensor:
        """From 1 down to ``least``."""
        return 1 - (1 - self.least) * t

    def sigma(self, t: Tensor) -> Tensor:
        """From 0 to 1."""
        return t


def plane_basis(dim: int) -> Tensor:
    """A fixed random matrix ``[2, dim]`` with orthonormal rows, which maps the plane into ``dim`` dimensions."""
    g = torch.Generator().manual_seed(dim)
    return torch.linalg.qr(torch.randn(dim, 2, generator=g, dtype=torch.float64))[0].T.float()


def measure(
    prediction: PredictionName,
    dim: int,
    seeds: int,
    steps: int,
    progress: Callable[[int], None] = lambda step: None,
    width: int = 256,
    test: int = TEST_SAMPLES,
    lr: float = LR,
) -> tuple[dict[str, Any], np.ndarray]:
    """W2 in the plane and the mean square off it, of each seed; and the first seed's samples in the plane."""
    basis = plane_basis(dim)
    spiral = SwissRoll(noise=0.0)
    objective = Flow(path=BoundedPath(), prediction=prediction, loss_space="velocity")
    torch.manual_seed(0)
    net = EnsembleMLP(seeds, dim, width, 4, F.relu)
    start = time.process_time()
    draw = draw_rows(spiral.load("train").x @ basis)
    train(objective, {"net": net}, draw, steps=steps, batch=BATCH * seeds, lr=lr, progress=progress)
    seconds = time.process_time() - start
    z = torch.randn(seeds * test, dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = objective.generator({"net": net}, bind("ddim", EULER_STEPS))(z, NO_COND)
    flat = x @ basis.T
    off = (x - flat @ basis).square().sum(1)
    held_out = spiral.load("test").x
    values = {
        "w2": [wasserstein2(p, held_out[i * test : (i + 1) * test]) for i, p in enumerate(flat.chunk(seeds))],
        "off": [float(p.mean()) for p in off.chunk(seeds)],
        "training_seconds": round(seconds, 1),
    }
    return values, flat[:test].numpy()


def save_picture(points: Mapping[str, np.ndarray], path: Path) -> None:
    """Samples projected onto the plane: a row for each prediction, a column for each dimension, the data first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # lazy: slow to import
    from matplotlib.figure import Figure

    data = SwissRoll(noise=0.0).load("test").x[:TEST_SAMPLES].numpy()
    fig = Figure(figsize=(2.2 * (len(DIMS) + 1), 2.3 * len(PREDICTIONS)), dpi=80, layout="constrained")
    axes = fig.subplots(len(PREDICTIONS), len(DIMS) + 1, squeeze=False)
    for row, prediction in zip(axes, PREDICTIONS, strict=True):
        shown = {"data": data} | {f"{prediction}, D = {d}": points.get(f"{prediction} {d}") for d in DIMS}
        for ax, (title, p) in zip(row, shown.items(), strict=True):
            ax.set_title(title, fontsize=9)
            ax.set(xticks=[], yticks=[], xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")
            if p is not None:
                ax.scatter(*p.T, s=1, color="C7" if title == "data" else "C0")
    FigureCanvasAgg(fig)
    with atomic_write(path) as part:
        fig.savefig(part, format="png")


def print_tables(console: Console, results: ResultsFile, dims: list[int]) -> None:
    """W2 and the mean square off the plane."""
    titles = {"w2": "W2 to the data, in the plane", "off": "mean square off the plane (in it: 2)"}
    for key, title in titles.items():
        table = make_table("prediction", *[f"D = {d}" for d in dims], title=title)
        for prediction in PREDICTIONS:
            table.add_row(prediction, *[format_mean_sd(results.cells[f"{prediction} {d}"][key]) for d in dims])
        console.print(table)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = ScriptParser(__doc__, "genkit bench prediction")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each cell, trained together")
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--only", type=int, action="append", default=[], help=f"a dimension of {DIMS}; may be repeated")
    parser.add_argument("--out", type=Path, help="JSON; cells that it has are not measured again")
    parser.add_argument("--picture", type=Path, help="PNG of the samples")
    args = parser.parse_args(argv)
    for d in args.only:
        if d not in DIMS:
            raise ValueError(f"only: given {d}; allowed: {', '.join(map(str, DIMS))}")
    check_ranges(args, seeds=MAX_SEEDS, steps=MAX_STEPS)
    return args


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    console = make_console()
    settings = {"seeds": args.seeds, "steps": args.steps, "batch": BATCH, "lr": LR}
    settings |= {"euler": EULER_STEPS, "test": TEST_SAMPLES}
    results = ResultsFile(args.out, settings, ["prediction", *argv])
    dims = [d for d in DIMS if d in args.only] or list(DIMS)
    cells: list[tuple[PredictionName, int]] = [(p, d) for d in reversed(dims) for p in PREDICTIONS]
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        all_cells, task = bar.add_task("cells", total=len(cells)), bar.add_task("steps", total=args.steps)

        def report(step: int) -> None:
            bar.update(task, completed=step)

        for prediction, d in cells:
            bar.update(task, description=f"{prediction}, D = {d}", completed=0)
            if f"{prediction} {d}" not in results:
                values, points = measure(prediction, d, args.seeds, args.steps, report)
                results.add(f"{prediction} {d}", values, points)
            bar.advance(all_cells)
    print_tables(console, results, dims)
    if args.out:
        console.print(args.out)
    if args.picture:
        save_picture(results.arrays, args.picture)
        console.print(args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
