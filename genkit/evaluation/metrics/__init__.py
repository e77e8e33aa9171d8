"""Metrics of sets of samples: numbers with intervals, from features, class scores, or the vectors themselves.

``METRICS`` is the registry. Each entry is a :class:`~genkit.evaluation.metrics.metric.Metric`, which documents the
contract. Every interval is for the noise of drawing the samples, at this number of samples and against this reference.
"""

from __future__ import annotations

from genkit.evaluation.metrics.estimate import Estimate, bootstrap, proportion
from genkit.evaluation.metrics.features import Classifier, Features, Inception, Raw
from genkit.evaluation.metrics.frechet import (
    FID,
    FID_INF,
    bias_warning,
    frechet_distance,
    frechet_from_features,
    frechet_infinity,
)
from genkit.evaluation.metrics.kernel import CMMD, KID, MMD, cmmd, kid, mmd
from genkit.evaluation.metrics.manifold import PRDC, prdc
from genkit.evaluation.metrics.metric import Direction, Metric, MetricSettings, SampleStatistics
from genkit.evaluation.metrics.moments import Moments
from genkit.evaluation.metrics.score import ACCURACY, INCEPTION_SCORE, accuracy, inception_score
from genkit.evaluation.metrics.spatial import InceptionSpatial, TorchFidelity
from genkit.evaluation.metrics.transport import MIND, SLICED_W2, W2, mind, sliced_wasserstein2, wasserstein2
from genkit.evaluation.metrics.vision import CLIP, DINOv2

METRICS: dict[str, Metric] = {
    "fid": FID,
    "kid": KID,
    "prdc": PRDC,
    "is": INCEPTION_SCORE,
    "fid_inf": FID_INF,
    "accuracy": ACCURACY,
    "w2": W2,
    "sliced_w2": SLICED_W2,
    "mmd": MMD,
    "cmmd": CMMD,
    "mind": MIND,
}

FEATURES: dict[str, type[Features]] = {
    "inception": Inception,
    "classifier": Classifier,
    "raw": Raw,
    "dinov2": DINOv2,
    "clip": CLIP,
    "inception-spatial": InceptionSpatial,
    "torch-fidelity": TorchFidelity,
}

TITLES = {("inception-spatial", "fid"): "sfid", ("clip", "cmmd"): "cmmd"}  # numbers with a name of their own
FRECHET_TITLES = {"fid": "fd", "fid_inf": "fd_inf"}  # a Fréchet distance is an FID only in Inception's features


def find_metric(value: str) -> str | None:
    """The name of the metric that gives the number ``value`` (``prdc`` for ``recall``), or None."""
    return next((name for name, metric in METRICS.items() if value in metric.values), None)


def metric_direction(value: str) -> Direction | None:
    """Whether lower or higher is better for the number ``value`` (``recall``, say); None if no metric gives it."""
    name = find_metric(value)
    return None if name is None else METRICS[name].direction


def metric_title(value: str, features: str | None) -> str:
    """What tables and plots call the number ``value`` in these features: ``fid`` in Inception's, ``fd (raw)`` in raw.

    Vectors are their own features, and an accuracy is no distance: their names stay as they are.
    """
    name = find_metric(value)
    if name is None or METRICS[name].needs in ("samples", "labels") or features in (None, "inception"):
        return value
    if (features, value) in TITLES:
        return TITLES[features, value]
    return f"{FRECHET_TITLES.get(value, value)} ({features})"


__all__ = [
    "FEATURES",
    "METRICS",
    "Direction",
    "Estimate",
    "Metric",
    "MetricSettings",
    "Moments",
    "SampleStatistics",
    "accuracy",
    "bias_warning",
    "bootstrap",
    "cmmd",
    "find_metric",
    "frechet_distance",
    "frechet_from_features",
    "frechet_infinity",
    "inception_score",
    "kid",
    "metric_direction",
    "metric_title",
    "mind",
    "mmd",
    "prdc",
    "proportion",
    "sliced_wasserstein2",
    "wasserstein2",
]
