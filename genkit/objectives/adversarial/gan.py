"""Generative adversarial networks: a decoder that draws in one pass against an encoder that scores its samples."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit.core import (
    NO_COND,
    Backbone,
    Batch,
    Cond,
    Denoiser,
    Direction,
    Generator,
    Label,
    Loss,
    Noise,
    Objective,
    Phase,
    Spec,
    Vector,
    expand,
)
from genkit.objectives.adversarial.augment import AUGMENTATIONS, AugmentationName
from genkit.objectives.adversarial.losses import (
    PENALTIES,
    GANLoss,
    Relativistic,
    add_spectral_norm,
    iterate_spectral_norm,
    squared_gradient_norm,
)
from genkit.objectives.autoencoders.autoencoder import LatentShape

NUM_FEATURES = 128  # on which a condition is projected: as many as in Miyato & Koyama's last layer for 32x32
FIRST_WARNING = 500  # steps after which the players should be even; at first, the discriminator is expected to win


@dataclass(frozen=True)
class GAN(Objective):
    """A ``generator`` against a ``discriminator`` (Goodfellow et al. 2014).

    The log has ``accuracy``, how often a real sample scores above a generated one (0.5: the players are even);
    ``margin``, by how much (for wasserstein: its estimate of W1); and ``diversity``, the mean distance between
    generated samples of a class over that between real ones: near 0 all are the same, far above 1 they scatter.
    """

    sampler: ClassVar[str | None] = None
    default_settings: ClassVar[Mapping[str, Any]] = {"betas": (0.0, 0.99), "warmup": 0}
    validation_metrics: ClassVar[Mapping[str, Direction]] = {}  # its losses are relative to a moving opponent
    needs_whole_networks: ClassVar[bool] = True  # gradient penalties

    gan_loss: GANLoss = field(
        default_factory=Relativistic, metadata={"table": "genkit.objectives.adversarial.losses:GAN_LOSSES"}
    )
    """relativistic (R3GAN), non-saturating, wasserstein, hinge or minimax, with their penalties"""
    latent: LatentShape = (64,)
    """shape of z: D for a vector, or C h w for a map that fits the backbone"""
    conditioning: Literal["auto", "projection", "embedding"] = "auto"
    """how the discriminator uses the condition: as a direction of its features (projection; Miyato & Koyama 2018, eq.
    3) or inside its blocks (embedding; CGAN, Mirza & Osindero 2014); auto: projection, but embedding of pictures and
    tokens"""
    spectral_norm: bool = False
    """keep the spectral norm of the discriminator's weights at 1 or less (Miyato et al. 2018)"""
    augment: tuple[AugmentationName, ...] = ()
    """augmentations of real and generated samples before they are scored (DiffAugment, Zhao et al. 2020); for little
    data"""

    def __post_init__(self) -> None:
        if not self.latent or min(self.latent) < 1:
            raise ValueError(f"latent: given {self.latent}; needs (D,) for a vector or (C, h, w) for a map, each >= 1")
        if self.gan_loss.is_unbounded and not self.gan_loss.penalties and not self.spectral_norm:
            raise ValueError("gp: given 0, which leaves the scores of this loss unbounded; take 10, or spectral_norm")

    @property
    def phases(self) -> Sequence[Phase]:
        return (
            Phase("discriminator", trains=("discriminator",), repeats=self.gan_loss.discriminator_steps),
            Phase("generator", trains=("generator",)),
        )

    @property
    def generator_phase(self) -> str:
        return "generator"

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        if self.augment and len(spec.shape) < 2:
            raise ValueError(f"augment: given {', '.join(self.augment)}, but samples are vectors; leave it out")
        discriminator = self.make_discriminator(backbone, spec)
        if self.spectral_norm:
            add_spectral_norm(discriminator)
        return {"generator": backbone.decoder(spec, self.latent), "discriminator": discriminator}

    def make_discriminator(self, backbone: Backbone, spec: Spec) -> nn.Module:
        """A network ``(x [B, *S], cond) -> [B, 1]``."""
        if self.conditioning != "auto" and not spec.cond:
            raise ValueError(f"conditioning: given {self.conditioning}, but this data has no labels; leave it out")
        others = [name for name, kind in spec.cond.items() if type(kind) not in PROJECTIONS]
        if self.conditioning == "projection" and others:
            raise ValueError(f"conditioning: given projection, but {others[0]} is no label or vector; take embedding")
        if self.conditioning == "embedding" or others or not spec.cond:
            return backbone.encoder(spec, (1,))
        return Projection(backbone.encoder(Spec(spec.shape), (NUM_FEATURES,)), spec)

    def noise_shape(self, spec: Spec) -> tuple[int, ...]:
        return self.latent

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        return {"discriminator": self.discriminator_loss, "generator": self.generator_loss}[phase](nets, batch)

    def discriminator_loss(self, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        """The discriminator's loss. All samples pass through it together, with or without a penalty."""
        penalty_factor = self.gan_loss.penalty_factor(batch.step)
        with torch.no_grad():
            fake = self.draw_fake(nets, batch)
        with differentiable_twice(penalty_factor > 0):
            # groups of samples: real, generated and, for the gradient penalty, interpolated between them
            x = [v.detach().requires_grad_(penalty_factor > 0) for v in (batch.x, fake)]
            scored = [self.apply_augmentations(batch, v) for v in x]
            if penalty_factor and self.gan_loss.gp:
                x.append(interpolate_samples(batch, scored[0], scored[1]))
                scored.append(x[2])
            scores = self.score(nets, batch, scored)
            losses = self.gan_loss.discriminator_loss(scores[0], scores[1])
            logs = {}
            for name, weight in self.gan_loss.penalties.items() if penalty_factor else ():
                group, function = PENALTIES[name]
                penalty = function(squared_gradient_norm(scores[group], x[group]))
                losses = losses + penalty_factor * weight * penalty
                logs[name] = penalty.mean()
        margin = (scores[0] - scores[1]).detach()
        logs |= {"accuracy": 0.5 * (margin.sign() + 1).mean(), "margin": margin.mean()}
        return Loss(losses, {**logs, "diversity": diversity(batch.x, fake, batch.cond)})

    def generator_loss(self, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        """The generator's loss."""
        fake = self.draw_fake(nets, batch)
        groups = (batch.x, fake) if self.gan_loss.uses_real else (fake,)
        scores = self.score(nets, batch, [self.apply_augmentations(batch, v) for v in groups])
        return Loss(self.gan_loss.generator_loss(scores[-1], scores[0]), {})

    def draw_fake(self, nets: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        """A generated sample for each condition of the batch, ``[B, *S]``."""
        return nets["generator"](batch.normal(*self.latent), batch.cond).to(batch.x)

    def apply_augmentations(self, batch: Batch, x: Tensor) -> Tensor:
        """``x`` ``[B, *S]`` after all augmentations."""
        for name in self.augment:
            x = AUGMENTATIONS[name](x, batch.uniform)
        return x

    def score(self, nets: Mapping[str, nn.Module], batch: Batch, groups: Sequence[Tensor]) -> Sequence[Tensor]:
        """Scores ``[B]`` of groups of samples ``[B, *S]``, each with the batch's conditions."""
        cond = {name: torch.cat([v] * len(groups)) for name, v in batch.cond.items()}
        return nets["discriminator"](torch.cat(list(groups)), cond).float().flatten().split(len(batch))

    def after_step(self, nets: Mapping[str, nn.Module], step: int) -> None:
        if self.spectral_norm:
            iterate_spectral_norm(nets["discriminator"], self.gan_loss.discriminator_steps)

    def warning(self, record: Mapping[str, Any]) -> str | None:
        spread, accuracy = record.get("discriminator/diversity"), record.get("discriminator/accuracy")
        if record["step"] < FIRST_WARNING or spread is None or accuracy is None:
            return None
        if spread < 0.3:
            return (
                f"mode collapse: generated samples are {spread:.2f} times as far apart as real ones; "
                "try --objective.gan-loss relativistic, --objective.gan-loss.r2 beside r1, or a lower --lr"
            )
        if spread > 3:
            return (
                f"divergence: generated samples are {spread:.1f} times as far apart as real ones; "
                "try a larger --objective.gan-loss.r1 or a lower --lr"
            )
        if accuracy > 0.99 and not self.gan_loss.is_unbounded:
            return (
                f"the discriminator wins: it is right about {100 * accuracy:.1f} % of pairs, so the generator learns "
                "little; try a larger --objective.gan-loss.r1, --objective.augment translation or a lower --lr"
            )
        return None

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        """A generator of one sample for each normal z."""
        if sampling is not None:
            raise ValueError("sampler: has no effect on GAN, which draws in one pass; leave it out")

        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            return nets["generator"](z, cond).to(z)

        return generate


@contextlib.contextmanager
def differentiable_twice(needed: bool) -> Iterator[None]:
    """A context for the gradient of a gradient, if ``needed``: without fused attention and compiled code, which have
    none.

    It works inside ``no_grad`` too, where the loop looks for the first layer that is not finite.
    """
    if not needed:
        yield
        return
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        yield


def interpolate_samples(batch: Batch, real: Tensor, fake: Tensor) -> Tensor:
    """A uniformly random point between each real and generated sample (Gulrajani et al. 2017, algorithm 1)."""
    return torch.lerp(fake.detach(), real.detach(), expand(batch.uniform(), fake)).requires_grad_()


class Projection(nn.Module):
    """``psi . phi(x) + sum_k <V_k y_k, phi(x)>`` (Miyato & Koyama 2018, eq. 3), ``(x [B, *S], cond) -> [B, 1]``."""

    def __init__(self, features: nn.Module, spec: Spec):
        super().__init__()
        self.features = features
        self.psi = nn.Linear(NUM_FEATURES, 1)
        self.names = list(spec.cond)
        self.v = nn.ModuleList(PROJECTIONS[type(kind)](kind) for kind in spec.cond.values())

    def forward(self, x: Tensor, cond: Cond = NO_COND) -> Tensor:
        phi = self.features(x, NO_COND)
        directions = []
        for name, v in zip(self.names, self.v, strict=True):
            value = cond[name]
            directions.append(v(value.flatten(1) if value.is_floating_point() else value))
        return self.psi(phi) + (torch.stack(directions).sum(0) * phi).sum(1, keepdim=True)


def project_label(kind: Label) -> nn.Module:
    """An embedding of the classes."""
    table = nn.Embedding(kind.num, NUM_FEATURES)
    nn.init.normal_(table.weight, std=NUM_FEATURES**-0.5)
    return table


def project_vector(kind: Vector) -> nn.Module:
    """A linear map of the flattened numbers."""
    return nn.Linear(math.prod(kind.shape), NUM_FEATURES, bias=False)


PROJECTIONS: Mapping[type, Callable[[Any], nn.Module]] = {Label: project_label, Vector: project_vector}


@torch.no_grad()
def diversity(real: Tensor, fake: Tensor, cond: Cond) -> Tensor:
    """The mean distance between two generated samples over that between two real ones.

    Both are of one class if the batch has such pairs. NaN if it has no pair at all.
    """
    pairs = ~torch.eye(len(real), dtype=torch.bool, device=real.device)
    alike = pairs
    for value in cond.values():
        if value.ndim == 1 and not value.is_floating_point():
            alike = alike & (value[:, None] == value)
    pairs = torch.where(alike.any(), alike, pairs)
    total = [(torch.cdist(v.flatten(1).float(), v.flatten(1).float()) * pairs).sum() for v in (fake, real)]
    return total[0] / total[1]
