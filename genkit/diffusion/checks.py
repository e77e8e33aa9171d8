"""Checks of options, each a ``ValueError`` in one line: what was given and what is allowed."""

from __future__ import annotations

import math


def require(name: str, value: object, allowed: str, holds: bool) -> None:
    """``ValueError`` unless ``holds``. ``value`` is shown as it is: pass ``repr(value)`` of a string."""
    if not holds:
        raise ValueError(f"{name}: given {value}; allowed {allowed}")


def require_finite(name: str, scale: float) -> None:
    """``ValueError`` for a scale that is infinite or not a number."""
    require(name, scale, "any finite number", math.isfinite(scale))
