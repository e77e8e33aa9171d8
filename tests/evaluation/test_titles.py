"""Numbers that do not compare are in other columns and curves, and a column is named by its features."""

import copy

import pytest

from genkit.evaluation import METRICS, Card, Estimate
from genkit.evaluation.cards import flatten, setting_differences
from genkit.evaluation.metrics import metric_title
from genkit.evaluation.report.quality import card_table, group_by_curve

SETTINGS = {
    "step": 10, "ema": "0.999", "weights_sha256": "w", "sampler": "heun", "steps": 5, "grid": "uniform", "seed": 0,
    "guidance": 1.0, "guidance_interval": None, "guidance_rule": "cfg", "autoguide": None, "classifier": None, "n": 64,
    "clip": False, "metric_settings": {"k": 5, "seed": 0}, "features": {"name": "classifier", "dim": 64, "seed": 0},
    "reference": {"data": "digits", "split": "train", "sha256": "r", "n": 100},
}  # fmt: skip


def make_card(nfe=9, **changes):
    """A card with some settings changed, by dotted name."""
    settings = copy.deepcopy(SETTINGS) | {"nfe": nfe}
    for key, value in changes.items():
        block, _, name = key.partition(".")
        if name:
            settings[block][name] = value
        else:
            settings[block] = value
    return Card({"fid": Estimate(1.0 + nfe)}, settings)


@pytest.mark.parametrize("key", [key for key in flatten(SETTINGS) if key not in ("steps", "reference.data")])
def test_what_compare_refuses_is_another_curve(key):
    """Every setting of a card, one by one; the number of steps alone makes no other curve."""
    base, further = make_card(), make_card(19, steps=10)
    changed = make_card(19, **{key: "other"})
    assert len(group_by_curve([base, further])) == 1
    curves = group_by_curve([base, further, changed])
    assert [len(cards) for cards in curves.values()] == [2, 1], list(curves)
    assert setting_differences(base, changed) or key in ("step", "ema", "weights_sha256")


@pytest.mark.parametrize("value", [value for metric in METRICS.values() for value in metric.values])
def test_only_inceptions_frechet_distance_is_called_fid(value):
    assert metric_title(value, "inception") == value
    for features in ("classifier", "raw"):
        title = metric_title(value, features)
        assert "fid" not in title
        metric = next(metric for metric in METRICS.values() if value in metric.values)
        assert title.endswith(f" ({features})") == (metric.needs not in ("samples", "labels"))


def test_columns_are_parted_by_features():
    cards = [make_card(), make_card(19, **{"features.name": "inception"}), make_card(29, **{"features.name": "raw"})]
    table = str(card_table(cards, []))
    for title in ("fd (classifier) ↓", "fid ↓", "fd (raw) ↓"):
        assert table.count(f">{title}<") == 1
    assert repr(cards[0]).startswith("fd (classifier)  10\n")
