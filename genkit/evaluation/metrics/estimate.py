"""A number with its interval, and the checks that every metric makes of its input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LEVEL = 0.95


class Estimate(NamedTuple):
    """A value and the bounds of an interval for what it estimates; a bound is None if it is not known."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def normal(cls, value: float, variance: float, level: float = LEVEL) -> Estimate:
        """The value with the interval of a normal distribution of this ``variance``."""
        half = normal_quantile((1 + level) / 2) * math.sqrt(variance)
        return cls(value, value - half, value + half)

    def overlaps(self, other: Estimate) -> bool | None:
        """Whether the two intervals have a point in common; None if a bound is not known."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        """``12.346 [11.25, 13.5]``."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.5g}{interval}"


def normal_quantile(p: float) -> float:
    """The standard normal distribution's quantile at ``p``."""
    from scipy import special  # lazy: a third of a second

    return float(special.ndtri(p))


def proportion(hits: int, n: int, level: float = LEVEL) -> Estimate:
    """The proportion ``hits / n`` with Wilson's interval (1927), which stays in [0, 1] and is right for small n."""
    z = normal_quantile((1 + level) / 2)
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))


def bootstrap(
    statistic: Callable[..., float], *sets: Tensor, num: int = 200, seed: int = 0, level: float = LEVEL
) -> Estimate:
    """``statistic(*sets)`` with an interval from ``num`` resamples of the rows of each set (Efron 1979).

    The quantiles of the resamples are shifted so that their mean is the value. A resample has about 0.63 n distinct
    rows, so statistics that are biased at finite n (FID, W2) are biased twice in it: their plain percentile interval
    can lie entirely above the value. The interval is for the *mean* of the statistic at this n, not for its limit.
    ``ValueError`` for fewer than 20 resamples.
    """
    if num < 20:
        raise ValueError(f"num: given {num} resamples; needs at least 20, 200 is usual")
    value = statistic(*sets)
    g = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num):
        resampled = [s[torch.randint(len(s), (len(s),), generator=g).to(s.device)] for s in sets]
        values.append(statistic(*resampled))
    spread = torch.tensor(values, dtype=torch.float64)
    low, high = torch.quantile(spread - spread.mean(), torch.tensor([(1 - level) / 2, (1 + level) / 2]).double())
    return Estimate(value, value + float(low), value + float(high))


def check_rows(x: Tensor, name: str, least: int = 1, first: int = 0) -> Tensor:
    """Return ``x`` if it is a finite floating-point ``[N, D]`` with at least ``least`` rows, else ``ValueError``.

    ``name`` is what ``x`` is called in the message; ``first`` the index of its first row in a larger set.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{name}: given {tuple(x.shape)} of {x.dtype}; needs [N, D] floating-point numbers")
    if len(x) < least:
        raise ValueError(f"{name}: given {len(x)} samples; needs at least {least}")
    bad = (~x.isfinite()).any(1)
    if bad.any():
        raise ValueError(
            f"{name}: row {first + int(bad.nonzero()[0])} is not finite, as are {int(bad.sum())} of {len(x)} rows; "
            "look at that sample, or at the precision of the network"
        )
    return x


def check_pair(x: Tensor, y: Tensor, names: tuple[str, str], least: int) -> None:
    """``ValueError`` unless both sets pass :func:`check_rows` and have rows of the same length."""
    for rows, name in zip((x, y), names, strict=True):
        check_rows(rows, name, least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{names[0]} have {x.shape[1]} numbers per row, {names[1]} {y.shape[1]}; take the same features for both"
        )
