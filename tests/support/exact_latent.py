"""Closed-form truth for models with a latent: the linear Gaussian one, also called probabilistic PCA."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from genkit.core import NO_COND, Backbone, Spec
from genkit.objectives.autoencoders.likelihoods import DecoderOutput

F64 = torch.float64


@dataclass(frozen=True)
class LinearGaussian:
    """``z ~ N(0, I)``, ``x | z ~ N(W z + mean, std^2 I)`` (Tipping & Bishop 1999, eq. 2-3): W [D, K], mean [D]."""

    weight: Tensor
    mean: Tensor
    std: float

    @staticmethod
    def random(dim: int, latent: int, std: float, orthogonal: bool, seed: int = 0) -> "LinearGaussian":
        """With orthogonal columns of W the posterior is a product of normals, as a VAE's is; else it is not."""
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(dim, latent, generator=g, dtype=F64)
        if orthogonal:
            weight = torch.linalg.qr(weight).Q * torch.linspace(0.7, 1.8, latent, dtype=F64)
        return LinearGaussian(weight, torch.randn(dim, generator=g, dtype=F64), std)

    def law(self) -> MultivariateNormal:
        eye = torch.eye(len(self.mean), dtype=F64)
        return MultivariateNormal(self.mean, self.weight @ self.weight.T + self.std**2 * eye)  # eq. 5-6

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """``p(z | x)`` (eq. 7-8)."""
        m = self.weight.T @ self.weight + self.std**2 * torch.eye(self.weight.shape[1], dtype=F64)
        mean = torch.linalg.solve(m, self.weight.T @ (x - self.mean).T).T
        return MultivariateNormal(mean, self.std**2 * torch.linalg.inv(m))

    def mean_field(self, x: Tensor, shift: float = 0.0, stretch: float = 1.0) -> Normal:
        """The product of normals nearest to the posterior; then shifted, and its spread stretched."""
        true = self.posterior(x)
        spread = torch.diagonal(true.precision_matrix, dim1=-2, dim2=-1).rsqrt()
        return Normal(true.mean + shift, stretch * spread)

    def gap(self, x: Tensor, **how: float) -> Tensor:
        """``KL(q || p(z | x))``, by which the ELBO of that encoder stays under ``log p(x)``, ``[B]``."""
        q = self.mean_field(x, **how)
        return kl_divergence(MultivariateNormal(q.mean, torch.diag_embed(q.variance)), self.posterior(x))

    def networks(self, **how: float):
        """An encoder and a decoder that know all this: they stand where networks stand."""

        def encoder(x, cond=NO_COND):
            q = self.mean_field(x, **how)
            return torch.cat([q.mean, q.variance.log()], 1)

        def decoder(z, cond=NO_COND):
            return DecoderOutput(
                z @ self.weight.T + self.mean, torch.full((1, len(self.mean)), self.std, dtype=F64).log()
            )

        return {"encoder": encoder, "decoder": decoder}


def principal(cov: Tensor, latent: int) -> tuple[float, float]:
    """What the best model with so many latents reaches on normal data of this covariance: its std (Tipping & Bishop
    1999, eq. 15) and its mean log density (eq. 13-16: the kept eigenvalues, and the mean of the others)."""
    values = torch.linalg.eigvalsh(cov).flip(0)
    rest = values[latent:].mean()
    fitted = torch.cat([values[:latent], rest.expand(len(values) - latent)])
    return float(rest.sqrt()), float(-0.5 * (fitted.log() + 1 + torch.log(torch.tensor(2 * torch.pi))).sum())


@dataclass(frozen=True)
class Linear(Backbone):
    """One layer for each cut."""

    def denoiser(self, spec: Spec):
        raise NotImplementedError

    def encoder(self, spec: Spec, out: tuple[int, ...]) -> nn.Module:
        return Layer(spec.shape[0], out[0])

    def decoder(self, spec: Spec, inp: tuple[int, ...]) -> nn.Module:
        return Layer(inp[0], spec.shape[0])


class Layer(nn.Linear):
    def forward(self, x: Tensor, cond=NO_COND) -> Tensor:  # type: ignore[override]
        return super().forward(x)
