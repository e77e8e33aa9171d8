"""A number with its interval, and what every metric asks of its input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy import special
from torch import Tensor

LEVEL = 0.95


class Estimate(NamedTuple):
    """A value and an interval ``low..high`` for what it estimates; None where no interval is known."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def normal(cls, value: float, variance: float, level: float = LEVEL) -> Estimate:
        """The value with the interval of a normal law of this variance."""
        half = float(special.ndtri((1 + level) / 2)) * math.sqrt(variance)
        return cls(value, value - half, value + half)


def share(hits: int, n: int, level: float = LEVEL) -> Estimate:
    """The share ``hits / n`` with the interval of Wilson (1927), which stays in [0, 1] and is right for small n."""
    z = float(special.ndtri((1 + level) / 2))
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))


def bootstrap(
    statistic: Callable[..., float], *sets: Tensor, num: int = 200, seed: int = 0, level: float = LEVEL
) -> Estimate:
    """``statistic(*sets)`` with an interval from ``num`` resamples of the rows of each set (Efron 1979).

    The resamples' quantiles are moved so that their mean falls on the value. A resample has about 0.63 n different
    rows, so statistics that are biased at finite n (FID, W2) are biased twice there: their plain percentile interval
    can lie wholly above the value. The interval is for the *mean* of the statistic at this n, not for its limit.
    """
    if num < 20:
        raise ValueError(f"num: given {num} resamples; needs at least 20, 200 is usual")
    value = statistic(*sets)
    g = torch.Generator().manual_seed(seed)
    drawn = [
        statistic(*(s[torch.randint(len(s), (len(s),), generator=g).to(s.device)] for s in sets)) for _ in range(num)
    ]
    resampled = torch.tensor(drawn, dtype=torch.float64)
    low, high = torch.quantile(resampled - resampled.mean(), torch.tensor([(1 - level) / 2, (1 + level) / 2]).double())
    return Estimate(value, value + float(low), value + float(high))


def rows(x: Tensor, what: str, least: int = 1, first: int = 0) -> Tensor:
    """``x`` itself, where it is ``[N, D]`` floating, finite and of at least ``least`` rows; ``ValueError`` otherwise.

    ``first`` is the number of the first row, where ``x`` is a part of a larger set.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{what}: given {tuple(x.shape)} of {x.dtype}; needs [N, D] floating-point numbers")
    if len(x) < least:
        raise ValueError(f"{what}: given {len(x)} samples; needs at least {least}")
    bad = (~x.isfinite()).any(1)
    if bad.any():
        raise ValueError(
            f"{what}: row {first + int(bad.nonzero()[0])} is not finite, as are {int(bad.sum())} of {len(x)} rows; "
            "look at that sample, or at the precision of the network"
        )
    return x


def pair(x: Tensor, y: Tensor, names: tuple[str, str], least: int) -> None:
    """``ValueError`` unless both sets are as :func:`rows` wants and have rows of the same length."""
    for v, name in zip((x, y), names, strict=True):
        rows(v, name, least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{names[0]} have {x.shape[1]} numbers a row, {names[1]} {y.shape[1]}; take the same features for both"
        )
