"""Drifting models (Deng et al. 2026): a one-step generator without time, teacher, adversary or derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from genkit.core import Backbone, Batch, Cond, Denoiser, Generator, Loss, Noise, Objective, Phase, Spec, mean_flat
from genkit.objectives.matching.couplings import other_class

NEIGHBOURS = 5  # of the coverage in the log


@dataclass(frozen=True)
class Drift(Objective):
    """Each sample is regressed onto itself plus a drift: towards data near it and away from other samples near it.

    The drift vanishes where samples and data have the same distribution (section 3). It is a sum over kernels of
    several widths: a single narrow one can lose modes. Samples and data meet within the rows of a micro-batch, and only
    within their class, so a class needs many rows: 32 or more in each micro-batch.
    """

    temperatures: tuple[Annotated[float, Gt(0)], ...] = (0.02, 0.05, 0.2)
    """widths of the kernels, in mean distances between samples and data; the paper's three"""
    cond_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """probability of training a sample without its conditions; there is no guidance here that would need it"""

    sampler: ClassVar[str | None] = None
    rows_interact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise ValueError("temperatures: given none; needs one or more, say 0.02 0.05 0.2")

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("drift", trains=("net",)),)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        return {"net": backbone.denoiser(spec)}

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        x = generate(nets["net"], batch.normal(), batch.drop(self.cond_dropout))
        with torch.no_grad():
            field = self.drift(x, batch.x, other_class(batch.cond, distances(x, x)) > 0)
            logs = {"drift": field.square().mean().sqrt(), "coverage": coverage(x, batch.x)}
        return Loss(mean_flat((x - (x + field).detach()).square()), logs)

    def drift(self, x: Tensor, data: Tensor, different: Tensor) -> Tensor:
        """The drift ``[B, *S]`` of samples ``x``; rows of ``different`` classes (Bool ``[B, B]``) do not meet."""
        to_data, to_samples = distances(x, data), distances(x, x)
        width = (to_data * ~different).sum() / (~different).sum().clamp(min=1)  # a mask as an index makes the host wait
        width = width.clamp(min=1e-12)
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        to_data = to_data.masked_fill(different, math.inf)
        to_samples = to_samples.masked_fill(different | itself, math.inf)
        parts = [drift_field(to_data / (width * t), to_samples / (width * t), data, x) for t in self.temperatures]
        return torch.stack(parts).sum(0)

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        if sampling is not None:
            raise ValueError("Drift answers in one pass: a sampler has no effect; leave it out")

        def draw(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            return generate(nets["net"], z, cond)

        return draw


def generate(net: nn.Module, z: Tensor, cond: Cond) -> Tensor:
    """A denoiser's network as a generator, ``[B, *S]``: it sees the noise ``z``, and no time."""
    return net(z, z.new_zeros(len(z)), cond).to(z)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances between all pairs of rows, ``[B, N]``."""
    return torch.cdist(x.flatten(1), y.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")


def drift_field(to_data: Tensor, to_samples: Tensor, data: Tensor, samples: Tensor) -> Tensor:
    """The drift of B points from their scaled distances to data ``[B, N]`` and to samples ``[B, M]`` (algorithm 2).

    Affinities are the geometric mean of a softmax over all others and one over the points. Attraction and repulsion
    weigh each other, so exchanging data and samples changes the sign alone, and equal sets give zero.
    """
    logits = -torch.cat([to_data, to_samples], 1)
    affinity = (logits.softmax(1) * torch.nan_to_num(logits.softmax(0))).sqrt()
    near_data, near_samples = affinity.split([to_data.shape[1], to_samples.shape[1]], 1)
    attract = near_data * near_samples.sum(1, keepdim=True)
    repel = near_samples * near_data.sum(1, keepdim=True)
    pull = attract @ data.flatten(1) - repel @ samples.flatten(1)
    return pull.unflatten(1, data.shape[1:])


def coverage(x: Tensor, data: Tensor) -> Tensor:
    """The share of data whose ball to their fifth neighbour holds a sample (Naeem et al. 2020, eq. 3); about 0.97 for
    a perfect model, less if modes are lost."""
    k = min(NEIGHBOURS, len(data) - 1)
    radius = distances(data, data).kthvalue(k + 1, dim=1).values
    return (distances(data, x).amin(1) <= radius).to(x).mean()
