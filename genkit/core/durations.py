"""Lengths of time: ``2h30m`` on the command line, ``2 h 30 min`` in messages."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
PATTERN = re.compile("".join(rf"(?:(?P<{unit}>\d+(?:\.\d+)?){unit})?" for unit in UNITS))


def parse_duration(text: str) -> float:
    """The seconds that ``2h30m``, ``90s`` or a plain number of seconds stands for.

    Raises ``ValueError`` for anything else, and for no time at all.
    """
    text = text.strip().lower()
    match = PATTERN.fullmatch(f"{text}s" if text[-1:].isdigit() else text)
    parts = match.groupdict() if match else {}
    seconds = sum(float(number) * UNITS[unit] for unit, number in parts.items() if number is not None)
    if not text or not 0 < seconds < math.inf:
        raise ValueError(f"{text!r} is no length of time; allowed: 90s, 10m, 2h30m, 1d or a number of seconds, above 0")
    return seconds


def check_duration(given: object) -> str:
    """``given``, text or a number of seconds, as text. ``ValueError`` if it is no length of time."""
    text = str(given) if isinstance(given, (str, int, float)) else ""
    parse_duration(text)
    return text


DurationText = Annotated[str, BeforeValidator(check_duration)]
"""The type of a setting that is a length of time."""


def format_duration(seconds: float) -> str:
    """``3.2 s``, ``12 min 30 s`` or ``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def estimate_duration(seconds: float) -> str:
    """``about 40 s``, ``about 12 min``, ``about 2 h 5 min``, ``about 3 days``: as many digits as an estimate has."""
    if seconds < 100:
        return f"about {max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min"
    if minutes < 48 * 60:
        return f"about {minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    return f"about {round(minutes / 1440)} days"


def format_step(seconds: float) -> str:
    """The time of a step: ``35 ms`` or ``2.1 s``."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
