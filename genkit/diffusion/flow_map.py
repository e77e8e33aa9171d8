"""Flow maps: networks that jump from any time of a path to any earlier one.

In the chart every path is rectified flow, ``z = (1 - tau) x0 + tau x1``, and a flow map is an average velocity
``u(z, r, t)``: it goes from z at t to ``z - (tau_t - tau_r) u(z, r, t)`` at r (Boffi et al. 2024; Geng et al. 2025, eq.
3). So ``u(z, t, t)`` is the velocity, ``u(z, 0, t)`` a consistency model and ``u(z, 0, 1)`` a one-step generator.

A flow map is a denoiser too: asked for the time ``cond["target_time"]`` it gives the ends of the straight line that
leads there, so that a sampler's step to ``(alpha, sigma)`` is ``prediction.at(alpha, sigma)``, as DDIM's is. Not asked,
it gives those of the velocity, and every sampler of the ODE or SDE applies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from genkit.core import SCALE_INPUT, Cond, Denoiser, Parametrization, Prediction, ProbabilityPath
from genkit.diffusion.paths import SharedTime

TARGET = "target_time"
SPAN = "span"  # t - r, the network's second time
LOW_INPUT, HIGH_INPUT = "guidance_low", "guidance_high"  # the interval of chart time in which a network guides itself
NO_GUIDANCE = {SCALE_INPUT: 1.0, LOW_INPUT: 0.0, HIGH_INPUT: 1.0}


@dataclass(frozen=True)
class FlowMapDenoiser:
    """A network with a second time, with its path and parametrisation: a :class:`~genkit.core.Denoiser`.

    ``time_rate`` multiplies the network's time label, whose waves turn up to 1000 rad a unit: 0.01 makes the derivative
    in time moderate. ``only_to_data`` says that no other jumps were learned, nor the velocity; asking
    for them raises ``ValueError``. If it ``takes_guidance``, scale and interval are inputs, 0 where there is none.
    """

    net: nn.Module
    path: ProbabilityPath
    parametrization: Parametrization
    time_rate: float = 1.0
    only_to_data: bool = False
    takes_guidance: bool = False
    is_flow_map: ClassVar[bool] = True

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        target = cond.get(TARGET, t)
        if self.only_to_data and not is_zero(target):
            raise ValueError(
                "sampler: this model has learned jumps to the data only (rule consistency); take --sampler consistency"
            )
        span = t - target
        inputs = {k: v for k, v in cond.items() if k != TARGET}
        if self.takes_guidance:
            scale, low, high = (cond.get(k, torch.full_like(span, v)) for k, v in NO_GUIDANCE.items())
            inputs |= {SCALE_INPUT: 1 - 1 / scale, LOW_INPUT: low, HIGH_INPUT: 1 - high}
        x_in, label = self.parametrization.inputs(self.path, x, t)
        out = self.net(x_in, self.time_rate * label, {**inputs, SPAN: span})
        return self.parametrization.predict(self.path, x, t, out)


def is_zero(t: Tensor) -> bool:
    """Whether times ``[B]`` are all 0. Only a time that is not shared by all samples makes the host wait."""
    return t.value == 0 if isinstance(t, SharedTime) else not bool((t > 0).any())


def is_flow_map(denoise: Denoiser) -> bool:
    """Whether a denoiser answers for the time ``cond["target_time"]``; others ignore it."""
    return getattr(denoise, "is_flow_map", False)
