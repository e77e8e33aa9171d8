"""What should the network predict? Data on a plane in D dimensions, and the same small network for all answers.

    genkit bench prediction [--seeds 3] [--steps N] [--only D] [--out FILE.json] [--picture FILE.png]

The toy of Li & He 2025, "Back to Basics: Let Denoising Generative Models Denoise" (section 3, figure 2): a spiral in
the plane, carried into D = 2, 8, 16, 512 dimensions by a fixed random map with orthonormal columns; a perceptron of
five layers, 256 wide, with ReLU; it predicts x0, eps or the velocity, and the loss is always the velocity's. Data lie
on the plane, noise and velocity do not: 256 numbers cannot carry 512 of noise, so at D = 512 only x0-prediction is
left.

"W2" is the exact 2-Wasserstein distance to the data in the plane, of samples projected back onto it; "off" the mean
squared distance of samples from the plane, beside the data's own mean square, which is 2.

eps-prediction divides by alpha, which is kept at 0.05 or more, for all three alike: where the paper clips.
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
from rich.table import Table
from torch import Tensor

from benchmarks.stack import Record, Stack, mean_sd, rows, train
from genkit.core import NO_COND
from genkit.core.files import atomic_write
from genkit.data.toy import SwissRoll
from genkit.diffusion.samplers import bind
from genkit.evaluation.metrics import wasserstein2 as w2
from genkit.objectives.matching.flow import Flow
from genkit.objectives.matching.matching import PredictionName

PREDICTIONS: tuple[PredictionName, ...] = ("x0", "eps", "velocity")
DIMS = (2, 8, 16, 512)
BATCH, LR, EULER, TEST = 128, 2e-3, 50, 1000


@dataclass(frozen=True)
class Held:
    """The straight path up to where ``alpha = least``."""

    least: float = 0.05

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.least) * t

    def sigma(self, t: Tensor) -> Tensor:
        return t


def plane(dim: int) -> Tensor:
    """A random map ``[2, dim]`` from the plane, its rows orthonormal; the same at every call."""
    g = torch.Generator().manual_seed(dim)
    return torch.linalg.qr(torch.randn(dim, 2, generator=g, dtype=torch.float64))[0].T.float()


def measure(
    prediction: PredictionName,
    dim: int,
    seeds: int,
    steps: int,
    progress: Callable[[int], None] = lambda step: None,
    width: int = 256,
    test: int = TEST,
    lr: float = LR,
) -> tuple[dict[str, Any], np.ndarray]:
    """W2 in the plane and the mean square off it, of each seed; and the first one's samples in the plane."""
    up = plane(dim)
    spiral = SwissRoll(noise=0.0)
    objective = Flow(path=Held(), prediction=prediction, loss_space="velocity")
    torch.manual_seed(0)
    net = Stack(seeds, dim, width, 4, F.relu)
    begin = time.process_time()
    train(objective, net, rows(spiral.load("train").x @ up), steps=steps, batch=BATCH * seeds, lr=lr, progress=progress)
    trained = time.process_time() - begin
    z = torch.randn(seeds * test, dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = objective.generator({"net": net}, bind("ddim", EULER))(z, NO_COND)
    flat = x @ up.T
    off = (x - flat @ up).square().sum(1)
    held_out = spiral.load("test").x
    values = {
        "w2": [w2(p, held_out[i * test : (i + 1) * test]) for i, p in enumerate(flat.chunk(seeds))],
        "off": [float(p.mean()) for p in off.chunk(seeds)],
        "training_seconds": round(trained, 1),
    }
    return values, flat[:test].numpy()


def picture(points: Mapping[str, np.ndarray], path: Path) -> None:
    """Samples projected back: a row a prediction, a column a dimension, the data first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = SwissRoll(noise=0.0).load("test").x[:TEST].numpy()
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


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="genkit bench prediction", description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="networks of each cell, trained side by side")
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--only", type=int, action="append", default=[], help=f"a dimension of {DIMS}; may be repeated")
    parser.add_argument("--out", type=Path, help="JSON; cells that are there are not measured again")
    parser.add_argument("--picture", type=Path, help="PNG of the samples")
    args = parser.parse_args(argv)
    for d in args.only:
        if d not in DIMS:
            raise ValueError(f"only: given {d}; allowed: {', '.join(map(str, DIMS))}")
    for name, most in (("seeds", 100), ("steps", 10**7)):
        if not 1 <= getattr(args, name) <= most:
            raise ValueError(f"{name}: given {getattr(args, name)}; allowed 1 to {most}")
    torch.set_num_threads(1)
    console = Console()
    settings = {"seeds": args.seeds, "steps": args.steps, "batch": BATCH, "lr": LR, "euler": EULER, "test": TEST}
    record = Record(args.out, settings, ["prediction", *argv])
    dims = [d for d in DIMS if d in args.only] or list(DIMS)
    cells: list[tuple[PredictionName, int]] = [(p, d) for d in reversed(dims) for p in PREDICTIONS]
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        whole_task, task = bar.add_task("cells", total=len(cells)), bar.add_task("steps", total=args.steps)
        for prediction, d in cells:
            bar.update(task, description=f"{prediction}, D = {d}", completed=0)
            if f"{prediction} {d}" not in record:
                values, points = measure(
                    prediction, d, args.seeds, args.steps, lambda step: bar.update(task, completed=step)
                )
                record.add(f"{prediction} {d}", values, points)
            bar.advance(whole_task)
    for key, title in (
        ("w2", "W2 to the data, in the plane"),
        ("off", "mean square off the plane (in it: 2)"),
    ):
        table = Table("prediction", *[f"D = {d}" for d in dims], title=title)
        for p in PREDICTIONS:
            table.add_row(p, *[mean_sd(record.cells[f"{p} {d}"][key]) for d in dims])
        console.print(table)
    if args.out:
        console.print(args.out)
    if args.picture:
        picture(record.arrays, args.picture)
        console.print(args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
