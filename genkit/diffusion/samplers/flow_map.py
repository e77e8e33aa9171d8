"""Samplers of flow maps: each step is one jump of the model to the next time, in place of a step of a solver."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from genkit.core import NO_COND, Cond, Denoiser, Noise
from genkit.diffusion.checks import require
from genkit.diffusion.flow_map import TARGET
from genkit.diffusion.paths import shared_time
from genkit.diffusion.samplers.steps import Callback, default_noise, interpolate, nodes, renoise


def flow_map(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    gamma: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Jump from each time to the next, one evaluation a step (Kim et al. 2024, algorithm 3; Zheng et al. 2024, TCD).

    ``gamma`` is the share of each jump's target time by which it overshoots towards the data, before noise leads back:
    0 is deterministic, 1 is multistep consistency sampling (Song et al. 2023, algorithm 1).
    """
    require("gamma", gamma, "0 … 1", 0 <= gamma <= 1)
    noise = noise or default_noise(x)
    grid = nodes(denoise.path, times)
    for i, (a, b) in enumerate(pairwise(grid)):
        end = nodes(denoise.path, times.new_tensor([1, (1 - gamma) * b.t]))[1] if gamma else b
        target = shared_time(end.t, len(x), x.dtype, x.device)
        prediction = denoise(x, a.time(x), {**cond, TARGET: target})
        x = interpolate(end, prediction)
        if end.t < b.t:
            x = renoise(x, end, b, noise(x.shape[1:]))
        if callback:
            callback(i, x, prediction)
    return x


def consistency(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): jump to the data, then add noise for the next.

    All that a model needs which has learned jumps to the data only.
    """
    return flow_map(denoise, x, times, cond, gamma=1.0, noise=noise, callback=callback)
