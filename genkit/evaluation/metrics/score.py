"""What a classifier says of generated samples: the inception score, and whether they are what was asked for."""

from __future__ import annotations

import math

import torch
from scipy import special
from torch import Tensor

from genkit.evaluation.metrics.estimate import LEVEL, Estimate, rows, share


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0, level: float = LEVEL) -> Estimate:
    """``exp(mean KL(p(y|x) | p(y)))`` of ``logits`` ``[N, K]``, mean over ``splits`` (Salimans et al. 2016, section 4).

    Rows are shuffled first: in samples sorted by class, every split would hold a few classes only. The interval is
    Student's over the splits.
    """
    rows(logits, "logits", max(1, splits))
    if splits < 1:
        raise ValueError(f"splits: given {splits}; needs at least 1 (10 is usual)")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed)).to(logits.device)
    ends = [i * len(logits) // splits for i in range(1, splits)]
    scores = torch.stack([score(part) for part in logits[order].double().tensor_split(ends)])
    value = float(scores.mean())
    if splits == 1:
        return Estimate(value)
    half = float(special.stdtrit(splits - 1, (1 + level) / 2)) * float(scores.std()) / math.sqrt(splits)
    return Estimate(value, value - half, value + half)


def score(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()


def accuracy(logits: Tensor, labels: Tensor, level: float = LEVEL) -> Estimate:
    """The share of samples that the classifier takes for the class that was asked for; ``labels`` Int ``[N]``."""
    rows(logits, "logits")
    if labels.shape != (len(logits),) or labels.dtype.is_floating_point:
        raise ValueError(f"labels: given {tuple(labels.shape)} of {labels.dtype}; needs [{len(logits)}] integers")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels: given {int(labels.min())}..{int(labels.max())}; this classifier knows 0..{logits.shape[1] - 1}"
        )
    return share(int((logits.argmax(1) == labels.to(logits.device)).sum()), len(logits), level)
