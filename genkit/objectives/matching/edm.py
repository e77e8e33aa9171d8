"""EDM: the training of "Elucidating the design space of diffusion-based generative models" (Karras et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Gt
from torch import Tensor, nn

from genkit.config.numbers import Fraction, Positive
from genkit.core import Backbone, Batch, Loss, Parametrization, Spec
from genkit.diffusion.parametrization import Karras
from genkit.diffusion.paths import VE
from genkit.objectives.matching.augmentation import augment_batch, augment_inputs
from genkit.objectives.matching.matching import Matching
from genkit.objectives.matching.times import SMALLEST, refuse_noisy_mean
from genkit.objectives.matching.weights import SIGMA_DATA, EDMWeight


@dataclass(frozen=True)
class EDM(Matching):
    """``lambda(sigma) |D(x0 + sigma z) - x0|^2`` with D preconditioned and ``log sigma`` normal (table 1).

    The parts belong together; each also serves ``flow``: its path ``ve``, prediction ``karras``, time distribution
    ``log-normal`` and loss weight ``edm``. The paper samples it with heun, or churn, on the grid ``karras``.
    """

    sigma_data: Positive | None = None
    """standard deviation of the data as the codec gives them; None: measured when a run begins (0.5 in the paper)"""
    sigma_max: Annotated[float, Gt(0.002)] = 80.0
    """the noise level from which samples start"""
    p_mean: float = -1.2
    """mean of log sigma in training (the paper's P_mean)"""
    p_std: Positive = 1.2
    """standard deviation of log sigma in training (the paper's P_std)"""
    cond_dropout: Fraction = 0.1
    """probability of training a sample without its conditions, for classifier-free guidance"""
    cond_dropout_each: Fraction = 0.0
    """probability of dropping each condition independently, so that any subset can be omitted when sampling"""
    augment: Fraction = 0.0
    """probability of each kind of augmentation, of which the network is told, so that samples have none; 0.12 in the
    paper, for CIFAR-10; 0: none"""

    loss_space = "x0"

    def __post_init__(self) -> None:
        refuse_noisy_mean("p_mean", self.p_mean, self.path)

    @property
    def weighs_places(self) -> bool:
        return not self.augment  # which moves the places of a sample, not their weights

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        inputs = augment_inputs(spec) if self.augment else {}
        return super().networks(backbone, replace(spec, cond={**spec.cond, **inputs}))

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        return super().loss(phase, nets, augment_batch(batch, self.augment) if self.augment else batch)

    def validate(self, nets: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        if self.augment:  # held-out samples are measured as they are
            return replace(self, augment=0.0).validate(nets, batch)
        return super().validate(nets, batch)

    @property
    def path(self) -> VE:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The variance-exploding path."""
        return VE(sigma_max=self.sigma_max)  # sigma_min only says how fast time runs, and times follow sigma here

    @property
    def parametrization(self) -> Parametrization:
        return Karras(self.sigma_data or SIGMA_DATA)

    @property
    def uses_sigma_data(self) -> bool:
        return True

    @property
    def loss_weight(self) -> EDMWeight:  # pyright: ignore[reportIncompatibleVariableOverride]
        """EDM's lambda(sigma)."""
        return EDMWeight(self.sigma_data or SIGMA_DATA)

    def sample_times(self, batch: Batch) -> Tensor:
        level = (self.p_mean + self.p_std * batch.normal(1)[:, 0].double()).exp()
        return self.path.time_of(level).to(batch.x).clamp(min=SMALLEST)
