"""Distributions of training times: frozen dataclasses that sample ``t [B]`` in (0, 1], t = 1 being noise.

Loss-aware times (Nichol & Dhariwal 2021, section 3.3) depend on past losses. :class:`LossHistory` keeps these in
buffers beside the network, so checkpoints hold them, and a step stays a function of (state, seed, step).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genkit.config.numbers import Positive
from genkit.core import Batch, ProbabilityPath
from genkit.diffusion.paths import times_at

SMALLEST = 1e-5  # in float32, sigma and alpha / sigma can still be told from 0 and infinity there, on every path


class TimeDistribution(ABC):
    """How training times are drawn. Its fields are configuration."""

    loss_aware: ClassVar[bool] = False
    """Whether times depend on past losses; :meth:`LossHistory.sample` then draws them."""

    @abstractmethod
    def sample(self, batch: Batch, path: ProbabilityPath) -> Tensor:
        """Times ``[B]`` in (0, 1], one for each sample of the batch, from the batch's own random numbers."""

    def check(self, path: ProbabilityPath) -> None:  # noqa: B027  (most have nothing to check)
        """``ValueError`` if this distribution mostly draws times that ``path`` does not have."""


@dataclass(frozen=True)
class Uniform(TimeDistribution):
    """All times are equally likely."""

    def sample(self, batch: Batch, path: ProbabilityPath) -> Tensor:
        return 1 - batch.uniform()  # (0, 1]


@dataclass(frozen=True)
class LogitNormal(TimeDistribution):
    """``logit t ~ N(mean, std^2)``, more of the middle of the path (Esser et al. 2024, eq. 19)."""

    mean: float = 0.0
    """mean of logit t; above 0 biases to noise"""
    std: Positive = 1.0
    """standard deviation of logit t"""

    def sample(self, batch: Batch, path: ProbabilityPath) -> Tensor:
        return torch.sigmoid(self.mean + self.std * batch.normal(1)[:, 0]).clamp(min=SMALLEST)


@dataclass(frozen=True)
class LogNormal(TimeDistribution):
    """``log(sigma / alpha) ~ N(mean, std^2)`` on any path (Karras et al. 2022, table 1: -1.2 and 1.2).

    On the linear path this is the logit-normal. Noise levels past the path's own end are drawn at t = 1.
    """

    mean: float = 0.0
    """mean of log(sigma / alpha); above 0 biases to noise"""
    std: Positive = 1.0
    """standard deviation of log(sigma / alpha)"""

    def sample(self, batch: Batch, path: ProbabilityPath) -> Tensor:
        tau = torch.sigmoid(self.mean + self.std * batch.normal(1)[:, 0].double())  # sigma / (alpha + sigma)
        return times_at(path, tau, halvings=50).to(batch.x).clamp(min=SMALLEST)

    def check(self, path: ProbabilityPath) -> None:
        refuse_noisy_mean("time_distribution.mean", self.mean, path)


@dataclass(frozen=True)
class Beta(TimeDistribution):
    """``t ~ Beta(1.5, 1)``, density ``1.5 sqrt(t)``: more noise, for actions (Black et al. 2024, appendix B)."""

    def sample(self, batch: Batch, path: ProbabilityPath) -> Tensor:
        return (1 - batch.uniform()) ** (1 / 1.5)


@dataclass(frozen=True)
class LossAware(TimeDistribution):
    """More times with large losses, reweighted to uniform (Nichol & Dhariwal 2021, section 3.3)."""

    loss_aware: ClassVar[bool] = True

    def sample(self, batch: Batch, path: ProbabilityPath) -> Tensor:
        raise AssertionError("loss-aware times are drawn by LossHistory.sample")


TIME_DISTRIBUTIONS: Mapping[str, type[TimeDistribution]] = {
    "uniform": Uniform,
    "logit-normal": LogitNormal,
    "log-normal": LogNormal,
    "beta": Beta,
    "loss-aware": LossAware,
}


def refuse_noisy_mean(name: str, mean: float, path: ProbabilityPath) -> None:
    """``ValueError`` if the mean of log(sigma / alpha) lies past the end of ``path``."""
    one = torch.ones(1, dtype=torch.float64)
    end = math.log(float(path.sigma(one))) - math.log(max(float(path.alpha(one)), 1e-300))
    if mean >= end:
        raise ValueError(
            f"{name}: given {mean}; allowed below {end:.2f}, where log(sigma / alpha) of {type(path).__name__} ends"
        )


class LossHistory(nn.Module):
    """Mean squared losses in ``BINS`` equal parts of (0, 1], by which times are drawn (Nichol & Dhariwal 2021, eq. 18).

    A bin's probability is proportional to the root of its mean squared loss over about its last ``MEMORY`` losses, with
    older ones fading (the paper keeps the last ten of each discrete time). Times are uniform until every bin has that
    many. Losses are weighted by the inverse density, so their mean is the same as with uniform times.

    :meth:`record` only gathers and :meth:`update` applies, once a step and over all ranks, so the result does not
    depend on how a batch is split into micro-batches and ranks.
    """

    BINS, MEMORY, UNIFORM_SHARE = 100, 10.0, 1e-3  # the share is that of the paper's code
    mean: Tensor
    num_losses: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("mean", "num_losses", "sums", "counts"):
            self.register_buffer(name, torch.zeros(self.BINS, dtype=torch.float64))

    def probabilities(self) -> Tensor:
        """The probability of each bin, ``[BINS]``; they sum to 1."""
        roots = self.mean.sqrt()
        complete = (self.num_losses >= self.MEMORY).all() & (roots.sum() > 0)
        p = torch.where(complete, roots / roots.sum().clamp(min=1e-300), 1 / self.BINS)
        return (1 - self.UNIFORM_SHARE) * p + self.UNIFORM_SHARE / self.BINS

    def sample(self, batch: Batch) -> Tensor:
        """Times ``[B]`` in (0, 1], by the inverse of their distribution function."""
        u, p = 1 - batch.uniform().double(), self.probabilities()
        ends = p.cumsum(0)
        i = torch.searchsorted(ends, u).clamp(max=self.BINS - 1)
        t = (i + ((u - ends[i] + p[i]) / p[i]).clamp(0, 1)) / self.BINS
        return t.to(batch.x).clamp(min=SMALLEST)

    def bins(self, t: Tensor) -> Tensor:
        """The bin of each time, Int ``[B]``."""
        return (t.double() * self.BINS).ceil().long().clamp(1, self.BINS) - 1

    def weight(self, t: Tensor) -> Tensor:
        """One over the density at t, ``[B]``."""
        return (1 / (self.BINS * self.probabilities()[self.bins(t)])).to(t)

    @torch.no_grad()
    def record(self, t: Tensor, loss: Tensor) -> None:
        """Gather losses ``[B]`` at times ``[B]``, except those that are not finite."""
        finite, i = torch.isfinite(loss), self.bins(t)
        self.sums.index_add_(0, i, torch.where(finite, loss, 0).double().square())
        self.counts.index_add_(0, i, finite.double())

    @torch.no_grad()
    def update(self) -> None:
        """Move the means by what was gathered on all ranks since the last update."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.sums)
            dist.all_reduce(self.counts)
        old = self.num_losses.clamp(max=self.MEMORY)
        total = old + self.counts
        self.mean.copy_(torch.where(total > 0, (old * self.mean + self.sums) / total.clamp(min=1), 0))
        self.num_losses.copy_(total)
        self.sums.zero_()
        self.counts.zero_()
