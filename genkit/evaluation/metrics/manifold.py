"""Precision, recall, density and coverage: how much of one set lies in the balls around the points of the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from genkit.evaluation.metrics.estimate import LEVEL, Estimate, check_pair, proportion
from genkit.evaluation.metrics.metric import Metric, MetricSettings, SampleStatistics, require_features

CHUNK = 2**24  # entries of a distance matrix held at once


def prdc(real: Tensor, fake: Tensor, k: int = 5, level: float = LEVEL) -> dict[str, Estimate]:
    """Precision and recall (Kynkäänniemi et al. 2019, eq. 2), density and coverage (Naeem et al. 2020, eq. 4-6).

    ``real`` ``[N, D]``, ``fake`` ``[M, D]`` features. The radius of a ball is the distance to the k-th other sample of
    the same set; a point is inside if it is nearer than that. Distance matrices are computed in chunks. Precision and
    density have intervals for the real set as given; recall and coverage depend too much on N and M.
    """
    check_pair(real, fake, ("real features", "generated features"), k + 1)
    if k < 1:
        raise ValueError(f"k: given {k}; needs at least 1 (5 is usual; 3 in Kynkäänniemi et al.)")
    shift = real.double().mean(0)
    real, fake = real.double() - shift, fake.double() - shift
    real_radius, fake_radius = kth_distances(real, k), kth_distances(fake, k)
    hits = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)
    recalled, covered = [], []
    for first, last, distance in chunked_distances(real, fake):
        inside = distance < real_radius[first:last, None]
        hits += inside.sum(0)
        recalled.append((distance < fake_radius).any(1))
        covered.append(distance.amin(1) < real_radius[first:last])
    density = hits / k
    return {
        "precision": proportion(int((hits > 0).sum()), len(fake), level),
        "recall": Estimate(float(torch.cat(recalled).double().mean())),
        "density": Estimate.normal(float(density.mean()), float(density.var()) / len(fake), level),
        "coverage": Estimate(float(torch.cat(covered).double().mean())),
    }


def chunked_distances(x: Tensor, y: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``first, last`` and the distances ``[last - first, M]`` of these rows of ``x`` to all of ``y``."""
    step = max(1, CHUNK // len(y))
    for first in range(0, len(x), step):
        part = x[first : first + step]
        yield first, first + len(part), torch.cdist(part, y)


def kth_distances(x: Tensor, k: int) -> Tensor:
    """The distance ``[N]`` of each row of ``x`` to its k-th nearest other row."""
    distances = []
    for first, last, distance in chunked_distances(x, x):
        own = torch.arange(first, last, device=x.device)
        distance[own - first, own] = torch.inf
        distances.append(distance.kthvalue(k, 1).values)
    return torch.cat(distances)


def compute_prdc(
    generated: SampleStatistics, reference: SampleStatistics | None, settings: MetricSettings
) -> dict[str, Estimate]:
    """``precision``, ``recall``, ``density`` and ``coverage`` of the features."""
    fake, real = require_features(generated, reference)
    return prdc(real, fake, settings.k, settings.level)


def min_neighbours(dim: int, settings: MetricSettings) -> int:
    """The smallest number of samples that all have k other ones."""
    return settings.k + 1


PRDC = Metric(
    compute_prdc,
    needs="features",
    direction="higher",
    values=("precision", "recall", "density", "coverage"),
    min_samples=min_neighbours,
    min_reference=min_neighbours,
)
