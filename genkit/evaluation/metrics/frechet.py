"""Fréchet distance between two Gaussians (FID if the features are Inception's), its sampling noise and its bias.

Dowson & Landau (1982), eq. 16; Heusel et al. (2017), section 2: ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``.
The trace of the root needs no matrix root: with ``S1 = L L^T`` the eigenvalues of ``S1 S2`` are those of the symmetric
``L^T S2 L``, so a Cholesky factor and a symmetric eigenvalue problem in float64 are enough.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from genkit.evaluation.metrics.estimate import LEVEL, Estimate, check_rows
from genkit.evaluation.metrics.metric import (
    Metric,
    MetricSettings,
    SampleStatistics,
    require_tensor,
    two_samples,
)
from genkit.evaluation.metrics.moments import CHUNK, Moments, require_same_dim

COMPARABLE_N = 10_000  # with fewer samples the bias of the FID exceeds most differences between models


def bias_warning(n: int) -> str | None:
    """A one-line warning if ``n`` samples are too few for an FID that can be compared with published ones."""
    if n >= COMPARABLE_N:
        return None
    return (
        f"FID of {n} samples is too high: its bias falls as 1/n and differs between models; compare only at equal n, "
        f"draw {COMPARABLE_N} or more (papers: 50000), or look at fid_inf and kid"
    )


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance between the Gaussians with these moments, computed on the CPU."""
    require_same_dim(a, b)
    a, b = a.to("cpu"), b.to("cpu")
    separate = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()
    return float(separate) - 2 * float(np.sqrt(product_eigenvalues(a, b).clip(min=0)).sum())


def product_eigenvalues(a: Moments, b: Moments) -> np.ndarray:
    """The eigenvalues of ``S1 S2``; only the ``rank`` largest if a covariance is singular.

    Rounding turns an eigenvalue 0 into about 1e-16, whose root is 1e-8: a thousand of them would be visible.
    """
    from scipy.linalg import eigh  # lazy: a third of a second

    p, q = (a, b) if a.rank >= b.rank else (b, a)
    if p.rank == p.dim:
        try:  # LAPACK's dsygv: Cholesky of p, L^T q L, and its eigenvalues, at half the cost of two products
            matrices = (q.cov.numpy(), p.cov.numpy())
            return eigh(*matrices, type=2, driver="gv", eigvals_only=True, check_finite=False)[-q.rank :]
        except np.linalg.LinAlgError:  # p is singular
            pass
    factor = factorise(p.cov, p.rank)[0]
    return torch.linalg.eigvalsh(factor.T @ q.cov @ factor)[-q.rank :].numpy()


def frechet_from_features(x: Tensor, reference: Moments, level: float = LEVEL) -> Estimate:
    """The distance of the rows ``x`` ``[N, D]`` from the reference, with an interval for its mean at this N.

    The interval is what other draws of N samples from the same generator would give against the same reference; it
    ignores the bias, for which see :func:`frechet_infinity`. It is the infinitesimal jackknife (Jaeckel 1972;
    Efron 1982, chapter 6): a sample's influence on the distance has a closed form, and the variance of the mean
    influence is that of the distance. Measured at D = 8, 16 and 64, N = 12 to 2000, it holds the mean in 90 to 100 of
    100 cases, also for N < D. There a bootstrap, whose resamples repeat rows, is up to five times too wide, and it
    costs hundreds of eigendecompositions.
    """
    value, influence = distance_and_influence(x, reference)
    return Estimate.normal(value, float(influence.var()) / len(influence), level)


def distance_and_influence(x: Tensor, reference: Moments) -> tuple[float, Tensor]:
    """The distance of ``x`` ``[N, D]``, and the influence ``[N]`` of each row on it. ``N x N`` matrices if ``N <= D``.

    With ``W`` the map that transports the Gaussian of ``x`` to the reference, the derivative of the distance is
    ``2 (m - m2) . (x - m) + (x - m)^T (1 - W) (x - m)`` (Dowson & Landau 1982, differentiated).
    """
    check_rows(x, "features", 2)
    if x.shape[1] != reference.dim:
        raise ValueError(
            f"features: given {x.shape[1]} per row; the reference has {reference.dim}; take the same features for both"
        )
    own = Moments.of(x)
    mean, cov = reference.mean.to(own.mean), reference.cov.to(own.mean)
    shift = own.mean - mean
    n, dim = x.shape
    if n <= dim:
        x = x.to(own.mean) - own.mean
        rank = min(own.rank, reference.rank)
        values, vectors = torch.linalg.eigh(x @ cov @ x.T / (n - 1))
        roots = values[-rank:].clamp(min=0).sqrt()
        influence = 2 * x @ shift + n / (n - 1) * x.square().sum(1) - n * (vectors[:, -rank:].square() @ roots)
    else:
        factor, whiten = factorise(own.cov, own.rank)
        values, vectors = torch.linalg.eigh(factor.T @ cov @ factor)
        roots, vectors = values[-reference.rank :].clamp(min=0).sqrt(), vectors[:, -reference.rank :]
        parts = []
        for part in x.split(CHUNK):
            c = part.to(own.mean) - own.mean
            transported = (vectors.T @ whiten(c.T)).square().T @ roots
            parts.append(2 * c @ shift + n / (n - 1) * (c.square().sum(1) - transported))
        influence = torch.cat(parts)
    value = shift.square().sum() + own.cov.trace() + cov.trace() - 2 * roots.sum()
    return float(value), influence


