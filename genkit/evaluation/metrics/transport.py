"""Wasserstein-2 distance between sets of vectors: exact, and sliced."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from genkit.evaluation.metrics.estimate import LEVEL, Estimate, check_pair
from genkit.evaluation.metrics.metric import Metric, MetricSettings, SampleStatistics, require_features, two_samples


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


MIND_PROJECTIONS = 1000  # Berthet et al. (2026)
AT_ONCE = 100  # projections, of which all samples are in memory


def mind(x: Tensor, y: Tensor, projections: int = MIND_PROJECTIONS, seed: int = 0, level: float = LEVEL) -> Estimate:
    """The Monge Inception Distance (Berthet et al. 2026): ``3 D`` times the mean of ``W2^2`` over random directions.

    ``x`` generated ``[N, D]``, ``y`` real ``[M, D]``; of the larger set a random subset of the size of the other. The
    factor gives it the size of an FID. The interval is for other draws of N samples against the same reference: the
    influence of a sample on ``W2^2`` in one direction is its Kantorovich potential (del Barrio & Loubes 2019), the
    integral of ``2 (x - T(x))`` with T the optimal transport.
    """
    check_pair(x, y, ("generated features", "real features"), 2)
    g = torch.Generator().manual_seed(seed)
    n, dim = min(len(x), len(y)), x.shape[1]
    x, y = (v if len(v) == n else v[torch.randperm(len(v), generator=g)[:n].to(v.device)] for v in (x, y))
    x, y = x.double(), y.double().to(x.device)
    total, influence = 0.0, torch.zeros(n, dtype=torch.float64, device=x.device)
    for first in range(0, projections, AT_ONCE):
        count = min(AT_ONCE, projections - first)
        directions = torch.randn(dim, count, generator=g, dtype=torch.float64)
        directions = (directions / directions.norm(dim=0)).to(x.device)
        a, order = (x @ directions).sort(0)
        slope = 2 * (a - (y @ directions).sort(0).values)
        total += float(slope.square().mean(0).sum()) / 4
        steps = (slope[1:] + slope[:-1]) / 2 * a.diff(dim=0)
        potential = torch.cat([torch.zeros_like(a[:1]), steps.cumsum(0)])
        influence += torch.zeros_like(a).scatter_(0, order, potential).sum(1)
    scale = 3 * dim / projections
    return Estimate.normal(scale * total, float((scale * influence).var()) / n, level)


def compute_mind(
    generated: SampleStatistics, reference: SampleStatistics | None, settings: MetricSettings
) -> dict[str, Estimate]:
    """``mind`` of the features."""
    x, y = require_features(generated, reference)
    return {"mind": mind(x, y, seed=settings.seed, level=settings.level)}


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
MIND = Metric(compute_mind, needs="features", direction="lower", values=("mind",),
              min_samples=two_samples, min_reference=two_samples)  # fmt: skip
