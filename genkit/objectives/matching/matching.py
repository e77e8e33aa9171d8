"""Regression onto a path: the loss that flow matching, DDPM and EDM share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from genkit.core import (
    Backbone,
    Batch,
    Denoiser,
    Generator,
    Loss,
    Objective,
    Parametrization,
    Phase,
    Prediction,
    ProbabilityPath,
    Spec,
    expand,
    mean_flat,
    pool_weight,
)
from genkit.diffusion.parametrization import PARAMETRIZATIONS, Karras, NetDenoiser
from genkit.diffusion.paths import mix, times_at
from genkit.objectives.matching.sources import Normal, Source
from genkit.objectives.matching.times import LossHistory, TimeDistribution, Uniform
from genkit.objectives.matching.weights import SIGMA_DATA, Constant, EDMWeight, LossSpace, LossWeight

PredictionName = Literal["velocity", "eps", "x0", "v", "score", "karras"]
LOSS_SPACES: Mapping[str, Callable[[Prediction, Tensor, Tensor], Tensor]] = {  # (prediction, alpha, sigma) -> quantity
    "x0": lambda p, alpha, sigma: p.x0,
    "eps": lambda p, alpha, sigma: p.x1,
    "v": lambda p, alpha, sigma: alpha * p.x1 - sigma * p.x0,
    "velocity": lambda p, alpha, sigma: p.velocity,
}
# what each prediction is trained on if nothing else is asked for, with a weight that is 0 nowhere: eps and v their own
# quantity; x0 by v, which is SNR + 1 (Salimans & Ho 2022, section 4) and better than x0 (docs/log.md)
NATURAL_SPACES: Mapping[PredictionName, LossSpace] = {
    "velocity": "velocity",
    "eps": "eps",
    "x0": "v",
    "v": "v",
    "score": "eps",
    "karras": "v",
}
MAX_ERROR_SCALE = 20.0  # Li & He 2025 (section 4.3) keep 1 - t at 0.05 or more where they divide by it


class PathSample(NamedTuple):
    """Points ``x = alpha(t) x0 + sigma(t) x1``, ``[B, *S]``, at times ``t`` ``[B]``."""

    x: Tensor
    t: Tensor
    x0: Tensor
    x1: Tensor
    raw_t: Tensor | None = None
    """loss-aware times before :meth:`Matching.quantize_times`"""
    place_weight: Tensor | None = None
    """weight of each place of a sample in the loss, ``[B, 1, ...]`` on the sample's own grid"""


