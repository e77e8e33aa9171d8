"""Scores that need no reference: the inception score, and the accuracy of the class that was conditioned on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkit.evaluation.metrics.estimate import LEVEL, Estimate, check_rows, proportion
from genkit.evaluation.metrics.metric import Metric, MetricSettings, SampleStatistics, require_tensor


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0, level: float = LEVEL) -> Estimate:
    """``exp(mean KL(p(y|x) | p(y)))`` of ``logits`` ``[N, K]``, mean over ``splits`` (Salimans et al. 2016, section 4).

    Rows are shuffled first: of samples sorted by class, each split would hold only a few classes. The interval is
    Student's over the splits.
    """
    check_rows(logits, "logits", max(1, splits))
    if splits < 1:
        raise ValueError(f"splits: given {splits}; needs at least 1 (10 is usual)")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed)).to(logits.device)
    ends = [i * len(logits) // splits for i in range(1, splits)]
    scores = torch.stack([split_score(part) for part in logits[order].double().tensor_split(ends)])
    value = float(scores.mean())
    if splits == 1:
        return Estimate(value)
    from scipy import special  # lazy: a third of a second

    half = float(special.stdtrit(splits - 1, (1 + level) / 2)) * float(scores.std()) / math.sqrt(splits)
    return Estimate(value, value - half, value + half)


def split_score(logits: Tensor) -> Tensor:
    """The score (a scalar) of one split ``[n, K]``."""
    log_p = logits.log_softmax(1)
    log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()


def accuracy(logits: Tensor, labels: Tensor, level: float = LEVEL) -> Estimate:
    """The share of samples that the classifier assigns to the class they were conditioned on.

    ``logits`` ``[N, K]``; ``labels`` integers ``[N]``. The interval is Wilson's.
    """
    check_rows(logits, "logits")
    if labels.shape != (len(logits),) or labels.dtype.is_floating_point:
        raise ValueError(f"labels: given {tuple(labels.shape)} of {labels.dtype}; needs [{len(logits)}] integers")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels: given {int(labels.min())}..{int(labels.max())}; this classifier knows 0..{logits.shape[1] - 1}"
        )
    return proportion(int((logits.argmax(1) == labels.to(logits.device)).sum()), len(logits), level)


def compute_inception_score(
    generated: SampleStatistics, reference: SampleStatistics | None, settings: MetricSettings
) -> dict[str, Estimate]:
    """``is`` of the logits."""
    logits = require_tensor(generated, "logits", "generated samples")
    return {"is": inception_score(logits, settings.splits, settings.seed, settings.level)}


def compute_accuracy(
    generated: SampleStatistics, reference: SampleStatistics | None, settings: MetricSettings
) -> dict[str, Estimate]:
    """``accuracy`` of class-conditional samples."""
    logits = require_tensor(generated, "logits", "generated samples")
    labels = require_tensor(generated, "labels", "generated samples")
    return {"accuracy": accuracy(logits, labels, settings.level)}


def one_per_split(dim: int, settings: MetricSettings) -> int:
    """The smallest number of samples of which each split has one."""
    return max(1, settings.splits)


INCEPTION_SCORE = Metric(
    compute_inception_score,
    needs="logits",
    direction="higher",
    values=("is",),
    reference=False,
    min_samples=one_per_split,
)
ACCURACY = Metric(compute_accuracy, needs="labels", direction="higher", values=("accuracy",), reference=False)
