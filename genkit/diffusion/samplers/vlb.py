"""The variational bound of the ancestral chain (Ho et al. 2020, eq. 5), term by term, on any path and grid.

    -log p(x0) <= KL(q(x_T | x0) || p(x_T)) + sum KL(q(x_s | x_t, x0) || p(x_s | x_t)) - E log p(x0 | x_1)

``p`` is what :func:`genkit.diffusion.samplers.ancestral` draws from, with the same variances; it starts at
``N(0, sigma_T^2 I)``.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from genkit.core import NO_COND, Cond, Denoiser, Noise, expand
from genkit.diffusion.checks import require
from genkit.diffusion.paths import require_diffusion
from genkit.diffusion.posterior import learned_variance, log_variance, reverse_step
from genkit.diffusion.samplers.sde import NONE_LEARNED
from genkit.diffusion.samplers.steps import default_noise, nodes

Variance = Literal["small", "large", "learned"]
WIDTHS = {"small": -1.0, "large": 1.0}


class VLBTerms(NamedTuple):
    """The terms of the variational bound, in nats, for each sample."""

    prior: Tensor
    """``L_T`` ``[B]``"""
    steps: Tensor
    """``L_{t-1}`` ``[B, N - 1]``, the noisiest step first"""
    data: Tensor
    """``L_0`` ``[B]``"""

    @property
    def total(self) -> Tensor:
        """The bound on ``-log p(x0)``, ``[B]``."""
        return self.prior + self.steps.sum(1) + self.data


def variational_bound(
    denoise: Denoiser,
    x0: Tensor,
    cond: Cond = NO_COND,
    *,
    times: Tensor,
    variance: Variance | None = None,
    pixels: bool = False,
    noise: Noise | None = None,
) -> VLBTerms:
    """The terms of the chain on the grid ``times`` (from 1 to 0, as a sampler's), at one draw of x_t each.

    The terms are unbiased, and the chain of N steps costs N evaluations. ``variance`` is as in ``ancestral``; None is
    the learned one if there is one, else small. In the last step, to the data, "small" is that of
    :func:`~genkit.diffusion.posterior.log_variance` with w = -1 and "large" is beta (Ho et al.'s code has the small one
    there). With ``pixels``, ``x0`` are uint8 pixels as ``k / 127.5 - 1``, and ``L_0`` is of the probability of these
    levels (Ho et al. 2020, eq. 13); else it is of the density of ``x0``.
    """
    require("variance", repr(variance), "small, large, learned", variance in (None, "learned", *WIDTHS))
    require_diffusion("bound", denoise.path)
    grid = nodes(denoise.path, times)
    if grid[0].t != 1 or grid[-1].t != 0:
        raise ValueError(f"times: given {grid[0].t:.3g} … {grid[-1].t:.3g}; a bound needs the whole path, 1 … 0")
    noise = noise or default_noise(x0)
    terms = []
    for a, b in pairwise(grid):
        x = a.alpha * x0 + a.sigma * noise(x0.shape[1:])
        prediction = denoise(x, a.time(x), cond)
        w = learned_variance(prediction) if variance in (None, "learned") else None
        if variance == "learned" and w is None:
            raise ValueError(NONE_LEARNED)
        t, s = (torch.full((len(x),), n.t, dtype=torch.float64, device=x.device) for n in (a, b))
        if w is None:
            w = torch.full_like(x0, WIDTHS[variance or "small"])
        _, posterior, x0_factor = (expand(v, x) for v in reverse_step(denoise.path, t, s))
        log_var = log_variance(denoise.path, t, s, w.double())
        data, predicted = x0.double(), prediction.x0.double()
        if b.t > 0:
            distance = (x0_factor * (data - predicted)).square() / log_var.exp()
            term = (log_var - posterior.log() + posterior / log_var.exp() + distance - 1) / 2
        else:
            term = -(log_level if pixels else log_density)(data, predicted, log_var)
        terms.append(term.flatten(1).sum(1).to(x0))
    prior = (grid[0].alpha / grid[0].sigma) ** 2 / 2 * x0.double().flatten(1).square().sum(1)
    return VLBTerms(prior.to(x0), torch.stack([torch.zeros_like(terms[0]), *terms[:-1]], 1)[:, 1:], terms[-1])


def log_density(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """``log N(x; mean, exp(log_var))``, elementwise."""
    return -(math.log(2 * math.pi) + log_var + (x - mean).square() / log_var.exp()) / 2


def log_level(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """The log probability of the pixel level ``x = k / 127.5 - 1`` under ``N(mean, exp(log_var))``, elementwise.

    The lowest level takes all below it and the highest all above (Ho et al. 2020, eq. 13), so the 256 levels sum to 1.
    """
    std, half = (log_var / 2).exp(), 1 / 255
    low = torch.where(x < half - 1, -math.inf, (x - half - mean) / std)
    high = torch.where(x > 1 - half, math.inf, (x + half - mean) / std)
    flip = low + high > 0  # to the side where the distribution function is small and its logarithm precise
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return upper + torch.log(-torch.expm1(lower - upper))
