"""Distribution matching distillation (Yin et al. 2024a, 2024b): a generator of few steps from a diffusion model.

The gradient of KL(generator || teacher) at a noisy sample is the difference of two scores: that of the teacher, and
that of the generator's own samples, which a further network, the fake score, learns along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from genkit.config import table
from genkit.config.numbers import Count, NonNegative, Positive
from genkit.core import (
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
    expand,
    mean_flat,
)
from genkit.diffusion.guidance import classifier_free
from genkit.diffusion.parametrization import NetDenoiser
from genkit.diffusion.paths import chart, end_time, mix, times_at
from genkit.objectives.distillation.student import Student, rows_of, same_times, starting_point, step_times
from genkit.objectives.matching.matching import Matching

LOW, HIGH = 0.02, 0.98  # of the path's chart times, at which the scores are compared (Yin et al. 2024a, appendix)
HALVINGS = 40  # of an interval of times, which are then right to float32
LEAST = 1e-8  # of the distance by which the gradient is divided


@dataclass(frozen=True)
class DMD(Student):
    """Distribution matching distillation, DMD2 (Yin et al. 2024b): the generator's samples follow the teacher's score.

    ``genkit train --init RUN --objective=dmd`` distils RUN into a generator ``net`` of ``steps`` steps. The network
    ``fake`` learns the score of its samples, ``fake_updates`` times for each of its own. A discriminator of noisy
    samples is optional (``gan_weight``); without one, only the conditions of the data are used. The log has ``gap``,
    the root mean square difference of the two predictions, which is 0 where the distributions agree.
    """

    of: Any = table("genkit.objectives:OBJECTIVES", "flow", kind="genkit.objectives.matching.matching:Matching")
    """objective of the model that is distilled; that of --init, unless it is given"""
    steps: Annotated[int, Ge(1), Le(8)] = 1
    """steps of the generator: it predicts the data, adds noise, and predicts again; it is trained on its own samples"""
    fake_updates: Count = 5
    """updates of the fake score, and of the discriminator, for each of the generator"""
    teacher_guidance: Annotated[float, Gt(0), Le(100)] = 1.0
    """scale of classifier-free guidance of the teacher, which becomes part of the generator"""
    gan_weight: NonNegative = 0.0
    """weight of a non-saturating GAN loss on noisy samples, beside the score difference; 0: no discriminator"""
    discriminator: Literal["network", "head"] = "network"
    """what scores the samples: a network of its own, or a head on the features of the fake score, which then learns
    both (Yin et al. 2024b, section 4.2)"""
    head_weight: Positive = 0.01
    """weight of the head's loss beside that of the fake score"""

    validation_metrics: ClassVar[Mapping[str, Direction]] = {}  # its losses are relative to a moving opponent
    starts_from: ClassVar[Mapping[str, str | None]] = {"teacher": "net", "fake": "net", "discriminator": None}

    def __post_init__(self) -> None:
        self.require_teacher()
        if not self.of.is_diffusion:
            raise ValueError(
                "of: given a flow whose source or coupling makes it no diffusion, so that it has no score; allowed: "
                "source normal and coupling independent"
            )
        self.require_null(self.teacher_guidance)
        if self.has_head and not self.gan_weight:
            raise ValueError(
                "discriminator: given head, which has no effect at gan_weight 0; try --objective.gan-weight 0.003"
            )
        if not self.has_head and self.head_weight != type(self).head_weight:
            raise ValueError("head_weight: has no effect without --objective.discriminator head; leave it out")

    @property
    def has_head(self) -> bool:
        """Whether the discriminator is a head on the fake score's features."""
        return self.discriminator == "head"

    @property
    def phases(self) -> Sequence[Phase]:
        trains = ("fake", "discriminator") if self.has_head else ("fake",)
        fake = Phase("fake", trains=trains, repeats=self.fake_updates)
        discriminator = Phase("discriminator", trains=("discriminator",), repeats=self.fake_updates)
        generator = Phase("generator", trains=("net",))
        return (fake, discriminator, generator) if self.gan_weight and not self.has_head else (fake, generator)

    @property
    def generator_phase(self) -> str:
        return "generator"

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        if self.teacher_guidance != 1 and not spec.cond:
            raise ValueError("teacher_guidance: these data have no conditions to guide by; use 1")
        nets = {name: self.new_network(backbone, spec) for name in ("net", "fake", "teacher")}
        for name in ("fake", "teacher"):
            nets[name].load_state_dict(nets["net"].state_dict())
        if not self.gan_weight:
            return nets
        head = make_head(nets["fake"], type(backbone).__name__) if self.has_head else backbone.encoder(spec, (1,))
        return {**nets, "discriminator": head}

    # -------------------------------------------------------------------------------------------------- the losses
    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        losses = {"fake": self.fake_loss, "discriminator": self.discriminator_loss, "generator": self.generator_loss}
        return losses[phase](nets, batch, self.dropped(batch))

    def fake_loss(self, nets: Mapping[str, nn.Module], batch: Batch, cond: Cond) -> Loss:
        """The teacher's own loss, on samples of the generator, and that of a head on the features."""
        with torch.no_grad():
            x = self.draw(nets["net"], batch, cond)
        objective = self.fake_objective
        loss = objective.loss(objective.phases[0].name, {"net": nets["fake"]}, replace(batch, x=x, cond=cond))
        if not self.has_head:
            return loss
        head = self.tell_apart(nets, batch, x, cond)
        return Loss(loss.per_sample + self.head_weight * head.per_sample, {**loss.logs, **head.logs})

    @property
    def fake_objective(self) -> Matching:
        """The objective of the fake score: the teacher's, with the conditions that the samples were drawn with."""
        names = {f.name for f in dataclasses.fields(self.of)}
        return replace(self.of, **{k: 0.0 for k in ("cond_dropout", "cond_dropout_each") if k in names})

    def generator_loss(self, nets: Mapping[str, nn.Module], batch: Batch, cond: Cond) -> Loss:
        """Half the squared distance to the samples moved by the score difference, whose gradient is that difference."""
        x = self.draw(nets["net"], batch, cond)
        z, t = self.add_noise(batch, x)
        with torch.no_grad():
            direction, gap = score_difference(x, z, t, cond, *self.denoisers(nets))
        losses = 0.5 * mean_flat((x - (x - direction).detach()).square())
        logs = {"gap": gap.square().mean().sqrt()}
        if self.gan_weight:
            adversarial = F.softplus(-self.score(nets, z, t, cond))
            losses = losses + self.gan_weight * adversarial
            logs["adversarial"] = adversarial.detach().mean()
        return Loss(losses, logs)

    def denoisers(self, nets: Mapping[str, nn.Module]) -> tuple[Denoiser, Denoiser]:
        """That of the data, guided, and that of the generator's samples."""
        guide = classifier_free(self.teacher_guidance)
        return guide(self.of.denoiser(nets["teacher"])), self.of.denoiser(nets["fake"])

    def discriminator_loss(self, nets: Mapping[str, nn.Module], batch: Batch, cond: Cond) -> Loss:
        """The cross-entropy of real samples and new ones of the generator."""
        with torch.no_grad():
            x = self.draw(nets["net"], batch, cond)
        return self.tell_apart(nets, batch, x, cond)

    def tell_apart(self, nets: Mapping[str, nn.Module], batch: Batch, x: Tensor, cond: Cond) -> Loss:
        """The cross-entropy of real and generated samples ``x``, with noise (Yin et al. 2024b, eq. 4)."""
        (fake, t), (real, s) = self.add_noise(batch, x), self.add_noise(batch, batch.x)
        both = {k: torch.cat([v, v]) for k, v in cond.items()}
        real_score, fake_score = self.score(nets, torch.cat([real, fake]), torch.cat([s, t]), both).chunk(2)
        accuracy = 0.5 * ((real_score - fake_score).detach().sign() + 1).mean()
        return Loss(F.softplus(-real_score) + F.softplus(fake_score), {"accuracy": accuracy})

    def score(self, nets: Mapping[str, nn.Module], z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The discriminator's score ``[B]`` of noisy samples; a network of its own sees them in the chart."""
        if self.has_head:
            denoise = cast(NetDenoiser, self.of.denoiser(nets["fake"]))
            return nets["discriminator"](denoise.features(z, t, cond)).float().flatten()
        scaled = z / expand(chart(self.path, t)[1], z)
        return nets["discriminator"](scaled, cond).float().flatten()

    def add_noise(self, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` at a random time of the path, uniform in the chart, and that time ``[B]``."""
        end = chart(self.path, torch.full_like(batch.uniform(), end_time(self.path)))[0]
        tau = end * (LOW + (HIGH - LOW) * batch.uniform())
        t = times_at(self.path, tau, HALVINGS).to(x.dtype)
        return mix(self.path, x, batch.normal(*x.shape[1:]), t), t

    @property
    def path(self) -> Any:
        """The path of the teacher's samplers."""
        return self.of.denoiser(nn.Identity()).path

    # -------------------------------------------------------------------------------------------------- its model
    def draw(self, net: nn.Module, batch: Batch, cond: Cond) -> Tensor:
        """A sample of each row after a random number of the generator's steps, with a gradient through the last."""
        denoise = self.of.denoiser(net)
        x, t = starting_point(denoise.path, batch.normal())
        if self.steps > 1:
            times = step_times(denoise.path, self.steps)
            with torch.no_grad():
                visited = [x]
                for now, following in zip(same_times(times[:-2], t), same_times(times[1:-1], t), strict=True):
                    clean = denoise(visited[-1], now, cond).x0
                    visited.append(mix(denoise.path, clean, batch.normal(), following))
            last = (batch.uniform() * self.steps).long()
            x, t = torch.stack(visited)[last, torch.arange(len(x), device=x.device)], rows_of(times, last, x)
        return denoise(x, t, cond).x0

    def draw_in_steps(self, denoise: Denoiser, nets: Mapping[str, nn.Module]) -> Generator:
        """The generator's steps: predict the data, and add noise for the next."""

        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            noise = noise or (lambda shape: torch.randn_like(z))
            x, t = starting_point(denoise.path, z)
            *further, _ = same_times(step_times(denoise.path, self.steps)[1:], t)
            for following in further:
                x, t = mix(denoise.path, denoise(x, t, cond).x0, noise(z.shape[1:]), following), following
            return denoise(x, t, cond).x0

        return generate


def make_head(net: nn.Module, family: str) -> nn.Module:
    """A head ``[B, D] -> [B, 1]`` on the features of ``net``. ``ValueError`` if it hands out none."""
    dim = getattr(net, "feature_dim", None)
    if dim is None:
        raise ValueError(f"discriminator: given head, but networks of {family} hand out no features; allowed: network")
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1))


def score_difference(
    x: Tensor, z: Tensor, t: Tensor, cond: Cond, real: Denoiser, fake: Denoiser
) -> tuple[Tensor, Tensor]:
    """The direction ``[B, *S]`` against which samples ``x`` move, from their noisy versions ``z`` at ``t``.

    It is ``fake.x0 - real.x0``, which is ``sigma^2 / alpha`` times the difference of the fake score and the real one,
    over the mean distance of ``real.x0`` from x, so that all noise levels count alike (Yin et al. 2024a, eq. 7 and 8).
    The undivided difference is returned too.
    """
    good = real(z, t, cond).x0
    gap = fake(z, t, cond).x0 - good
    return gap / expand(mean_flat((x - good).abs()).clamp(min=LEAST), x), gap
