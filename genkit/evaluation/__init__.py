"""Evaluation: samples of a run or of a folder, measured against a reference, and the card that says all about it."""

from __future__ import annotations

from genkit.evaluation import cards
from genkit.evaluation.cards import Card, compare, newest
from genkit.evaluation.evaluator import FEATURES, Ruler, is_picture, named, ruler
from genkit.evaluation.metrics import Settings
from genkit.evaluation.shards import Found, Ranks, measure, reference
from genkit.evaluation.sources import (
    OPTIONS,
    Drawn,
    Given,
    Named,
    Rebuilt,
    data_of,
    find_data,
    how_of,
    is_stats,
    weights_sha256,
)

SETTINGS = {"usual": Settings}

__all__ = [
    "FEATURES",
    "OPTIONS",
    "SETTINGS",
    "Card",
    "Drawn",
    "Found",
    "Given",
    "Named",
    "Ranks",
    "Rebuilt",
    "Ruler",
    "cards",
    "compare",
    "data_of",
    "find_data",
    "how_of",
    "is_picture",
    "is_stats",
    "measure",
    "named",
    "newest",
    "reference",
    "ruler",
    "weights_sha256",
]
