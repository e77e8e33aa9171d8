"""Guidance by the gradient of a learned value: samples from ``p(x) exp(scale Q(x))``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genkit.core import Cond, Denoiser, Guidance, Prediction, expand
from genkit.diffusion.checks import require, require_finite
from genkit.diffusion.guidance import Wrapped, shift_data
from genkit.diffusion.paths import require_diffusion

Value = Callable[[Tensor, Cond], Tensor]  # (samples in the model's units [B, *S], conditions) -> [B]


def value_guidance(value: Value, scale: float, var: float = 1.0, rounds: int = 1) -> Guidance:
    """Guidance toward ``p(x) exp(scale Q(x))``: the predicted data x solves ``x = x0 + scale V grad Q(x)``.

    ``V = var sigma^2 / (sigma^2 + alpha^2 var)`` is the variance of x0 given x_t for data of variance ``var`` around
    one centre (Song et al. 2023, section 3.2, for var = 1), and x is then the mean of ``p(x0 | x_t) exp(scale Q)``,
    exactly so if Q is linear or quadratic. The equation is solved by ``rounds`` of fixed-point iteration from x0: one
    is enough for a linear Q; more converge if ``scale V`` times Q's curvature is below 1. It needs the gradient of Q
    only, not the denoiser's, and no value function of noisy samples.
    """
    require_finite("q_guidance", scale)
    require("var", var, "above 0", var > 0)
    require("rounds", rounds, "1 or more", rounds >= 1)

    def guide(denoise: Denoiser) -> Denoiser:
        path = denoise.path
        require_diffusion("q_guidance", path)

        def predict(x: Tensor, t: Tensor, cond: Cond) -> Prediction:
            p = denoise(x, t, cond)
            alpha, sigma = path.alpha(t), path.sigma(t)
            weight = expand(scale * var * sigma**2 / (sigma**2 + alpha**2 * var), x)
            shift = torch.zeros_like(p.x0)
            for _ in range(rounds):
                with torch.enable_grad():
                    point = (p.x0 + shift).detach().requires_grad_()
                    grad = torch.autograd.grad(value(point, cond).sum(), point)[0]
                shift = weight * grad
            return shift_data(p, path, t, shift)

        return Wrapped(denoise, predict)

    return guide
