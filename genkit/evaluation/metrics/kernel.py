"""Maximum mean discrepancy: KID (a polynomial kernel on features) and MMD (a Gaussian kernel on vectors)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from genkit.evaluation.metrics.estimate import LEVEL, Estimate, pair

CHUNK = 2**24  # numbers of a matrix of distances that are held at once


class Choice(Protocol):
    """What of ``np.random.Generator`` (and of the older ``RandomState``) is used here."""

    def choice(self, a: int, size: int, replace: bool) -> np.ndarray: ...


def kid(
    x: Tensor,
    y: Tensor,
    subsets: int = 100,
    size: int = 1000,
    rng: Choice | None = None,
    level: float = LEVEL,
) -> Estimate:
    """Kernel inception distance (Binkowski et al. 2018, section 4): unbiased squared MMD, kernel ``(x.y / D + 1)^3``.

    ``x`` generated ``[N, D]``, ``y`` real ``[M, D]``; the mean over ``subsets`` of ``size`` rows (or as many as there
    are), drawn as clean-fid draws them from ``rng`` (default: seed 0). Being unbiased, it can be below 0, and it can be
    compared between different N. The interval: influence of single rows (first order), and the subsets' spread.
    """
    pair(x, y, ("generated features", "real features"), 2)
    rng = rng or np.random.default_rng(0)
    size = min(len(x), len(y), size)
    if size < 2 or subsets < 1:
        raise ValueError(f"kid: given {subsets} subsets of {size}; needs at least 1 of 2")
    subsets = 1 if size == len(x) == len(y) else subsets  # they would all be the whole
    found, influence = [], []
    for _ in range(subsets):
        a, b = (v[torch.from_numpy(rng.choice(len(v), size, replace=False)).to(v.device)].double() for v in (x, y))
        xx, yy, xy = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        value, variances = unbiased(xx, yy, xy)
        found.append(value)
        influence.append(variances)
    variance_x, variance_y = (sum(v) / subsets for v in zip(*influence, strict=True))
    spread = float(np.var(found, ddof=1)) / subsets if subsets > 1 else 0.0
    return Estimate.normal(float(np.mean(found)), variance_x / len(x) + variance_y / len(y) + spread, level)


def unbiased(xx: Tensor, yy: Tensor, xy: Tensor) -> tuple[float, tuple[float, float]]:
    """The squared MMD of Gretton et al. (2012), eq. 3, from whole kernel matrices; the variances of the influences."""
    x_rows, y_rows = ((k.sum(1) - k.diagonal()) / (len(k) - 1) for k in (xx, yy))
    value = x_rows.mean() + y_rows.mean() - 2 * xy.mean()
    return float(value), (float((2 * (x_rows - xy.mean(1))).var()), float((2 * (y_rows - xy.mean(0))).var()))


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None, level: float = LEVEL) -> Estimate:
    """The squared MMD of vectors with the kernel ``exp(-|x - y|^2 / (2 h^2))``, unbiased (Gretton et al. 2012, eq. 3).

    ``h`` is the median distance between the real vectors ``y`` (at most 1000 of them) unless given.
    """
    pair(x, y, ("generated vectors", "real vectors"), 2)
    x, y = x.double(), y.double()
    if bandwidth is None:
        some = y[:: -(-len(y) // 1000)]
        bandwidth = float(torch.pdist(some).median())
    if not bandwidth > 0:
        raise ValueError(f"bandwidth: given {bandwidth}; needs a number above 0 (half of the real vectors are equal)")

    def means(u: Tensor, v: Tensor, own: bool) -> Tensor:
        """Of each row of ``u``, its mean kernel with the (other) rows of ``v``."""
        parts = u.split(max(1, CHUNK // len(v)))
        sums = [(-torch.cdist(p, v).square() / (2 * bandwidth**2)).exp().sum(1) for p in parts]
        return (torch.cat(sums) - float(own)) / (len(v) - float(own))

    x_rows, y_rows, xy, yx = means(x, x, True), means(y, y, True), means(x, y, False), means(y, x, False)
    value = x_rows.mean() + y_rows.mean() - 2 * xy.mean()
    variance = (2 * (x_rows - xy)).var() / len(x) + (2 * (y_rows - yx)).var() / len(y)
    return Estimate.normal(float(value), float(variance), level)
