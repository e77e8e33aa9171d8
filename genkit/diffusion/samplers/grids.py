"""Grids: functions ``path -> times``, decreasing from 1 to 0, regular in chart time, noise level or discrete time.

They start before t = 1 on a :class:`~genkit.diffusion.paths.TruncatedPath`.

Uniform t on a VP path costs Heun half an order; uniform tau keeps every solver's order on every path (tests). The last
three, for models of discrete time, are uniform in t = k / timesteps nevertheless, to compare with what others report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from genkit.core import ProbabilityPath
from genkit.diffusion.paths import chart, end_time, times_at

Grid = Callable[[ProbabilityPath], Tensor]


def _positive(num_steps: int) -> int:
    if num_steps < 1:
        raise ValueError(f"steps: given {num_steps}; allowed 1 or more")
    return num_steps


def uniform(num_steps: int) -> Grid:
    """``num_steps`` equal steps of chart time from the path's noisy end to 0."""
    _positive(num_steps)

    def grid(path: ProbabilityPath) -> Tensor:
        end = chart(path, torch.full((1,), end_time(path), dtype=torch.float64))[0]
        return times_at(path, torch.linspace(1, 0, num_steps + 1, dtype=torch.float64) * end)

    return grid


def karras_levels(num: int, low: float, high: float, rho: float = 7.0) -> list[float]:
    """``num`` noise levels from ``high`` to ``low`` (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(high ** (1 / rho), low ** (1 / rho), num, dtype=torch.float64) ** rho
    return [high, *ramp[1:-1].tolist(), low]


def _levels(num_steps: int, low: float, high: float, between: Callable[[int, float, float], Sequence[float]]) -> Grid:
    """Nodes at noise levels ``sigma / alpha``, ``high`` or the path's own end if that is lower, to ``low``, then 0.

    The first node is the path's end even if it is noisier than ``high``, because samples start there.
    """
    _positive(num_steps)
    if not 0 < low < high:
        raise ValueError(f"low, high: given {low}, {high}; allowed 0 < low < high")

    def grid(path: ProbabilityPath) -> Tensor:
        first = torch.full((1,), end_time(path), dtype=torch.float64)
        alpha, sigma = float(path.alpha(first)), float(path.sigma(first))
        top = min(high, sigma / alpha) if alpha > 0 else high
        if top <= low:
            raise ValueError(f"low: given {low}; allowed below the path's highest noise level, {top:.3g}")
        levels = torch.tensor(between(num_steps, low, top)[1:] if num_steps > 1 else [], dtype=torch.float64)
        return torch.cat([first, times_at(path, levels / (1 + levels)), 0 * first])

    return grid


def karras(num_steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Grid:
    """EDM's levels (Karras et al. 2022, eq. 5 and table 1), on any path; see :func:`_levels` for the ends."""
    return _levels(num_steps, low, high, lambda n, a, b: karras_levels(n, a, b, rho))


def logsnr(num_steps: int, low: float = 0.002, high: float = 80.0) -> Grid:
    """Uniform in log-SNR: geometric levels (Lu et al. 2022, section 3), with the same ends as ``karras``."""

    def levels(n: int, a: float, b: float) -> list[float]:
        return torch.logspace(math.log10(b), math.log10(a), n, dtype=torch.float64).tolist()

    return _levels(num_steps, low, high, levels)


def _discrete(num_steps: int, timesteps: int, choose: Callable[[int], Tensor]) -> Grid:
    """The times ``k / timesteps``, then 0, with the numbers ``k = choose(timesteps)``.

    If the first is past the end of a truncated path, they are chosen among the discrete times up to that end.
    """
    _within(num_steps, timesteps)

    def grid(path: ProbabilityPath) -> Tensor:
        k, last = choose(timesteps), math.floor(end_time(path) * timesteps)
        if int(k[0]) > last:
            if num_steps > last:
                raise ValueError(
                    f"steps: given {num_steps}; allowed 1 … {last}, because at later times a prediction of the noise "
                    "says too little about the data; if they are in [-1, 1], clip the predicted data (--clip)"
                )
            k = choose(last)
        return torch.cat([k.double() / timesteps, torch.zeros(1, dtype=torch.float64)])

    return grid


def _within(num_steps: int, timesteps: int) -> None:
    if _positive(num_steps) > timesteps:
        raise ValueError(f"steps: given {num_steps}; allowed 1 … {timesteps}, the model's own")


def trailing(num_steps: int, timesteps: int = 1000) -> Grid:
    """Every T/n-th of the discrete times, counted from the noisy end (Lin et al. 2024, table 2)."""

    def choose(last: int) -> Tensor:
        return (torch.arange(num_steps, 0, -1, dtype=torch.float64) * last / num_steps).round()

    return _discrete(num_steps, timesteps, choose)


def linspace(num_steps: int, timesteps: int = 1000) -> Grid:
    """The discrete times from T to 1, both included, then 0 (Lin et al. 2024, table 2). One step: from T to 0."""
    return _discrete(
        num_steps, timesteps, lambda last: torch.linspace(last - 1, 0, num_steps, dtype=torch.float64).round() + 1
    )


def leading(num_steps: int, timesteps: int = 1000) -> Grid:
    """Every floor(T/n)-th of the discrete times, counted from the clean end: DDPM's usual (Lin et al. 2024, table 2).

    It starts short of t = 1, where some of the data is left: it is here to compare with what others report.
    """
    return _discrete(num_steps, timesteps, lambda last: torch.arange(num_steps - 1, -1, -1) * (last // num_steps) + 1)


GRIDS: Mapping[str, Callable[[int], Grid]] = {
    "uniform": uniform,
    "logsnr": logsnr,
    "karras": karras,
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
}
