"""The convergence order of every deterministic solver, and the error of the likelihood, on a mixture in closed form.

    genkit bench order [--out FILE.json]

The error is the mean distance, in the chart, to the solution of 1024 RK4 steps from tau = 0.98 to 0.02; the order is
log2 of the factor by which it falls from 128 to 256 steps. The likelihood's is the mean of ``|log p - log p exact|`` in
nats.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.mixture import F64, ExactDenoiser, three
from benchmarks.results import make_console, make_table
from genkit import __version__
from genkit.cli.scripts import ScriptParser
from genkit.core import ProbabilityPath
from genkit.core.files import write_text
from genkit.diffusion.paths import PATHS, Linear, chart, times_at
from genkit.diffusion.samplers import SAMPLERS, uniform
from genkit.diffusion.samplers.likelihood import log_prob

SOLVERS = [name for name, info in SAMPLERS.items() if info.order]  # fixed steps, no noise
STEPS = (64, 128, 256)
REFERENCE_STEPS = 1024
LIKELIHOOD_STEPS = 256


def solve(sampler: str, path: ProbabilityPath, z: Tensor, steps: int) -> Tensor:
    """The solution ``[N, 2]`` at tau = 0.02, in the chart, from ``z`` at tau = 0.98."""
    times = times_at(path, torch.linspace(0.98, 0.02, steps + 1, dtype=F64))
    scale = chart(path, times)[1]
    return SAMPLERS[sampler].function(ExactDenoiser(three(), path), scale[0] * z, times) / scale[-1]


def likelihood_error(path: ProbabilityPath, x: Tensor) -> float:
    """The mean error in nats of the log-likelihood of ``x`` ``[N, 2]``."""
    times = uniform(LIKELIHOOD_STEPS)(path)
    estimate = log_prob(ExactDenoiser(three(), path), x, times=times)
    return float((estimate - three().log_prob(x)).abs().mean())


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    parser = ScriptParser(__doc__, "genkit bench order")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON, with the settings")
    args = parser.parse_args(argv)
    console = make_console()
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    truth = solve("rk4", Linear(), z, REFERENCE_STEPS)
    errors: dict[str, dict[str, list[float]]] = {}
    jobs = [(solver, path) for solver in SOLVERS for path in PATHS]
    for solver, path in track(jobs, "solving", console=console, disable=not console.is_terminal):
        solutions = [solve(solver, PATHS[path](), z, n) for n in STEPS]
        errors.setdefault(solver, {})[path] = [float((x - truth).norm(dim=1).mean()) for x in solutions]
    orders = {}
    for solver, by_path in errors.items():
        orders[solver] = {path: math.log2(e[-2] / e[-1]) for path, e in by_path.items()}
    likelihood = {path: likelihood_error(PATHS[path](), three().sample(64)[0]) for path in PATHS}
    table = make_table("solver", "lowest order", "and highest, of all paths", *[f"error, {n} steps" for n in STEPS])
    for solver, by_path in orders.items():
        sizes = [f"{e:.1e}" for e in errors[solver]["linear"]]
        table.add_row(solver, f"{min(by_path.values()):.2f}", f"{max(by_path.values()):.2f}", *sizes)
    console.print(table)
    shown = ", ".join(f"{path} {e:.1e}" for path, e in likelihood.items())
    console.print(f"log-likelihood with {LIKELIHOOD_STEPS} Heun steps, mean error in nats: {shown}")
    if args.out:
        results = {"order": orders, "error": errors, "likelihood_error_nats": likelihood, "steps": STEPS}
        results |= {"likelihood_steps": LIKELIHOOD_STEPS, "genkit": __version__, "torch": torch.__version__}
        write_text(args.out, json.dumps(results, indent=1) + "\n")
        console.print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
