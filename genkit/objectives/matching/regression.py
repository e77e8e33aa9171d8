"""Plain regression: what a network says at once, without noise. The baseline that a generative policy has to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from genkit.core import Backbone, Batch, Cond, Denoiser, Generator, Loss, Noise, Objective, Phase, Spec, mean_flat


@dataclass(frozen=True)
class Regression(Objective):
    """The mean of the samples given their conditions, by least squares (behaviour cloning: Pomerleau 1989).

    One pass, the same network as that of a denoiser, which sees no sample and no time. Where the data go left or right,
    the answer is straight on.
    """

    drop: Annotated[float, Ge(0), Lt(1)] = 0.0
    """probability that a sample is trained without its conditions"""
    drop_each: Annotated[float, Ge(0), Lt(1)] = 0.0
    """probability that it is trained without one condition, for each of several"""

    sampler: ClassVar[str | None] = None

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("regress", trains=("net",)),)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        return {"net": backbone.denoiser(spec)}

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        said = answer(nets["net"], batch.x, batch.drop(self.drop, self.drop_each))
        return Loss(mean_flat((said - batch.x) ** 2), {})

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        if sampling is not None:
            raise ValueError("Regression answers in one pass: a sampler has no effect; leave it out")

        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            with torch.no_grad():
                return answer(nets["net"], z, cond)

        return generate


def answer(net: nn.Module, like: Tensor, cond: Cond) -> Tensor:
    """What the network says where there is nothing but the conditions to see, ``[B, *S]``."""
    return net(torch.zeros_like(like), like.new_zeros(len(like)), cond).float()
