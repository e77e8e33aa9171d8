"""One-step samplers: Runge-Kutta methods on ``du/dtau = x1 - x0``."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from genkit.core import NO_COND, Cond, Denoiser, Noise, Prediction
from genkit.diffusion.checks import require
from genkit.diffusion.samplers.steps import (
    Callback,
    Node,
    default_noise,
    interpolate,
    nodes,
    nodes_at,
)

Clock = Literal["tau", "sigma"]


def posterior_variance(t: tuple[float, float], s: tuple[float, float]) -> float:
    """``Var[x_s | x_t, x0]`` from ``(alpha, sigma)`` at t > s: Ho et al. 2020, eq. 7, for any Gaussian path.

    ``x_t = r x_s + noise`` with ``r = alpha_t / alpha_s``, so it is ``sigma_s^2 (sigma_t^2 - r^2 sigma_s^2) /
    sigma_t^2``.
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
    require("eta", eta, "0 … 1", 0 <= eta <= 1)
    noise = noise or default_noise(x)
    for i, (a, b) in enumerate(pairwise(nodes(denoise.path, times))):
        prediction = denoise(x, a.time(x), cond)
        var = eta**2 * posterior_variance(a[1:], b[1:]) if eta else 0.0
        x = interpolate(b._replace(sigma=math.sqrt(max(0.0, b.sigma**2 - var))) if var else b, prediction)
        if var:
            x = x + math.sqrt(var) * noise(x.shape[1:])
        if callback:
            callback(i, x, prediction)
    return x


def heun_step(
    denoise: Denoiser, x: Tensor, a: Node, b: Node, cond: Cond, clock: Clock = "tau"
) -> tuple[Tensor, Prediction]:
    """One step of Heun's method from a to b, by the trapezoid rule in ``clock``; Euler's if b is the data.

    "tau": on ``du/dtau = x1 - x0``, u = x / (alpha + sigma). "sigma": on ``dy/dlevel = x1``, y = x / alpha, as in
    Karras et al. 2022 (eq. 4, algorithm 1); a step from an infinite level (alpha = 0) is taken in tau. Returns x at b
    and the prediction at a.
    """
    p = denoise(x, a.time(x), cond)
    x = interpolate(b, p)  # Euler's method, whatever the clock
    if b.t > 0:
        q = denoise(x, b.time(x), cond)
        if clock == "sigma" and a.alpha > 0:
            x = torch.add(x, q.x1 - p.x1, alpha=b.alpha * (b.level - a.level) / 2)
        else:
            x = torch.add(x, q.velocity - p.velocity, alpha=b.scale * (b.tau - a.tau) / 2)
    return x, p


def heun(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    clock: Clock = "tau",
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, algorithm 1), in the chart.

    Two evaluations a step, but one in the last, since no denoiser is evaluated at the data. ``clock="sigma"`` is EDM's
    own, see :func:`heun_step`.
    """
    require("clock", repr(clock), "tau, sigma", clock in ("tau", "sigma"))
    for i, (a, b) in enumerate(pairwise(nodes(denoise.path, times))):
        x, prediction = heun_step(denoise, x, a, b, cond, clock)
        if callback:
            callback(i, x, prediction)
    return x


def rk4(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """The classical fourth-order Runge-Kutta method (Kutta 1901), in the chart. Four evaluations a step.

    A step that ends at the data must not be evaluated there: it is Heun's third-order rule (Heun 1900), with three
    evaluations at 0, 1/3 and 2/3 of the step. Its error h^4 is made only once, so the method stays of order four.
    """
    grid = nodes(denoise.path, times)
    # the nodes inside all steps, found at once
    taus = []
    for a, b in pairwise(grid):
        taus += [a.tau + f * (b.tau - a.tau) for f in ((1 / 2,) if b.t > 0 else (1 / 3, 2 / 3))]
    between = iter(nodes_at(denoise.path, taus))

    def slope(u: Tensor, n: Node) -> Tensor:
        return denoise(n.scale * u, n.time(u), cond).velocity

    for i, (a, b) in enumerate(pairwise(grid)):
        prediction = denoise(x, a.time(x), cond)
        h, u, k1 = b.tau - a.tau, x / a.scale, prediction.velocity
        inner = next(between)
        if b.t > 0:
            k2 = slope(u + h / 2 * k1, inner)
            k3 = slope(u + h / 2 * k2, inner)
            u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(u + h * k3, b))
        else:
            k2 = slope(u + h / 3 * k1, inner)
            u = u + h / 4 * (k1 + 3 * slope(u + 2 * h / 3 * k2, next(between)))
        x = b.scale * u
        if callback:
            callback(i, x, prediction)
    return x


def dopri5(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    tau_min: float = 1e-3,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Dormand & Prince's adaptive 5(4) pair (1980) in the chart, through torchdiffeq.

    It takes its own steps from ``times[0]`` to ``times[-1]``; the rest of the grid has no effect. A grid that ends at
    the data is solved to chart time ``tau_min``, and from there by one Euler step (error ``tau_min^2``), so nothing is
    evaluated at t = 0. The samples of a batch share each step's size, set by the worst one's error, so a sample depends
    on its batch by up to the tolerance. (Samples of the fixed-grid samplers do not depend on their batch.)
    """
    from torchdiffeq import odeint  # lazy: it imports scipy

    require("rtol", rtol, "above 0", rtol > 0)
    require("atol", atol, "above 0", atol > 0)
    first, *_, last = nodes(denoise.path, times)
    require("tau_min", tau_min, f"between 0 and the start, {first.tau:.3g}", 0 < tau_min < first.tau)
    stop = last if last.tau >= tau_min else nodes_at(denoise.path, [tau_min])[0]
    field = _Field(denoise, cond, (stop, first), callback)
    end = torch.tensor([stop.tau], dtype=torch.float64, device=x.device)
    span = torch.cat([end.new_tensor([first.tau]), end])
    # a step must end at `stop`, for the solver must not look past it
    options = {"norm": worst_of_batch, "step_t": end}
    states = odeint(field, x / first.scale, span, rtol=rtol, atol=atol, method="dopri5", options=options)
    u = torch.as_tensor(states[-1])
    if stop is not last:
        u = u + (last.tau - stop.tau) * field(end[0], u)
        field.done(last.scale * u)
    return last.scale * u


def worst_of_batch(error: Tensor) -> Tensor:
    """The largest root-mean-square error of a sample, from errors ``[B, *S]``."""
    return error.flatten(1).square().mean(1).sqrt().max()


class _Field:
    """``du/dtau`` for torchdiffeq, which calls ``callback_accept_step`` after the last stage of an accepted step.

    For this pair the last stage is the step's own end.
    """

    def __init__(self, denoise: Denoiser, cond: Cond, ends: tuple[Node, Node], callback: Callback | None):
        self.denoise, self.cond, self.ends, self.callback, self.steps = denoise, cond, ends, callback, 0

    def __call__(self, tau: Tensor, u: Tensor) -> Tensor:
        low, high = self.ends
        within = low.tau < float(tau) < high.tau
        node = nodes_at(self.denoise.path, [float(tau)])[0] if within else low if float(tau) <= low.tau else high
        self.x = node.scale * u
        self.prediction = self.denoise(self.x, node.time(u), self.cond)
        return self.prediction.velocity

    def callback_accept_step(self, tau: Tensor, u: Tensor, dt: Tensor) -> None:
        self.done(self.x)

    def done(self, x: Tensor) -> None:
        if self.callback:
            self.callback(self.steps, x, self.prediction)
        self.steps += 1
