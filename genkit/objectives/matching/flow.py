"""Rectified flow, also called conditional flow matching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from genkit.core import Backbone, Batch, Cond, Denoiser, Generator, Noise, Parametrization, ProbabilityPath, Spec
from genkit.diffusion.parametrization import PARAMETRIZATIONS, NetDenoiser, refuse_singular
from genkit.diffusion.paths import Linear, ODEOnlyPath
from genkit.objectives.matching.couplings import COUPLINGS, Coupling, Independent
from genkit.objectives.matching.matching import Matching, PredictionName
from genkit.objectives.matching.sources import SOURCES, Normal, Source
from genkit.objectives.matching.times import LOSS_AWARE, TIMES, TimesName, refuse_times
from genkit.objectives.matching.weights import Constant, Space, Weight, refuse_weight


@dataclass(frozen=True)
class Flow(Matching):
    """Flow matching (Liu et al. 2023, eq. 1; Lipman et al. 2023, eq. 23): regress ``x1 - x0`` along straight lines."""

    path: ProbabilityPath = field(default_factory=Linear, metadata={"table": "genkit.diffusion.paths:PATHS"})
    """the path between data and noise"""
    prediction: PredictionName = "velocity"
    """what the network puts out"""
    space: Space = "velocity"
    """where the squared error is taken (Li & He 2025, table 1)"""
    weight: Weight = field(default_factory=Constant, metadata={"table": "genkit.objectives.matching.weights:WEIGHTS"})
    """how much each time counts"""
    times: TimesName = "uniform"
    """how times are drawn; logit-normal (Esser et al. 2024, eq. 19) spends more on the middle, beta on the noise;
    loss-aware where losses are large (Nichol & Dhariwal 2021, section 3.3), weighted back"""
    t_mean: float = 0.0
    """location of logit-normal times, or of log(sigma / alpha) for log-normal ones; above 0 biases to noise"""
    t_std: Annotated[float, Gt(0)] = 1.0
    """scale of the same"""
    coupling: Coupling = field(
        default_factory=Independent, metadata={"table": "genkit.objectives.matching.couplings:COUPLINGS"}
    )
    """which source goes with which sample: independent, ot, sb, or given with the data"""
    source: Source = field(default_factory=Normal, metadata={"table": "genkit.objectives.matching.sources:SOURCES"})
    """where the flow starts: normal, anchored at a condition, or another data set"""
    drop: Annotated[float, Ge(0), Lt(1)] = 0.1
    """probability that a sample is trained without its conditions, for classifier-free guidance"""
    drop_each: Annotated[float, Ge(0), Lt(1)] = 0.0
    """probability that it is trained without one condition, for each of several, so that any of them may be left out"""

    def __post_init__(self) -> None:
        refuse_singular(self.parametrization, self.path)
        refuse_times(self.times, self.path, self.t_mean, self.t_std)
        refuse_weight(self.weight, self.space)
        if self.source.conditional and self.coupling.moves:
            raise ValueError(
                f"coupling: given {name_of(COUPLINGS, self.coupling)}, which gives a sample the source of another, but "
                f"the source {name_of(SOURCES, self.source)} belongs to its condition; allowed: independent, given"
            )

    @property
    def diffuses(self) -> bool:
        return self.source.normal and self.coupling.independent

    @property
    def needs_pairs(self) -> bool:
        return self.coupling.given

    @property
    def along(self) -> ProbabilityPath:
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

    @property
    def loss_aware(self) -> bool:
        return self.times == LOSS_AWARE

    def draw_times(self, batch: Batch) -> Tensor:
        return TIMES[self.times](batch, self.path, self.t_mean, self.t_std)

    def ends(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.coupling(batch, self.source(batch.normal(), batch.cond), self.path, t)

    def denoiser(self, net: nn.Module) -> Denoiser:
        path = self.path if self.diffuses else ODEOnlyPath(self.path, self.described())
        return NetDenoiser(net, path, self.parametrization)

    def described(self) -> str:
        """What error messages call this flow."""
        return f"a flow with source {name_of(SOURCES, self.source)} and coupling {name_of(COUPLINGS, self.coupling)}"

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        self.source.check(spec)
        return super().networks(backbone, spec)

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        """Starts from the source of ``z``."""
        generate = super().generator(nets, sampling)
        if self.diffuses:
            return generate

        def from_source(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            return generate(self.source(z, cond), cond, noise)

        return from_source


def name_of(registry: Mapping[str, type], value: object) -> str:
    return next((k for k, v in registry.items() if type(value) is v), type(value).__name__)
