"""Guidance that a flow map learns: scale and interval are inputs of the network (Geng et al. 2025b, section 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.core import SCALE_INPUT, Batch, Cond, Denoiser, Prediction, ProbabilityPath, expand
from genkit.diffusion.flow_map import HIGH_INPUT, LOW_INPUT, NO_GUIDANCE
from genkit.diffusion.guidance import keep_mask, one_pass, shift_data
from genkit.diffusion.paths import chart
from genkit.objectives.flow_map.learned import LearnedMap

SHARE_OF_INTERVALS = 0.5  # of the samples; the others are guided at all times


def draw_guidance(batch: Batch, cond: Cond, largest: float) -> dict[str, Tensor]:
    """Scales of density ``1 / scale`` on [1, largest] and intervals of chart time, ``[B]`` each, as conditions.

    An interval starts below 1/2 and ends above. Samples that see no condition have scale 1.
    """
    draws = batch.uniform(4)
    scale = torch.where(keep_mask(batch.x, cond), largest ** draws[:, 0], 1.0).to(batch.x)
    limited = draws[:, 1] < SHARE_OF_INTERVALS
    low = torch.where(limited, draws[:, 2] / 2, 0.0)
    high = torch.where(limited, 1 - draws[:, 3] / 2, 1.0)
    return {SCALE_INPUT: scale, LOW_INPUT: low, HIGH_INPUT: high}


def scale_at(path: ProbabilityPath, t: Tensor, cond: Cond) -> Tensor:
    """The scale of each sample at time t, ``[B]``: 1 outside its interval."""
    tau = chart(path, t)[0]
    inside = (cond[LOW_INPUT] <= tau) & (tau <= cond[HIGH_INPUT])
    return torch.where(inside, cond[SCALE_INPUT], 1.0)


def without(cond: Cond, x: Tensor) -> dict[str, Tensor]:
    """The conditions of a batch, unguided and dropped."""
    rest = {k: v for k, v in cond.items() if k not in NO_GUIDANCE}
    return {**rest, "keep": torch.zeros(len(x), dtype=torch.bool, device=x.device)}


def guided_velocity(u: LearnedMap, z: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """The velocity ``v_g = v_0 + scale (v - v_0)`` that ``velocity``, ``x1 - x0``, has in the mean.

    With the map's own guided velocity ``u_g`` and unconditional one ``u_0`` it is ``v + (1 - 1 / scale) (u_g - u_0)``,
    whose fixed point is v_g (Geng et al. 2025b, eq. 15): its error is not multiplied by the scale.
    """
    guided = u.frozen(z, t, t)
    null = LearnedMap(u.denoise, without(u.cond, z)).frozen(z, t, t)
    return velocity + expand(1 - 1 / scale_at(u.path, t, u.cond), z) * (guided - null)


@dataclass(frozen=True)
class GuidedTeacher:
    """A teacher with classifier-free guidance, of the scale that each sample has among its conditions."""

    inner: Denoiser

    @property
    def path(self) -> ProbabilityPath:
        return self.inner.path

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        seen = {k: v for k, v in cond.items() if k not in NO_GUIDANCE}
        good, bad = one_pass(self.inner)(x, t, seen)
        shift = expand(scale_at(self.path, t, cond) - 1, x) * (good.x0 - bad.x0)
        return shift_data(good, self.path, t, shift)
