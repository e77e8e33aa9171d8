"""Real-time chunking (Black, Galliker & Levine 2025): a new chunk of actions that continues the one under way.

While a chunk is drawn, the actions of the chunk before go on. Those that will be executed until it arrives are known:
the new chunk is inpainted around them. Its later actions are pulled, ever more weakly, towards those that the old chunk
had for the same steps, so that the new chunk keeps to the plan of the old one where it can.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkit.core import Cond, Denoiser, Guidance, Prediction, expand
from genkit.diffusion.checks import require
from genkit.diffusion.guidance import LAST, Wrapped
from genkit.diffusion.paths import require_diffusion, within_path
from genkit.diffusion.posterior import replace_endpoints

UNDERWAY, UNDERWAY_WEIGHT = "underway", "underway.weight"  # conditions that the guidance alone reads


def soft_mask(length: int, delay: int, act_steps: int) -> Tensor:
    """Weights ``[length]`` of the old chunk's actions, of which ``act_steps`` have been executed since it was drawn.

    1 for the next ``delay`` actions, which go on until the new chunk arrives; then falling to 0 at the end of the old
    chunk, after ``length - act_steps`` actions (Black et al. 2025, eq. 5).
    """
    i = torch.arange(length, dtype=torch.float64)
    left = (length - act_steps - i) / (length - act_steps - delay + 1)
    falling = (left * left.expm1() / math.expm1(1)).clamp(min=0)
    return torch.where(i < delay, 1.0, torch.where(i < length - act_steps, falling, 0.0)).float()


def continue_chunk(limit: float = math.inf, spread: float | None = None) -> Guidance:
    """Pseudoinverse guidance towards ``cond["underway"]`` ``[B, *S]`` with weights ``cond["underway.weight"]``.

    The expected data move by ``sigma^2 / (alpha r2) J^T W (y - x0_hat)`` with ``J = d x0_hat / d x_t`` and ``r2 =
    sigma^2 / (alpha^2 + sigma^2)`` (Black et al. 2025, eq. 2 to 4; Song et al. 2023), then the numbers of weight 1 are
    set to y. ``limit`` bounds the factor ``sigma / (alpha r2)``, the paper's beta, which is infinite for pure noise.
    Without these conditions it is the denoiser itself. ``ValueError`` for a flow that has no score.

    ``spread`` is the standard deviation of a source ``N(centre, spread^2)``, such as that of an anchored flow. About
    its centre it is a diffusion with ``spread sigma`` in place of sigma; the centre itself cancels.
    """
    require("guidance_limit", limit, "above 0", limit > 0)

    def guide(denoise: Denoiser) -> Denoiser:
        path = denoise.path
        if spread is None:
            require_diffusion("execution real-time", path)

        def guided(x: Tensor, t: Tensor, cond: Cond) -> Prediction:
            if UNDERWAY not in cond:
                return denoise(x, t, cond)
            y, weight = cond[UNDERWAY], cond[UNDERWAY_WEIGHT]
            inner = {k: v for k, v in cond.items() if k not in (UNDERWAY, UNDERWAY_WEIGHT)}
            t_safe = within_path(path, t, LAST)
            alpha, sigma = path.alpha(t_safe), path.sigma(t_safe) * (spread or 1.0)
            with torch.enable_grad():
                x_grad = x.detach().requires_grad_()
                prediction = denoise(x_grad, t_safe, inner)
                pull = torch.autograd.grad(prediction.x0, x_grad, weight * (y - prediction.x0.detach()))[0]
            factor = ((alpha**2 + sigma**2) / (alpha * sigma)).clamp(max=limit)
            x0 = prediction.x0.detach() + expand(sigma * factor, x) * pull
            x0 = torch.where(weight == 1, y.to(x0), x0)
            x1 = (x - expand(path.alpha(t), x) * x0) / expand(path.sigma(t), x)
            return replace_endpoints(prediction, x0, x1)

        return Wrapped(denoise, guided)

    return guide
