"""Denoising diffusion (Ho et al. 2020), sampled by DDIM or ancestrally."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from genkit.core import Batch, Parametrization, Path
from genkit.objectives.matching import Matching, PredictionName, Space
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
    prediction: PredictionName = "eps"
    """what the network puts out"""
    space: Space = "eps"
    """where the squared error is taken"""
    drop: Annotated[float, Ge(0), Lt(1)] = 0.1
    """probability that a sample is trained without its conditions, for classifier-free guidance"""

    def __post_init__(self) -> None:
        refuse_singular(self.parametrization, self.along)

    @property
    def along(self) -> Path:
        return VP(self.betas, self.timesteps, self.beta_min, self.beta_max)

    @property
    def parametrization(self) -> Parametrization:
        return PARAMETRIZATIONS[self.prediction]()

    @property
    def loss_space(self) -> Space:
        return self.space

    def draw_times(self, batch: Batch) -> Tensor:
        return (batch.uniform() * self.timesteps).floor().clamp(max=self.timesteps - 1).add(1) / self.timesteps
