"""Means and variances of latents, to normalise each channel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from genkit.core import Data, Draw
from genkit.core.progress import Progress, silent
from genkit.objectives.autoencoders.autoencoder import Posterior
from genkit.training.first_stage import FirstStage

MAX_SAMPLES = 10_000  # samples that the statistics are measured on


class LatentStatistics(NamedTuple):
    """Statistics of ``n`` numbers in each of C channels, float64 ``[C]``.

    ``mean`` and ``between`` are the mean and variance of the posteriors' means, ``within`` is the mean of their own
    variances. The variance of draws is ``between + within``.
    """

    n: float
    mean: Tensor
    between: Tensor
    within: Tensor

    def std(self, posterior: Literal["draw", "mean"]) -> Tensor:
        """Return the standard deviation ``[C]`` of the posteriors' draws, or of their means."""
        return (self.between + self.within if posterior == "draw" else self.between).sqrt()

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics, ready for JSON."""
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in self._asdict().items()}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> LatentStatistics:
        """Return the statistics that :meth:`to_dict` wrote."""
        mean, between, within = (torch.tensor(stored[k], dtype=torch.float64) for k in ("mean", "between", "within"))
        return LatentStatistics(stored["n"], mean, between, within)


def compute_statistics(posteriors: Iterable[Posterior]) -> LatentStatistics:
    """Compute the statistics of all ``posteriors`` in one pass.

    Raises ``ValueError`` if there are none.
    """

    def parts() -> Iterator[LatentStatistics]:
        for q in posteriors:
            mean, var = (v.double().movedim(1, 0).flatten(1).cpu() for v in (q.mean, q.log_var.exp()))
            yield LatentStatistics(mean.shape[1], mean.mean(1), mean.var(1, correction=0), var.mean(1))

    return merge_all(parts())


def merge_all(parts: Iterable[LatentStatistics]) -> LatentStatistics:
    """Return the statistics of the union of disjoint sets, merged one after the other (Chan et al. 1979, eq. 2.1).

    Raises ``ValueError`` if there are none.
    """
    total: LatentStatistics | None = None
    for part in parts:
        total = part if total is None else merge_statistics(total, part)
    if total is None:
        raise ValueError("codec: there are no samples to measure the latents of")
    return total


def merge_statistics(a: LatentStatistics, b: LatentStatistics) -> LatentStatistics:
    """Return the statistics of the union of two disjoint sets."""
    n = a.n + b.n
    share = b.n / n

    def interpolate(x: Tensor, y: Tensor) -> Tensor:
        return x + (y - x) * share

    between = interpolate(a.between, b.between) + (b.mean - a.mean) ** 2 * share * (1 - share)
    return LatentStatistics(n, interpolate(a.mean, b.mean), between, interpolate(a.within, b.within))


def measure_latents(
    stage: FirstStage, data: Data, device: torch.device, batch: int = 256, progress: Progress = silent
) -> LatentStatistics:
    """Compute the statistics of the latents of ``data``, from at most ``MAX_SAMPLES`` evenly spaced samples."""
    n = min(MAX_SAMPLES, len(data))

    def posteriors() -> Iterable[Posterior]:
        for first in range(0, n, batch):
            rows = range(first, min(first + batch, n))
            yield encode_samples(stage, data, torch.tensor(rows) * len(data) // n, rows, device)
            progress("measuring latents", rows.stop, n)

    return compute_statistics(posteriors())


def encode_samples(stage: FirstStage, data: Data, indices: Tensor, rows: range, device: torch.device) -> Posterior:
    """Return the posterior of the samples at ``indices``, with the random numbers of ``rows``."""
    batch = data.batch(indices, Draw((0, 1), rows.start, rows.stop)).to(device)
    with torch.no_grad():
        return stage.posterior(replace(batch, draw=Draw((0,), rows.start, rows.stop, device)))
