"""Wasserstein-2 distance between sets of vectors: exact, and sliced."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from genkit.evaluation.metrics.estimate import Estimate, check_pair
from genkit.evaluation.metrics.metric import Metric, MetricSettings, SampleStatistics, require_features


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """The distance ``W2`` (not its square) of the point sets ``[N, D]`` and ``[M, D]``, all points of equal weight.

    Exact: scipy's assignment for N = M, else POT's network simplex (``pip install POT``). The cost grows as N^2 to
    N^3: seconds at N = 2000. For two finite draws of one distribution it is above 0, the more so in many dimensions.
    """
    check_pair(x, y, ("generated vectors", "real vectors"), 1)
    exact = "donot_use_mm_for_euclid_dist"  # equal points are at distance 0, not 1e-8
    cost = torch.cdist(x.double(), y.double(), compute_mode=exact).square().cpu().numpy()
    if len(x) == len(y):
        from scipy.optimize import linear_sum_assignment  # lazy: half a second

        i, j = linear_sum_assignment(cost)
        return math.sqrt(float(cost[i, j].mean()))
    if importlib.util.find_spec("ot") is None:
        raise ValueError(f"w2: given {len(x)} and {len(y)} vectors; draw as many as there are, or pip install POT")
    import ot  # lazy: optional

    return math.sqrt((ot.emd([], [], cost, numItermax=10_000_000) * cost).sum())


def sliced_wasserstein2(x: Tensor, y: Tensor, projections: int = 256, seed: int = 0) -> float:
    """The root of the mean of ``W2^2`` over random directions (Bonneel et al. 2015, eq. 8); ``[N, D]``, ``[M, D]``.

    For a shift by ``v`` alone it is ``|v| / sqrt(D)``. Directions are drawn on the CPU from ``seed``.
    """
    check_pair(x, y, ("generated vectors", "real vectors"), 1)
    if projections < 1:
        raise ValueError(f"projections: given {projections}; needs at least 1")
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], projections, generator=g, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(x.device)
    a, b = (v.double().to(x.device) @ directions for v in (x, y))
    a, b = a.sort(0).values, b.sort(0).values
    # both quantile functions are steps: cut (0, 1) wherever one of them steps
    n, m = len(x), len(y)
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = torch.diff(ends, prepend=ends.new_zeros(1)).double().to(x.device) / (n * m)
    i, j = ((ends - 1) // m).to(x.device), ((ends - 1) // n).to(x.device)
    return math.sqrt(float((widths[:, None] * (a[i] - b[j]).square()).sum(0).mean()))


def compute_w2(
    generated: SampleStatistics, reference: SampleStatistics | None, settings: MetricSettings
) -> dict[str, Estimate]:
    """``w2``, between the first ``settings.transport`` vectors of each set."""
    x, y = require_features(generated, reference)
    n = min(len(x), len(y), settings.transport)
    return {"w2": Estimate(wasserstein2(x[:n], y[:n]))}


def compute_sliced_w2(
    generated: SampleStatistics, reference: SampleStatistics | None, settings: MetricSettings
) -> dict[str, Estimate]:
    """``sliced_w2`` of vectors."""
    x, y = require_features(generated, reference)
    return {"sliced_w2": Estimate(sliced_wasserstein2(x, y, settings.projections, settings.seed))}


W2 = Metric(compute_w2, needs="samples", direction="lower", values=("w2",))
SLICED_W2 = Metric(compute_sliced_w2, needs="samples", direction="lower", values=("sliced_w2",))
