"""Generative adversarial networks: a decoder that draws in one pass, and an encoder that judges it."""

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
from genkit.objectives.adversarial.augment import AUGMENTS, AugmentName
from genkit.objectives.adversarial.games import PENALTIES, Game, Relativistic, bound, power_iteration, slopes
from genkit.objectives.autoencoders.autoencoder import Latent

FEATURES = (
    128  # of a sample, that a condition is projected on: as many as the last layer of Miyato & Koyama's for 32x32
)
SETTLED = 500  # steps after which an even game is expected; before, the discriminator has it easy


@dataclass(frozen=True)
class GAN(Objective):
    """A ``generator`` against a ``discriminator`` (Goodfellow et al. 2014), in the ``game`` of your choice.

    The log has ``accuracy``, how often a real sample scores above a drawn one (0.5: an even game), ``margin``, by how
    much (for wasserstein: its estimate of W1), and ``diversity``, the mean distance between drawn samples of a class
    over that between real ones: near 0 all are the same, far above 1 they scatter.
    """

    sampler: ClassVar[str | None] = None
    default_settings: ClassVar[Mapping[str, Any]] = {"betas": (0.0, 0.99), "warmup": 0}

    game: Game = field(default_factory=Relativistic, metadata={"table": "genkit.objectives.adversarial.games:GAMES"})
    """relativistic (R3GAN), non-saturating, wasserstein, hinge or minimax, with their penalties"""
    latent: Latent = (64,)
    """z: D for a vector, or C h w for a map that fits the backbone"""
    condition: Literal["auto", "projection", "embedding"] = "auto"
    """how the discriminator sees the condition: as a direction of its features (Miyato & Koyama 2018, eq. 3), or inside
    its blocks (CGAN, Mirza & Osindero 2014); auto: projection, but embedding of pictures and tokens"""
    spectral: bool = False
    """keep the spectral norm of the discriminator's weights at 1 or less (Miyato et al. 2018)"""
    augment: tuple[AugmentName, ...] = ()
    """what both sides' samples go through before they are judged (DiffAugment, Zhao et al. 2020): for little data"""

    def __post_init__(self) -> None:
        if not self.latent or min(self.latent) < 1:
            raise ValueError(f"latent: given {self.latent}; needs (D,) for a vector or (C, h, w) for a map, each >= 1")
        if self.game.unbounded and not self.game.penalties and not self.spectral:
            raise ValueError("gp: given 0, which leaves this game's scores without a bound; take 10, or spectral")

    @property
    def phases(self) -> Sequence[Phase]:
        return (
            Phase("discriminator", trains=("discriminator",), repeats=self.game.critic_steps),
            Phase("generator", trains=("generator",)),
        )

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        if self.augment and len(spec.shape) < 2:
            raise ValueError(f"augment: given {', '.join(self.augment)}, but samples are vectors; leave it out")
        discriminator = self.judge_of(backbone, spec)
        if self.spectral:
            bound(discriminator)
        return {"generator": backbone.decoder(spec, self.latent), "discriminator": discriminator}

    def judge_of(self, backbone: Backbone, spec: Spec) -> nn.Module:
        """A network ``(x [B, *S], cond) -> [B, 1]``."""
        if self.condition != "auto" and not spec.cond:
            raise ValueError(f"condition: given {self.condition}, but this data has no labels; leave it out")
        others = [name for name, kind in spec.cond.items() if type(kind) not in PROJECTED]
        if self.condition == "projection" and others:
            raise ValueError(f"condition: given projection, but {others[0]} is no label or vector; take embedding")
        if self.condition == "embedding" or others or not spec.cond:
            return backbone.encoder(spec, (1,))
        return Projection(backbone.encoder(Spec(spec.shape), (FEATURES,)), spec)

    def noise_shape(self, spec: Spec) -> tuple[int, ...]:
        return self.latent

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        return {"discriminator": self.judge, "generator": self.forge}[phase](nets, batch)

    def judge(self, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        """The discriminator's loss. All samples pass it together, whatever is asked of their gradients."""
        game, weight = self.game, self.game.due(batch.step)
        with torch.no_grad():
            fake = self.draw(nets, batch)
        with differentiable_twice(weight > 0):
            x = [v.detach().requires_grad_(weight > 0) for v in (batch.x, fake)]
            seen = [self.change(batch, v) for v in x]
            if weight and game.gp:
                x.append(between(batch, seen[0], seen[1]))
                seen.append(x[2])
            scores = self.score(nets, batch, seen)
            each, logs = game.critic(scores[0], scores[1]), {}
            for name, size in game.penalties.items() if weight else ():
                group, penalty = PENALTIES[name]
                found = penalty(slopes(scores[group], x[group]))
                each, logs[name] = each + weight * size * found, found.mean()
        margin = (scores[0] - scores[1]).detach()
        logs |= {"accuracy": 0.5 * (margin.sign() + 1).mean(), "margin": margin.mean()}
        return Loss(each, {**logs, "diversity": diversity(batch.x, fake, batch.cond)})

    def forge(self, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        """The generator's loss."""
        fake = self.draw(nets, batch)
        seen = [self.change(batch, v) for v in ((batch.x, fake) if self.game.against_real else (fake,))]
        scores = self.score(nets, batch, seen)
        return Loss(self.game.generator(scores[-1], scores[0]), {})

    def draw(self, nets: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        """A sample for each condition of the batch."""
        return nets["generator"](batch.normal(*self.latent), batch.cond).to(batch.x)

    def change(self, batch: Batch, x: Tensor) -> Tensor:
        for name in self.augment:
            x = AUGMENTS[name](x, batch.uniform)
        return x

    def score(self, nets: Mapping[str, nn.Module], batch: Batch, groups: Sequence[Tensor]) -> Sequence[Tensor]:
        """Scores ``[B]`` of some groups of samples that have the batch's conditions."""
        cond = {name: torch.cat([v] * len(groups)) for name, v in batch.cond.items()}
        return nets["discriminator"](torch.cat(list(groups)), cond).float().flatten().split(len(batch))

    def after_step(self, nets: Mapping[str, nn.Module], step: int) -> None:
        if self.spectral:
            power_iteration(nets["discriminator"], self.game.critic_steps)

    def warning(self, record: Mapping[str, Any]) -> str | None:
        spread, right = record["discriminator/diversity"], record["discriminator/accuracy"]
        if record["step"] < SETTLED or spread is None or right is None:
            return None
        if spread < 0.3:
            return (
                f"mode collapse: drawn samples are {spread:.2f} times as far apart as real ones; "
                "try --objective.game relativistic, --objective.game.r2 beside r1, or a lower --lr"
            )
        if spread > 3:
            return (
                f"divergence: drawn samples are {spread:.1f} times as far apart as real ones; "
                "try a larger --objective.game.r1 or a lower --lr"
            )
        if right > 0.99 and not self.game.unbounded:
            return (
                f"the discriminator wins: it is right about {100 * right:.1f} % of pairs, and teaches little; "
                "try a larger --objective.game.r1, --objective.augment translation or a lower --lr"
            )
        return None

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        """A sample of each normal z."""
        if sampling is not None:
            raise ValueError("sampler: has no effect on GAN, which draws in one pass; leave it out")

        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            return nets["generator"](z, cond).to(z)

        return generate


@contextlib.contextmanager
def differentiable_twice(needed: bool) -> Iterator[None]:
    """Where a penalty asks for a gradient of a gradient, which neither fused attention nor compiled code has; also
    inside ``no_grad``, where the loop looks for the first bad layer."""
    if not needed:
        yield
        return
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        yield


def between(batch: Batch, real: Tensor, fake: Tensor) -> Tensor:
    """A point between each real and drawn sample, uniformly (Gulrajani et al. 2017, algorithm 1)."""
    return torch.lerp(fake.detach(), real.detach(), expand(batch.uniform(), fake)).requires_grad_()


class Projection(nn.Module):
    """``psi . phi(x) + sum_k <V_k y_k, phi(x)>`` (Miyato & Koyama 2018, eq. 3), ``(x [B, *S], cond) -> [B, 1]``."""

    def __init__(self, features: nn.Module, spec: Spec):
        super().__init__()
        self.features = features
        self.psi = nn.Linear(FEATURES, 1)
        self.names = list(spec.cond)
        self.v = nn.ModuleList(PROJECTED[type(kind)](kind) for kind in spec.cond.values())

    def forward(self, x: Tensor, cond: Cond = NO_COND) -> Tensor:
        phi = self.features(x, NO_COND)
        towards = [v(cond[name].flatten(1) if cond[name].is_floating_point() else cond[name])
                   for name, v in zip(self.names, self.v, strict=True)]  # fmt: skip
        return self.psi(phi) + (torch.stack(towards).sum(0) * phi).sum(1, keepdim=True)


def table_of(kind: Label) -> nn.Module:
    table = nn.Embedding(kind.num, FEATURES)
    nn.init.normal_(table.weight, std=FEATURES**-0.5)
    return table


def map_of(kind: Vector) -> nn.Module:
    return nn.Linear(math.prod(kind.shape), FEATURES, bias=False)


PROJECTED: Mapping[type, Callable[[Any], nn.Module]] = {Label: table_of, Vector: map_of}


@torch.no_grad()
def diversity(real: Tensor, fake: Tensor, cond: Cond) -> Tensor:
    """The mean distance between two drawn samples over that between two real ones; both of a class, where the batch
    has such pairs. Not a number where it has no pair at all."""
    pairs = ~torch.eye(len(real), dtype=torch.bool, device=real.device)
    alike = pairs
    for value in cond.values():
        if value.ndim == 1 and not value.is_floating_point():
            alike = alike & (value[:, None] == value)
    pairs = torch.where(alike.any(), alike, pairs)
    apart = [(torch.cdist(v.flatten(1).float(), v.flatten(1).float()) * pairs).sum() for v in (fake, real)]
    return apart[0] / apart[1]
