"""Autoencoders: plain, denoising and sparse; and what every objective with a latent has in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

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

Latent = tuple[Annotated[int, Ge(1)], ...]
ErrorName = Literal["l2", "l1"]
ERRORS: Mapping[str, Callable[[Tensor], Tensor]] = {"l2": torch.square, "l1": torch.abs}


class Posterior(NamedTuple):
    """``q(z | x)``: independent normals, each ``[B, *latent]``."""

    mean: Tensor
    log_var: Tensor

    def draw(self, normal: Tensor) -> Tensor:
        """The reparametrised ``z`` of standard normals (Kingma & Welling 2014, section 2.4)."""
        return self.mean + (0.5 * self.log_var).exp() * normal

    def kl(self) -> Tensor:
        """``KL(q || N(0, 1))`` of each number of the latent, in nats (Kingma & Welling 2014, appendix B)."""
        return 0.5 * (self.mean.square() + self.log_var.exp() - 1 - self.log_var)


class Autoencoding(Objective):
    """An ``encoder`` from samples to a latent, a vector ``(D,)`` or a map ``(C, h, w)``, and a ``decoder`` back.

    Both see the conditions. A trained one stands between the world's samples and a model of latents.
    """

    sampler: ClassVar[str | None] = None
    latent: Latent

    def __post_init__(self) -> None:
        if not self.latent or min(self.latent) < 1:
            raise ValueError(f"latent: given {self.latent}; needs (D,) for a vector or (C, h, w) for a map, each >= 1")

    def noise_shape(self, spec: Spec) -> tuple[int, ...]:
        return self.latent

    @abstractmethod
    def encode(self, nets: Mapping[str, nn.Module], x: Tensor, cond: Cond = NO_COND) -> Posterior:
        """Where ``x`` ``[B, *S]`` lies in the latent space; without a spread where the encoder has none."""

    @abstractmethod
    def decode(self, nets: Mapping[str, nn.Module], z: Tensor, cond: Cond = NO_COND) -> Tensor:
        """The sample that a latent ``[B, *latent]`` stands for, ``[B, *S]``."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that encode and decode; others are for training only."""
        return ("encoder", "decoder")

    def told(self, spec: Spec) -> Spec:
        """What the networks are made for: of the samples' conditions those that both ends see."""
        return spec

    def seen(self, batch: Batch) -> Tensor:
        """What the encoder sees of a batch of samples, ``[B, *S]``."""
        return batch.x

    def nearest(self, nets: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        """The latent that the decoder knows best near any ``z``, as a model of latents draws it."""
        return z

    def reconstruct(self, nets: Mapping[str, nn.Module], batch: Batch) -> Tensor | None:
        return self.decode(nets, self.encode(nets, batch.x, batch.cond).mean, batch.cond)


def certain(z: Tensor) -> Posterior:
    """A posterior without a spread."""
    return Posterior(z, torch.full_like(z, -torch.inf))


@dataclass(frozen=True)
class Autoencoder(Autoencoding):
    """Reconstruction through a small code: plain; denoising (Vincent et al. 2008) with ``noise`` or ``mask``; sparse
    with ``sparse`` or ``top``. The loss is a mean over the numbers of a sample. It has no law to draw samples from."""

    is_generative: ClassVar[bool] = False
    usage: ClassVar[str] = "genkit report {run}"

    latent: Latent = (16,)
    """the code: D for a vector, or C h w for a map that fits the backbone"""
    error: ErrorName = "l2"
    """what is small between sample and reconstruction: squares or absolute values"""
    noise: Annotated[float, Ge(0)] = 0.0
    """denoising: spread of the normal noise on what the encoder sees, in the model's numbers"""
    mask: Annotated[float, Ge(0), Lt(1)] = 0.0
    """denoising: share of the numbers that the encoder sees as 0 (Vincent et al. 2008, section 2.3)"""
    sparse: Annotated[float, Ge(0)] = 0.0
    """weight of 1 - sparseness of the code (Hoyer 2004, eq. 2), which no rescaling of the code can escape"""
    top: Annotated[int, Ge(1)] | None = None
    """of each code only so many numbers, the largest, are kept (Makhzani & Frey 2014, k-sparse)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        size = math.prod(self.latent)
        if self.top is not None and not 1 <= self.top < size:
            raise ValueError(f"top: given {self.top}; allowed 1..{size - 1}, fewer than the {size} of the latent")
        if self.noise < 0 or not 0 <= self.mask < 1 or self.sparse < 0:
            raise ValueError(
                f"given noise {self.noise}, mask {self.mask}, sparse {self.sparse}; allowed from 0, and mask under 1"
            )
        if self.sparse and size < 2:
            raise ValueError(f"sparse: given {self.sparse}, but a code of one number is never sparse; take 0")

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("reconstruct", trains=("encoder", "decoder")),)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        return {"encoder": backbone.encoder(spec, self.latent), "decoder": backbone.decoder(spec, self.latent)}

    def encode(self, nets: Mapping[str, nn.Module], x: Tensor, cond: Cond = NO_COND) -> Posterior:
        z = nets["encoder"](x, cond).to(x)
        return certain(z if self.top is None else largest(z, self.top))

    def decode(self, nets: Mapping[str, nn.Module], z: Tensor, cond: Cond = NO_COND) -> Tensor:
        return nets["decoder"](z, cond).to(z)

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        z = self.encode(nets, self.spoil(batch), batch.cond).mean
        error = mean_flat(ERRORS[self.error](self.decode(nets, z, batch.cond) - batch.x))
        dense = 1 - sparseness(z) if z[0].numel() > 1 else torch.zeros_like(error)
        return Loss(error + self.sparse * dense, {"error": error.mean(), "sparseness": 1 - dense.mean()})

    def spoil(self, batch: Batch) -> Tensor:
        """What the encoder sees of the samples."""
        x = batch.x + self.noise * batch.normal() if self.noise else batch.x
        return torch.where(batch.uniform(*x.shape[1:]) < self.mask, 0.0, x).to(x) if self.mask else x

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        raise ValueError("ae: draws nothing: it knows no law of its codes; a VAE does: genkit train --objective=vae")


def largest(z: Tensor, k: int) -> Tensor:
    """``z`` ``[B, *latent]`` with all but the ``k`` numbers of largest magnitude of each row set to 0."""
    flat = z.flatten(1)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(1, flat.abs().topk(k, 1).indices, True)
    return torch.where(kept, flat, 0.0).view_as(z)


def sparseness(z: Tensor) -> Tensor:
    """``(sqrt(n) - |z|_1 / |z|_2) / (sqrt(n) - 1)``, ``[B]``: 0 where all are equal, 1 where one is not 0 (Hoyer
    2004, eq. 2)."""
    flat = z.flatten(1)
    root = math.sqrt(flat.shape[1])
    return (root - flat.abs().sum(1) / flat.square().sum(1).clamp(min=1e-12).sqrt()) / (root - 1)
