"""Grids: functions ``path -> times``, decreasing from 1 to 0. They belong to the chart: uniform in tau, not in t.

Uniform t on a VP path costs Heun half an order; uniform tau keeps every solver's order on every path (tests).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from genkit.core import Path
from genkit.paths import chart, times_at

Grid = Callable[[Path], Tensor]


def _positive(num_steps: int) -> int:
    if num_steps < 1:
        raise ValueError(f"steps: given {num_steps}; allowed 1 or more")
    return num_steps


def uniform(num_steps: int) -> Grid:
    """``num_steps`` equal steps of chart time from the path's noisy end to 0."""
    _positive(num_steps)

    def grid(path: Path) -> Tensor:
        end = chart(path, torch.ones(1, dtype=torch.float64))[0]
        return times_at(path, torch.linspace(1, 0, num_steps + 1, dtype=torch.float64) * end)

    return grid


def trailing(num_steps: int) -> Grid:
    """Equal steps of ``t`` itself, ending at 0: the "trailing" spacing of discrete DDPM (Lin et al. 2024, table 2)."""
    _positive(num_steps)
    return lambda path: torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


GRIDS: Mapping[str, Callable[[int], Grid]] = {"uniform": uniform, "trailing": trailing}
