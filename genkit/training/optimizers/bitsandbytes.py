"""AdamW of bitsandbytes, whose state takes a byte a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from genkit.config.numbers import Count, Positive
from genkit.training.optimizers.family import Group, Networks, OptimizerFamily, PhaseRates


@dataclass(frozen=True)
class AdamW8bit(OptimizerFamily):
    """AdamW with 8-bit moments (Dettmers et al. 2022), on a GPU."""

    target: ClassVar[str] = "bitsandbytes.optim:AdamW8bit"
    package: ClassVar[str] = "bitsandbytes"
    eps: Positive = 1e-8
    """added to the root of the second moment"""
    min_8bit_size: Count = 4096
    """weights with fewer numbers have moments of 32 bits"""

    @classmethod
    def takes(cls, name: str) -> bool:
        return name in ("lr", "betas", "weight_decay")

    def create(self, groups: Sequence[Group], rates: PhaseRates, nets: Networks) -> torch.optim.Optimizer:
        if any(p.device.type == "cpu" for group in groups for p in group["params"]):
            raise ValueError("optimizer: adamw-8bit works on a GPU only, and these weights are on the CPU; try adamw")
        return super().create(groups, rates, nets)
