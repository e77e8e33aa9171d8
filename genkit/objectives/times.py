"""How training times are drawn: functions ``(batch, path, mean, std) -> t [B]`` in (0, 1], t = 1 being noise.

The loss-aware times of Nichol & Dhariwal 2021 (section 3.3) are not here: they need a memory of past losses, and then
a step is no longer a pure function of (weights, seed, step), nor independent of how its batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from genkit.core import Batch, Path
from genkit.paths import times_at

TimesName = Literal["uniform", "logit-normal", "log-normal", "beta"]
Times = Callable[[Batch, Path, float, float], Tensor]
SMALLEST = 1e-5  # in float32, sigma and alpha / sigma can still be told from 0 and infinity there, on every path


def uniform(batch: Batch, path: Path, mean: float, std: float) -> Tensor:
    return 1 - batch.uniform()  # (0, 1]


def logit_normal(batch: Batch, path: Path, mean: float, std: float) -> Tensor:
    """``logit t ~ N(mean, std^2)`` (Esser et al. 2024, eq. 19): more of the middle."""
    return torch.sigmoid(mean + std * batch.normal(1)[:, 0]).clamp(min=SMALLEST)


def log_normal(batch: Batch, path: Path, mean: float, std: float) -> Tensor:
    """``log(sigma / alpha) ~ N(mean, std^2)`` (Karras et al. 2022, table 1: -1.2 and 1.2), whatever the path.

    On the linear path this is the logit-normal. What lies past the path's own end is drawn at t = 1.
    """
    tau = torch.sigmoid(mean + std * batch.normal(1)[:, 0].double())  # sigma / (alpha + sigma)
    return times_at(path, tau, halvings=50).to(batch.x).clamp(min=SMALLEST)


def beta(batch: Batch, path: Path, mean: float, std: float) -> Tensor:
    """``t ~ Beta(1.5, 1)``, density ``1.5 sqrt(t)``: more of the noise, for actions (Black et al. 2024, appendix B)."""
    return (1 - batch.uniform()) ** (1 / 1.5)


TIMES: Mapping[str, Times] = {
    "uniform": uniform,
    "logit-normal": logit_normal,
    "log-normal": log_normal,
    "beta": beta,
}
PLACED = ("logit-normal", "log-normal")  # those that t_mean and t_std belong to


def refuse_times(times: str, path: Path, mean: float, std: float) -> None:
    """``ValueError`` where mean and std would have no effect, or draw mostly what the path does not have."""
    if times not in PLACED and (mean, std) != (0.0, 1.0):
        raise ValueError(
            f"t_mean, t_std: given {mean}, {std}, but {times} times have neither; allowed with: {', '.join(PLACED)}"
        )
    if times == "log-normal":
        one = torch.ones(1, dtype=torch.float64)
        end = math.log(float(path.sigma(one))) - math.log(max(float(path.alpha(one)), 1e-300))
        if mean >= end:
            raise ValueError(
                f"t_mean: given {mean}; allowed below {end:.2f}, where log(sigma / alpha) of {type(path).__name__} ends"
            )
