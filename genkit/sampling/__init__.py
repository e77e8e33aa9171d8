"""Samplers: plain functions ``(denoise, x, times, cond, *, noise, callback) -> x``, and :func:`bind`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from genkit.core import Cond, Denoiser, Generator, Guidance, Noise, Sampler
from genkit.sampling.grids import GRIDS, Grid, trailing, uniform
from genkit.sampling.multistep import dpmpp_2m
from genkit.sampling.ode import ddim, heun
from genkit.sampling.sde import ancestral
from genkit.sampling.steps import Callback, Seeds, nodes

SAMPLERS: Mapping[str, Sampler] = {"ddim": ddim, "heun": heun, "ancestral": ancestral, "dpmpp_2m": dpmpp_2m}


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
        sampler = SAMPLERS[sampler]
    if isinstance(grid, int):
        grid = uniform(grid)
    draw, places = sampler, grid

    def bound(denoise: Denoiser) -> Generator:
        guided = guidance(denoise) if guidance else denoise
        times = places if isinstance(places, Tensor) else places(denoise.path)
        start = nodes(denoise.path, times)[0]

        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            with torch.no_grad():
                return draw(guided, start.sigma * z, times, cond, noise=noise, callback=callback, **options)

        return generate

    return bound


__all__ = [
    "GRIDS", "SAMPLERS", "Callback", "Grid", "Seeds", "ancestral", "bind", "ddim", "dpmpp_2m", "heun", "nodes",
    "trailing", "uniform",
]  # fmt: skip
