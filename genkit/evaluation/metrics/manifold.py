"""Precision, recall, density and coverage: how much of one set lies in the balls around the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from genkit.evaluation.metrics.estimate import LEVEL, Estimate, pair, share

CHUNK = 2**24  # numbers of a matrix of distances that are held at once


def prdc(real: Tensor, fake: Tensor, k: int = 5, level: float = LEVEL) -> dict[str, Estimate]:
    """Precision and recall (Kynkäänniemi et al. 2019, eq. 2), density and coverage (Naeem et al. 2020, eq. 4-6).

    ``real`` ``[N, D]``, ``fake`` ``[M, D]`` features; a ball's radius is the distance to the k-th other sample of its
    own set, and a point is inside where it is nearer than that. Matrices of distances are made in chunks.
    Precision and density have intervals for the real set as given; recall and coverage depend on N and M too much.
    """
    pair(real, fake, ("real features", "generated features"), k + 1)
    if k < 1:
        raise ValueError(f"k: given {k}; needs at least 1 (5 is usual; 3 in Kynkäänniemi et al.)")
    shift = real.double().mean(0)
    real, fake = real.double() - shift, fake.double() - shift
    real_radius, fake_radius = radii(real, k), radii(fake, k)
    hits = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)
    recalled, covered = [], []
    for first, last, distance in chunks(real, fake):
        inside = distance < real_radius[first:last, None]
        hits += inside.sum(0)
        recalled.append((distance < fake_radius).any(1))
        covered.append(distance.amin(1) < real_radius[first:last])
    density = hits / k
    return {
        "precision": share(int((hits > 0).sum()), len(fake), level),
        "recall": Estimate(float(torch.cat(recalled).double().mean())),
        "density": Estimate.normal(float(density.mean()), float(density.var()) / len(fake), level),
        "coverage": Estimate(float(torch.cat(covered).double().mean())),
    }


def chunks(x: Tensor, y: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The distances of rows ``first..last`` of ``x`` to all of ``y``."""
    step = max(1, CHUNK // len(y))
    for first in range(0, len(x), step):
        part = x[first : first + step]
        yield first, first + len(part), torch.cdist(part, y)


def radii(x: Tensor, k: int) -> Tensor:
    """The distance of each row to its k-th other row."""
    found = []
    for first, last, distance in chunks(x, x):
        own = torch.arange(first, last, device=x.device)
        distance[own - first, own] = torch.inf
        found.append(distance.kthvalue(k, 1).values)
    return torch.cat(found)
