"""Deterministic samplers of one step each: Euler's and Heun's method on ``du/dtau = x1 - x0``."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from genkit.core import NO_COND, Cond, Denoiser, Noise
from genkit.sampling.steps import Callback, ask, fresh, nodes


def posterior_variance(t: tuple[float, float], s: tuple[float, float]) -> float:
    """``Var[x_s | x_t, x0]`` for ``(alpha, sigma)`` at t > s: Ho et al. 2020, eq. 7, for any Gaussian path.

    ``x_t = r x_s + noise`` with ``r = alpha_t / alpha_s``; so ``sigma_s^2 (sigma_t^2 - r^2 sigma_s^2) / sigma_t^2``.
    """
    r = t[0] / s[0] if s[0] else 0.0
    return max(0.0, s[1] ** 2 * (1 - (r * s[1] / t[1]) ** 2))


def ddim(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12) from ``x`` at ``times[0]`` to ``times[-1]``.

    ``eta = 0`` is deterministic: Euler's method of rectified flow in the chart. ``eta = 1`` is ancestral sampling.
    """
    noise = noise or fresh(x)
    for i, (a, b) in enumerate(pairwise(nodes(denoise.path, times))):
        prediction = ask(denoise, x, a, cond)
        var = eta**2 * posterior_variance(a[1:], b[1:]) if eta else 0.0
        x = b.alpha * prediction.x0 + math.sqrt(max(0.0, b.sigma**2 - var)) * prediction.x1
        if var:
            x = x + math.sqrt(var) * noise(x.shape[1:])
        if callback:
            callback(i, x, prediction)
    return x


def heun(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, algorithm 1), in the chart. Two evaluations a step, one in the
    last, which ends where no denoiser may be asked."""
    grid = nodes(denoise.path, times)
    for i, (a, b) in enumerate(pairwise(grid)):
        prediction = ask(denoise, x, a, cond)
        h, u, slope = b.tau - a.tau, x / a.scale, prediction.x1 - prediction.x0
        x = b.scale * (u + h * slope)
        if b.t > 0:
            corrected = ask(denoise, x, b, cond)
            x = b.scale * (u + h / 2 * (slope + corrected.x1 - corrected.x0))
        if callback:
            callback(i, x, prediction)
    return x
