"""Closed-form truth: a Gaussian mixture, and its exact denoiser on any path. The tests use it too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.core import Cond, Prediction, ProbabilityPath

F64 = torch.float64


@dataclass(frozen=True)
class Mixture:
    """``sum_k weights[k] N(means[k], covs[k])``: weights ``[K]``, means ``[K, D]``, covs ``[K, D, D]``; float64."""

    weights: Tensor
    means: Tensor
    covs: Tensor

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[1]

    def log_prob(self, x: Tensor) -> Tensor:
        """The natural logarithm of the density, ``[B, D]`` to ``[B]``."""
        return torch.logsumexp(self.weights.log() + self.component_log_prob(x), dim=1)

    def component_log_prob(self, x: Tensor) -> Tensor:
        """The same of each component, ``[B, D]`` to ``[B, K]``."""
        components = torch.distributions.MultivariateNormal(self.means, self.covs)
        return components.log_prob(x[:, None])

    def sample(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Samples ``[n, D]`` and their components ``[n]``."""
        g = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=g)
        z = torch.randn(n, self.dim, generator=g, dtype=F64)
        root = torch.linalg.cholesky(self.covs)
        return self.means[k] + torch.einsum("bij,bj->bi", root[k], z), k

    def mean(self) -> Tensor:
        """``[D]``."""
        return self.weights @ self.means

    def cov(self) -> Tensor:
        """``[D, D]``."""
        centred = self.means - self.mean()
        return torch.einsum("k,kij->ij", self.weights, self.covs) + (centred.T * self.weights) @ centred

    def noised(self, alpha: float, sigma: float) -> Mixture:
        """The distribution of ``alpha x0 + sigma z``, with ``z`` standard normal."""
        return Mixture(
            self.weights, alpha * self.means, alpha**2 * self.covs + sigma**2 * torch.eye(self.dim, dtype=F64)
        )

    def component(self, k: int) -> Mixture:
        """Component ``k`` alone."""
        return Mixture(torch.ones(1, dtype=F64), self.means[k : k + 1], self.covs[k : k + 1])


@dataclass(frozen=True)
class ExactDenoiser:
    """The posterior means ``E[x0 | x]`` and ``E[x1 | x]`` of a mixture on a path; a label selects a component."""

    mixture: Mixture
    path: ProbabilityPath

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """The exact prediction for ``x`` ``[B, D]`` at times ``t`` ``[B]``."""
        m, eye = self.mixture, torch.eye(self.mixture.dim, dtype=x.dtype)
        a, s = self.path.alpha(t)[:, None, None, None], self.path.sigma(t)[:, None, None, None]
        cov = a**2 * m.covs + s**2 * eye  # [B, K, D, D]
        offset = x[:, None] - a[..., 0] * m.means  # [B, K, D]
        solved = torch.linalg.solve(cov, offset[..., None])[..., 0]
        log_p = -0.5 * (offset * solved).sum(-1) - 0.5 * torch.logdet(cov)
        prior = m.weights.log().expand_as(log_p)
        if "label" in cond:
            only = torch.nn.functional.one_hot(cond["label"], len(m.weights)).to(x).log()
            keep = cond.get("keep", torch.ones(len(x), dtype=torch.bool))
            prior = torch.where(keep[:, None], only, prior)
        post = torch.softmax(log_p + prior, dim=1)
        each = m.means + a[..., 0] * torch.einsum("kij,bkj->bki", m.covs, solved)  # E[x0 | x, k]
        x0 = (post[..., None] * each).sum(1)
        return Prediction(x0, (x - a[:, 0, 0] * x0) / s[:, 0, 0])


def three() -> Mixture:
    """A mixture of three unequal, correlated Gaussians in the plane, without symmetries that could hide a mistake."""
    covs = torch.tensor([[[0.2, 0.1], [0.1, 0.3]], [[0.1, -0.05], [-0.05, 0.2]], [[0.4, 0.0], [0.0, 0.05]]], dtype=F64)
    means = torch.tensor([[1.0, 0.5], [-1.2, 0.3], [0.2, -1.5]], dtype=F64)
    return Mixture(torch.tensor([0.5, 0.3, 0.2], dtype=F64), means, covs)
