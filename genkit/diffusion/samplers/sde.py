"""Samplers that add noise."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from genkit.core import NO_COND, Cond, Denoiser, Noise, Prediction
from genkit.diffusion.checks import require
from genkit.diffusion.posterior import learned_variance, log_variance
from genkit.diffusion.samplers.grids import karras_levels
from genkit.diffusion.samplers.ode import Clock, heun, heun_step, posterior_variance
from genkit.diffusion.samplers.steps import Callback, Node, default_noise, nodes, nodes_at, renoise

MAX_DRIFT = (
    20.0  # of sde: on VP a step of 1 / 10 has 16; on cosine betas, which end at alpha = 5e-5, it would have 2,000
)
NONE_LEARNED = (
    "variance: given 'learned', but this model has learned none; allowed small, large; or train with "
    "--objective=ddpm --objective.learn-variance"
)


def ancestral(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    variance: Literal["small", "large", "learned"] | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDPM's ancestral sampling (Ho et al. 2020, algorithm 2) on any path and grid.

    The mean is that of ``q(x_s | x_t, x0)`` (eq. 7). ``variance`` is "small", the posterior's, right for a
    deterministic x0; "large", ``beta = sigma_t^2 - r^2 sigma_s^2``, right for normal data (section 3.2); or "learned",
    the model's own between these (Nichol & Dhariwal 2021, eq. 15; :mod:`genkit.diffusion.posterior`). None: learned if
    the model has one, else small. On paths with alpha(1) = 0 "large" is the same as "small" in the first step, in which
    beta would be all of sigma_t^2.
    """
    require("variance", repr(variance), "small, large, learned", variance in (None, "small", "large", "learned"))
    noise = noise or default_noise(x)
    for i, (a, b) in enumerate(pairwise(nodes(denoise.path, times))):
        prediction = denoise(x, a.time(x), cond)
        w = learned_variance(prediction) if variance in (None, "learned") else None
        if variance == "learned" and w is None:
            raise ValueError(NONE_LEARNED)
        var = posterior_variance(a[1:], b[1:])
        x = prediction.at(b.alpha, math.sqrt(max(0.0, b.sigma**2 - var)))
        if b.sigma > 0 and w is not None:
            t, s = (torch.full((len(x),), n.t, dtype=torch.float64, device=x.device) for n in (a, b))
            x = x + (log_variance(denoise.path, t, s, w) / 2).exp().to(x) * noise(x.shape[1:])
        elif b.sigma > 0:
            beta = a.sigma**2 - (a.alpha / b.alpha * b.sigma) ** 2 if b.alpha else 0.0
            spread = beta if variance == "large" and a.alpha > 0 else var
            x = x + math.sqrt(spread) * noise(x.shape[1:])
        if callback:
            callback(i, x, prediction)
    return x


