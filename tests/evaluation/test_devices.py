"""Metrics and evaluation on the pretended device: no mismatch, and in the loop over samples only the listed waits."""

from types import SimpleNamespace

import pytest
import torch

from genkit.evaluation.measurement import Shard, Space, add_block
from genkit.evaluation.metrics import FEATURES, METRICS, MetricSettings
from genkit.evaluation.sources import SampleRows
from tests.support.metrics import make_statistics
from tests.support.pretended_device import CUDA, PretendedDevice


@pytest.mark.parametrize("name", METRICS)
def test_no_metric_mixes_devices(name):
    """The values are those of the CPU, from statistics that lie on the device."""
    metric = METRICS[name]
    generated, reference = make_statistics(), make_statistics(50, seed=1, shift=0.7) if metric.reference else None
    expected = metric.compute(generated, reference, MetricSettings())
    with PretendedDevice():
        moved = [None if s is None else s.to(CUDA) for s in (generated, reference)]
        values = metric.compute(*moved, MetricSettings())
    for key, estimate in expected.items():
        assert values[key].value == pytest.approx(estimate.value, rel=1e-6, abs=1e-9)


def waits_of_a_block(extract, x, keep):
    """What the host waits for while a second block of samples is measured."""
    with PretendedDevice() as device:
        on_device, extractor, shard = x.to(CUDA), extract(), Shard()
        samples = SimpleNamespace(rows=lambda a, b, n: SampleRows(on_device[a:b], torch.arange(b - a) % 3))
        add_block([shard], samples, [Space(extractor, keep)], range(8), 16)
        before = device.waits.copy()
        add_block([shard], samples, [Space(extractor, keep)], range(8, 16), 16)
        assert shard.moments.mean.device == CUDA
        return device.waits - before


ALLOWED = {"moments": 1, "features": 2, "logits": 3}
"""a block: whether all features are finite, and a copy to the host of each tensor that a metric keeps"""


@pytest.mark.parametrize("keep", ["moments", "features", "logits"])
def test_a_block_of_vectors_waits_as_often_as_listed(keep):
    class Extractor:
        """Scores beside features."""

        settings, dim = {"name": "scores"}, 4

        def __call__(self, x):
            return SimpleNamespace(features=x, logits=3 * x)

    kept = frozenset({"moments": [], "features": ["features"], "logits": ["features", "logits"]}[keep])
    waits = waits_of_a_block(Extractor, torch.randn(16, 4), kept)
    assert sum(waits.values()) <= ALLOWED[keep], waits


def test_raw_features_stay_on_the_device():
    waits = waits_of_a_block(lambda: FEATURES["raw"]().load(CUDA), torch.randn(16, 4), frozenset())
    assert sum(waits.values()) <= ALLOWED["moments"], waits
