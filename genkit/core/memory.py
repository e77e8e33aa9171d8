"""How much memory this process has used at most, and whether it sufficed."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import psutil
import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|unable to allocate|cannot allocate memory"
    r"|storage size calculation overflowed|array is too big|maximum allowed dimension exceeded"
    r"|bytes-?size .* overflow|numel: integer multiplication overflow|invalid buffer size",
    re.IGNORECASE,
)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a CUDA device, or resident in this process on a CPU.

    On a CPU without /proc/self/status or a peak of its own, this is what is resident now. ``getrusage`` is not used:
    it starts at the peak of the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.is_file() and (match := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
        return int(match[1]) * 1024
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` start again at what is used now, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # absent outside Linux, or not permitted
            CLEAR.write_text("5")


def format_bytes(count: float) -> str:
    """``530 MB`` or ``1.2 GB``."""
    for unit, size, digits in (("GB", 1e9, 1), ("MB", 1e6, 0), ("kB", 1e3, 0)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f} B"


def is_out_of_memory(e: BaseException) -> bool:
    """Whether the memory of this machine or its device did not suffice: torch raises errors of many kinds then."""
    known = isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError"  # of CUDA
    return known or (isinstance(e, RuntimeError | ValueError) and OUT_OF_MEMORY.search(str(e)) is not None)
