"""Metrics of sets of samples: numbers with intervals, from features, logits or the vectors themselves.

``METRICS`` is the registry: a metric says what must be kept of the samples and computes :class:`Estimate` s from it.
Every interval is for the noise of drawing the samples, at this number of them and against this reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from genkit.evaluation.metrics.estimate import Estimate, bootstrap
from genkit.evaluation.metrics.features import FEATURES
from genkit.evaluation.metrics.frechet import (
    Moments,
    bias_warning,
    frechet_distance,
    frechet_from_features,
    frechet_infinity,
)
from genkit.evaluation.metrics.kernel import kid, mmd
from genkit.evaluation.metrics.manifold import prdc
from genkit.evaluation.metrics.score import accuracy, inception_score
from genkit.evaluation.metrics.transport import sliced_wasserstein2, wasserstein2

Needs = Literal["moments", "features", "logits", "labels", "samples"]


@dataclass
class Measured:
    """What was measured of one set of samples."""

    moments: Moments
    features: Tensor | None = None
    """``[N, D]`` float32, kept only where a metric needs them"""
    logits: Tensor | None = None
    """``[N, K]``"""
    labels: Tensor | None = None
    """``[N]``, the classes that were asked for"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """of the features"""


@dataclass(frozen=True)
class Settings:
    """What the metrics can be told; a card holds all of it."""

    k: int = 5
    """neighbours of precision, recall, density and coverage"""
    subsets: int = 100
    """how many subsets KID is the mean of"""
    subset_size: int = 1000
    """how large they are"""
    splits: int = 10
    """how many parts the inception score is the mean of"""
    projections: int = 256
    """directions of the sliced Wasserstein distance"""
    transport: int = 2000
    """the exact Wasserstein distance is that of the first so many vectors of each set"""
    seed: int = 0
    """of subsets, shuffles and directions"""
    level: float = 0.95
    """of the intervals"""


@dataclass(frozen=True)
class Metric:
    """``compute(generated, reference, settings)`` gives named estimates; ``reference`` says whether it needs one.

    ``needs`` says what must be kept of the samples: only their moments, features, logits, logits and labels, or
    features that are the samples themselves.
    """

    needs: Needs
    compute: Callable[[Measured, Measured | None, Settings], dict[str, Estimate]]
    reference: bool = True


def kept(measured: Measured | None, what: str, of: str) -> Any:
    """``measured.what``; ``ValueError`` where it was not kept."""
    value = None if measured is None else getattr(measured, what)
    if value is None:
        raise ValueError(f"{of}: the {what} were not kept; measure again with this metric named")
    return value


def _both(generated: Measured, reference: Measured | None) -> tuple[Tensor, Tensor]:
    x = kept(generated, "features", "generated samples")
    return x, kept(reference, "features", "reference").to(x.device)


def _fid(generated: Measured, reference: Measured | None, s: Settings) -> dict[str, Estimate]:
    against = kept(reference, "moments", "reference")
    if generated.features is None:
        return {"fid": Estimate(frechet_distance(generated.moments, against))}
    return {"fid": frechet_from_features(generated.features, against, s.level)}


def _fid_inf(generated: Measured, reference: Measured | None, s: Settings) -> dict[str, Estimate]:
    against = kept(reference, "moments", "reference")
    features = kept(generated, "features", "generated samples")
    return {"fid_inf": frechet_infinity(features, against, s.seed, s.level)}


def _kid(generated: Measured, reference: Measured | None, s: Settings) -> dict[str, Estimate]:
    x, y = _both(generated, reference)
    return {"kid": kid(x, y, s.subsets, s.subset_size, np.random.default_rng(s.seed), s.level)}


def _prdc(generated: Measured, reference: Measured | None, s: Settings) -> dict[str, Estimate]:
    fake, real = _both(generated, reference)
    return prdc(real, fake, s.k, s.level)


def _is(generated: Measured, reference: Measured | None, s: Settings) -> dict[str, Estimate]:
    return {"is": inception_score(kept(generated, "logits", "generated samples"), s.splits, s.seed, s.level)}


def _accuracy(generated: Measured, reference: Measured | None, s: Settings) -> dict[str, Estimate]:
    logits, labels = (kept(generated, k, "generated samples") for k in ("logits", "labels"))
    return {"accuracy": accuracy(logits, labels, s.level)}


def _w2(generated: Measured, reference: Measured | None, s: Settings) -> dict[str, Estimate]:
    x, y = _both(generated, reference)
    n = min(len(x), len(y), s.transport)
    return {"w2": Estimate(wasserstein2(x[:n], y[:n]))}


def _sliced_w2(generated: Measured, reference: Measured | None, s: Settings) -> dict[str, Estimate]:
    x, y = _both(generated, reference)
    return {"sliced_w2": Estimate(sliced_wasserstein2(x, y, s.projections, s.seed))}


def _mmd(generated: Measured, reference: Measured | None, s: Settings) -> dict[str, Estimate]:
    x, y = _both(generated, reference)
    return {"mmd": mmd(x, y, level=s.level)}


METRICS: dict[str, Metric] = {
    "fid": Metric("moments", _fid),
    "kid": Metric("features", _kid),
    "prdc": Metric("features", _prdc),
    "is": Metric("logits", _is, reference=False),
    "fid_inf": Metric("features", _fid_inf),
    "accuracy": Metric("labels", _accuracy, reference=False),
    "w2": Metric("samples", _w2),
    "sliced_w2": Metric("samples", _sliced_w2),
    "mmd": Metric("samples", _mmd),
}

__all__ = [
    "FEATURES",
    "METRICS",
    "Estimate",
    "Measured",
    "Metric",
    "Moments",
    "Settings",
    "accuracy",
    "bias_warning",
    "bootstrap",
    "frechet_distance",
    "frechet_from_features",
    "frechet_infinity",
    "inception_score",
    "kid",
    "mmd",
    "prdc",
    "sliced_wasserstein2",
    "wasserstein2",
]
