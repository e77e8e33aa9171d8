"""Evaluation: samples of a run or stored samples, measured against a reference, as a card with all its settings."""

from __future__ import annotations

from genkit.evaluation.cards import Card, compare, find_card
from genkit.evaluation.evaluations import EvaluationSettings, evaluate, evaluate_all
from genkit.evaluation.evaluator import FEATURES, Evaluator, find_metrics
from genkit.evaluation.likelihoods import LikelihoodResult, LikelihoodSettings, likelihood
from genkit.evaluation.measurement import Measurement, measure
from genkit.evaluation.metrics import METRICS, Estimate, Metric, MetricSettings
from genkit.evaluation.sources import (
    DataOptions,
    DatasetSamples,
    ModelSamples,
    Reconstructions,
    SampleSource,
    open_data,
    open_run_data,
)
from genkit.evaluation.sweeps import SweepResult, SweepSettings, sweep
from genkit.training.ranks import Ranks

DATA_OPTIONS = {"default": DataOptions}
METRIC_SETTINGS = {"default": MetricSettings}

__all__ = [
    "DATA_OPTIONS",
    "FEATURES",
    "METRICS",
    "METRIC_SETTINGS",
    "Card",
    "DataOptions",
    "DatasetSamples",
    "Estimate",
    "EvaluationSettings",
    "Evaluator",
    "LikelihoodResult",
    "LikelihoodSettings",
    "Measurement",
    "Metric",
    "MetricSettings",
    "ModelSamples",
    "Ranks",
    "Reconstructions",
    "SampleSource",
    "SweepResult",
    "SweepSettings",
    "compare",
    "evaluate",
    "evaluate_all",
    "find_card",
    "find_metrics",
    "likelihood",
    "measure",
    "open_data",
    "open_run_data",
    "sweep",
]
