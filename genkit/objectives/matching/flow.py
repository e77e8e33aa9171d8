"""Rectified flow, also called conditional flow matching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from genkit.config.numbers import Fraction, Positive
from genkit.core import Backbone, Batch, Cond, Denoiser, Generator, Noise, ProbabilityPath, Spec
from genkit.diffusion.parametrization import NetDenoiser, refuse_singular
from genkit.diffusion.paths import Linear, ODEOnlyPath
from genkit.objectives.matching.couplings import COUPLINGS, Coupling, Independent
from genkit.objectives.matching.matching import Matching, PredictionName
from genkit.objectives.matching.sources import SOURCES, Normal, Source
from genkit.objectives.matching.times import TimeDistribution, Uniform
from genkit.objectives.matching.weights import Constant, LossSpace, LossWeight, refuse_loss_weight


@dataclass(frozen=True)
class Flow(Matching):
    """Flow matching (Liu et al. 2023, eq. 1; Lipman et al. 2023, eq. 23): regress ``x1 - x0`` along straight lines."""

    path: ProbabilityPath = field(default_factory=Linear, metadata={"table": "genkit.diffusion.paths:PATHS"})
    """the path between data and noise"""
    prediction: PredictionName = "velocity"
    """what the network predicts"""
    loss_space: LossSpace | None = None
    """the quantity whose squared error is minimised (Li & He 2025, table 1); None: that of the loss weight, else the
    velocity"""
    loss_weight: LossWeight = field(
        default_factory=Constant, metadata={"table": "genkit.objectives.matching.weights:LOSS_WEIGHTS"}
    )
    """weight of each time in the loss: constant, min-snr, p2 or edm"""
    sigma_data: Positive | None = None
    """standard deviation of the data, for the prediction karras and the weight edm; None: measured when a run begins"""
    time_distribution: TimeDistribution = field(
        default_factory=Uniform, metadata={"table": "genkit.objectives.matching.times:TIME_DISTRIBUTIONS"}
    )
    """how training times are drawn: uniform, logit-normal (more of the middle), log-normal (of the noise level), beta
    (more noise) or loss-aware (where losses are large)"""
    coupling: Coupling = field(
        default_factory=Independent, metadata={"table": "genkit.objectives.matching.couplings:COUPLINGS"}
    )
    """which source goes with which sample: independent, ot, sb, or given with the data"""
    source: Source = field(default_factory=Normal, metadata={"table": "genkit.objectives.matching.sources:SOURCES"})
    """where the flow starts: normal, anchored at a condition, or another data set"""
    cond_dropout: Fraction = 0.1
    """probability of training a sample without its conditions, for classifier-free guidance"""
    cond_dropout_each: Fraction = 0.0
    """probability of dropping each condition independently, so that any subset can be omitted when sampling"""

    def __post_init__(self) -> None:
        refuse_singular(self.parametrization, self.path)
        self.time_distribution.check(self.path)
        refuse_loss_weight(self.loss_weight, self.space)
        self.refuse_sigma_data()
        if self.source.is_conditional and self.coupling.permutes:
            raise ValueError(
                f"coupling: given {name_of(COUPLINGS, self.coupling)}, which gives a sample the source of another, but "
                f"the source {name_of(SOURCES, self.source)} belongs to its condition; allowed: independent, given"
            )

    @property
    def natural_space(self) -> LossSpace:
        return "velocity"  # flow matching is the regression of velocities, whatever the network predicts

    @property
    def is_diffusion(self) -> bool:
        return self.source.is_normal and self.coupling.independent

    @property
    def needs_pairs(self) -> bool:
        return self.coupling.needs_pairs

    def endpoints(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.coupling(batch, self.source(batch.normal(), batch.cond), self.path, t)

    def denoiser(self, net: nn.Module) -> Denoiser:
        path = self.path if self.is_diffusion else ODEOnlyPath(self.path, self.describe())
        return NetDenoiser(net, path, self.parametrization)

    def describe(self) -> str:
        """What error messages call this flow."""
        return f"a flow with source {name_of(SOURCES, self.source)} and coupling {name_of(COUPLINGS, self.coupling)}"

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        self.source.check(spec)
        return super().networks(backbone, spec)

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        """A generator whose samples start from the source of ``z``."""
        generate = super().generator(nets, sampling)
        if self.is_diffusion:
            return generate

        def from_source(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            return generate(self.source(z, cond), cond, noise)

        return from_source


def name_of(registry: Mapping[str, type], value: object) -> str:
    """The registered name of an object's class, or else the class's own name."""
    return next((k for k, v in registry.items() if type(value) is v), type(value).__name__)