class Matching(Objective):
    """One network ``net``, one phase: predict an end of the path through ``x = alpha(t) x0 + sigma(t) x1``.

    A subclass provides the attributes below, as dataclass fields, class attributes or properties, whichever suits it.
    The space in which the squared error is taken is a choice apart from the prediction (Li & He 2025, table 1).
    """

    path: ProbabilityPath
    """the path between data and noise"""
    prediction: PredictionName = "velocity"
    """what the network predicts"""
    loss_space: LossSpace | None
    """the quantity whose squared error is minimised; None: :meth:`space`"""
    loss_weight: LossWeight = Constant()
    """weight of each time in the loss, besides what ``loss_space`` implies"""
    sigma_data: float | None = None
    """standard deviation of the data, for the prediction karras and the weight edm; None: measured when a run begins"""
    time_distribution: TimeDistribution = Uniform()
    """how training times are drawn"""
    source: Source = Normal()
    """where the path starts"""
    cond_dropout: float
    """probability of training a sample without its conditions"""
    cond_dropout_each: float = 0.0
    """probability of dropping each condition independently"""

    open_settings: ClassVar[tuple[str, ...]] = ("loss_space", "sigma_data")
    sampler: ClassVar[str | None] = "heun"
    likelihood_method: ClassVar[str | None] = "ode"

    @property
    def space(self) -> LossSpace:
        """The space of the loss: ``loss_space``, or else that of the loss weight, or else :attr:`natural_space`."""
        return self.loss_space or self.loss_weight.space or self.natural_space

    @property
    def natural_space(self) -> LossSpace:
        """The space that suits the prediction."""
        return NATURAL_SPACES[self.prediction]

    @property
    def parametrization(self) -> Parametrization:
        """What the network's input, output and regression target mean."""
        if self.prediction == "karras":
            return Karras(self.sigma_data or SIGMA_DATA)
        return PARAMETRIZATIONS[self.prediction]()

    @property
    def uses_sigma_data(self) -> bool:
        """Whether the standard deviation of the data matters."""
        weight = self.loss_weight
        return self.prediction == "karras" or (isinstance(weight, EDMWeight) and weight.sigma_data is None)

    def refuse_sigma_data(self) -> None:
        """``ValueError`` for a standard deviation of the data that has no effect, or for two that differ."""
        if self.sigma_data is not None and not self.uses_sigma_data:
            raise ValueError(
                f"sigma_data: given {self.sigma_data}, which has no effect on prediction {self.prediction} without the "
                "loss weight edm; leave it out"
            )
        std = self.loss_weight.sigma_data if isinstance(self.loss_weight, EDMWeight) else None
        if self.prediction == "karras" and std is not None and std != (self.sigma_data or SIGMA_DATA):
            raise ValueError(
                f"loss_weight.sigma_data: given {std}, but the prediction karras has "
                f"{self.sigma_data or SIGMA_DATA}; leave it out, or give sigma_data the same"
            )

    @property
    def is_diffusion(self) -> bool:
        """Whether x1 is the standard normal, drawn independently of x0.

        Then ``E[x1 | x]`` is a multiple of the score, and there are an SDE, a variational bound and guidance by Bayes'
        rule. Otherwise only the ODE is right.
        """
        return self.source.is_normal

    @property
    def knows_null(self) -> bool:
        """Whether conditions are dropped in training, so that a prediction without them means something."""
        return self.cond_dropout > 0 or self.cond_dropout_each > 0

    @property
    def weighs_places(self) -> bool:
        return True

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("denoise", trains=("net",)),)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        history = {"history": LossHistory()} if self.time_distribution.loss_aware else {}
        return {"net": backbone.denoiser(spec), **history}

    # ------------------------------------------------------------------------------------------------- one sample
    def sample_times(self, batch: Batch) -> Tensor:
        """Times ``[B]`` in (0, 1]."""
        return self.time_distribution.sample(batch, self.path)

    def quantize_times(self, t: Tensor) -> Tensor:
        """Loss-aware times ``[B]`` as the objective trains on them; those of discrete objectives are rounded up."""
        return t

    def endpoints(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        """The ends ``(x0, x1)`` of each sample's path, each ``[B, *S]``."""
        return batch.x, batch.normal()

    def sample_path(self, batch: Batch, nets: Mapping[str, nn.Module]) -> PathSample:
        """A random point of each sample's path."""
        raw_t = history_of(nets).sample(batch) if self.time_distribution.loss_aware else None
        t = self.sample_times(batch) if raw_t is None else self.quantize_times(raw_t)
        x0, x1 = self.endpoints(batch, t)
        weight = None if batch.place_weight is None else pool_weight(batch.place_weight, x0)
        return PathSample(mix(self.path, x0, x1, t), t, x0, x1, raw_t, weight)

    # --------------------------------------------------------------------------------------------------- its loss
    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        sample = self.sample_path(batch, nets)
        out = self.network_output(nets["net"], sample, batch)
        return Loss(self.weighted(nets, sample, self.squared_error(sample, out)), {})

    def validate(self, nets: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        # an empty history draws uniform times: the same ones at every step
        history = {"history": LossHistory().to(batch.x.device)} if self.time_distribution.loss_aware else {}
        return super().validate({**nets, **history}, batch)

    def level_errors(self, nets: Mapping[str, nn.Module], batch: Batch, levels: Sequence[float]) -> Tensor:
        # one draw of the noise for all levels of a sample, so that their differences are those of the levels
        x0, x1 = self.endpoints(batch, batch.uniform())
        denoise, errors = self.denoiser(nets["net"]), []
        for t in times_at(self.path, torch.tensor(levels)).to(x0):
            times = self.quantize_times(t.expand(len(x0)))
            predicted = denoise(mix(self.path, x0, x1, times), times, batch.cond).velocity
            errors.append(mean_flat((predicted.float() - (x1 - x0)) ** 2))
        return torch.stack(errors)

    def network_output(self, net: nn.Module, sample: PathSample, batch: Batch) -> Tensor:
        """What the network predicts at the sampled points, with some conditions dropped."""
        x_in, label = self.parametrization.inputs(self.path, sample.x, sample.t)
        return net(x_in, label, batch.drop(self.cond_dropout, self.cond_dropout_each)).float()

    def squared_error(self, sample: PathSample, out: Tensor) -> Tensor:
        """The mean squared error in the loss space ``[B]``, times ``loss_weight`` and the weight of each place."""
        error = out - self.parametrization.target(self.path, sample.x0, sample.x1, sample.t)
        squared = (self.error_scale(sample.t, sample.x) * error) ** 2
        return mean_flat(squared if sample.place_weight is None else sample.place_weight * squared)

    def preservation_loss(
        self, nets: Mapping[str, nn.Module], batch: Batch, original: Callable[[], AbstractContextManager[Any]]
    ) -> Tensor:
        """The squared distance ``[B]``, in the loss space and with its weights, between what the network predicts and
        what it predicts in the context ``original()``, at new points of the samples' paths."""
        sample = self.sample_path(batch, nets)
        x_in, label = self.parametrization.inputs(self.path, sample.x, sample.t)
        with torch.no_grad(), original():
            target = nets["net"](x_in, label, batch.cond).float()
        error = nets["net"](x_in, label, batch.cond).float() - target
        return mean_flat((self.error_scale(sample.t, sample.x) * error[:, : sample.x.shape[1]]) ** 2)

    def error_scale(self, t: Tensor, like: Tensor) -> Tensor:
        """The factor from an error of the network's output to a weighted error in the loss space, ``[B, 1, ...]``.

        Every parametrisation is affine in the output, so its linear part is its prediction from output 1 at x = 0. The
        weight joins before the bound MAX_ERROR_SCALE: a small weight may balance a large linear part. The bound is for
        divisions by a small alpha or sigma, so it grows with the score's own ``1 / sigma``.
        """
        one, parametrization = torch.ones_like(expand(t, like)), self.parametrization
        alpha, sigma = expand(self.path.alpha(t), like), expand(self.path.sigma(t), like)
        linear = parametrization.predict(self.path, torch.zeros_like(one), t, one)
        weight = self.loss_weight
        if isinstance(weight, EDMWeight) and weight.sigma_data is None:
            weight = EDMWeight(self.sigma_data)
        scale = weight(alpha, sigma).sqrt() * LOSS_SPACES[self.space](linear, alpha, sigma)
        bound = MAX_ERROR_SCALE * one
        if parametrization.predicts_noise:  # in noise as large as the output: 1 / sigma for the score
            bound = bound / parametrization.target(self.path, torch.zeros_like(one), one, t).abs()
        return torch.clamp(scale, -bound, bound)

    def weighted(self, nets: Mapping[str, nn.Module], sample: PathSample, losses: Tensor) -> Tensor:
        """Losses ``[B]`` times :meth:`importance_weight`; the history of loss-aware times records them."""
        if sample.raw_t is not None and torch.is_grad_enabled():
            history_of(nets).record(sample.raw_t, losses.detach())
        return self.importance_weight(nets, sample) * losses

    def importance_weight(self, nets: Mapping[str, nn.Module], sample: PathSample) -> Tensor:
        """One over the density of loss-aware times, so that the mean loss is that of uniform times; else 1. ``[B]``."""
        if sample.raw_t is None:
            return torch.ones_like(sample.t)
        return history_of(nets).weight(sample.raw_t)

    def after_step(self, nets: Mapping[str, nn.Module], step: int) -> None:
        if self.time_distribution.loss_aware:
            history_of(nets).update()

    def decide(self, data_std: Callable[[], float], data_radius: Callable[[], float] = lambda: math.inf) -> Matching:
        decided: dict[str, Any] = {} if self.loss_space else {"loss_space": self.space}
        is_field = any(f.name == "sigma_data" for f in dataclasses.fields(cast(Any, self)))
        if is_field and self.uses_sigma_data and self.sigma_data is None:
            decided["sigma_data"] = data_std() or SIGMA_DATA
        return dataclasses.replace(cast(Any, self), **decided) if decided else self

    def notes(self) -> Sequence[str]:
        """The measured ``sigma_data``, and whether the loss has weight 0 where the path is pure noise."""
        notes = [f"note     sigma_data is {self.sigma_data:g}"] if self.uses_sigma_data and self.sigma_data else []
        one = torch.ones(1, dtype=torch.float64)
        if float(self.path.alpha(one)) == 0 and float(self.error_scale(one, one)) == 0:
            notes.append(
                f"note     the loss of {self.space} has weight 0 at t = 1, where the path is pure noise, so that the "
                f"first step of sampling is never learned; take --objective.loss-space {self.natural_space}"
            )
        return notes

    # -------------------------------------------------------------------------------------------------- its model
    def denoiser(self, net: nn.Module) -> Denoiser:
        """The denoiser of a trained network."""
        return NetDenoiser(net, self.path, self.parametrization)

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        if sampling is None:
            raise ValueError(f"{type(self).__name__} needs a sampler to draw with, say bind('heun', 20)")
        return sampling(self.denoiser(nets["net"]))


def bound_velocity_error(parametrization: Parametrization, path: ProbabilityPath, t: Tensor, like: Tensor) -> Tensor:
    """The factor ``[B, 1, ...]`` that keeps the network's share of an error of the velocity within MAX_ERROR_SCALE.

    A prediction of the data is divided by the noise to give a velocity, which is infinite at t = 0.
    """
    return (MAX_ERROR_SCALE / velocity_scale(parametrization, path, t, like)).clamp(max=1)


def velocity_scale(parametrization: Parametrization, path: ProbabilityPath, t: Tensor, like: Tensor) -> Tensor:
    """How far the velocity in the chart moves with the network's output, ``[B, 1, ...]``."""
    one = torch.ones_like(expand(t, like))
    return parametrization.predict(path, torch.zeros_like(one), t, one).velocity.abs()


def history_of(nets: Mapping[str, nn.Module]) -> LossHistory:
    """The loss history among the networks of an objective with loss-aware times."""
    return cast(LossHistory, nets["history"])
