"""Plain regression: one prediction without noise, the baseline that a generative policy has to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from genkit.config.numbers import Fraction
from genkit.core import Backbone, Batch, Cond, Denoiser, Generator, Loss, Noise, Objective, Phase, Spec, mean_flat


@dataclass(frozen=True)
class Regression(Objective):
    """The mean of the samples given their conditions, by least squares (behaviour cloning: Pomerleau 1989).

    One pass of a denoiser's network, which sees no sample and no time. If the data go left or right, the mean goes
    straight on.
    """

    cond_dropout: Fraction = 0.0
    """probability of training a sample without its conditions"""
    cond_dropout_each: Fraction = 0.0
    """probability of dropping each condition independently"""

    sampler: ClassVar[str | None] = None

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("regress", trains=("net",)),)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        return {"net": backbone.denoiser(spec)}

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        mean = predict_mean(nets["net"], batch.x, batch.drop(self.cond_dropout, self.cond_dropout_each))
        return Loss(mean_flat((mean - batch.x) ** 2), {})

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        if sampling is not None:
            raise ValueError("Regression answers in one pass: a sampler has no effect; leave it out")

        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            with torch.no_grad():
                return predict_mean(nets["net"], z, cond)

        return generate


def predict_mean(net: nn.Module, like: Tensor, cond: Cond) -> Tensor:
    """The network's prediction from the conditions alone, ``[B, *S]``, in the shape of ``like``."""
    return net(torch.zeros_like(like), like.new_zeros(len(like)), cond).float()
