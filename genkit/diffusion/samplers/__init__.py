"""Samplers: plain functions ``(denoise, x, times, cond, *, noise, callback) -> x``, and :func:`bind`.

Euler's method is ``ddim`` with eta = 0. ``heun``, ``rk4`` and ``dopri5`` are one-step solvers of the ODE in the chart;
``dpmpp_2m``, ``dpmpp_3m`` and ``unipc`` are multistep; ``ancestral``, ``churn``, ``sde``, ``dpmpp_sde`` and ``restart``
add noise. ``flow_map`` and ``consistency`` jump by a flow map, in few steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from genkit.core import Cond, Denoiser, Generator, Guidance, Noise, Sampler
from genkit.diffusion.flow_map import is_flow_map
from genkit.diffusion.paths import ODEOnlyPath
from genkit.diffusion.samplers.flow_map import consistency, flow_map
from genkit.diffusion.samplers.grids import GRIDS, Grid, karras, leading, linspace, logsnr, trailing, uniform
from genkit.diffusion.samplers.inversion import invert
from genkit.diffusion.samplers.likelihood import bits_per_dim, dequantise, log_prob
from genkit.diffusion.samplers.multistep import dpmpp_2m, dpmpp_3m, dpmpp_sde, unipc
from genkit.diffusion.samplers.ode import ddim, dopri5, heun, rk4
from genkit.diffusion.samplers.registry import (
    COMMON_ARGUMENTS,
    FLOW_MAP_SAMPLERS,
    SAMPLERS,
    SamplerInfo,
    find_sampler,
    ode_samplers,
    refuse_noise,
)
from genkit.diffusion.samplers.sde import ancestral, churn, restart, sde
from genkit.diffusion.samplers.steps import Callback, CountingDenoiser, Seeds, nodes
from genkit.diffusion.samplers.vlb import VLBTerms, variational_bound


def bind(
    sampler: Sampler | str = "heun",
    grid: Grid | Tensor | int = 20,
    guidance: Guidance | None = None,
    *,
    callback: Callback | None = None,
    from_noise: bool = False,
    differentiable: bool = False,
    **options: object,
) -> Callable[[Denoiser], Generator]:
    """A function from denoisers to generators: ``bind("heun", uniform(20), classifier_free(2.0))(denoise)(z, cond)``.

    ``grid`` is a grid, explicit times, or a number of uniform steps; ``options`` go to the sampler (``eta`` of ddim).
    The generator takes standard normals ``z`` ``[B, *S]`` and starts from ``sigma(times[0]) z``, or ``from_noise`` from
    z itself, as the pipelines of diffusers do. It is computed without gradients unless it is to be ``differentiable``,
    which takes the memory of all steps. For a flow that is not
    a diffusion (:class:`~genkit.diffusion.paths.ODEOnlyPath`), a sampler that adds noise raises ``ValueError``.
    """
    if isinstance(sampler, str):
        info = find_sampler(sampler)
        for name in options:
            if name not in info.options:
                raise ValueError(f"{sampler}: has no option {name!r}; allowed: {', '.join(info.options) or 'none'}")
        sampler = info.function
    function = sampler
    needs_map = any(function is info.function for info in FLOW_MAP_SAMPLERS.values())
    make_times = uniform(grid) if isinstance(grid, int) else grid

    def bind_to(denoise: Denoiser) -> Generator:
        if needs_map and not is_flow_map(denoise):
            raise ValueError(
                f"sampler: given {function.__name__}, and this model has learned no flow map; take one of "
                f"{', '.join(SAMPLERS)}, or train with --objective=flow-map"
            )
        path = (guidance(denoise) if guidance else denoise).path
        times = make_times if isinstance(make_times, Tensor) else make_times(path)
        start = nodes(path, times)[0]

        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            if isinstance(path, ODEOnlyPath):
                noise = refuse_noise(f"{path.model} is only an ODE")
            guided = guidance(denoise) if guidance else denoise  # for each call: guidance may hold state
            with nullcontext() if differentiable else torch.no_grad():
                first = z if from_noise else start.sigma * z
                return function(guided, first, times, cond, noise=noise, callback=callback, **options)

        return generate

    return bind_to


__all__ = [
    "COMMON_ARGUMENTS",
    "FLOW_MAP_SAMPLERS",
    "GRIDS",
    "SAMPLERS",
    "Callback",
    "CountingDenoiser",
    "Grid",
    "SamplerInfo",
    "Seeds",
    "VLBTerms",
    "ancestral",
    "bind",
    "bits_per_dim",
    "churn",
    "consistency",
    "ddim",
    "dequantise",
    "dopri5",
    "dpmpp_2m",
    "dpmpp_3m",
    "dpmpp_sde",
    "find_sampler",
    "flow_map",
    "heun",
    "invert",
    "karras",
    "leading",
    "linspace",
    "log_prob",
    "logsnr",
    "nodes",
    "ode_samplers",
    "refuse_noise",
    "restart",
    "rk4",
    "sde",
    "trailing",
    "uniform",
    "unipc",
    "variational_bound",
]
