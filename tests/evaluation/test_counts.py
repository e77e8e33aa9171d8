"""Metrics that cannot be computed of so few samples: refused before the work; one that fails leaves the others."""

import contextlib
import dataclasses
import re

import pytest
import torch

from genkit.evaluation import METRICS, Card, Estimate, MetricSettings, evaluate
from genkit.evaluation.cards import setting_differences
from genkit.evaluation.evaluator import check_counts
from genkit.evaluation.metrics import Moments, SampleStatistics
from genkit.evaluation.sources import ModelSamples
from tests.support.evaluation import refusal

SETTINGS = MetricSettings(k=3, splits=4, subset_size=6)
DIM = 3


def statistics(n):
    """Of ``n`` samples of three classes."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, DIM, generator=g)
    return SampleStatistics(Moments.of(x), x, torch.randn(n, 3, generator=g), torch.arange(n) % 3)


@pytest.mark.parametrize("side", ["samples", "reference"])
@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_refused_below_its_minimum_and_computed_at_it(name, side):
    """Of every metric in the registry: the minimum that it states is the one that it has."""
    metric, many = METRICS[name], 40
    minimum = (metric.min_samples if side == "samples" else metric.min_reference)(DIM, SETTINGS)
    if side == "reference" and not metric.reference:
        return
    counts = {"n": many, "reference_n": many}
    option = "n" if side == "samples" else "reference_n"
    for n in (minimum, minimum - 1):
        counts[option] = n
        generated, reference = (statistics(counts[key]) if counts[key] else None for key in ("n", "reference_n"))
        if n == minimum:
            check_counts({name: metric}, DIM, SETTINGS, **counts)
            values = metric.compute(generated, reference if metric.reference else None, SETTINGS)
            assert values.keys() == set(metric.values)
            continue
        with pytest.raises(ValueError, match=f"{option}: given {n}; .*{name} needs at least {minimum}"):
            check_counts({name: metric}, DIM, SETTINGS, **counts)


@pytest.mark.parametrize("names", [("n", "reference_n"), ("eval_n", None), ("confirm_n", None)])
@pytest.mark.parametrize("limits", [(None, None), (8, 8), (2, 2)])
@pytest.mark.parametrize("name", METRICS)
def test_advice_that_is_followed_is_not_refused_again(name, limits, names):
    """It names an option of the command that says it, and never more samples than there are."""
    metric, counts = METRICS[name], [1, 1]
    for _ in range(2):
        counts = [n if limit is None else min(n, limit) for n, limit in zip(counts, limits, strict=True)]
        with contextlib.suppress(ValueError):
            check_counts({name: metric}, DIM, SETTINGS, *counts, names, limits)
            return
        with pytest.raises(ValueError, match=r"leave them out$") as refused:
            check_counts({name: metric}, DIM, SETTINGS, *counts, names, limits)
        error = str(refused.value)
        advice = re.search(r"take --([a-z-]+) (\d+), or", error)
        if advice is None:
            assert re.search(r"no more samples; leave|larger reference, or leave|\d; leave", error)
            return
        side = names.index(advice[1].replace("-", "_"))
        assert counts[side] < int(advice[2]) <= (limits[side] or 10**9)
        counts[side] = int(advice[2])
    check_counts({name: metric}, DIM, SETTINGS, *counts, names, limits)


def test_what_cannot_be_computed_is_refused_before_drawing(moons, capsys, monkeypatch):
    def rows(*_):
        raise AssertionError("samples were drawn")

    monkeypatch.setattr(ModelSamples, "rows", rows)
    few = (moons, "--features=raw", "--n=4")
    line = refusal(capsys, "eval", *few, "--metrics=fid,fid_inf,prdc")
    assert "fid_inf needs at least 5, prdc needs at least 6; take --n 6" in line
    assert "prdc needs at least 6" in refusal(capsys, "sweep", moons, "--metric=recall", "--n=4", "--steps", "2")
    assert "reference_n: given 5; " in refusal(capsys, "eval", moons, "--metrics=prdc", "--n=9", "--reference-n=5")


def test_a_metric_that_fails_leaves_the_others_on_the_card(moons, monkeypatch):
    def fails(*_):
        raise ValueError("bandwidth: given 0.0")

    def is_nan(*_):
        return {"sliced_w2": Estimate(float("nan"))}

    monkeypatch.setitem(METRICS, "mmd", dataclasses.replace(METRICS["mmd"], compute=fails))
    monkeypatch.setitem(METRICS, "sliced_w2", dataclasses.replace(METRICS["sliced_w2"], compute=is_nan))
    card = evaluate(moons, metrics="mmd,w2,sliced_w2", n=20, steps=2, device="cpu")
    assert set(card.metrics) == {"w2"}
    assert "mmd is missing: bandwidth: given 0.0" in card.notes
    assert any(note.startswith("sliced_w2 is missing: sliced_w2: is nan") for note in card.notes)
    with pytest.raises(ValueError, match="bandwidth"):
        evaluate(moons, metrics="mmd", n=20, steps=2, device="cpu")


def test_a_block_that_differs_is_one_entry():
    a = {"n": 10, "features": {"name": "raw", "dim": 2}, "reference": {"sha256": "a", "n": 5}}
    b = {"n": 10, "features": {"name": "classifier", "dim": 64, "seed": 0}, "reference": {"sha256": "b", "n": 5}}
    cards = [Card({"fid": Estimate(1.0)}, settings) for settings in (a, b)]
    features, reference = setting_differences(*cards)
    assert features == 'features.name: "raw" and "classifier" (and 2 more)'
    assert reference.startswith("reference.sha256: ")
