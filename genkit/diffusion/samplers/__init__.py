"""Samplers: plain functions ``(denoise, x, times, cond, *, noise, callback) -> x``, and :func:`bind`.

Euler's method is ``ddim`` with eta = 0. ``heun``, ``rk4`` and ``dopri5`` solve the ODE in the chart; ``dpmpp_2m``,
``dpmpp_3m`` and ``unipc`` remember earlier evaluations; ``ancestral``, ``churn``, ``sde``, ``dpmpp_sde`` and
``restart`` add noise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from genkit.core import Cond, Denoiser, Generator, Guidance, Noise, Sampler
from genkit.diffusion.samplers.grids import GRIDS, Grid, karras, leading, linspace, logsnr, trailing, uniform
from genkit.diffusion.samplers.inversion import invert
from genkit.diffusion.samplers.likelihood import bits_per_dim, dequantise, log_prob
from genkit.diffusion.samplers.multistep import dpmpp_2m, dpmpp_3m, dpmpp_sde, unipc
from genkit.diffusion.samplers.ode import ddim, dopri5, heun, rk4
from genkit.diffusion.samplers.sde import ancestral, churn, restart, sde
from genkit.diffusion.samplers.steps import Callback, Counted, Seeds, nodes
from genkit.diffusion.samplers.vlb import Bound, variational_bound

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": ddim,
    "ancestral": ancestral,
    "heun": heun,
    "rk4": rk4,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "unipc": unipc,
    "dopri5": dopri5,
    "churn": churn,
    "sde": sde,
    "dpmpp_sde": dpmpp_sde,
    "restart": restart,
}
GIVEN = ("denoise", "x", "times", "cond", "noise", "callback")  # what every sampler takes; the rest are its options


def bind(
    sampler: Sampler | str = "heun",
    grid: Grid | Tensor | int = 20,
    guidance: Guidance | None = None,
    *,
    callback: Callback | None = None,
    **options: object,
) -> Callable[[Denoiser], Generator]:
    """A function from denoisers to generators: ``bind("heun", uniform(20), classifier_free(2.0))(denoise)(z, cond)``.

    ``grid`` is a grid, explicit times, or a number of uniform steps; ``options`` go to the sampler (``eta`` of ddim).
    The generator takes standard normals ``z`` ``[B, *S]`` and starts from ``sigma(times[0]) z``.
    """
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: given {sampler!r}; allowed: {', '.join(SAMPLERS)}")
        known = [k for k in inspect.signature(SAMPLERS[sampler]).parameters if k not in GIVEN]
        for name in options:
            if name not in known:
                raise ValueError(f"{sampler}: has no option {name!r}; allowed: {', '.join(known) or 'none'}")
        sampler = SAMPLERS[sampler]
    if isinstance(grid, int):
        grid = uniform(grid)
    draw, places = sampler, grid

    def bound(denoise: Denoiser) -> Generator:
        times = places if isinstance(places, Tensor) else places(denoise.path)
        start = nodes(denoise.path, times)[0]

        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            guided = guidance(denoise) if guidance else denoise  # anew: it may remember its trajectory
            with torch.no_grad():
                return draw(guided, start.sigma * z, times, cond, noise=noise, callback=callback, **options)

        return generate

    return bound


__all__ = [
    "GRIDS", "SAMPLERS", "Bound", "Callback", "Counted", "Grid", "Seeds", "ancestral", "bind", "bits_per_dim", "churn",
    "ddim", "dequantise", "dopri5", "dpmpp_2m", "dpmpp_3m", "dpmpp_sde", "heun", "invert", "karras", "leading",
    "linspace", "log_prob", "logsnr", "nodes", "restart", "rk4", "sde", "trailing", "uniform", "unipc",
    "variational_bound",
]  # fmt: skip
