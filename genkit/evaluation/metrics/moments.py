"""Mean and covariance of features, added up in float64 from any number of parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genkit.core.arrays import open_npz, save_npz
from genkit.evaluation.metrics.estimate import check_rows

CHUNK = 8192  # rows converted to float64 at a time


class Moments:
    """Mean and covariance of the rows added so far, in float64, by the update of Chan et al. (1979), eq. 2.1.

    Sums are of centred numbers, so features of mean 1000 and standard deviation 0.01 keep their covariance.
    ``n`` is None if a file of foreign statistics does not store it; such moments cannot be added to.
    """

    n: int | None
    mean: Tensor
    """``[D]`` float64"""

    def __init__(self, n: int | None, mean: Tensor, scatter: Tensor):
        """``scatter`` ``[D, D]``: the sum of centred outer products, or the covariance itself if ``n`` is None."""
        self.n, self.mean, self.scatter = n, mean, scatter

    @classmethod
    def zeros(cls, dim: int, device: torch.device | str = "cpu") -> Moments:
        """The moments of no rows of ``dim`` numbers."""
        options = {"dtype": torch.float64, "device": device}
        return cls(0, torch.zeros(dim, **options), torch.zeros(dim, dim, **options))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of ``features`` ``[N, D]`` (any floating dtype), on their device."""
        moments = cls.zeros(check_rows(features, "features").shape[1], features.device)
        for part in features.split(CHUNK):
            moments.add(part)
        return moments

    @property
    def dim(self) -> int:
        """The number of features D."""
        return len(self.mean)

    @property
    def cov(self) -> Tensor:
        """``[D, D]``, normalised by n - 1 as ``np.cov`` does. ``ValueError`` if n < 2."""
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
        """The same on ``device``."""
        return Moments(self.n, self.mean.to(device), self.scatter.to(device))

    def add(self, features: Tensor) -> None:
        """Include the rows of ``features`` ``[B, D]``. ``ValueError`` if one of them is not finite."""
        x = check_rows(features, "features", 0, self.n or 0).to(self.mean)
        if not len(x):
            return
        mean = x.mean(0)
        x = x - mean
        both = self.merge(Moments(len(x), mean, x.T @ x))
        self.n, self.mean, self.scatter = both.n, both.mean, both.scatter

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows. ``ValueError`` if a number of rows is unknown, or the features differ."""
        if self.n is None or other.n is None:
            raise ValueError("moments: cannot be added to, because the file does not store its number of samples")
        require_same_dim(self, other)
        n = self.n + other.n
        if not self.n or not other.n:
            return other if other.n else self
        step = other.mean.to(self.mean) - self.mean
        between = torch.outer(step, step) * (self.n * other.n / n)
        return Moments(n, self.mean + step * (other.n / n), self.scatter + other.scatter.to(self.scatter) + between)

    def scaled(self, n: int) -> Moments:
        """The same mean and, up to the factor ``n / (n - 1)``, covariance, with the weight of ``n`` rows."""
        if self.n is None:
            raise ValueError("moments: cannot be weighted, because the file does not store its number of samples")
        return Moments(n, self.mean, self.scatter * (n / max(1, self.n)))

    def save(self, path: str | Path) -> None:
        """Write an npz with ``mu``, ``sigma`` (the names of pytorch-fid and EDM) and, if known, ``n``."""
        save_npz(path, self.to_arrays())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """``mu``, ``sigma`` and, if known, ``n``."""
        arrays = {"mu": self.mean.cpu().numpy(), "sigma": self.cov.cpu().numpy()}
        if self.n is not None:
            arrays["n"] = np.asarray(self.n)
        return arrays

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read an npz as :meth:`save` or pytorch-fid write it. ``ValueError`` if it is not one."""
        arrays: dict[str, np.ndarray] = {}
        try:
            with open_npz(path) as file:
                arrays = {key: file[key] for key in file.files}
            mean, cov = (torch.from_numpy(np.asarray(arrays[key], dtype=np.float64)) for key in ("mu", "sigma"))
        except KeyError:
            raise ValueError(f"{path}: holds {', '.join(arrays) or 'nothing'}; statistics need mu and sigma") from None
        except (ValueError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}: not an npz of statistics (mu, sigma): {e}") from None
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: mu is {tuple(mean.shape)}, sigma {tuple(cov.shape)}; needs [D] and [D, D]")
        if not (mean.isfinite().all() and cov.isfinite().all()):
            raise ValueError(f"{path}: has numbers that are not finite")
        n = int(arrays["n"]) if "n" in arrays else None
        return cls(n, mean, cov if n is None else cov * (n - 1))


def require_same_dim(a: Moments, b: Moments) -> None:
    """``ValueError`` unless both have the same number of features."""
    if a.dim != b.dim:
        raise ValueError(f"moments: one set has {a.dim} features, the other {b.dim}; take the same features for both")
