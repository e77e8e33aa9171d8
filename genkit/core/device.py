"""Devices by name."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

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
