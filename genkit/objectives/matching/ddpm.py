"""Denoising diffusion (Ho et al. 2020), sampled by DDIM or ancestrally."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn

from genkit.config.numbers import Count, Fraction, Positive
from genkit.core import (
    Backbone,
    Batch,
    Cond,
    Denoiser,
    Loss,
    Prediction,
    ProbabilityPath,
    Spec,
    expand,
    mean_flat,
)
from genkit.diffusion.parametrization import NetDenoiser, refuse_singular
from genkit.diffusion.paths import VP
from genkit.diffusion.posterior import LearnedVariance, log_variance, reverse_step
from genkit.objectives.matching.matching import Matching, PathSample, PredictionName
from genkit.objectives.matching.times import TimeDistribution, Uniform
from genkit.objectives.matching.weights import Constant, LossSpace, LossWeight, refuse_loss_weight


@dataclass(frozen=True)
class DDPM(Matching):
    """``L_simple`` (Ho et al. 2020, eq. 14): predict the noise at one of T discrete times, t = k / T."""

    timesteps: Count = 1000
    """T, the number of discrete times"""
    betas: Literal["linear", "scaled-linear", "cosine"] = "linear"
    """the noise schedule: linear; scaled-linear, whose square roots are linear, as in latent diffusion (Rombach et al.
    2022); or cosine (Nichol & Dhariwal 2021, eq. 17)"""
    beta_min: Annotated[float, Gt(0), Lt(1)] = 1e-4
    """first beta of the linear schedules"""
    beta_max: Annotated[float, Gt(0), Lt(1)] = 0.02
    """last beta of the linear schedules"""
    zero_snr: bool = False
    """rescale the schedule to end in pure noise (Lin et al. 2024, algorithm 1); needs prediction v, x0 or velocity"""
    prediction: PredictionName = "eps"
    """what the network predicts"""
    loss_space: LossSpace | None = None
    """the quantity whose squared error is minimised; None: that of the loss weight, else that of the prediction"""
    loss_weight: LossWeight = field(
        default_factory=Constant, metadata={"table": "genkit.objectives.matching.weights:LOSS_WEIGHTS"}
    )
    """weight of each time in the loss: constant, min-snr, p2 or edm"""
    sigma_data: Positive | None = None
    """standard deviation of the data, for the prediction karras and the weight edm; None: measured when a run begins"""
    time_distribution: TimeDistribution = field(
        default_factory=Uniform, metadata={"table": "genkit.objectives.matching.times:TIME_DISTRIBUTIONS"}
    )
    """how training times are drawn; all but uniform are rounded up to a discrete time"""
    learn_variance: bool = False
    """also learn the variance of the reverse steps, by the hybrid loss (Nichol & Dhariwal 2021, eq. 16)"""
    vlb_weight: Positive = 1e-3
    """weight of the variational bound, in nats a dimension, in the hybrid loss"""
    cond_dropout: Fraction = 0.1
    """probability of training a sample without its conditions, for classifier-free guidance"""
    cond_dropout_each: Fraction = 0.0
    """probability of dropping each condition independently, so that any subset can be omitted when sampling"""

    def __post_init__(self) -> None:
        refuse_singular(self.parametrization, self.path)
        self.time_distribution.check(self.path)
        refuse_loss_weight(self.loss_weight, self.space)
        self.refuse_sigma_data()
        uniform = isinstance(self.time_distribution, Uniform) or self.time_distribution.loss_aware
        if self.learn_variance and not uniform:
            raise ValueError(
                f"time_distribution: given {type(self.time_distribution).__name__}; the bound of learn_variance is a "
                "sum over all times: allowed: uniform, loss-aware"
            )
        if self.vlb_weight != 1e-3 and not self.learn_variance:
            raise ValueError(f"vlb_weight: given {self.vlb_weight}, but without learn_variance there is no bound")

    @property
    def path(self) -> ProbabilityPath:  # pyright: ignore[reportIncompatibleVariableOverride]
        return VP(self.betas, self.timesteps, self.beta_min, self.beta_max, self.zero_snr)

    def quantize_times(self, t: Tensor) -> Tensor:
        return (t * self.timesteps).ceil().clamp(1, self.timesteps) / self.timesteps

    def sample_times(self, batch: Batch) -> Tensor:
        if isinstance(self.time_distribution, Uniform):
            k = (batch.uniform() * self.timesteps).floor().clamp(max=self.timesteps - 1) + 1
            return k / self.timesteps
        return self.quantize_times(super().sample_times(batch))

    # ---- learned variance: the network's output has twice the channels, the second half being w in [-1, 1] or so
    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        if not self.learn_variance:
            return super().networks(backbone, spec)
        nets = super().networks(backbone, Spec((2 * spec.shape[0], *spec.shape[1:]), spec.cond))
        return nets | {"net": DoubledOutput(nets["net"])}

    def denoiser(self, net: nn.Module) -> Denoiser:
        if not self.learn_variance:
            return super().denoiser(net)
        return LearnedVarianceDenoiser(net, self.path, self.parametrization)

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        """``L_simple``; with a learned variance ``L_simple + vlb_weight L_vlb`` (Nichol & Dhariwal 2021, eq. 16)."""
        if not self.learn_variance:
            return super().loss(phase, nets, batch)
        sample = self.sample_path(batch, nets)
        out, w = self.network_output(nets["net"], sample, batch).chunk(2, 1)
        simple = self.squared_error(sample, out)
        vlb = self.timesteps * self.vlb_term(sample, out.detach(), w)
        weight = self.importance_weight(nets, sample)
        logs = {"simple": (weight * simple).mean(), "vlb": (weight * vlb).mean()}
        return Loss(self.weighted(nets, sample, simple + self.vlb_weight * vlb), logs)

    def vlb_term(self, sample: PathSample, out: Tensor, w: Tensor) -> Tensor:
        """``L_{k-1}``, the variational bound's term at k = T t, in nats a dimension ``[B]`` (Ho et al. 2020, eq. 5).

        At k = 1 it is minus the log density of x0, not the probability of one of 256 levels: not all data are pixels.
        """
        x0_hat = self.parametrization.predict(self.path, sample.x, sample.t, out).x0
        s = (sample.t * self.timesteps - 1).round().clamp(min=0) / self.timesteps
        _, posterior, x0_factor = (expand(v, sample.x) for v in reverse_step(self.path, sample.t, s))
        log_var = log_variance(self.path, sample.t, s, w)
        distance = (x0_factor * (sample.x0 - x0_hat)).square() / log_var.exp()
        kl = (log_var - posterior.clamp(min=1e-20).log() + posterior / log_var.exp() + distance - 1) / 2
        neg_log_density = (math.log(2 * math.pi) + log_var + distance) / 2
        return mean_flat(torch.where(expand(s, sample.x) > 0, kl, neg_log_density))


class DoubledOutput(nn.Module):
    """A denoiser of ``[B, 2C, ...]`` as a network from ``[B, C, ...]`` to ``[B, 2C, ...]``, which sees x twice."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
        return self.inner(torch.cat([x, x], 1), label, cond)


class LearnedVarianceDenoiser(NetDenoiser):
    """The denoiser of the first half of a network's output channels, with the second half as learned variance."""

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Tensor]:
        """The ends of the path, and ``w`` ``[B, *S]``."""
        x_in, label = self.parametrization.inputs(self.path, x, t)
        out, w = self.net(x_in, label, cond).chunk(2, 1)
        return self.parametrization.predict(self.path, x, t, out), w

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> LearnedVariance:
        return LearnedVariance.of(*self.predict(x, t, cond))
