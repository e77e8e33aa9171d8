"""Fréchet distance of two Gaussians (FID where the features are Inception's), its noise and its bias.

Dowson & Landau (1982), eq. 16; Heusel et al. (2017), section 2: ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``.
The trace of the root needs no root: with ``S1 = L L^T`` the eigenvalues of ``S1 S2`` are those of ``L^T S2 L``, which
is symmetric: Cholesky and a symmetric eigenvalue problem, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import LinAlgError, eigh
from torch import Tensor

from genkit.core.files import atomic_write
from genkit.evaluation.metrics.estimate import LEVEL, Estimate, rows

FEW = 10_000
CHUNK = 8192  # rows that are held in float64 at once


def bias_warning(n: int) -> str | None:
    """One line where ``n`` samples are too few for an FID to be compared with published ones, else None."""
    if n >= FEW:
        return None
    return (
        f"FID of {n} samples is too high: its bias falls as 1/n and differs between models; compare only at equal n, "
        f"draw {FEW} or more (papers: 50000), or look at fid_inf and kid"
    )


class Moments:
    """Mean and covariance of the rows that were added, in float64, by the update of Chan et al. (1979), eq. 2.1.

    The sums are of centred numbers, so features of mean 1000 and spread 0.01 keep their covariance.
    ``n`` is None where a file of other statistics does not tell; such moments cannot be added to.
    """

    n: int | None
    mean: Tensor
    """``[D]`` float64"""

    def __init__(self, n: int | None, mean: Tensor, scatter: Tensor):
        """``scatter`` ``[D, D]``: the sum of centred outer products; the covariance itself where ``n`` is None."""
        self.n, self.mean, self.scatter = n, mean, scatter

    @classmethod
    def zeros(cls, dim: int, device: torch.device | str = "cpu") -> Moments:
        """No rows yet."""
        kind = {"dtype": torch.float64, "device": device}
        return cls(0, torch.zeros(dim, **kind), torch.zeros(dim, dim, **kind))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of ``[N, D]``, any floating dtype, on its device."""
        moments = cls.zeros(rows(features, "features").shape[1], features.device)
        for part in features.split(CHUNK):
            moments.add(part)
        return moments

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def cov(self) -> Tensor:
        """``[D, D]`` with n - 1 below, as ``np.cov``."""
        if self.n is None:
            return self.scatter
        if self.n < 2:
            raise ValueError(f"covariance: given {self.n} samples; needs at least 2")
        return self.scatter / (self.n - 1)

    @property
    def rank(self) -> int:
        """The largest rank that the covariance can have."""
        return self.dim if self.n is None else min(self.dim, self.n - 1)

    def to(self, device: torch.device | str) -> Moments:
        return Moments(self.n, self.mean.to(device), self.scatter.to(device))

    def add(self, features: Tensor) -> None:
        """Count the rows ``[B, D]`` in."""
        x = rows(features, "features", 0, self.n or 0).to(self.mean)
        if not len(x):
            return
        mean = x.mean(0)
        x = x - mean
        both = self.merge(Moments(len(x), mean, x.T @ x))
        self.n, self.mean, self.scatter = both.n, both.mean, both.scatter

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows."""
        if self.n is None or other.n is None:
            raise ValueError("moments: a file that does not tell its number of samples cannot be added to")
        same(self, other)
        n = self.n + other.n
        if not self.n or not other.n:
            return other if other.n else self
        step = other.mean.to(self.mean) - self.mean
        between = torch.outer(step, step) * (self.n * other.n / n)
        return Moments(n, self.mean + step * (other.n / n), self.scatter + other.scatter.to(self.scatter) + between)

    def save(self, path: str | Path) -> None:
        """Write an npz of ``mu``, ``sigma`` (the names of pytorch-fid and EDM) and, where known, ``n``."""
        arrays = {"mu": self.mean.cpu().numpy(), "sigma": self.cov.cpu().numpy()}
        if self.n is not None:
            arrays["n"] = np.asarray(self.n)
        with atomic_write(path) as part, open(part, "wb") as f:
            np.savez(f, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read such an npz. ``ValueError`` where it is not one."""
        found: dict[str, np.ndarray] = {}
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {k: file[k] for k in file.files}
            mean, cov = (torch.from_numpy(np.asarray(found[k], dtype=np.float64)) for k in ("mu", "sigma"))
        except KeyError:
            raise ValueError(f"{path}: holds {', '.join(found) or 'nothing'}; statistics need mu and sigma") from None
        except (ValueError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}: not an npz of statistics (mu, sigma): {e}") from None
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: mu is {tuple(mean.shape)}, sigma {tuple(cov.shape)}; needs [D] and [D, D]")
        if not (mean.isfinite().all() and cov.isfinite().all()):
            raise ValueError(f"{path}: holds numbers that are not finite")
        n = int(found["n"]) if "n" in found else None
        return cls(n, mean, cov if n is None else cov * (n - 1))


