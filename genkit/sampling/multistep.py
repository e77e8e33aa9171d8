"""Samplers that remember: one evaluation a step, second order and up."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from genkit.core import NO_COND, Cond, Denoiser, Noise
from genkit.sampling.steps import Callback, Node, ask, nodes


def _lambda(n: Node) -> float:
    """Half log-SNR, ``log(alpha / sigma)``."""
    return math.log(n.alpha / n.sigma) if n.alpha > 0 else -math.inf


def dpmpp_2m(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation a step.

    First order in the first step and, where it ends at 0 (infinite log-SNR), in the last.
    """
    grid, last, h_last = nodes(denoise.path, times), None, 0.0
    for i, (a, b) in enumerate(pairwise(grid)):
        prediction = ask(denoise, x, a, cond)
        d = prediction.x0
        if b.sigma > 0:
            h = _lambda(b) - _lambda(a)
            if last is not None and math.isfinite(h_last):
                d = d + (d - last) * (h / (2 * h_last))
            x = (b.sigma / a.sigma) * x - b.alpha * math.expm1(-h) * d
            h_last = h
        else:
            x = b.alpha * d
        last = prediction.x0
        if callback:
            callback(i, x, prediction)
    return x
