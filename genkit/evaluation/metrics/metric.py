"""The contract of a metric: what it gets, what it returns, and the facts about it that the rest of genkit reads.

A metric lives in one file, ends in a :class:`Metric` record, and has one line in
``genkit.evaluation.metrics.METRICS`` (docs/contributing/metric.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from genkit.core.protocols import Direction
from genkit.evaluation.metrics.estimate import Estimate
from genkit.evaluation.metrics.moments import Moments

Needs = Literal["moments", "features", "logits", "labels", "samples"]

TENSORS: Mapping[Needs, tuple[str, ...]] = {
    "moments": (),
    "features": ("features",),
    "samples": ("features",),
    "logits": ("logits",),
    "labels": ("logits", "labels"),
}
"""The fields of :class:`SampleStatistics`, besides the moments, that a metric of each kind needs."""


@dataclass
class SampleStatistics:
    """What is known about a set of N samples: the moments of their features, and tensors that some metric needs."""

    moments: Moments
    """of the features"""
    features: Tensor | None = None
    """float32 ``[N, D]``"""
    logits: Tensor | None = None
    """``[N, K]``, class scores"""
    labels: Tensor | None = None
    """int ``[N]``, the classes that the samples were conditioned on"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """the settings of the feature extractor"""

    def to(self, device: Any) -> SampleStatistics:
        """The same with all tensors on ``device``."""
        tensors = {name: getattr(self, name) for name in ("features", "logits", "labels")}
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
        return SampleStatistics(self.moments.to(device), **moved, settings=self.settings)


@dataclass(frozen=True)
class MetricSettings:
    """Settings of the metrics. A card stores all of them."""

    k: int = 5
    """Nearest neighbours of precision, recall, density and coverage."""
    subsets: int = 100
    """Number of subsets that KID is averaged over."""
    subset_size: int = 1000
    """Samples in each subset of KID."""
    splits: int = 10
    """Number of splits that the inception score is averaged over."""
    projections: int = 256
    """Random directions of the sliced Wasserstein distance."""
    transport: int = 2000
    """Largest number of vectors of each set in the exact Wasserstein distance; the first ones are taken."""
    seed: int = 0
    """Seed of subsets, shuffles and directions."""
    level: float = 0.95
    """Confidence level of the intervals."""


def one_sample(dim: int, settings: MetricSettings) -> int:
    """The smallest number of samples of a metric that can be computed of any number."""
    return 1


def two_samples(dim: int, settings: MetricSettings) -> int:
    """The smallest number of samples of a metric that needs a spread."""
    return 2


Compute = Callable[[SampleStatistics, SampleStatistics | None, MetricSettings], dict[str, Estimate]]


@dataclass(frozen=True)
class Metric:
    """A metric and the facts about it.

    Contract of ``compute(generated, reference, settings)``:

    - ``reference`` is None if ``reference`` (the field) is False; otherwise both sets have features of the same D.
    - It returns one :class:`Estimate` for each name in ``values``: a finite value, with the bounds of an interval at
      ``settings.level`` for the noise of drawing the samples (at this N, against this reference), or without bounds.
    - It is a deterministic function of its arguments: random numbers come from ``settings.seed``.
    - It raises ``ValueError`` in one line for tensors that are missing (:func:`require_tensor`), malformed or not
      finite (:func:`~genkit.evaluation.metrics.estimate.check_rows`), and for fewer samples than ``min_samples`` and
      ``min_reference`` say. It does not modify its arguments.
    """

    compute: Compute
    needs: Needs
    """What must be kept of the samples. moments: only the moments of their features. features, logits: these tensors.
    labels: logits and the classes the samples were conditioned on. samples: vectors, whose features are themselves."""
    direction: Direction
    """Whether lower or higher values are better."""
    values: tuple[str, ...]
    """The names of the numbers that ``compute`` returns; usually just the metric's own."""
    reference: bool = True
    """Whether the samples are compared with a reference."""
    min_samples: Callable[[int, MetricSettings], int] = one_sample
    """The smallest number of samples with D features that ``compute`` takes, as a function of D and the settings."""
    min_reference: Callable[[int, MetricSettings], int] = one_sample
    """The smallest number of samples of the reference, likewise."""
    warn: Callable[[int], str | None] | None = None
    """A one-line note for the card if N samples are too few for this metric, else None."""

    @property
    def required_tensors(self) -> tuple[str, ...]:
        """The tensors of :class:`SampleStatistics` that must be kept for this metric."""
        return TENSORS[self.needs]

    @property
    def needs_reference_samples(self) -> bool:
        """Whether the moments of the reference are not enough."""
        return self.reference and self.needs != "moments"


def require_tensor(statistics: SampleStatistics | None, name: str, owner: str) -> Any:
    """The field ``name`` of ``statistics``. ``ValueError``, naming the ``owner`` of the samples, if it was not kept."""
    value = None if statistics is None else getattr(statistics, name)
    if value is None:
        raise ValueError(f"{owner}: the {name} were not kept; measure again with this metric selected")
    return value


def require_features(generated: SampleStatistics, reference: SampleStatistics | None) -> tuple[Tensor, Tensor]:
    """The features of both sets, on the device of the generated ones. ``ValueError`` if they were not kept."""
    x = require_tensor(generated, "features", "generated samples")
    return x, require_tensor(reference, "features", "reference").to(x.device)