def same(a: Moments, b: Moments) -> None:
    if a.dim != b.dim:
        raise ValueError(f"moments: one set has {a.dim} features, the other {b.dim}; take the same features for both")


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance of the Gaussians with these moments. It is computed on the CPU."""
    same(a, b)
    a, b = a.to("cpu"), b.to("cpu")
    apart = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()
    return float(apart) - 2 * float(np.sqrt(product_eigenvalues(a, b).clip(min=0)).sum())


def product_eigenvalues(a: Moments, b: Moments) -> np.ndarray:
    """The eigenvalues of ``S1 S2``, the ``rank`` largest where a covariance is singular.

    What rounding leaves of an eigenvalue 0 is some 1e-16, and its root 1e-8: a thousand of them would be seen.
    """
    p, q = (a, b) if a.rank >= b.rank else (b, a)
    if p.rank == p.dim:
        try:  # LAPACK's dsygv: Cholesky of p, L^T q L, and its eigenvalues, at half the cost of two products
            both = (q.cov.numpy(), p.cov.numpy())
            return eigh(*both, type=2, driver="gv", eigvals_only=True, check_finite=False)[-q.rank :]
        except LinAlgError:  # p is singular
            pass
    factor = factors(p.cov, p.rank)[0]
    return torch.linalg.eigvalsh(factor.T @ q.cov @ factor)[-q.rank :].numpy()


def frechet_from_features(x: Tensor, reference: Moments, level: float = LEVEL) -> Estimate:
    """The distance of the rows ``x`` ``[N, D]`` from the reference, and an interval for its mean at this N.

    The interval is what other draws of N samples from the same generator would give against the same reference: it
    knows nothing of the bias, for which see :func:`frechet_infinity`. It is the infinitesimal jackknife (Jaeckel 1972;
    Efron 1982, chapter 6): a sample's influence on the distance has a closed form, and the variance of their mean is
    that of the distance. Measured at D = 8, 16 and 64, N = 12 to 2000, it holds the mean in 90 to 100 of
    100 cases, also where N < D. There a bootstrap, whose resamples repeat rows, is up to five times too wide, and it
    costs hundreds of eigendecompositions.
    """
    value, influence = linearised(x, reference)
    return Estimate.normal(value, float(influence.var()) / len(influence), level)


def linearised(x: Tensor, reference: Moments) -> tuple[float, Tensor]:
    """The distance of ``x`` and the influence ``[N]`` of each row on it, through ``N x N`` matrices where ``N <= D``.

    With ``W`` the map that carries the Gaussian of ``x`` to the reference, the derivative of the distance is
    ``2 (m - m2) . (x - m) + (x - m)^T (1 - W) (x - m)`` (Dowson & Landau 1982, differentiated).
    """
    rows(x, "features", 2)
    if x.shape[1] != reference.dim:
        raise ValueError(f"features: given {x.shape[1]} a row; the reference has {reference.dim}; take the same ones")
    own = Moments.of(x)
    mean, cov = reference.mean.to(own.mean), reference.cov.to(own.mean)
    away, (n, dim) = own.mean - mean, x.shape
    if n <= dim:
        x = x.to(own.mean) - own.mean
        rank = min(own.rank, reference.rank)
        values, vectors = torch.linalg.eigh(x @ cov @ x.T / (n - 1))
        roots = values[-rank:].clamp(min=0).sqrt()
        influence = 2 * x @ away + n / (n - 1) * x.square().sum(1) - n * (vectors[:, -rank:].square() @ roots)
    else:
        factor, whiten = factors(own.cov, own.rank)
        values, vectors = torch.linalg.eigh(factor.T @ cov @ factor)
        roots, vectors = values[-reference.rank :].clamp(min=0).sqrt(), vectors[:, -reference.rank :]
        influence = torch.cat([
            2 * c @ away + n / (n - 1) * (c.square().sum(1) - (vectors.T @ whiten(c.T)).square().T @ roots)
            for c in (part.to(own.mean) - own.mean for part in x.split(CHUNK))
        ])  # fmt: skip
    value = away.square().sum() + own.cov.trace() + cov.trace() - 2 * roots.sum()
    return float(value), influence


def factors(cov: Tensor, rank: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``A`` with ``A A^T = cov``, and what multiplies by its (pseudo-)inverse; ``rank`` is the largest it can have."""
    if rank == len(cov):
        factor, failed = torch.linalg.cholesky_ex(cov)
        if not failed:
            return factor, lambda v: torch.linalg.solve_triangular(factor, v, upper=False)
    values, vectors = torch.linalg.eigh(cov)
    keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    values, vectors = values[keep], vectors[:, keep]
    return vectors * values.sqrt(), lambda v: (vectors / values.sqrt()).T @ v


def frechet_infinity(x: Tensor, reference: Moments, seed: int = 0, level: float = LEVEL) -> Estimate:
    """The distance without its bias: a line in 1/N, extrapolated to 0 (Chong & Forsyth 2020, section 3).

    They fit the line to distances of random subsets. Here it goes through the distance of ``x`` and the mean distance
    of its two halves: every row is used at both sizes, so most of the noise of the draw cancels in the slope.
    (Thirds, quarters and parabolas through them were measured to be worse: ``docs/log.md``.)

    The interval is for the distance itself. Below N = 10 D the line bends, its interval misses, and there is none;
    ``ValueError`` where a half has no more rows than features, where it is no line at all.
    """
    least, n = 2 * reference.dim + 1, len(rows(x, "features", 2))
    if n < least:
        raise ValueError(
            f"fid_inf: given {n} samples of {reference.dim} features; needs at least {least}: draw more, "
            "or look at kid, which has no bias"
        )
    value, influence = linearised(x, reference)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(x.device)
    halves = [frechet_distance(Moments.of(x[part]), reference) for part in order.tensor_split(2)]
    limit = 2 * value - sum(halves) / 2
    return Estimate.normal(limit, float(influence.var()) / n, level) if n >= 10 * reference.dim else Estimate(limit)
