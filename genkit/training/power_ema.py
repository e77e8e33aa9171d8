"""Power-function averages (Karras et al. 2024, section 3): their profiles, and how one is combined from others.

The average of exponent g weighs step k of K by ``(g + 1) k^g / K^(g + 1)``: it spans the same share of the training
whenever it is looked at. Its width is named by that share, ``sigma_rel``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

PREFIX = "power-"  # of the names of these averages: power-0.1
WIDEST = 0.28  # sigma_rel of the exponent 0, the plain mean, is 0.289


@functools.cache
def exponent_of(width: float) -> float:
    """The exponent g whose profile has the relative standard deviation ``width`` (eq. 126 to 128)."""
    if not 0 < width <= WIDEST:
        raise ValueError(f"power_ema: given a width of {width}; allowed above 0 and up to {WIDEST}")
    # sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)) falls with g
    low, high = 0.0, 2 / width
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if relative_width(middle) < width else (middle, high)
    return (low + high) / 2


def relative_width(exponent: float) -> float:
    """The standard deviation of the profile of ``exponent``, as a share of the training (eq. 126)."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def power_decay(width: float, step: int) -> float:
    """The decay of the average at ``step`` = 0, 1, ...: ``(1 - 1 / k)^(g + 1)`` with k = step + 1 (eq. 127)."""
    return (1 - 1 / (step + 1)) ** (exponent_of(width) + 1)


def width_of(name: str) -> float | None:
    """The width in the name of an average, ``power-0.1``; None for another name. ``ValueError`` if it is no width."""
    if not name.startswith(PREFIX):
        return None
    try:
        width = float(name.removeprefix(PREFIX))
        exponent_of(width)
    except ValueError:
        raise ValueError(
            f"ema: given {name}; allowed {PREFIX}WIDTH with 0 < WIDTH <= {WIDEST}, such as {PREFIX}0.1"
        ) from None
    return width


def average_names(power_ema: Sequence[float]) -> list[str]:
    """The names of the averages that are kept while training."""
    return [f"{PREFIX}{width}" for width in power_ema]


def slowest_key(keys: Sequence[float | str]) -> float | str | None:
    """The largest decay in the keys of averages, else the name of the widest power function; None without any."""
    decays = [key for key in keys if not isinstance(key, str)]
    names = [key for key in keys if isinstance(key, str)]
    return max(decays, default=None) if decays else max(names, key=lambda key: width_of(key) or 0.0, default=None)


def inner_products(steps_a: np.ndarray, a: np.ndarray, steps_b: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The inner products of the profiles of exponents ``a`` and ``b``, which end at those steps (eq. 151)."""
    ratio = steps_a / steps_b
    overlap = np.where(ratio < 1, ratio**b, ratio**-a)
    return (a + 1) * (b + 1) * overlap / ((a + b + 1) * np.maximum(steps_a, steps_b))


def combine_profiles(profiles: Sequence[tuple[int, float]], step: int, width: float) -> tuple[np.ndarray, float]:
    """The weights of ``profiles``, pairs of (last step, width), that come closest to the one of ``width`` at ``step``.

    Also the distance that remains, as a share of the wanted profile's norm (least squares, appendix C.3).
    """
    steps = np.array([k for k, _ in profiles], dtype=np.float64)
    exponents = np.array([exponent_of(w) for _, w in profiles])
    wanted, end = np.array(exponent_of(width)), np.array(float(step))
    gram = inner_products(steps[:, None], exponents[:, None], steps[None], exponents[None])
    right = inner_products(steps, exponents, end, wanted)
    scale = 1 / np.sqrt(np.diag(gram))  # profiles of unit norm: their Gram matrix is better conditioned
    weights = scale * np.linalg.lstsq(gram * scale[:, None] * scale, right * scale, rcond=1e-14)[0]
    norm = float(inner_products(end, wanted, end, wanted))
    residual = norm - 2 * weights @ right + weights @ gram @ weights
    return weights, math.sqrt(max(float(residual), 0.0) / norm)
