"""Rectified flow, also called conditional flow matching."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from genkit.core import Batch, Parametrization, Path
from genkit.objectives.matching import Matching, PredictionName
from genkit.objectives.times import TIMES, TimesName, refuse_times
from genkit.objectives.weights import Constant, Space, Weight, refuse_weight
from genkit.parametrize import PARAMETRIZATIONS, refuse_singular
from genkit.paths import Linear


@dataclass(frozen=True)
class Flow(Matching):
    """Flow matching (Liu et al. 2023, eq. 1; Lipman et al. 2023, eq. 23): regress ``x1 - x0`` along straight lines."""

    path: Path = field(default_factory=Linear, metadata={"table": "genkit.paths:PATHS"})
    """the path between data and noise"""
    prediction: PredictionName = "velocity"
    """what the network puts out"""
    space: Space = "velocity"
    """where the squared error is taken (Li & He 2025, table 1)"""
    weight: Weight = field(default_factory=Constant, metadata={"table": "genkit.objectives.weights:WEIGHTS"})
    """how much each time counts"""
    times: TimesName = "uniform"
    """how times are drawn; logit-normal (Esser et al. 2024, eq. 19) spends more on the middle, beta on the noise"""
    t_mean: float = 0.0
    """location of logit-normal times, or of log(sigma / alpha) for log-normal ones; above 0 biases to noise"""
    t_std: Annotated[float, Gt(0)] = 1.0
    """scale of the same"""
    drop: Annotated[float, Ge(0), Lt(1)] = 0.1
    """probability that a sample is trained without its conditions, for classifier-free guidance"""

    def __post_init__(self) -> None:
        refuse_singular(self.parametrization, self.path)
        refuse_times(self.times, self.path, self.t_mean, self.t_std)
        refuse_weight(self.weight, self.space)

    @property
    def along(self) -> Path:
        return self.path

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
        return TIMES[self.times](batch, self.path, self.t_mean, self.t_std)
