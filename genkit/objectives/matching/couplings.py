"""Couplings of sources and samples: ``(batch, x1, path, t) -> (x0, x1)``, the ends of each sample's path.

A coupling sees the rows of one micro-batch on one rank, so its result depends on how a batch is split. Samples stay in
their rows and only the sources move, so conditions, weights and times belong to the same sample as before.

Couplings other than ``independent`` change the distribution of x1 given x: ``E[x1 | x]`` is no multiple of the score.
The ODE is right for all of them, the SDE is not. With conditions, a coupling must not make x1 depend on the condition,
because sampling draws x1 without it (Cheng & Schwing 2025). So ``ot`` keeps sources within their class. It cannot do so
for conditions that are not classes, nor can ``sb`` at all: prefer ``independent`` there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from genkit.config.numbers import Positive
from genkit.core import Batch, Cond, ProbabilityPath, expand
from genkit.diffusion.paths import chart


class Coupling(Protocol):
    """Which source goes with which sample."""

    independent: ClassVar[bool]
    """whether x1 is drawn independently of x0"""
    permutes: ClassVar[bool]
    """whether a sample may get the source that was drawn for another"""
    needs_pairs: ClassVar[bool]
    """whether the data have to bring the sources"""

    def __call__(self, batch: Batch, x1: Tensor, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the paths from sources ``x1`` ``[B, *S]``, at times ``t`` ``[B]``."""
        ...


@dataclass(frozen=True)
class Independent:
    """Every sample keeps the source that was drawn for it."""

    independent: ClassVar[bool] = True
    permutes: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = False

    def __call__(self, batch: Batch, x1: Tensor, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        return batch.x, x1


@dataclass(frozen=True)
class OptimalTransport:
    """The exact optimal plan between samples and sources of the batch, for the squared distance.

    Tong et al. 2024, section 3.2.3; Pooladian et al. 2023. It is a permutation, found in O(B^3): 1 ms for 128 rows. If
    the samples have classes, each class has a plan of its own.
    """

    independent: ClassVar[bool] = False
    permutes: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False

    def __call__(self, batch: Batch, x1: Tensor, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        from scipy.optimize import linear_sum_assignment  # lazy: half a second

        cost = torch.nan_to_num(squared_distances(batch.x, x1))
        other = other_class(batch.cond, cost)
        _, order = linear_sum_assignment((cost + other * (1 + len(cost) * cost.max())).cpu().numpy())
        return batch.x, x1[torch.as_tensor(order, device=x1.device)]


@dataclass(frozen=True)
class SchrodingerBridge:
    """SB-CFM, a flow with the marginals of the Schrödinger bridge (Tong et al. 2024, section 3.2.4).

    Brownian bridges of variance ``sigma^2 t (1 - t)`` connect partners of the entropic plan with regularisation
    ``2 sigma^2``. The velocity of the bridge at ``x = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) e`` is that of the
    straight line through x from ``x0 + (sigma / 2) sqrt(t / (1 - t)) e`` to ``x1 + (sigma / 2) sqrt((1 - t) / t) e``;
    so these are the ends, with chart time in the place of t.
    """

    sigma: Positive = 0.5
    """diffusion of the bridge; 0.5 is half the spread of data that are scaled to one"""
    independent: ClassVar[bool] = False
    permutes: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False

    def __call__(self, batch: Batch, x1: Tensor, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        # a partner for each sample, drawn from its row of the plan
        cumulative = entropic_plan(squared_distances(batch.x, x1), 2 * self.sigma**2).cumsum(1)
        u = batch.uniform()[:, None].to(cumulative) * cumulative[:, -1:]
        partner = torch.searchsorted(cumulative, u, right=True)[:, 0]
        # the straight line with the bridge's velocity
        e = batch.normal()
        tau = expand(chart(path, t)[0], e).clamp(1e-4, 1 - 1e-4)  # the bridge's velocity is infinite at both ends
        ratio = (tau / (1 - tau)).sqrt()
        return batch.x + self.sigma / 2 * ratio * e, x1[partner.clamp(max=len(x1) - 1)] + self.sigma / 2 / ratio * e


@dataclass(frozen=True)
class GivenPairs:
    """The source that comes with each sample, ``batch.x1``: pairs made by a model (Liu et al. 2023, section 2.2)."""

    independent: ClassVar[bool] = False
    permutes: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = True

    def __call__(self, batch: Batch, x1: Tensor, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        return batch.x, paired_source(batch)


def paired_source(batch: Batch) -> Tensor:
    """``batch.x1``; ``ValueError`` if the data have no pairs."""
    if batch.x1 is None:
        raise ValueError("data: hold no pairs (noise, sample), which this needs; make them of a run: genkit reflow RUN")
    return batch.x1


def other_class(cond: Cond, like: Tensor) -> Tensor:
    """``[B, B]``: 1 if sample i and source j are of different classes. Integer conditions ``[B]`` are classes."""
    other = torch.zeros_like(like)
    for v in cond.values():
        if v.ndim == 1 and not v.is_floating_point():
            other = torch.maximum(other, (v[:, None] != v).to(like))
    return other


def squared_distances(x0: Tensor, x1: Tensor) -> Tensor:
    """Squared distances between all pairs of rows, ``[B, B]``, float64."""
    return torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()).square()


def entropic_plan(cost: Tensor, regularisation: float, max_iterations: int = 1000, tolerance: float = 1e-4) -> Tensor:
    """``[B, B]``: argmin of ``<plan, cost> - regularisation * entropy(plan)``, rows and columns summing to ``1 / B``.

    Sinkhorn's iteration (Cuturi 2013) on logarithms, until the rows are right to ``tolerance``.
    """
    log_kernel = -cost / regularisation
    g = torch.zeros_like(cost[0])
    for i in range(max_iterations):
        f = -torch.logsumexp(log_kernel + g, 1)
        g = -torch.logsumexp(log_kernel + f[:, None], 0)
        if i % 10 == 9 and float((torch.logsumexp(log_kernel + g, 1) + f).exp().sub(1).abs().max()) < tolerance:
            break
    f = -torch.logsumexp(log_kernel + g, 1)
    return (log_kernel + f[:, None] + g).exp() / len(cost)


COUPLINGS: Mapping[str, type[Coupling]] = {
    "independent": Independent,
    "ot": OptimalTransport,
    "sb": SchrodingerBridge,
    "given": GivenPairs,
}
