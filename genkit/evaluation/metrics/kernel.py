"""Maximum mean discrepancy: KID (a polynomial kernel on features) and MMD (a Gaussian kernel on vectors)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from genkit.evaluation.metrics.estimate import LEVEL, Estimate, check_pair
from genkit.evaluation.metrics.metric import Metric, MetricSettings, SampleStatistics, require_features, two_samples

CHUNK = 2**24  # entries of a distance matrix held at once


class RandomChoice(Protocol):
    """The part of ``np.random.Generator`` (and of the older ``RandomState``) that is used here."""

    def choice(self, a: int, size: int, replace: bool) -> np.ndarray:
        """``size`` of the numbers 0..``a``, with or without replacement."""
        ...


def kid(
    x: Tensor,
    y: Tensor,
    subsets: int = 100,
    size: int = 1000,
    rng: RandomChoice | None = None,
    level: float = LEVEL,
) -> Estimate:
    """Kernel inception distance (Binkowski et al. 2018, section 4): unbiased squared MMD, kernel ``(x.y / D + 1)^3``.

    ``x`` generated ``[N, D]``, ``y`` real ``[M, D]``; the mean over ``subsets`` of ``size`` rows (or as many as there
    are), drawn as clean-fid draws them from ``rng`` (default: seed 0). It is unbiased, so it can be below 0 and can be
    compared between different N. The interval combines the influence of single rows (first order) and the spread of
    the subsets.
    """
    check_pair(x, y, ("generated features", "real features"), 2)
    rng = rng or np.random.default_rng(0)
    size = min(len(x), len(y), size)
    if size < 2 or subsets < 1:
        raise ValueError(f"kid: given {subsets} subsets of {size}; needs at least 1 of 2")
    subsets = 1 if size == len(x) == len(y) else subsets  # all subsets would be the whole set
    values, variances = [], []
    for _ in range(subsets):
        a, b = (v[torch.from_numpy(rng.choice(len(v), size, replace=False)).to(v.device)].double() for v in (x, y))
        xx, yy, xy = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        value, variance = unbiased_mmd(xx, yy, xy)
        values.append(value)
        variances.append(variance)
    variance_x, variance_y = (sum(v) / subsets for v in zip(*variances, strict=True))
    spread = float(np.var(values, ddof=1)) / subsets if subsets > 1 else 0.0
    return Estimate.normal(float(np.mean(values)), variance_x / len(x) + variance_y / len(y) + spread, level)


def unbiased_mmd(xx: Tensor, yy: Tensor, xy: Tensor) -> tuple[float, tuple[float, float]]:
    """The squared MMD of Gretton et al. (2012), eq. 3, from kernel matrices; and the variances of the influences.

    ``xx`` ``[N, N]`` and ``yy`` ``[M, M]`` within the sets, ``xy`` ``[N, M]`` between them.
    """
    x_rows, y_rows = ((k.sum(1) - k.diagonal()) / (len(k) - 1) for k in (xx, yy))
    value = x_rows.mean() + y_rows.mean() - 2 * xy.mean()
    return float(value), (float((2 * (x_rows - xy.mean(1))).var()), float((2 * (y_rows - xy.mean(0))).var()))


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None, level: float = LEVEL) -> Estimate:
    """The squared MMD of vectors with the kernel ``exp(-|x - y|^2 / (2 h^2))``, unbiased (Gretton et al. 2012, eq. 3).

    ``x`` generated ``[N, D]``, ``y`` real ``[M, D]``. The bandwidth ``h`` defaults to the median distance between the
    real vectors (at most 1000 of them).
    """
    check_pair(x, y, ("generated vectors", "real vectors"), 2)
    x, y = x.double(), y.double()
    if bandwidth is None:
        subset = y[:: -(-len(y) // 1000)]
        bandwidth = float(torch.pdist(subset).median())
    if not bandwidth > 0:
        raise ValueError(f"bandwidth: given {bandwidth}; needs a number above 0 (half of the real vectors are equal)")

    def mean_kernel(u: Tensor, v: Tensor, same: bool) -> Tensor:
        """For each row of ``u``, its mean kernel with the (other) rows of ``v``."""
        parts = u.split(max(1, CHUNK // len(v)))
        sums = [(-torch.cdist(p, v).square() / (2 * bandwidth**2)).exp().sum(1) for p in parts]
        return (torch.cat(sums) - float(same)) / (len(v) - float(same))

    x_rows, y_rows = mean_kernel(x, x, True), mean_kernel(y, y, True)
    xy, yx = mean_kernel(x, y, False), mean_kernel(y, x, False)
    value = x_rows.mean() + y_rows.mean() - 2 * xy.mean()
    variance = (2 * (x_rows - xy)).var() / len(x) + (2 * (y_rows - yx)).var() / len(y)
    return Estimate.normal(float(value), float(variance), level)


CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. (2024), section 4


def cmmd(x: Tensor, y: Tensor, level: float = LEVEL) -> Estimate:
    """CMMD (Jayasumana et al. 2024, section 4): 1000 times the squared MMD with ``exp(-|x - y|^2 / (2 10^2))``.

    ``x`` generated ``[N, D]``, ``y`` real ``[M, D]``, embeddings of CLIP of length 1. It is their estimator, in which a
    row is also compared with itself: for equal distributions its mean is of the order 1/N + 1/M, not 0. The interval is
    for other draws of N samples against the same reference.
    """
    check_pair(x, y, ("generated features", "real features"), 2)
    x, y = x.double(), y.double().to(x.device)

    def mean_kernel(u: Tensor, v: Tensor) -> Tensor:
        parts = u.split(max(1, CHUNK // len(v)))
        kernels = [(-torch.cdist(p, v).square() / (2 * CMMD_BANDWIDTH**2)).exp().mean(1) for p in parts]
        return torch.cat(kernels)

    xx, xy, yy = mean_kernel(x, x), mean_kernel(x, y), mean_kernel(y, y)
    value = CMMD_SCALE * (xx.mean() + yy.mean() - 2 * xy.mean())
    variance = (CMMD_SCALE * 2 * (xx - xy)).var() / len(x)
    return Estimate.normal(float(value), float(variance), level)


# --------------------------------------------------------------------------------------------------------- metrics
def compute_cmmd(
    generated: SampleStatistics, reference: SampleStatistics | None, settings: MetricSettings
) -> dict[str, Estimate]:
    """``cmmd`` of the features."""
    x, y = require_features(generated, reference)
    return {"cmmd": cmmd(x, y, settings.level)}


def compute_kid(
    generated: SampleStatistics, reference: SampleStatistics | None, settings: MetricSettings
) -> dict[str, Estimate]:
    """``kid`` of the features."""
    x, y = require_features(generated, reference)
    rng = np.random.default_rng(settings.seed)
    return {"kid": kid(x, y, settings.subsets, settings.subset_size, rng, settings.level)}


def compute_mmd(
    generated: SampleStatistics, reference: SampleStatistics | None, settings: MetricSettings
) -> dict[str, Estimate]:
    """``mmd`` of vectors."""
    x, y = require_features(generated, reference)
    return {"mmd": mmd(x, y, level=settings.level)}


KID = Metric(compute_kid, needs="features", direction="lower", values=("kid",),
             min_samples=two_samples, min_reference=two_samples)  # fmt: skip
MMD = Metric(compute_mmd, needs="samples", direction="lower", values=("mmd",),
             min_samples=two_samples, min_reference=two_samples)  # fmt: skip
CMMD = Metric(compute_cmmd, needs="features", direction="lower", values=("cmmd",),
              min_samples=two_samples, min_reference=two_samples)  # fmt: skip
