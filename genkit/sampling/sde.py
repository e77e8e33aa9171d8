"""Stochastic samplers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor

from genkit.core import NO_COND, Cond, Denoiser, Noise
from genkit.sampling.ode import posterior_variance
from genkit.sampling.steps import Callback, ask, fresh, nodes


def ancestral(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    variance: Literal["small", "large"] = "small",
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDPM's ancestral sampling (Ho et al. 2020, algorithm 2) on any path and grid.

    The mean is that of ``q(x_s | x_t, x0)`` (eq. 7); its variance is that of the posterior ("small", the choice for a
    deterministic x0) or ``beta = sigma_t^2 - r^2 sigma_s^2`` ("large", for normal data; section 3.2). On paths with
    alpha(1) = 0 "large" is the same as "small" in the first step, where beta would be the whole of sigma_t^2.
    """
    noise = noise or fresh(x)
    for i, (a, b) in enumerate(pairwise(nodes(denoise.path, times))):
        prediction = ask(denoise, x, a, cond)
        var = posterior_variance(a[1:], b[1:])
        x = b.alpha * prediction.x0 + math.sqrt(max(0.0, b.sigma**2 - var)) * prediction.x1
        if b.sigma > 0:
            beta = a.sigma**2 - (a.alpha / b.alpha * b.sigma) ** 2 if b.alpha else 0.0
            spread = beta if variance == "large" and a.alpha > 0 else var
            x = x + math.sqrt(spread) * noise(x.shape[1:])
        if callback:
            callback(i, x, prediction)
    return x