def frechet_contributions(x: Tensor, reference: Moments, own: Moments | None = None) -> Tensor:
    """The first-order contributions ``[N]`` of the rows ``x`` ``[N, D]`` to a distance from the reference, float64.

    It is that of the rows, or of a larger population with the moments ``own``. The mean of the contributions is the
    distance. Its gradient by x is that of :func:`frechet_distance`, in closed form: ``2 (m - m2) / N + 2 / (N - 1) (1 -
    W) (x - m)``, with W the map that transports one Gaussian to the other, and for rows of a larger population that
    times its size over theirs. No eigenvalue problem is differentiated. ``ValueError`` unless there are more rows than
    features.
    """
    own = Moments.of(check_rows(x, "features", 2).detach()) if own is None else own
    n = own.n or 0
    if n <= own.dim:
        raise ValueError(f"features: given {n} rows of {own.dim}; needs more rows than features")
    mean, cov = reference.mean.to(own.mean), reference.cov.to(own.mean)
    factor, whiten = factorise(own.cov, own.rank)
    values, vectors = torch.linalg.eigh(factor.T @ cov @ factor)
    roots = values.clamp(min=0).sqrt()
    c = x.to(own.mean) - own.mean
    transported = (vectors.T @ whiten(c.T)).square().T @ roots
    changes = 2 * c @ (own.mean - mean) + n / (n - 1) * (c.square().sum(1) - transported)
    distance = (own.mean - mean).square().sum() + own.cov.trace() + cov.trace() - 2 * roots.sum()
    return changes + (distance - changes.mean().detach())


def factorise(cov: Tensor, rank: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``A`` with ``A A^T = cov``, and a function that multiplies by its (pseudo-)inverse.

    ``rank`` is the largest rank that ``cov`` can have.
    """
    if rank == len(cov):
        factor, failed = torch.linalg.cholesky_ex(cov)
        if not failed:
            return factor, lambda v: torch.linalg.solve_triangular(factor, v, upper=False)
    values, vectors = torch.linalg.eigh(cov)
    positive = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    values, vectors = values[positive], vectors[:, positive]
    return vectors * values.sqrt(), lambda v: (vectors / values.sqrt()).T @ v


def frechet_infinity(x: Tensor, reference: Moments, seed: int = 0, level: float = LEVEL) -> Estimate:
    """The distance without its bias: a line in 1/N, extrapolated to 0 (Chong & Forsyth 2020, section 3).

    They fit the line to distances of random subsets. Here it goes through the distance of ``x`` and the mean distance
    of its two halves: every row is used at both sizes, so most of the sampling noise cancels in the slope.
    (Thirds, quarters and parabolas through them were measured to be worse: ``docs/log.md``.)

    The interval is for the distance itself. Below N = 10 D the line bends and its interval misses, so there is none.
    ``ValueError`` if a half has no more rows than features: then the distance is not linear in 1/N at all.
    """
    least, n = min_infinity_samples(reference.dim), len(check_rows(x, "features", 2))
    if n < least:
        raise ValueError(
            f"fid_inf: given {n} samples of {reference.dim} features; needs at least {least}: draw more, "
            "or look at kid, which has no bias"
        )
    value, influence = distance_and_influence(x, reference)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(x.device)
    halves = [frechet_distance(Moments.of(x[part]), reference) for part in order.tensor_split(2)]
    limit = 2 * value - sum(halves) / 2
    return Estimate.normal(limit, float(influence.var()) / n, level) if n >= 10 * reference.dim else Estimate(limit)


def min_infinity_samples(dim: int, settings: MetricSettings | None = None) -> int:
    """The smallest number of samples of :func:`frechet_infinity`: each half needs more rows than features."""
    return 2 * dim + 1


# --------------------------------------------------------------------------------------------------------- metrics
def compute_fid(
    generated: SampleStatistics, reference: SampleStatistics | None, settings: MetricSettings
) -> dict[str, Estimate]:
    """``fid``; it has an interval if the features of the generated samples were kept."""
    moments = require_tensor(reference, "moments", "reference")
    if generated.features is None:
        return {"fid": Estimate(frechet_distance(generated.moments, moments))}
    return {"fid": frechet_from_features(generated.features, moments, settings.level)}


def compute_fid_inf(
    generated: SampleStatistics, reference: SampleStatistics | None, settings: MetricSettings
) -> dict[str, Estimate]:
    """``fid_inf``, the FID extrapolated to infinitely many samples."""
    moments = require_tensor(reference, "moments", "reference")
    features = require_tensor(generated, "features", "generated samples")
    return {"fid_inf": frechet_infinity(features, moments, settings.seed, settings.level)}


FID = Metric(
    compute_fid,
    needs="moments",
    direction="lower",
    values=("fid",),
    min_samples=two_samples,
    min_reference=two_samples,
    warn=bias_warning,
)
FID_INF = Metric(
    compute_fid_inf,
    needs="features",
    direction="lower",
    values=("fid_inf",),
    min_samples=min_infinity_samples,
    min_reference=two_samples,
)
