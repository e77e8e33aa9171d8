"""Exploration noise: it turns the deterministic steps of a sampler into Gaussian ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from genkit.backbones import MLP
from genkit.config.numbers import Count, NonNegative
from genkit.core import Cond, Spec
from genkit.diffusion.samplers.ode import posterior_variance
from genkit.diffusion.samplers.sde import MAX_DRIFT
from genkit.diffusion.samplers.steps import Node

Sigma = Callable[[Tensor, Tensor, Cond], Tensor]  # (x [B, *S], step k Int [B], cond) -> factor of the std, [B, *S]


class ExplorationNoise(ABC):
    """The distribution of a step from node ``a`` to node ``b``: ``N(alpha_b x0 + kept x1, std^2)``."""

    needs_diffusion: ClassVar[bool]
    """whether it needs a diffusion, whose predicted noise gives the score"""
    learned: ClassVar[bool] = False
    """whether its size is trained too (:meth:`network`)"""

    @property
    def name(self) -> str:
        """Its name in :data:`NOISES`."""
        return next((name for name, cls in NOISES.items() if cls is type(self)), type(self).__name__)

    @abstractmethod
    def __call__(self, a: Node, b: Node) -> tuple[float, float]:
        """``(kept, std)``: the factor of the predicted noise x1, and the deviation of the fresh noise."""

    def network(self, spec: Spec, steps: int) -> nn.Module | None:
        """A :data:`Sigma` to train along with the model, for chains of ``steps`` steps; None if nothing is learned."""
        return None


@dataclass(frozen=True)
class DDIMNoise(ExplorationNoise):
    """DDIM (Song et al. 2021, eq. 12 and 16): ``eta^2`` times the posterior variance is drawn anew.

    1 is DDPM's ancestral sampling, 0 is deterministic. The last step, to the data, has no noise of its own.
    """

    eta: Annotated[float, Ge(0), Le(1)] = 1.0
    needs_diffusion: ClassVar[bool] = True

    def __call__(self, a: Node, b: Node) -> tuple[float, float]:
        var = self.eta**2 * posterior_variance(a[1:], b[1:]) if self.eta else 0.0
        return (math.sqrt(max(0.0, b.sigma**2 - var)) if var else b.sigma), math.sqrt(var)


@dataclass(frozen=True)
class SDENoise(ExplorationNoise):
    """The reverse SDE by Euler-Maruyama in the chart, like the sampler ``sde``; every ``eta`` keeps the marginals.

    On the linear path it is that of Flow-GRPO (Liu et al. 2025) with ``eta = a^2 / 2``: their a = 0.7 is 0.245.
    """

    eta: NonNegative = 0.25
    needs_diffusion: ClassVar[bool] = True

    def __call__(self, a: Node, b: Node) -> tuple[float, float]:
        if not self.eta or b.sigma == 0:
            return b.sigma, 0.0
        k = self.eta * (a.tau - b.tau) / max(1 - a.tau, 1e-300)
        if k > MAX_DRIFT:  # the diffusion is near infinite: in the limit of the step all noise is drawn anew
            return 0.0, b.sigma
        return b.sigma - b.scale * k, b.scale * math.sqrt(2 * a.tau * k)


@dataclass(frozen=True)
class FixedNoise(ExplorationNoise):
    """The ODE's step plus noise of a constant size (ReinFlow, Zhang et al. 2025, without learning the noise).

    It suits every source, few steps, and the last step too; after training the noise is left out.
    """

    std: NonNegative = 0.15
    needs_diffusion: ClassVar[bool] = False

    def __call__(self, a: Node, b: Node) -> tuple[float, float]:
        return b.sigma, self.std


@dataclass(frozen=True)
class LearnedNoise(ExplorationNoise):
    """The ODE's step plus noise whose size a small network learns for each number of the sample, step and condition
    (ReinFlow, Zhang et al. 2025, section 4.1), between std / spread and std * spread.

    It starts at ``std`` exactly. The bounds keep it from vanishing, which would end exploration, and from drowning the
    mean. After training it is left out, like that of ``fixed``.
    """

    std: NonNegative = 0.15
    spread: Annotated[float, Gt(1)] = 3.0
    """bounds: std / spread and std * spread"""
    width: Count = 64
    """width of the network"""
    needs_diffusion: ClassVar[bool] = False
    learned: ClassVar[bool] = True

    def __call__(self, a: Node, b: Node) -> tuple[float, float]:
        return b.sigma, self.std

    def network(self, spec: Spec, steps: int) -> nn.Module:
        return SigmaNetwork(MLP(self.width, depth=1).denoiser(spec), self.spread, steps)


class SigmaNetwork(nn.Module):
    """``spread ^ tanh(net)``, which is 1 at the start, since the last layer of ``net`` starts at zero."""

    def __init__(self, net: nn.Module, spread: float, steps: int):
        super().__init__()
        self.net, self.spread, self.steps = net, spread, steps

    def forward(self, x: Tensor, k: Tensor, cond: Cond) -> Tensor:
        """Factors ``[B, *S]`` of the std at points ``x`` [B, *S] and steps ``k`` Int [B]."""
        return self.spread ** self.net(x, 1 - k / self.steps, cond).tanh()


NOISES: Mapping[str, type[ExplorationNoise]] = {
    "fixed": FixedNoise,
    "ddim": DDIMNoise,
    "sde": SDENoise,
    "learned": LearnedNoise,
}


def unlearned_noises() -> str:
    """Names of the noises whose size is given, for messages."""
    return ", ".join(name for name, cls in NOISES.items() if not cls.learned)
