"""Autoencoders: plain, denoising and sparse; and what every objective with an encoder and a decoder has in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from genkit.config.numbers import Count, Fraction, NonNegative
from genkit.core import (
    NO_COND,
    Backbone,
    Batch,
    Cond,
    Denoiser,
    Generator,
    Loss,
    Objective,
    Phase,
    Spec,
    mean_flat,
)

LatentShape = tuple[Count, ...]
ReconstructionLoss = Literal["l2", "l1"]
RECONSTRUCTION_LOSSES: Mapping[str, Callable[[Tensor], Tensor]] = {"l2": torch.square, "l1": torch.abs}


class Posterior(NamedTuple):
    """``q(z | x)``: independent normals, each ``[B, *latent]``."""

    mean: Tensor
    log_var: Tensor

    def sample(self, normal: Tensor) -> Tensor:
        """The reparametrised ``z`` of standard normals (Kingma & Welling 2014, section 2.4)."""
        return self.mean + (0.5 * self.log_var).exp() * normal

    def kl(self) -> Tensor:
        """``KL(q || N(0, 1))`` of each number of the latent, in nats (Kingma & Welling 2014, appendix B)."""
        return 0.5 * (self.mean.square() + self.log_var.exp() - 1 - self.log_var)


def point_posterior(z: Tensor) -> Posterior:
    """A posterior without variance, at ``z``."""
    return Posterior(z, torch.full_like(z, -torch.inf))


class EncoderDecoder(Objective):
    """An ``encoder`` from samples to a latent, a vector ``(D,)`` or a map ``(C, h, w)``, and a ``decoder`` back.

    Both see the conditions. A trained one can be the codec of a model of latents.
    """

    sampler: ClassVar[str | None] = None
    latent: LatentShape

    def __post_init__(self) -> None:
        if not self.latent or min(self.latent) < 1:
            raise ValueError(f"latent: given {self.latent}; needs (D,) for a vector or (C, h, w) for a map, each >= 1")

    def noise_shape(self, spec: Spec) -> tuple[int, ...]:
        return self.latent

    @abstractmethod
    def encode(self, nets: Mapping[str, nn.Module], x: Tensor, cond: Cond = NO_COND) -> Posterior:
        """The posterior of samples ``[B, *S]``; without variance if the encoder has none."""

    @abstractmethod
    def decode(self, nets: Mapping[str, nn.Module], z: Tensor, cond: Cond = NO_COND) -> Tensor:
        """The samples ``[B, *S]`` of latents ``[B, *latent]``."""

    @property
    def codec_networks(self) -> tuple[str, ...]:
        """The names of the networks that encode and decode; all others are for training only."""
        return ("encoder", "decoder")

    def codec_spec(self, spec: Spec) -> Spec:
        """The spec that the networks are made for: the samples' conditions that encoder and decoder see."""
        return spec

    def encoder_input(self, batch: Batch) -> Tensor:
        """What the encoder sees of a batch of samples, ``[B, *S]``."""
        return batch.x

    def quantize(self, nets: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        """The latents that the decoder was trained on which are nearest to ``z`` ``[B, *latent]``."""
        return z

    def reconstruct(self, nets: Mapping[str, nn.Module], batch: Batch) -> Tensor | None:
        return self.decode(nets, self.encode(nets, batch.x, batch.cond).mean, batch.cond)


@dataclass(frozen=True)
class Autoencoder(EncoderDecoder):
    """Reconstruction through a small latent. It has no distribution to draw latents from.

    Plain; denoising (Vincent et al. 2008) with ``noise_std`` or ``mask_prob``; sparse with ``sparsity_weight`` or
    ``top_k``. The loss is a mean over the numbers of a sample.
    """

    is_generative: ClassVar[bool] = False
    usage: ClassVar[str] = "genkit report {run}"

    latent: LatentShape = (16,)
    """shape of the latent: D for a vector, or C h w for a map that fits the backbone"""
    reconstruction_loss: ReconstructionLoss = "l2"
    """error between sample and reconstruction: squared (l2) or absolute (l1)"""
    noise_std: NonNegative = 0.0
    """denoising: standard deviation of normal noise on the encoder's input, in the model's units"""
    mask_prob: Fraction = 0.0
    """denoising: probability that the encoder sees a number as 0 (Vincent et al. 2008, section 2.3)"""
    sparsity_weight: NonNegative = 0.0
    """weight of 1 - sparseness of the latent (Hoyer 2004, eq. 2), which rescaling the latent does not change"""
    top_k: Count | None = None
    """numbers of each latent that are kept, the largest (Makhzani & Frey 2014, k-sparse); None: all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        size = math.prod(self.latent)
        if self.top_k is not None and not 1 <= self.top_k < size:
            raise ValueError(f"top_k: given {self.top_k}; allowed 1..{size - 1}, fewer than the {size} of the latent")
        if self.noise_std < 0 or not 0 <= self.mask_prob < 1 or self.sparsity_weight < 0:
            raise ValueError(
                f"given noise_std {self.noise_std}, mask_prob {self.mask_prob}, sparsity_weight "
                f"{self.sparsity_weight}; allowed from 0, and mask_prob under 1"
            )
        if self.sparsity_weight and size < 2:
            raise ValueError(
                f"sparsity_weight: given {self.sparsity_weight}, but a latent of one number is never sparse; take 0"
            )

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("reconstruct", trains=("encoder", "decoder")),)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        return {"encoder": backbone.encoder(spec, self.latent), "decoder": backbone.decoder(spec, self.latent)}

    def encode(self, nets: Mapping[str, nn.Module], x: Tensor, cond: Cond = NO_COND) -> Posterior:
        z = nets["encoder"](x, cond).to(x)
        return point_posterior(z if self.top_k is None else keep_largest(z, self.top_k))

    def decode(self, nets: Mapping[str, nn.Module], z: Tensor, cond: Cond = NO_COND) -> Tensor:
        return nets["decoder"](z, cond).to(z)

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        z = self.encode(nets, self.corrupt(batch), batch.cond).mean
        reconstruction = self.decode(nets, z, batch.cond)
        error = mean_flat(RECONSTRUCTION_LOSSES[self.reconstruction_loss](reconstruction - batch.x))
        density = 1 - sparseness(z) if z[0].numel() > 1 else torch.zeros_like(error)
        logs = {"error": error.mean(), "sparseness": 1 - density.mean()}
        return Loss(error + self.sparsity_weight * density, logs)

    def corrupt(self, batch: Batch) -> Tensor:
        """The samples with noise and mask, as the encoder sees them in training."""
        x = batch.x + self.noise_std * batch.normal() if self.noise_std else batch.x
        if not self.mask_prob:
            return x
        return torch.where(batch.uniform(*x.shape[1:]) < self.mask_prob, 0.0, x).to(x)

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        raise ValueError("ae: draws nothing: its latents have no distribution; try genkit train --objective=vae")


def keep_largest(z: Tensor, k: int) -> Tensor:
    """``z`` ``[B, *latent]`` with all but the ``k`` numbers of largest magnitude of each row set to 0."""
    flat = z.flatten(1)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(1, flat.abs().topk(k, 1).indices, True)
    return torch.where(kept, flat, 0.0).view_as(z)


def sparseness(z: Tensor) -> Tensor:
    """``(sqrt(n) - |z|_1 / |z|_2) / (sqrt(n) - 1)``, ``[B]`` (Hoyer 2004, eq. 2).

    It is 0 if all numbers are equal and 1 if only one is not 0.
    """
    flat = z.flatten(1)
    root = math.sqrt(flat.shape[1])
    return (root - flat.abs().sum(1) / flat.square().sum(1).clamp(min=1e-12).sqrt()) / (root - 1)
