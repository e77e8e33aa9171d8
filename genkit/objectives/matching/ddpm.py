"""Denoising diffusion (Ho et al. 2020), sampled by DDIM or ancestrally."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from genkit.core import (
    Backbone,
    Batch,
    Cond,
    Denoiser,
    Loss,
    Parametrization,
    Prediction,
    ProbabilityPath,
    Spec,
    expand,
    mean_flat,
)
from genkit.diffusion.parametrization import PARAMETRIZATIONS, refuse_singular
from genkit.diffusion.paths import VP
from genkit.diffusion.posterior import Learned, log_variance, reverse_step
from genkit.objectives.matching.matching import Matching, Place, PredictionName
from genkit.objectives.matching.times import LOSS_AWARE, TIMES, TimesName, refuse_times
from genkit.objectives.matching.weights import Constant, Space, Weight, refuse_weight


@dataclass(frozen=True)
class DDPM(Matching):
    """``L_simple`` (Ho et al. 2020, eq. 14): predict the noise at one of T discrete times, t = k / T."""

    timesteps: Annotated[int, Ge(1)] = 1000
    """T, the number of discrete times"""
    betas: Literal["linear", "scaled-linear", "cosine"] = "linear"
    """the noise schedule; scaled-linear has linear square roots, as in latent diffusion (Rombach et al. 2022), cosine
    is Nichol & Dhariwal 2021, eq. 17"""
    beta_min: Annotated[float, Gt(0), Lt(1)] = 1e-4
    """first beta of the linear schedules"""
    beta_max: Annotated[float, Gt(0), Lt(1)] = 0.02
    """last beta of the linear schedules"""
    zero_snr: bool = False
    """rescale the schedule to end in pure noise (Lin et al. 2024, algorithm 1); needs prediction v, x0 or velocity"""
    prediction: PredictionName = "eps"
    """what the network puts out"""
    space: Space = "eps"
    """where the squared error is taken"""
    weight: Weight = field(default_factory=Constant, metadata={"table": "genkit.objectives.matching.weights:WEIGHTS"})
    """how much each time counts"""
    times: TimesName = "uniform"
    """how times are drawn; all but uniform are rounded up to a discrete one"""
    t_mean: float = 0.0
    """location of logit-normal times, or of log(sigma / alpha) for log-normal ones; above 0 biases to noise"""
    t_std: Annotated[float, Gt(0)] = 1.0
    """scale of the same"""
    learn_variance: bool = False
    """also learn the variance of the reverse steps, by the hybrid loss (Nichol & Dhariwal 2021, eq. 16)"""
    bound_weight: Annotated[float, Gt(0)] = 1e-3
    """how much the variational bound, in nats a dimension, counts beside the simple loss in the hybrid one"""
    drop: Annotated[float, Ge(0), Lt(1)] = 0.1
    """probability that a sample is trained without its conditions, for classifier-free guidance"""
    drop_each: Annotated[float, Ge(0), Lt(1)] = 0.0
    """probability that it is trained without one condition, for each of several, so that any of them may be left out"""

    def __post_init__(self) -> None:
        refuse_singular(self.parametrization, self.along)
        refuse_times(self.times, self.along, self.t_mean, self.t_std)
        refuse_weight(self.weight, self.space)
        if self.learn_variance and self.times not in ("uniform", LOSS_AWARE):
            raise ValueError(
                f"times: given {self.times}; the bound of learn_variance is a sum over all: allowed: uniform, "
                f"{LOSS_AWARE}"
            )
        if self.bound_weight != 1e-3 and not self.learn_variance:
            raise ValueError(f"bound_weight: given {self.bound_weight}, but without learn_variance there is no bound")

    @property
    def along(self) -> ProbabilityPath:
        return VP(self.betas, self.timesteps, self.beta_min, self.beta_max, self.zero_snr)

    @property
    def parametrization(self) -> Parametrization:
        return PARAMETRIZATIONS[self.prediction]()

    @property
    def loss_space(self) -> Space:
        return self.space

    @property
    def loss_weight(self) -> Weight:
        return self.weight

    @property
    def loss_aware(self) -> bool:
        return self.times == LOSS_AWARE

    def on_grid(self, t: Tensor) -> Tensor:
        return (t * self.timesteps).ceil().clamp(1, self.timesteps) / self.timesteps

    def draw_times(self, batch: Batch) -> Tensor:
        return DRAWN.get(self.times, rounded_up)(self, batch)

    # ---- learned variance: the network's output has twice the channels, the second half being w in [-1, 1] or so
    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        if not self.learn_variance:
            return super().networks(backbone, spec)
        nets = super().networks(backbone, Spec((2 * spec.shape[0], *spec.shape[1:]), spec.cond))
        return nets | {"net": Twofold(nets["net"])}

    def denoiser(self, net: nn.Module) -> Denoiser:
        return (
            super().denoiser(net) if not self.learn_variance else LearnedDenoiser(net, self.along, self.parametrization)
        )

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        """``L_simple``; with a learned variance ``L_simple + bound_weight L_vlb`` (Nichol & Dhariwal 2021, eq. 16)."""
        if not self.learn_variance:
            return super().loss(phase, nets, batch)
        at = self.place(batch, nets)
        out, w = self.answer(nets["net"], at, batch).chunk(2, 1)
        simple, bound = self.squared_error(at, out), self.timesteps * self.bound(at, out.detach(), w)
        scale = self.scale(nets, at)
        logs = {"simple": (scale * simple).mean(), "bound": (scale * bound).mean()}
        return Loss(self.weighed(nets, at, simple + self.bound_weight * bound), logs)

    def bound(self, at: Place, out: Tensor, w: Tensor) -> Tensor:
        """``L_{k-1}``, the term of the variational bound at k = T t, in nats a dimension (Ho et al. 2020, eq. 5).

        At k = 1 it is minus the log density of x0, not the probability of one of 256 levels: not all data are pixels.
        """
        guess = self.parametrization.predict(self.along, at.x, at.t, out).x0
        s = (at.t * self.timesteps - 1).round().clamp(min=0) / self.timesteps
        _, posterior, pull = (expand(v, at.x) for v in reverse_step(self.along, at.t, s))
        log_var = log_variance(self.along, at.t, s, w)
        away = (pull * (at.x0 - guess)).square() / log_var.exp()
        kl = (log_var - posterior.clamp(min=1e-20).log() + posterior / log_var.exp() + away - 1) / 2
        density = (math.log(2 * math.pi) + log_var + away) / 2
        return mean_flat(torch.where(expand(s, at.x) > 0, kl, density))


class Twofold(nn.Module):
    """A denoiser of ``[B, 2C, ...]`` as a network from ``[B, C, ...]`` to ``[B, 2C, ...]``: it sees x twice."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
        return self.inner(torch.cat([x, x], 1), label, cond)


@dataclass(frozen=True)
class LearnedDenoiser:
    """The denoiser of the first half of the channels; the second is the width of its predictions."""

    net: nn.Module
    path: ProbabilityPath
    parametrization: Parametrization

    def both(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Tensor]:
        x_in, label = self.parametrization.inputs(self.path, x, t)
        out, w = self.net(x_in, label, cond).chunk(2, 1)
        return self.parametrization.predict(self.path, x, t, out), w

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Learned:
        return Learned.of(*self.both(x, t, cond))


def rounded_up(ddpm: DDPM, batch: Batch) -> Tensor:
    return ddpm.on_grid(TIMES[ddpm.times](batch, ddpm.along, ddpm.t_mean, ddpm.t_std))


def uniform(ddpm: DDPM, batch: Batch) -> Tensor:
    return (batch.uniform() * ddpm.timesteps).floor().clamp(max=ddpm.timesteps - 1).add(1) / ddpm.timesteps


DRAWN: Mapping[str, Callable[[DDPM, Batch], Tensor]] = {"uniform": uniform}
