"""Regression onto a path: the loss that flow matching, DDPM and EDM share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from genkit.core import (
    Backbones,
    Batch,
    Denoiser,
    Generator,
    Loss,
    Objective,
    Parametrization,
    Path,
    Phase,
    Prediction,
    Spec,
    expand,
    mean_flat,
)
from genkit.objectives.sources import Normal, Source
from genkit.objectives.weights import Constant, Space, Weight
from genkit.parametrize import NetDenoiser
from genkit.paths import mix

PredictionName = Literal["velocity", "eps", "x0", "v", "score", "karras"]
SPACES: Mapping[str, Callable[[Prediction], Tensor]] = {
    "x0": lambda p: p.x0,
    "eps": lambda p: p.x1,
    "velocity": lambda p: p.x1 - p.x0,
}
MAX_GAIN = 20.0  # Li & He 2025 (section 4.3) keep 1 - t at 0.05 or more where they divide by it


class Place(NamedTuple):
    """Points ``x = alpha(t) x0 + sigma(t) x1``, ``[B, *S]`` at times ``[B]``."""

    x: Tensor
    t: Tensor
    x0: Tensor
    x1: Tensor


class Matching(Objective):
    """One network ``net``, one phase: predict an endpoint of the path through ``x = alpha(t) x0 + sigma(t) x1``.

    A subclass says on which path, what the network predicts, in which space the squared error is taken (a choice apart
    from the prediction: Li & He 2025, table 1), how times are drawn and weighted, and how often conditions are dropped.
    """

    sampler: ClassVar[str | None] = "heun"
    evidence: ClassVar[str | None] = "ode"
    drop: float
    source: Source = Normal()

    @property
    @abstractmethod
    def along(self) -> Path: ...

    @property
    @abstractmethod
    def parametrization(self) -> Parametrization: ...

    @property
    @abstractmethod
    def loss_space(self) -> Space: ...

    @abstractmethod
    def draw_times(self, batch: Batch) -> Tensor:
        """Times ``[B]`` in (0, 1]."""

    @property
    def diffuses(self) -> bool:
        """Whether x1 is the standard normal, drawn without regard to x0: then ``E[x1 | x]`` is a multiple of the score,
        and there are an SDE, a variational bound, guidance by Bayes' rule. Else the ODE alone is right."""
        return self.source.normal

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("denoise", trains=("net",)),)

    @property
    def loss_weight(self) -> Weight:
        """How much each time counts, besides what ``loss_space`` makes of it."""
        return Constant()

    def ends(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(x0, x1)``, each ``[B, *S]``: the ends of each sample's path."""
        return batch.x, batch.normal()

    def networks(self, backbones: Backbones, spec: Spec) -> dict[str, nn.Module]:
        return {"net": backbones.denoiser(spec)}

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        at = self.place(batch)
        return Loss(self.squared_error(at, self.answer(nets["net"], at, batch)), {})

    def place(self, batch: Batch) -> Place:
        """A point of each sample's path."""
        t = self.draw_times(batch)
        x0, x1 = self.ends(batch, t)
        return Place(mix(self.along, x0, x1, t), t, x0, x1)

    def answer(self, net: nn.Module, at: Place, batch: Batch) -> Tensor:
        """What the network says of it, some conditions dropped."""
        x_in, label = self.parametrization.inputs(self.along, at.x, at.t)
        return net(x_in, label, batch.drop(self.drop)).float()

    def squared_error(self, at: Place, out: Tensor) -> Tensor:
        error = out - self.parametrization.target(self.along, at.x0, at.x1, at.t)
        return mean_flat((self.gain(at.t, at.x) * error) ** 2)

    def gain(self, t: Tensor, like: Tensor) -> Tensor:
        """How much an error of the network's output weighs in the loss space, ``[B, 1, ...]``, at most MAX_GAIN.

        Every parametrisation is affine in the output, so its linear part is its answer to 1 at x = 0. The weight joins
        before the bound: a small weight may balance a large linear part.
        """
        one = torch.ones_like(expand(t, like))
        linear = self.parametrization.predict(self.along, torch.zeros_like(one), t, one)
        weight = self.loss_weight(expand(self.along.alpha(t), like), expand(self.along.sigma(t), like))
        return (weight.sqrt() * SPACES[self.loss_space](linear)).clamp(-MAX_GAIN, MAX_GAIN)

    def denoiser(self, net: nn.Module) -> Denoiser:
        return NetDenoiser(net, self.along, self.parametrization)

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        if sampling is None:
            raise ValueError(f"{type(self).__name__} needs a sampler to draw with, say bind('heun', 20)")
        return sampling(self.denoiser(nets["net"]))
