"""Ages and sizes as the tables of the command line show them."""

from __future__ import annotations

import time


def format_bytes(number: float) -> str:
    """``512 B``, ``1.5 MB``: powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 99.5 else f"{number:.2g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def format_age(moment: float, now: float | None = None) -> str:
    """``5 min``, ``3 h`` or ``12 d`` since ``moment``, in seconds since 1970; nothing for 0."""
    if not moment:
        return ""
    seconds = max(0.0, (time.time() if now is None else now) - moment)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"
