"""The samplers by name, each with the facts that tests, error messages and help texts are derived from.

A new sampler is one function and one entry in ``SAMPLERS`` (``docs/contributing/sampler.md``). Those that jump by a
flow map, and so need a model of ``--objective=flow-map``, are in ``FLOW_MAP_SAMPLERS``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from genkit.core import Noise, Sampler
from genkit.diffusion.samplers.flow_map import consistency, flow_map
from genkit.diffusion.samplers.multistep import dpmpp_2m, dpmpp_3m, dpmpp_sde, unipc
from genkit.diffusion.samplers.ode import ddim, dopri5, heun, rk4
from genkit.diffusion.samplers.sde import ancestral, churn, restart, sde

COMMON_ARGUMENTS = ("denoise", "x", "times", "cond", "noise", "callback")


@dataclass(frozen=True)
class SamplerInfo:
    """A sampler function and what is known about it with its default options."""

    function: Sampler
    """``(denoise, x, times, cond, *, noise, callback, **options) -> x``"""
    evaluations: Callable[[int], int] | None
    """Denoiser evaluations on a grid of n steps that ends at the data; None: adaptive, depends on the model."""
    order: float | None = None
    """Global order of convergence on fixed grids; None for adaptive and for stochastic samplers."""
    order_grid: Literal["uniform", "logsnr"] = "uniform"
    """The grid on which the order is reached: equal steps in chart time or in log-SNR."""
    stochastic: bool = False
    """Whether it adds noise. All other samplers solve the probability-flow ODE, so they can invert it, and they are
    right for flows that are not diffusions."""
    other_names: tuple[str, ...] = ()
    """What other libraries call it."""
    default_steps: int = 20
    """Number of steps if none is asked for."""
    swept_steps: tuple[int, ...] = (5, 10, 20)
    """Numbers of steps that a sweep tries if none are asked for."""

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the sampler's own keyword arguments."""
        return tuple(name for name in inspect.signature(self.function).parameters if name not in COMMON_ARGUMENTS)


SAMPLERS: Mapping[str, SamplerInfo] = {
    "ddim": SamplerInfo(ddim, lambda n: n, order=1, other_names=("euler", "euler_discrete")),
    "ancestral": SamplerInfo(ancestral, lambda n: n, stochastic=True, other_names=("ddpm", "euler_a")),
    "heun": SamplerInfo(heun, lambda n: 2 * n - 1, order=2),
    "rk4": SamplerInfo(rk4, lambda n: 4 * n - 1, order=4, other_names=("runge_kutta",)),
    "dpmpp_2m": SamplerInfo(dpmpp_2m, lambda n: n, order=2, other_names=("dpm_solver", "dpmsolver", "dpm++")),
    "dpmpp_3m": SamplerInfo(dpmpp_3m, lambda n: n, order=3, order_grid="logsnr"),
    "unipc": SamplerInfo(unipc, lambda n: n, order=3, order_grid="logsnr"),  # UniP-2 and UniC-2: order 2 + 1
    "dopri5": SamplerInfo(dopri5, None, other_names=("rk45", "ode45", "dopri")),
    "churn": SamplerInfo(churn, lambda n: 2 * n - 1, stochastic=True),
    "sde": SamplerInfo(sde, lambda n: n, stochastic=True),
    "dpmpp_sde": SamplerInfo(dpmpp_sde, lambda n: n, stochastic=True),
    # its lower level is one more node; then twice three Heun steps
    "restart": SamplerInfo(restart, lambda n: 2 * (n + 1) - 1 + 2 * 2 * 3, stochastic=True),
}

FLOW_MAP_SAMPLERS: Mapping[str, SamplerInfo] = {
    "flow_map": SamplerInfo(flow_map, lambda n: n, default_steps=1, swept_steps=(1, 2, 4)),
    "consistency": SamplerInfo(consistency, lambda n: n, stochastic=True, default_steps=1, swept_steps=(1, 2, 4)),
}


def find_sampler(name: str) -> SamplerInfo:
    """The sampler of this name. ``ValueError`` lists those that exist."""
    known = {**SAMPLERS, **FLOW_MAP_SAMPLERS}
    if name not in known:
        raise ValueError(f"sampler: given {name!r}; allowed: {', '.join(known)}")
    return known[name]


def ode_samplers() -> tuple[str, ...]:
    """The names of the samplers that add no noise."""
    return tuple(name for name, info in SAMPLERS.items() if not info.stochastic)


def refuse_noise(reason: str) -> Noise:
    """A noise source for samplers that must not draw any: calling it raises ``ValueError`` with ``reason``."""

    def refuse(shape: Sequence[int]) -> Tensor:
        raise ValueError(f"sampler: this one adds noise, but {reason}; take one of {', '.join(ode_samplers())}")

    return refuse
