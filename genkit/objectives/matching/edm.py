"""EDM: the training of "Elucidating the design space of diffusion-based generative models" (Karras et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from genkit.core import Batch, Parametrization
from genkit.diffusion.parametrization import Karras
from genkit.diffusion.paths import VE
from genkit.objectives.matching.matching import Matching
from genkit.objectives.matching.times import SMALLEST, refuse_times
from genkit.objectives.matching.weights import Lambda, Space, Weight


@dataclass(frozen=True)
class EDM(Matching):
    """``lambda(sigma) |D(x0 + sigma z) - x0|^2`` with D preconditioned and ``log sigma`` normal (table 1).

    The pieces are one whole; each also serves ``flow``: its path ``ve``, prediction ``karras``, times ``log-normal``
    and weight ``edm``. As of the paper, sample it with heun, or churn, on the grid ``karras``.
    """

    sigma_data: Annotated[float, Gt(0)] = 0.5
    """standard deviation of the data as the codec gives them; 0.5 is that of pictures in [-1, 1]"""
    sigma_max: Annotated[float, Gt(0.002)] = 80.0
    """the noise level from which samples start"""
    t_mean: float = -1.2
    """mean of log sigma in training"""
    t_std: Annotated[float, Gt(0)] = 1.2
    """standard deviation of log sigma in training"""
    drop: Annotated[float, Ge(0), Lt(1)] = 0.1
    """probability that a sample is trained without its conditions, for classifier-free guidance"""
    drop_each: Annotated[float, Ge(0), Lt(1)] = 0.0
    """probability that it is trained without one condition, for each of several, so that any of them may be left out"""

    def __post_init__(self) -> None:
        refuse_times("log-normal", self.along, self.t_mean, self.t_std)

    @property
    def along(self) -> VE:
        return VE(sigma_max=self.sigma_max)  # sigma_min only says how fast time runs, and times follow sigma here

    @property
    def parametrization(self) -> Parametrization:
        return Karras(self.sigma_data)

    @property
    def loss_space(self) -> Space:
        return "x0"

    @property
    def loss_weight(self) -> Weight:
        return Lambda(self.sigma_data)

    def draw_times(self, batch: Batch) -> Tensor:
        level = (self.t_mean + self.t_std * batch.normal(1)[:, 0].double()).exp()
        return self.along.time_of(level).to(batch.x).clamp(min=SMALLEST)
