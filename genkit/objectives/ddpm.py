"""Denoising diffusion (Ho et al. 2020), sampled by DDIM or ancestrally."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from genkit.core import Batch, Parametrization, Path
from genkit.objectives.matching import Matching, PredictionName
from genkit.objectives.times import TIMES, TimesName, refuse_times
from genkit.objectives.weights import Constant, Space, Weight, refuse_weight
from genkit.parametrize import PARAMETRIZATIONS, refuse_singular
from genkit.paths import VP


@dataclass(frozen=True)
class DDPM(Matching):
    """``L_simple`` (Ho et al. 2020, eq. 14): predict the noise at one of T discrete times, t = k / T."""

    timesteps: Annotated[int, Ge(1)] = 1000
    """T, the number of discrete times"""
    betas: Literal["linear", "cosine"] = "linear"
    """the noise schedule; cosine is Nichol & Dhariwal 2021, eq. 17"""
    beta_min: Annotated[float, Gt(0), Lt(1)] = 1e-4
    """first beta of the linear schedule"""
    beta_max: Annotated[float, Gt(0), Lt(1)] = 0.02
    """last beta of the linear schedule"""
    zero_snr: bool = False
    """rescale the schedule to end in pure noise (Lin et al. 2024, algorithm 1); needs prediction v, x0 or velocity"""
    prediction: PredictionName = "eps"
    """what the network puts out"""
    space: Space = "eps"
    """where the squared error is taken"""
    weight: Weight = field(default_factory=Constant, metadata={"table": "genkit.objectives.weights:WEIGHTS"})
    """how much each time counts"""
    times: TimesName = "uniform"
    """how times are drawn; all but uniform are rounded up to a discrete one"""
    t_mean: float = 0.0
    """location of logit-normal times, or of log(sigma / alpha) for log-normal ones; above 0 biases to noise"""
    t_std: Annotated[float, Gt(0)] = 1.0
    """scale of the same"""
    drop: Annotated[float, Ge(0), Lt(1)] = 0.1
    """probability that a sample is trained without its conditions, for classifier-free guidance"""

    def __post_init__(self) -> None:
        refuse_singular(self.parametrization, self.along)
        refuse_times(self.times, self.along, self.t_mean, self.t_std)
        refuse_weight(self.weight, self.space)

    @property
    def along(self) -> Path:
        return VP(self.betas, self.timesteps, self.beta_min, self.beta_max, self.zero_snr)

    @property
    def parametrization(self) -> Parametrization:
        return PARAMETRIZATIONS[self.prediction]()

    @property
    def loss_space(self) -> Space:
        return self.space

    @property
    def loss_weight(self) -> Weight:
        return self.weight

    def draw_times(self, batch: Batch) -> Tensor:
        return DRAWN.get(self.times, rounded_up)(self, batch)


def rounded_up(ddpm: DDPM, batch: Batch) -> Tensor:
    t = TIMES[ddpm.times](batch, ddpm.along, ddpm.t_mean, ddpm.t_std)
    return (t * ddpm.timesteps).ceil().clamp(1, ddpm.timesteps) / ddpm.timesteps


def uniform(ddpm: DDPM, batch: Batch) -> Tensor:
    return (batch.uniform() * ddpm.timesteps).floor().clamp(max=ddpm.timesteps - 1).add(1) / ddpm.timesteps


DRAWN: Mapping[str, Callable[[DDPM, Batch], Tensor]] = {"uniform": uniform}
