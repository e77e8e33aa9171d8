"""Reflow and distillation (Liu et al. 2023): train on the pairs (source, sample) that a model itself makes.

``flow`` with ``--objective.coupling=given`` on such pairs is reflow (section 2.2): the new ODE has the same marginals
and straighter trajectories. Pairs of the reflowed model reflow it once more, and ``distillation`` ends with a one-step
model. ``genkit reflow RUN`` makes the pairs, the data source ``pairs`` reads them, and ``--init RUN`` starts from the
model that made them, as the paper does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from genkit.config.numbers import Fraction
from genkit.core import Backbone, Batch, Cond, Denoiser, Generator, Noise, Objective, Spec
from genkit.diffusion.paths import Linear
from genkit.objectives.matching.couplings import paired_source
from genkit.objectives.matching.matching import Matching, PredictionName
from genkit.objectives.matching.sources import Normal, Source


@dataclass(frozen=True)
class Distillation(Matching):
    """One Euler step from the source to the sample: only the velocity at t = 1 is learned (section 2.2).

    It needs data with pairs of a model that is reflowed already: then ``x1 - x0`` is nearly a function of x1.
    """

    source: Source = field(default_factory=Normal, metadata={"table": "genkit.objectives.matching.sources:SOURCES"})
    """where the pairs start, as in the model that made them"""
    prediction: PredictionName = "velocity"
    """what the network predicts, as in the model that it begins from"""
    cond_dropout: Fraction = 0.0
    """probability of training a sample without its conditions; there is no guidance here that would need it"""
    sampler: ClassVar[str | None] = None

    path = Linear()
    loss_space = "velocity"

    @property
    def is_diffusion(self) -> bool:
        return False

    @property
    def needs_pairs(self) -> bool:
        return True

    def sample_times(self, batch: Batch) -> Tensor:
        return torch.ones_like(batch.uniform())

    def endpoints(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        return batch.x, paired_source(batch)

    # its points are not those of a path from noise to samples
    level_errors, preservation_loss = Objective.level_errors, Objective.preservation_loss

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        self.source.check(spec)
        return super().networks(backbone, spec)

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        if sampling is not None:
            raise ValueError("sampler: a distilled flow takes one step of its own; leave the sampler out")

        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            x1 = self.source(z, cond)
            return self.denoiser(nets["net"])(x1, torch.ones_like(z.flatten(1)[:, 0]), cond).x0

        return generate
