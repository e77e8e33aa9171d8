"""Variational autoencoders: the evidence lower bound, and the importance-weighted bound for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genkit.config.numbers import Natural, NonNegative
from genkit.core import (
    ELBO,
    NO_COND,
    Backbone,
    Batch,
    Cond,
    Denoiser,
    Direction,
    Generator,
    Loss,
    Noise,
    Phase,
    Spec,
)
from genkit.objectives.autoencoders.autoencoder import EncoderDecoder, LatentShape, Posterior
from genkit.objectives.autoencoders.likelihoods import DecoderOutput, Gaussian, Likelihood

ACTIVE = 0.01  # a unit is active if its mean varies more than this over the data (Burda et al. 2016, section 5.2)
FIRST_WARNING = 500  # steps after which a posterior without information has collapsed; before, it has yet to learn
DRAWS_PER_PASS = 16  # draws of z that are decoded together; a constant, so that no random number depends on it


@dataclass(frozen=True)
class VAE(EncoderDecoder):
    """``E_q log p(x | z) - beta KL(q(z | x) || N(0, 1))`` (Kingma & Welling 2014, eq. 3; Higgins et al. 2017, eq. 4).

    The loss is minus that, in nats a dimension of x. The log has nats a sample: ``neg_elbo`` with beta 1 and without
    free bits, its two parts ``kl`` and ``reconstruction``; and ``active_units``.
    """

    likelihood_method: ClassVar[str | None] = "iwae"
    validation_metrics: ClassVar[Mapping[str, Direction]] = {"loss": "lower", "neg_elbo": "lower"}

    latent: LatentShape = (16,)
    """shape of z: D for a vector, or C h w for a map that fits the backbone"""
    likelihood: Likelihood = field(
        default_factory=Gaussian, metadata={"table": "genkit.objectives.autoencoders.likelihoods:LIKELIHOODS"}
    )
    """p(x | z): gaussian, bernoulli (black and white) or discretised-logistic (256 grey levels)"""
    beta: NonNegative = 1.0
    """weight of the KL term; 1 is the bound itself, more disentangles the latent, less makes sharper samples"""
    anneal_steps: Natural = 0
    """steps over which beta rises from 0 (Bowman et al. 2016, section 3.1)"""
    free_bits: NonNegative = 0.0
    """nats of each number of z that cost nothing (Kingma et al. 2016, eq. 15), by sample, not by mini-batch"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "anneal_steps", "free_bits"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: given {getattr(self, name)}; allowed from 0")

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("vae", trains=("encoder", "decoder")),)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        moments = (2 * self.latent[0], *self.latent[1:])
        return {
            "encoder": backbone.encoder(spec, moments),
            "decoder": self.likelihood.decoder_head(backbone, spec, self.latent),
        }

    def encoder_input(self, batch: Batch) -> Tensor:
        return self.likelihood.target(batch)

    def encode(self, nets: Mapping[str, nn.Module], x: Tensor, cond: Cond = NO_COND) -> Posterior:
        mean, log_var = nets["encoder"](x, cond).to(x).chunk(2, 1)
        return Posterior(mean, log_var.clamp(-30, 20))

    def decode(self, nets: Mapping[str, nn.Module], z: Tensor, cond: Cond = NO_COND) -> Tensor:
        return self.likelihood.mean(nets["decoder"](z, cond))

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        q, reconstruction, kl_each = self.bound_terms(nets, batch)
        kl = kl_each.sum(1)
        active = (q.mean.detach().var(0, correction=0) > ACTIVE).sum().float()
        logs = {"neg_elbo": (reconstruction + kl).mean(), "kl": kl.mean(), "reconstruction": reconstruction.mean()}
        return Loss(self.training_loss(reconstruction, kl_each, batch), {**logs, "active_units": active})

    def bound_terms(self, nets: Mapping[str, nn.Module], batch: Batch) -> tuple[Posterior, Tensor, Tensor]:
        """The posterior, minus the log-likelihood ``[B]`` of one draw, and the KL of each number of z ``[B, D]``.

        All are in nats.
        """
        x = self.likelihood.target(batch)
        q = self.encode(nets, x, batch.cond)
        out = nets["decoder"](q.sample(batch.normal(*self.latent)), batch.cond)
        return q, -self.likelihood.log_prob(out, x), q.kl().flatten(1)

    def training_loss(self, reconstruction: Tensor, kl_each: Tensor, batch: Batch) -> Tensor:
        """The loss ``[B]``, with beta, annealing and free bits, in nats a dimension of x."""
        beta = self.beta * self.annealing(batch.step)
        kl = (kl_each.clamp(min=self.free_bits) if self.free_bits else kl_each).sum(1)
        return (reconstruction + beta * kl) / batch.x[0].numel()

    def validate(self, nets: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        _, reconstruction, kl_each = self.bound_terms(nets, batch)
        loss = self.training_loss(reconstruction, kl_each, batch)
        return {"loss": loss, "neg_elbo": reconstruction + kl_each.sum(1)}

    def annealing(self, step: int | None) -> float:
        """The fraction of beta that counts at a step; outside training (None), 1."""
        return 1.0 if step is None or not self.anneal_steps else min(1.0, step / self.anneal_steps)

    def warning(self, record: Mapping[str, Any]) -> str | None:
        if (
            record["step"] < self.anneal_steps + FIRST_WARNING
            or record["vae/kl"] > 1
            or record["vae/active_units"] >= 1
        ):
            return None
        return (
            f"posterior collapse: no active unit of {math.prod(self.latent)}, {record['vae/kl']:.3f} nats in z; the "
            "decoder ignores it: try --objective.beta 0.5, --objective.anneal-steps 5000 or --objective.free-bits 0.1"
        )

    @torch.no_grad()
    def bounds(self, nets: Mapping[str, nn.Module], batch: Batch, samples: int) -> ELBO:
        """The ELBO, and the importance-weighted bound of Burda et al. (2016, eq. 8), from the same ``samples`` draws.

        Both average over draws of ``w = p(x | z) p(z) / q(z | x)``: the mean of log w, and the log of the mean of w.
        """
        x = self.likelihood.target(batch)
        q = self.encode(nets, x, batch.cond)
        log_w = []
        for first in range(0, samples, DRAWS_PER_PASS):
            k = min(DRAWS_PER_PASS, samples - first)
            mean, log_var, x_repeated = (v.repeat_interleave(k, 0) for v in (q.mean, q.log_var, x))
            cond = {name: v.repeat_interleave(k, 0) for name, v in batch.cond.items()}
            normal = batch.normal(DRAWS_PER_PASS, *self.latent)[:, :k].flatten(0, 1)
            z = Posterior(mean, log_var).sample(normal)
            out: DecoderOutput = nets["decoder"](z, cond)
            prior_ratio = 0.5 * (normal.square() - z.square() + log_var).flatten(1).sum(1)  # log p(z) / q(z | x)
            log_w.append((self.likelihood.log_prob(out, x_repeated) + prior_ratio).double().unflatten(0, (-1, k)))
        all_log_w = torch.cat(log_w, 1)
        return ELBO(all_log_w.mean(1), all_log_w.logsumexp(1) - math.log(samples))

    @property
    def is_discrete(self) -> bool:
        return self.likelihood.is_discrete

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        """A generator of ``E[x | z]`` for a normal z."""
        if sampling is not None:
            raise ValueError("sampler: has no effect on VAE, which draws in one pass; leave it out")

        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            return self.decode(nets, z, cond)

        return generate
