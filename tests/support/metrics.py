"""The contract of a metric, checked for each entry of ``METRICS`` and for the recipe."""

import math

import pytest
import torch

from genkit.evaluation.metrics import METRICS, MetricSettings, Moments, SampleStatistics, find_metric, metric_direction


def make_statistics(n=60, dim=4, seed=0, shift=0.0):
    """Statistics of ``n`` normal vectors that are moved by ``shift``, with all tensors."""
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (shift + x).float()
    return SampleStatistics(Moments.of(x), x, 3 * x, x.argmax(1))


def check_all(name):
    """Every check of the metric ``name``."""
    check_values(name)
    check_missing_tensors(name)
    check_first_bad_row(name)
    if METRICS[name].reference:
        check_features_of_two_extractors(name)


def check_values(name):
    """Values are finite, deterministic and within their intervals, which narrow with the confidence level."""
    metric, generated = METRICS[name], make_statistics()
    reference = make_statistics(50, seed=1, shift=0.7) if metric.reference else None
    estimates = metric.compute(generated, reference, MetricSettings())
    narrow = metric.compute(generated, reference, MetricSettings(level=0.5))
    assert tuple(estimates) == metric.values
    assert estimates == metric.compute(make_statistics(), reference, MetricSettings()), "it is not deterministic"
    for key, e in estimates.items():
        assert find_metric(key) == name
        assert metric_direction(key) == metric.direction
        assert math.isfinite(e.value)
        assert (e.low is None) == (e.high is None)
        if e.low is not None:
            assert e.low <= e.value <= e.high
            assert narrow[key].high - narrow[key].low < e.high - e.low


def check_missing_tensors(name):
    """Tensors that were not kept, and a missing reference, are named."""
    metric, generated, reference = METRICS[name], make_statistics(), make_statistics(50, seed=1)
    if metric.required_tensors:
        with pytest.raises(ValueError, match="were not kept"):
            metric.compute(SampleStatistics(generated.moments), reference, MetricSettings())
    if metric.reference:
        with pytest.raises(ValueError, match="reference"):
            metric.compute(generated, None, MetricSettings())


def check_features_of_two_extractors(name):
    """Sets with different numbers of features are refused."""
    with pytest.raises(ValueError, match="take the same"):
        METRICS[name].compute(make_statistics(dim=4), make_statistics(dim=5), MetricSettings())


def check_first_bad_row(name):
    """The first row that is not finite is named."""
    generated, reference = make_statistics(), make_statistics(seed=1)
    for tensor in (generated.features, generated.logits):
        tensor[17, 2] = torch.nan
        tensor[40] = torch.inf
    with pytest.raises(ValueError, match="row 17 is not finite, as are 2 of 60 rows"):
        METRICS[name].compute(generated, reference, MetricSettings())
