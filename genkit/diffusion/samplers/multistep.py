"""Multistep samplers: one evaluation a step and second order or more, in the half log-SNR ``lambda``.

A path that starts in pure noise has its first node at lambda = -inf. The first step is then the exact limit (DDIM's,
for an infinite h), and that node is left out of all differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from genkit.core import NO_COND, Cond, Denoiser, Noise
from genkit.diffusion.checks import require
from genkit.diffusion.samplers.steps import Callback, Node, default_noise, nodes

Past = Sequence[tuple[float, Tensor]]  # (lambda, predicted data), newest first


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

    First order in the first step and, if the grid ends at 0 (infinite log-SNR), in the last.
    """
    return _dpmpp(denoise, x, times, cond, 2, 0.0, noise, callback)


def dpmpp_3m(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    curvature: float = 1.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(3M) (Lu et al. 2022, eq. 11 with k = 3 and backward differences): third order.

    ``curvature`` multiplies the second derivative of the predicted data. 1 is Taylor's, of third order. The authors'
    code, k-diffusion and diffusers have 0.5, a divided difference without its factor 2!, which is of second order.
    Below 15 steps the step before the last is of second order, as in diffusers (``lower_order_final``).
    """
    return _dpmpp(denoise, x, times, cond, 3, 0.0, noise, callback, curvature)


def dpmpp_sde(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    eta: float = 1.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix D and eq. 18). ``eta`` scales the noise; at 0 it is the 2M."""
    require("eta", eta, "0 or more", eta >= 0)
    return _dpmpp(denoise, x, times, cond, 2, eta, noise, callback)


def _dpmpp(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond,
    order: int,
    eta: float,
    noise: Noise | None,
    callback: Callback | None,
    curvature: float = 1.0,
) -> Tensor:
    """``x_b = sigma_b/sigma_a e^(-eta h) x_a + alpha_b I + sigma_b sqrt(1 - e^(-2 eta h)) z``, with I of _integral."""
    noise = noise or default_noise(x)
    grid = nodes(denoise.path, times)
    past: list[tuple[float, Tensor]] = []
    before_last = len(grid) - 3 if grid[-1].sigma == 0 and len(grid) <= 15 else -1
    for i, (a, b) in enumerate(pairwise(grid)):
        prediction = denoise(x, a.time(x), cond)
        past = [(a.half_log_snr, prediction.x0), *(p for p in past if math.isfinite(p[0]))][:order]
        if b.sigma > 0:
            h = b.half_log_snr - a.half_log_snr
            decay = math.exp(-eta * h) if eta else 1.0
            used = past[:2] if i == before_last else past
            x = torch.add((b.sigma / a.sigma * decay) * x, _integral(used, h, 1 + eta, curvature), alpha=b.alpha)
            if eta:
                x = x + b.sigma * math.sqrt(-math.expm1(-2 * eta * h)) * noise(x.shape[1:])
        else:
            x = b.alpha * prediction.x0
        if callback:
            callback(i, x, prediction)
    return x


def _integral(past: Past, h: float, k: float, curvature: float) -> Tensor:
    """``k int_0^h e^(-k (h - s)) x0(lambda_a + s) ds``, with x0 extrapolated from the past."""
    (l0, m0), *older = past
    phi0 = -math.expm1(-k * h)
    if not older:
        return phi0 * m0
    l1, m1 = older[0]
    slope = (m0 - m1) / (l0 - l1)
    if len(older) == 1:
        return phi0 * (m0 + h / 2 * slope)  # the midpoint form of algorithm 2
    l2, m2 = older[1]
    second = (2 / (l0 - l2)) * (slope - (m1 - m2) / (l1 - l2))
    assert k == 1, "the third order is for the ODE only"
    phi1 = h - phi0
    phi2 = h**2 / 2 - phi1
    return phi0 * m0 + phi1 * (slope + (l0 - l1) / 2 * second) + (curvature * phi2) * second


def unipc(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    order: Literal[1, 2, 3] = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2, data prediction): UniP of ``order``, each step corrected by UniC.

    The corrector uses the evaluation of the next step, so it costs none; the last step is not corrected. B(h) is
    ``e^h - 1`` ("bh2") or h ("bh1"). If the grid ends at the data, the last steps are of lower order.
    """
    require("order", order, "1, 2, 3", order in (1, 2, 3))
    require("variant", repr(variant), "bh1, bh2", variant in ("bh1", "bh2"))
    grid = nodes(denoise.path, times)
    past: list[tuple[float, Tensor]] = []
    before = x  # x at the beginning of the step before
    for i, (a, b) in enumerate(pairwise(grid)):
        prediction = denoise(x, a.time(x), cond)
        if i:
            x = _unified(before, grid[i - 1], a, past, prediction.x0, variant)
        past = [(a.half_log_snr, prediction.x0), *past][:order]
        p = min(order, i + 1, len(grid) - 1 - i if grid[-1].sigma == 0 else order)
        before, x = x, _unified(x, a, b, past[:p], None, variant)
        if callback:
            callback(i, x, prediction)
    return x


def _unified(x: Tensor, a: Node, b: Node, past: Past, new: Tensor | None, variant: str) -> Tensor:
    """A step from a to b: UniP, or UniC with the predicted data ``new`` at b (Zhao et al. 2023, theorem 3.1).

    With q differences ``D_k = (m_k - m_0) / r_k`` the weights solve ``sum_k rho_k r_k^(j-1) = j! h phi_(j+1) / B(h)``
    for j = 1 .. q; one difference alone gets 1/2 (the paper's appendix F).
    """
    h, (l0, m0) = b.half_log_snr - a.half_log_snr, past[0]
    phi = math.expm1(-h)
    differences = [((lk - l0) / h, mk) for lk, mk in past[1:] if math.isfinite(lk)]
    if new is not None:
        differences.append((1.0, new))
    x = (b.sigma / a.sigma) * x - b.alpha * phi * m0
    if not differences:
        return x
    scale = -h if variant == "bh1" and math.isfinite(h) else phi
    if len(differences) == 1:
        weights = [0.5]
    else:
        right, term = [], phi / -h - 1
        for j in range(1, len(differences) + 1):
            right.append(math.factorial(j) * term / scale)
            term = term / -h - 1 / math.factorial(j + 1)
        r = torch.tensor([r for r, _ in differences], dtype=torch.float64)
        powers = r ** torch.arange(len(r), dtype=torch.float64)[:, None]
        weights = torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64)).tolist()
    for weight, (r, m) in zip(weights, differences, strict=True):
        x = x - (b.alpha * scale * weight / r) * (m - m0)
    return x
