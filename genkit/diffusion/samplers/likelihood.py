"""Likelihood by the instantaneous change of variables (Chen et al. 2018, theorem 1; Song et al. 2021, appendix D.2).

In the chart ``du/dtau = v(u, tau) = E[x1 - x0 | u]`` from the data (tau = 0, where u = x) to the path's end, so

    log p(x) = log p_end(u_end) + int_0^end div v dtau,     p_end = N(0, tau_end^2 I),

which is exact if the path ends in pure noise; VP and VE keep a trace of the data there, which is neglected. No denoiser
is evaluated at tau = 0: there the expected noise vanishes (it is ``-tau score``), so v = -u and div v = -D exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from genkit.core import NO_COND, Cond, Denoiser, Noise
from genkit.diffusion.checks import require
from genkit.diffusion.paths import end_time
from genkit.diffusion.samplers.ode import worst_of_batch
from genkit.diffusion.samplers.steps import Node, default_noise, nodes, nodes_at

Divergence = Literal["exact", "hutchinson"]
Rates = Callable[[Tensor, Node], tuple[Tensor, Tensor]]  # (u, node) -> (v [B, *S], div v [B])


def log_prob(
    denoise: Denoiser,
    x: Tensor,
    cond: Cond = NO_COND,
    *,
    times: Tensor,
    divergence: Divergence = "exact",
    probes: int = 1,
    noise: Noise | None = None,
    solver: Literal["heun", "dopri5"] = "heun",
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    """``log p(x)`` in nats, ``[B]``, by Heun's method on the grid ``times`` (from 1 to 0, as a sampler's) backwards.

    ``divergence`` "exact" costs one backward pass for each dimension; "hutchinson" one for each of ``probes``
    Rademacher vectors, drawn from ``noise`` for each sample and kept throughout (Grathwohl et al. 2019, eq. 8), which
    is unbiased. ``solver`` "dopri5" takes its own steps after the grid's first, to the tolerances ``rtol`` and
    ``atol``.
    """
    require("divergence", repr(divergence), "exact, hutchinson", divergence in ("exact", "hutchinson"))
    require("solver", repr(solver), "heun, dopri5", solver in ("heun", "dopri5"))
    require("probes", probes, "1 or more", probes >= 1)
    require("rtol", rtol, "above 0", rtol > 0)
    require("atol", atol, "above 0", atol > 0)
    if not x.is_floating_point():
        raise ValueError(f"x: given {x.dtype}; a density needs floats: dequantise(x) first")
    grid = nodes(denoise.path, times)[::-1]  # from data to noise
    if grid[0].t != 0 or grid[-1].t < end_time(denoise.path):
        raise ValueError(f"times: given {grid[-1].t:.3g} … {grid[0].t:.3g}; a likelihood needs the whole path, 1 … 0")
    directions = _directions(x, noise or default_noise(x), probes) if divergence == "hutchinson" else None
    rates = _rates(denoise, cond, directions)
    u, change = x.detach(), torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for a, b in pairwise(grid if solver == "heun" else grid[:2]):
        h, (v, div) = b.tau - a.tau, rates(u, a)
        w, div_end = rates(u + h * v, b)
        u, change = u + h / 2 * (v + w), change + h / 2 * (div + div_end)
    if solver == "dopri5" and len(grid) > 2:
        u, change = _dopri5(rates, denoise, u, change, (grid[1].tau, grid[-1].tau), rtol, atol)
    tau, dims = grid[-1].tau, x[0].numel()
    return change - (u / tau).flatten(1).square().sum(1) / 2 - dims * math.log(tau * math.sqrt(2 * math.pi))


def _directions(x: Tensor, noise: Noise, probes: int) -> Tensor:
    """Rademacher vectors ``[probes, B, *S]``."""
    normals = torch.stack([noise(x.shape[1:]) for _ in range(probes)])
    return torch.where(normals < 0, -1.0, 1.0).to(x)


def _rates(denoise: Denoiser, cond: Cond, directions: Tensor | None) -> Rates:
    def rates(u: Tensor, node: Node) -> tuple[Tensor, Tensor]:
        if node.t == 0:
            return -u, torch.full((len(u),), -float(u[0].numel()), dtype=u.dtype, device=u.device)
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            prediction = denoise(node.scale * u, node.time(u), cond)
            v = prediction.velocity
            return v.detach(), _divergence(v, u, directions)

    return rates


def _divergence(v: Tensor, u: Tensor, directions: Tensor | None) -> Tensor:
    """``div v`` ``[B]``: the trace row by row, or the mean of ``e . (dv/du) e`` over the directions e."""
    div = torch.zeros(len(u), dtype=u.dtype, device=u.device)
    flat = v.flatten(1)
    if directions is None:
        for i in range(flat.shape[1]):
            div = div + torch.autograd.grad(flat[:, i].sum(), u, retain_graph=True)[0].flatten(1)[:, i]
        return div
    for e in directions:
        product = torch.autograd.grad(v, u, e, retain_graph=True)[0]
        div = div + (product * e).flatten(1).sum(1) / len(directions)
    return div


def _dopri5(
    rates: Rates, denoise: Denoiser, u: Tensor, change: Tensor, taus: tuple[float, float], rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """Dormand & Prince's pair on ``(u, change)`` together, up to a last step that ends at the path's end."""
    from torchdiffeq import odeint  # lazy: it imports scipy

    def field(tau: Tensor, state: Tensor) -> Tensor:
        (node,) = nodes_at(denoise.path, [min(float(tau), taus[1])])
        v, div = rates(state[:, :-1].reshape(u.shape), node)
        return torch.cat([v.flatten(1), div[:, None]], dim=1)

    span = torch.tensor(taus, dtype=torch.float64, device=u.device)
    state = torch.cat([u.flatten(1), change[:, None]], dim=1)
    options = {"norm": worst_of_batch, "step_t": span[1:]}
    state = torch.as_tensor(odeint(field, state, span, rtol=rtol, atol=atol, method="dopri5", options=options)[-1])
    return state[:, :-1].reshape(u.shape), state[:, -1]


# ------------------------------------------------------------------------------------------------ bits per dimension
PIXEL = 127.5  # the pixel k of 0 .. 255 is k / 127.5 - 1 in model space


def dequantise(pixels: Tensor, noise: Noise | None = None) -> Tensor:
    """uint8 pixels ``[B, *S]`` as continuous numbers, ``(k + w) / 127.5 - 1`` with w uniform in [-1/2, 1/2).

    Theis et al. 2016, section 3.1; centred, so that the model sees what it was trained on. ``noise`` draws normals for
    each sample, and w is their quantile.
    """
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels: given {pixels.dtype}; allowed torch.uint8")
    z = (noise or default_noise(pixels.float()))(pixels.shape[1:])
    return ((pixels.to(z) + torch.special.ndtr(z) - 0.5) / PIXEL - 1).to(torch.promote_types(z.dtype, torch.float32))


class BitsPerDim(NamedTuple):
    """Bits per dimension, and the standard error of their mean over the samples."""

    value: float
    stderr: float


def bits_per_dim(log_prob: Tensor, num_dims: int, scale: float = PIXEL) -> BitsPerDim:
    """From ``log p`` in nats ``[N]`` of dequantised samples: an upper bound on ``-log2 P(pixels) / num_dims``.

    A bin is one pixel level wide, ``1 / scale`` in model space: hence ``+ log2(scale)``. ``scale=1`` for data
    that were never discrete.
    """
    if log_prob.ndim != 1 or not log_prob.numel() or num_dims < 1:
        raise ValueError(f"log_prob: given {tuple(log_prob.shape)}, {num_dims} dimensions; needs [N] and 1 or more")
    bits = math.log2(scale) - log_prob.double() / (num_dims * math.log(2))
    return BitsPerDim(float(bits.mean()), float(bits.std() / math.sqrt(len(bits))) if len(bits) > 1 else math.nan)
