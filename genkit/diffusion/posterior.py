"""The reverse steps of a diffusion, ``p(x_s | x_t)`` for any two times s < t: their variances, fixed and learned.

``q(x_s | x_t, x0)`` is normal (Ho et al. 2020, eq. 6-7). A model's step has its mean, with the predicted data for x0,
and one of three variances: the posterior's ("small", right for deterministic x0), ``beta`` ("large", right for normal
data), or a learned one between them (Nichol & Dhariwal 2021, eq. 15), which a :class:`LearnedVariance` carries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.core import Prediction, ProbabilityPath, expand


class LearnedVariance(Prediction):
    """A prediction with a learned variance of the reverse step: ``w`` ``[B, *S]``, for :func:`log_variance`.

    ``w = 2 v - 1`` with the v of Nichol & Dhariwal 2021, eq. 15. Guidance moves the ends and leaves the variance as it
    is (as the code of Dhariwal & Nichol 2021 does).
    """

    w: Tensor

    @classmethod
    def of(cls, ends: Prediction, w: Tensor) -> LearnedVariance:
        """The same ends, with this variance."""
        prediction = cls(*ends)
        prediction.w = w
        return prediction


def learned_variance(prediction: Prediction) -> Tensor | None:
    """The ``w`` of a prediction, ``[B, *S]``; None if it has none."""
    return prediction.w if isinstance(prediction, LearnedVariance) else None


def replace_endpoints(prediction: Prediction, x0: Tensor, x1: Tensor) -> Prediction:
    """A prediction of other ends with the same learned variance, if any, as a constant for gradients."""
    return _with_variance_of(prediction, Prediction(x0, x1), slice(None))


def take(prediction: Prediction, rows: slice) -> Prediction:
    """The prediction for some of the samples."""
    return _with_variance_of(prediction, Prediction(prediction.x0[rows], prediction.x1[rows]), rows)


def _with_variance_of(prediction: Prediction, ends: Prediction, rows: slice) -> Prediction:
    w = learned_variance(prediction)
    return ends if w is None else LearnedVariance.of(ends, w[rows].detach())


def reverse_step(path: ProbabilityPath, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of ``q(x_s | x_t, x0)``, s < t (Ho et al. 2020, eq. 6-7, between any two times), each ``[B]``.

    They are ``beta`` of the step, the posterior variance, and the factor of x0 in the mean.
    """
    a, b, sa, sb = (f(v.double()) for f in (path.alpha, path.sigma) for v in (t, s))
    beta = sa**2 - (a / b * sb) ** 2
    return beta.to(t), (beta * (sb / sa) ** 2).to(t), (beta * b / sa**2).to(t)


def log_variance(path: ProbabilityPath, t: Tensor, s: Tensor, w: Tensor) -> Tensor:
    """The learned log variance of a step from t to s, in the shape of ``w``.

    It lies between the posterior's (w = -1) and beta's (w = 1): Nichol & Dhariwal 2021, eq. 15, with v = (w + 1) / 2.
    The last step, to s = 0, has no posterior variance; it takes that of the step before, from 2t to t.
    """
    beta, posterior, _ = reverse_step(path, t, s)
    floor = reverse_step(path, (2 * t).clamp(max=1), t.clamp(max=0.5))[1]
    low = torch.where(s > 0, posterior, torch.minimum(floor, beta))
    v = (w + 1) / 2
    return v * expand(beta, w).log() + (1 - v) * expand(low, w).log()