def sde(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    eta: float = 1.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """The reverse SDE (Song et al. 2021, eq. 6) by Euler-Maruyama, in the chart.

    There ``g^2 = 2 tau / (1 - tau)`` and ``score = -x1 / tau``, so the drift is ``x1 - x0 - g^2 / 2 score``, whose last
    term compensates the noise. ``eta`` scales both: any value keeps the marginals (Song et al. 2021, appendix D.1), 0
    is DDIM. If g is infinite or huge (alpha near 0) the step is the limit ``alpha_b x0 + sigma_b z``, for Euler's would
    overshoot; the last step, to the data, is x0. At 50 uniform steps the samples' covariance was 6 times closer than in
    the clock of the VE SDE (measured).
    """
    require("eta", eta, "0 or more", eta >= 0)
    noise = noise or default_noise(x)
    for i, (a, b) in enumerate(pairwise(nodes(denoise.path, times))):
        prediction = denoise(x, a.time(x), cond)
        x = b.alpha * prediction.x0
        k = eta * (a.tau - b.tau) / max(1 - a.tau, 1e-300) if eta else 0.0  # g^2 h / (2 tau)
        if b.sigma > 0 and k <= MAX_DRIFT:
            x = x + (b.sigma - b.scale * k) * prediction.x1
            if eta:
                x = x + b.scale * math.sqrt(2 * a.tau * k) * noise(x.shape[1:])
        elif b.sigma > 0:
            x = x + b.sigma * noise(x.shape[1:])
        if callback:
            callback(i, x, prediction)
    return x


def churn(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.0,
    clock: Clock = "sigma",
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2) on any path, in noise levels ``sigma / alpha``.

    A node between ``s_tmin`` and ``s_tmax`` is first raised by the factor ``1 + min(s_churn / steps, sqrt(2) - 1)``,
    but not above the path's own end; then Heun's step goes to the next. Defaults: the paper's for ImageNet-64 (table
    5), but s_noise = 1, which keeps the marginals exact (its 1.003 makes up for a network's lost detail).
    """
    require("s_churn", s_churn, "0 or more", s_churn >= 0)
    require("s_tmin, s_tmax", (s_tmin, s_tmax), "0 <= s_tmin <= s_tmax", 0 <= s_tmin <= s_tmax)
    require("s_noise", s_noise, "above 0", s_noise > 0)
    require("clock", repr(clock), "tau, sigma", clock in ("tau", "sigma"))
    noise = noise or default_noise(x)
    grid = nodes(denoise.path, times)
    gamma = min(s_churn / (len(grid) - 1), math.sqrt(2) - 1)
    levels = [n.level * (1 + gamma) for n in grid[:-1]]
    raised = nodes_at(denoise.path, [s / (1 + s) if math.isfinite(s) else 1.0 for s in levels])
    for i, (a, b) in enumerate(pairwise(grid)):
        if s_tmin <= a.level <= s_tmax and raised[i].t > a.t and gamma > 0:
            x, a = renoise(x, a, raised[i], s_noise * noise(x.shape[1:])), raised[i]
        x, prediction = heun_step(denoise, x, a, b, cond, clock)
        if callback:
            callback(i, x, prediction)
    return x


def restart(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    low: float = 0.06,
    high: float = 0.3,
    repeats: int = 2,
    steps: int = 3,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Restart sampling (Xu et al. 2023, algorithm 1), with Heun's method in the chart.

    On reaching the noise level ``low``, ``repeats`` times: add noise up to the level ``high`` and solve the ODE down
    again in ``steps`` steps (rho = 7). Levels are ``sigma / alpha``; ``low`` becomes a node of the grid.
    """
    require("low, high", (low, high), "0 < low < high", 0 < low < high)
    require("repeats", repeats, "0 or more", repeats >= 0)
    require("steps", steps, "1 or more", steps >= 1)
    require("s_noise", s_noise, "above 0", s_noise > 0)
    grid = list(nodes(denoise.path, times))
    ends = grid[-1].level, grid[0].level
    require("low, high", (low, high), f"within the grid's levels, {ends[0]:.3g} … {ends[1]:.3g}",
            ends[0] < low and high <= ends[1])  # fmt: skip
    noise = noise or default_noise(x)
    loop = [*nodes_at(denoise.path, [s / (1 + s) for s in karras_levels(steps + 1, low, high)])]
    count = itertools.count()

    def count_step(_: int, x: Tensor, prediction: Prediction) -> None:
        if callback:
            callback(next(count), x, prediction)

    def solve(x: Tensor, part: list[Node]) -> Tensor:
        times = torch.tensor([n.t for n in part], dtype=torch.float64)
        return heun(denoise, x, times, cond, callback=count_step)

    x = solve(x, [n for n in grid if n.t > loop[-1].t] + loop[-1:])
    for _ in range(repeats):
        x = solve(renoise(x, loop[-1], loop[0], s_noise * noise(x.shape[1:])), loop)
    return solve(x, loop[-1:] + [n for n in grid if n.t < loop[-1].t])
