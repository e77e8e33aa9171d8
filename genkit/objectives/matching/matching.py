"""Regression onto a path: the loss that flow matching, DDPM and EDM share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, cast

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
)
from genkit.diffusion.parametrization import NetDenoiser
from genkit.diffusion.paths import mix
from genkit.objectives.matching.sources import Normal, Source
from genkit.objectives.matching.times import History
from genkit.objectives.matching.weights import Constant, Space, Weight

PredictionName = Literal["velocity", "eps", "x0", "v", "score", "karras"]
SPACES: Mapping[str, Callable[[Prediction], Tensor]] = {
    "x0": lambda p: p.x0,
    "eps": lambda p: p.x1,
    "velocity": lambda p: p.velocity,
}
MAX_GAIN = 20.0  # Li & He 2025 (section 4.3) keep 1 - t at 0.05 or more where they divide by it


class Place(NamedTuple):
    """Points ``x = alpha(t) x0 + sigma(t) x1``, ``[B, *S]`` at times ``[B]``."""

    x: Tensor
    t: Tensor
    x0: Tensor
    x1: Tensor
    drawn: Tensor | None = None
    """loss-aware times as they were drawn, before they were put on a grid"""


class Matching(Objective):
    """One network ``net``, one phase: predict an endpoint of the path through ``x = alpha(t) x0 + sigma(t) x1``.

    A subclass says on which path, what the network predicts, in which space the squared error is taken (a choice apart
    from the prediction: Li & He 2025, table 1), how times are drawn and weighted, and how often conditions are dropped.
    """

    sampler: ClassVar[str | None] = "heun"
    likelihood_method: ClassVar[str | None] = "ode"
    drop: float
    drop_each: float = 0.0
    source: Source = Normal()

    @property
    @abstractmethod
    def along(self) -> ProbabilityPath: ...

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

    @property
    def loss_aware(self) -> bool:
        """Whether times are drawn by the losses of the past (:class:`~genkit.objectives.matching.times.History`)."""
        return False

    def on_grid(self, t: Tensor) -> Tensor:
        """Loss-aware times as the objective wants them."""
        return t

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        return {"net": backbone.denoiser(spec), **({"history": History()} if self.loss_aware else {})}

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        at = self.place(batch, nets)
        return Loss(self.weighed(nets, at, self.squared_error(at, self.answer(nets["net"], at, batch))), {})

    def place(self, batch: Batch, nets: Mapping[str, nn.Module]) -> Place:
        """A point of each sample's path."""
        drawn = cast(History, nets["history"]).draw(batch) if self.loss_aware else None
        t = self.draw_times(batch) if drawn is None else self.on_grid(drawn)
        x0, x1 = self.ends(batch, t)
        return Place(mix(self.along, x0, x1, t), t, x0, x1, drawn)

    def weighed(self, nets: Mapping[str, nn.Module], at: Place, each: Tensor) -> Tensor:
        """Losses ``[B]``, whose mean is that of uniform times; they are remembered where times depend on them."""
        if at.drawn is not None and torch.is_grad_enabled():
            cast(History, nets["history"]).note(at.drawn, each.detach())
        return self.scale(nets, at) * each

    def scale(self, nets: Mapping[str, nn.Module], at: Place) -> Tensor:
        """One over the density of the times as they were drawn, ``[B]``."""
        if at.drawn is None:
            return torch.ones_like(at.t)
        return cast(History, nets["history"]).weight(at.drawn)

    def after_step(self, nets: Mapping[str, nn.Module], step: int) -> None:
        if self.loss_aware:
            cast(History, nets["history"]).after_step()

    def answer(self, net: nn.Module, at: Place, batch: Batch) -> Tensor:
        """What the network says of it, some conditions dropped."""
        x_in, label = self.parametrization.inputs(self.along, at.x, at.t)
        return net(x_in, label, batch.drop(self.drop, self.drop_each)).float()

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
