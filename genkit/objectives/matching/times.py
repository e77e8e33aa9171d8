"""How training times are drawn: functions ``(batch, path, mean, std) -> t [B]`` in (0, 1], t = 1 being noise.

Loss-aware times (Nichol & Dhariwal 2021, section 3.3) also need the past losses. :class:`History` keeps them in
buffers, beside the network: so checkpoints hold them, and a step stays a function of (state, seed, step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genkit.core import Batch, ProbabilityPath
from genkit.diffusion.paths import times_at

TimesName = Literal["uniform", "logit-normal", "log-normal", "beta", "loss-aware"]
Times = Callable[[Batch, ProbabilityPath, float, float], Tensor]
SMALLEST = 1e-5  # in float32, sigma and alpha / sigma can still be told from 0 and infinity there, on every path


def uniform(batch: Batch, path: ProbabilityPath, mean: float, std: float) -> Tensor:
    return 1 - batch.uniform()  # (0, 1]


def logit_normal(batch: Batch, path: ProbabilityPath, mean: float, std: float) -> Tensor:
    """``logit t ~ N(mean, std^2)`` (Esser et al. 2024, eq. 19): more of the middle."""
    return torch.sigmoid(mean + std * batch.normal(1)[:, 0]).clamp(min=SMALLEST)


def log_normal(batch: Batch, path: ProbabilityPath, mean: float, std: float) -> Tensor:
    """``log(sigma / alpha) ~ N(mean, std^2)`` (Karras et al. 2022, table 1: -1.2 and 1.2), whatever the path.

    On the linear path this is the logit-normal. What lies past the path's own end is drawn at t = 1.
    """
    tau = torch.sigmoid(mean + std * batch.normal(1)[:, 0].double())  # sigma / (alpha + sigma)
    return times_at(path, tau, halvings=50).to(batch.x).clamp(min=SMALLEST)


def beta(batch: Batch, path: ProbabilityPath, mean: float, std: float) -> Tensor:
    """``t ~ Beta(1.5, 1)``, density ``1.5 sqrt(t)``: more of the noise, for actions (Black et al. 2024, appendix B)."""
    return (1 - batch.uniform()) ** (1 / 1.5)


TIMES: Mapping[str, Times] = {
    "uniform": uniform,
    "logit-normal": logit_normal,
    "log-normal": log_normal,
    "beta": beta,
}
LOSS_AWARE = "loss-aware"


class History(nn.Module):
    """The squared losses of ``BINS`` equal parts of (0, 1], by which times are drawn (Nichol & Dhariwal 2021, eq. 18).

    A bin's share is the root of its mean squared loss over about ``MEMORY`` losses, the older ones fading (the paper
    keeps the last ten of each discrete time); all are drawn alike until each bin has so many. Losses are weighted by
    the inverse of the density, so that their mean stays what it is with uniform times. ``note`` only gathers and
    ``settle`` moves, once a step and over all ranks: the answer is that of one rank with one batch.
    """

    BINS, MEMORY, ALWAYS = 100, 10.0, 1e-3  # the last: this share is uniform, as in the paper's code
    mean: Tensor
    seen: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("mean", "seen", "sums", "counts"):
            self.register_buffer(name, torch.zeros(self.BINS, dtype=torch.float64))

    def shares(self) -> Tensor:
        """How probable each bin is, ``[BINS]``; they sum to 1."""
        roots = self.mean.sqrt()
        known = (self.seen >= self.MEMORY).all() & (roots.sum() > 0)
        p = torch.where(known, roots / roots.sum().clamp(min=1e-300), 1 / self.BINS)
        return (1 - self.ALWAYS) * p + self.ALWAYS / self.BINS

    def draw(self, batch: Batch) -> Tensor:
        """Times ``[B]`` in (0, 1], by the inverse of their distribution function."""
        u, p = 1 - batch.uniform().double(), self.shares()
        ends = p.cumsum(0)
        i = torch.searchsorted(ends, u).clamp(max=self.BINS - 1)
        t = (i + ((u - ends[i] + p[i]) / p[i]).clamp(0, 1)) / self.BINS
        return t.to(batch.x).clamp(min=SMALLEST)

    def bins(self, t: Tensor) -> Tensor:
        return (t.double() * self.BINS).ceil().long().clamp(1, self.BINS) - 1

    def weight(self, t: Tensor) -> Tensor:
        """One over the density at t, ``[B]``."""
        return (1 / (self.BINS * self.shares()[self.bins(t)])).to(t)

    @torch.no_grad()
    def note(self, t: Tensor, loss: Tensor) -> None:
        """Gather losses ``[B]``; those that are not finite are left out."""
        ok, i = torch.isfinite(loss), self.bins(t)
        self.sums.index_add_(0, i, torch.where(ok, loss, 0).double().square())
        self.counts.index_add_(0, i, ok.double())

    @torch.no_grad()
    def after_step(self) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.sums)
            dist.all_reduce(self.counts)
        old = self.seen.clamp(max=self.MEMORY)
        total = old + self.counts
        self.mean.copy_(torch.where(total > 0, (old * self.mean + self.sums) / total.clamp(min=1), 0))
        self.seen.copy_(total)
        self.sums.zero_()
        self.counts.zero_()


PLACED = ("logit-normal", "log-normal")  # those that t_mean and t_std belong to


def refuse_times(times: str, path: ProbabilityPath, mean: float, std: float) -> None:
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
