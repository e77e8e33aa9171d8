"""A sampler in one function and one line: the explicit midpoint method (Runge 1895)."""

from itertools import pairwise

from torch import Tensor

from genkit.core import NO_COND, Cond, Denoiser, Noise
from genkit.diffusion.samplers import SamplerInfo
from genkit.diffusion.samplers.steps import Callback, nodes, nodes_at


def midpoint(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Integrate ``du/dtau = x1 - x0`` by the slope in the middle of each step. Two evaluations a step."""
    grid = nodes(denoise.path, times)
    middles = nodes_at(denoise.path, [(a.tau + b.tau) / 2 for a, b in pairwise(grid)])
    for i, (a, b, middle) in enumerate(zip(grid, grid[1:], middles, strict=False)):
        prediction = denoise(x, a.time(x), cond)
        u = x / a.scale
        half_way = u + (middle.tau - a.tau) * prediction.velocity
        slope = denoise(middle.scale * half_way, middle.time(x), cond).velocity
        x = b.scale * (u + (b.tau - a.tau) * slope)
        if callback:
            callback(i, x, prediction)
    return x


ENTRY = SamplerInfo(midpoint, lambda n: 2 * n, order=2)
