"""Inversion: from data to the noise from which an ODE sampler makes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.core import NO_COND, Cond, Denoiser, Prediction, ProbabilityPath
from genkit.diffusion.checks import require
from genkit.diffusion.samplers.registry import SAMPLERS, ode_samplers
from genkit.diffusion.samplers.steps import Callback, nodes


@dataclass(frozen=True)
class ReversedPath:
    """A path with noise and data exchanged: ``tau' = 1 - tau``, at ``t' = 1 - t / 2``, which is never 0."""

    inner: ProbabilityPath

    def alpha(self, t: Tensor) -> Tensor:
        return self.inner.sigma((2 - 2 * t).clamp(max=1))

    def sigma(self, t: Tensor) -> Tensor:
        return self.inner.alpha((2 - 2 * t).clamp(max=1))


@dataclass(frozen=True)
class ReversedDenoiser:
    """A denoiser on the reversed path: its ``x0`` is the noise."""

    inner: Denoiser

    @property
    def path(self) -> ReversedPath:
        return ReversedPath(self.inner.path)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        x0, x1 = self.inner(x, (2 - 2 * t).clamp(max=1), cond)
        return Prediction(x1, x0)


def invert(
    denoise: Denoiser,
    x0: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    sampler: str = "heun",
    refine: int = 3,
    callback: Callback | None = None,
    **options: object,
) -> Tensor:
    """The ``x`` ``[B, *S]`` at ``times[0]`` from which the ODE leads to ``x0`` at ``times[-1]``, by any ODE sampler.

    The sampler runs unchanged, on the reversed path, on which noise is the data. No denoiser is evaluated at t = 0, so
    the first step, to the last node above 0, is the limit ``x = alpha x0`` (the expected noise there is ``-sigma
    score``, which vanishes), then ``refine`` rounds of ``x = alpha x0 + sigma x1(x)``, whose fixed point is the exact
    inverse of a sampler's last step.
    """
    if sampler not in ode_samplers():
        raise ValueError(f"sampler: given {sampler!r}; allowed for inversion: {', '.join(ode_samplers())}")
    require("refine", refine, "0 or more", refine >= 0)
    grid, x = nodes(denoise.path, times), x0
    t = torch.tensor([n.t for n in grid], dtype=torch.float64)
    if grid[-1].t == 0:
        first, t = grid[-2], t[:-1]
        x = first.alpha * x0
        for _ in range(refine):
            x = first.alpha * x0 + first.sigma * denoise(x, first.time(x), cond).x1
    if len(t) == 1:
        return x
    return SAMPLERS[sampler].function(
        ReversedDenoiser(denoise), x, 1 - t.flip(0) / 2, cond, callback=callback, **options
    )
