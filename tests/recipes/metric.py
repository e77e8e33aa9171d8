"""A metric in one file and one line: the energy distance between vectors (Székely & Rizzo 2013, eq. 5)."""

import torch
from torch import Tensor

from genkit.evaluation.metrics.estimate import Estimate, check_pair
from genkit.evaluation.metrics.metric import Metric, MetricSettings, SampleStatistics, require_features


def energy_distance(x: Tensor, y: Tensor, level: float = 0.95) -> Estimate:
    """``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` of ``x`` ``[N, D]`` and ``y`` ``[M, D]``, without bias.

    The interval is from the influence of single rows (first order).
    """
    check_pair(x, y, ("generated vectors", "real vectors"), 2)
    x, y = x.double(), y.double()
    between = torch.cdist(x, y)
    within_x, within_y = (torch.cdist(v, v).sum(1) / (len(v) - 1) for v in (x, y))
    value = 2 * between.mean() - within_x.mean() - within_y.mean()
    influence_x, influence_y = 2 * (between.mean(1) - within_x), 2 * (between.mean(0) - within_y)
    variance = influence_x.var() / len(x) + influence_y.var() / len(y)
    return Estimate.normal(float(value), float(variance), level)


def compute_energy(
    generated: SampleStatistics, reference: SampleStatistics | None, settings: MetricSettings
) -> dict[str, Estimate]:
    """``energy`` of vectors."""
    x, y = require_features(generated, reference)
    return {"energy": energy_distance(x, y, settings.level)}


ENTRY = Metric(compute_energy, needs="samples", direction="lower", values=("energy",))
