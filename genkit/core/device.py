"""Devices by name."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from genkit.core.messages import warn_once

DeviceName = Literal["auto", "cpu", "cuda", "mps", "xpu"]


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the machine's accelerator, or the CPU if it has none.

    Raises ``ValueError`` if torch sees no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    if name != "cpu" and (accelerator is None or accelerator.type != name):
        allowed = ", ".join(["cpu", "auto", *([accelerator.type] if accelerator else [])])
        raise ValueError(f"device: given {name}, and torch sees no such device here; allowed: {allowed}")
    return torch.device(name)


def send(x: Tensor, device: torch.device) -> Tensor:
    """``x``, from the CPU, on ``device``: without waiting for it, through pinned memory if it is a CUDA device."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type == "cuda")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device supports bf16 natively; one that emulates it is slower than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_has_bf16()


@lru_cache
def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 instructions, as Linux lists them."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def warn_of_emulated_bf16(what: str, device: torch.device) -> None:
    """Warn once that the device emulates the bf16 that ``what`` asks for, if it does."""
    if device.type in ("cpu", "cuda") and not has_fast_bf16(device):
        warn_once(f"{what}: this {device.type.upper()} only emulates it, which takes several times as long as fp32")
