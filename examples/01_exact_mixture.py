"""A sampler needs no network. Here a Gaussian mixture's own posterior mean is the denoiser, so the truth is known.

    python examples/01_exact_mixture.py

Prints how far each deterministic sampler is from the exact solution as its steps double: the error of a first-order
method halves, that of a second-order method falls to a quarter. On every path the same numbers come out, because all
of them solve the same equation in the chart (see genkit/diffusion/paths.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from genkit import SAMPLERS, VP, Linear, Prediction, ProbabilityPath
from genkit.cli.scripts import ScriptParser, run_script
from genkit.core import Cond
from genkit.diffusion.paths import chart, times_at

MEANS = torch.tensor([[1.0, 1.0], [-1.0, 0.5], [0.0, -1.5]], dtype=torch.float64)
STD = 0.3  # of each component


@dataclass(frozen=True)
class Exact:
    """``E[x0 | x]`` of the mixture ``mean_k N(MEANS[k], STD^2)``, for ``x = alpha x0 + sigma x1``."""

    path: ProbabilityPath

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        variance = (alpha * STD) ** 2 + sigma**2
        offset = x[:, None] - alpha[..., None] * MEANS  # [B, K, 2]
        weight = torch.softmax(-(offset**2).sum(-1) / (2 * variance), dim=1)
        each = MEANS + (alpha * STD**2 / variance)[..., None] * offset  # E[x0 | x, k]
        x0 = (weight[..., None] * each).sum(1)
        return Prediction(x0, (x - alpha * x0) / sigma)


def solve(path: ProbabilityPath, sampler: str, steps: int, z: Tensor) -> Tensor:
    """Solve from chart time 0.98 to 0.02, in the chart's own scale, in which all paths have the same solution."""
    times = times_at(path, torch.linspace(0.98, 0.02, steps + 1, dtype=torch.float64))
    scale = chart(path, times)[1]
    return SAMPLERS[sampler].function(Exact(path), scale[0] * z, times) / scale[-1]


def main() -> None:
    ScriptParser(__doc__).parse_args()
    z = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = solve(Linear(), "heun", 1024, z)
    print(f"{'path':<8}{'sampler':<10}" + "".join(f"{n:>12}" for n in (16, 32, 64, 128)) + "   order")
    for path in (Linear(), VP()):
        for sampler in ("ddim", "heun", "dpmpp_2m"):
            errors = [float((solve(path, sampler, n, z) - truth).norm(dim=1).mean()) for n in (16, 32, 64, 128)]
            order = math.log2(errors[-2] / errors[-1])
            print(f"{type(path).__name__:<8}{sampler:<10}" + "".join(f"{e:12.2e}" for e in errors) + f"{order:8.2f}")


if __name__ == "__main__":
    run_script(main)
