"""The average velocity of a network on one batch, its derivatives, and what a rule learns it from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from genkit.core import Cond, Denoiser, ProbabilityPath, expand, mean_flat
from genkit.diffusion.flow_map import TARGET, FlowMapDenoiser
from genkit.diffusion.paths import chart
from genkit.objectives.matching.matching import velocity_scale
from genkit.objectives.matching.times import SMALLEST


class Jumps(NamedTuple):
    """What a batch is trained on: a jump from ``z`` ``[B, *S]`` at times ``t`` to ``r`` ``[B]``, ``0 <= r <= t <= 1``.

    Points are in the chart, ``z = (1 - tau) x0 + tau x1`` with ``x0``, ``x1`` ``[B, *S]``; times are those of the path.
    ``velocity`` is the target at z: ``x1 - x0``, whose mean given z is the velocity, or the velocity itself (``exact``)
    if a teacher gives it.
    """

    z: Tensor
    r: Tensor
    t: Tensor
    velocity: Tensor
    x0: Tensor
    x1: Tensor
    exact: bool = False


@dataclass(frozen=True)
class LearnedMap:
    """The average velocity ``u(z, r, t)`` ``[B, *S]`` that a network gives, with the conditions of one batch.

    A call has a gradient and goes through the network as it is wrapped, so that ranks exchange their gradients. All
    other methods have none and take the bare network, with the numbers for dropout that the call will have.
    """

    denoise: FlowMapDenoiser
    cond: Cond
    teacher: Denoiser | None = None
    radius: Tensor | float = math.inf
    """bound of the root mean square of the data that a jump without a gradient points to, one number or ``[B]``"""

    @property
    def path(self) -> ProbabilityPath:
        """The path, on whose times the map is defined."""
        return self.denoise.path

    def gap(self, r: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """``tau_t - tau_r``, the length of a jump in the chart, as a factor of ``like``."""
        return expand(chart(self.path, t)[0] - chart(self.path, r)[0], like)

    def sensitivity(self, t: Tensor, like: Tensor) -> Tensor:
        """How far the velocity at t moves with the network's output, ``[B, 1, ...]``: ``1 / tau`` if that is x0."""
        return velocity_scale(self.denoise.parametrization, self.path, t, like)

    def __call__(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return average_velocity(self.denoise, z, r, t, self.cond)

    def bare(self) -> LearnedMap:
        """The map by the network without its wrapper."""
        net = self.denoise.net
        inner: nn.Module = net.module if isinstance(net, DistributedDataParallel) else net
        return replace(self, denoise=replace(self.denoise, net=inner))

    def frozen(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """``u`` without a gradient, of which targets are made: the data that it points to are kept in the radius.

        The data ``z - tau u`` of the exact map are a weighted mean of predicted data along the jump, and so in any ball
        that holds all data. Those of a network need not be. Where targets are its own jumps, an error outside of the
        data could grow from step to step, because there it was never told anything else.
        """
        with torch.no_grad(), same_dropout(z):
            u = self.bare()(z, r, t)
            tau = expand(chart(self.path, t)[0], z)
            data = z - tau * u
            size = mean_flat(data.square()).sqrt()
            excess = 1 - (self.radius / size).clamp(max=1)
            return u + expand(excess, z) * data / tau.clamp(min=SMALLEST)

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """The velocity at z without a gradient: the teacher's, or else the map's own, ``u(z, t, t)``."""
        if self.teacher is None:
            return self.frozen(z, t, t)
        with torch.no_grad():
            return average_velocity(self.teacher, z, t, t, self.cond)

    def derivative(self, z: Tensor, r: Tensor, t: Tensor, direction: Tensor) -> Tensor:
        """``du/dtau`` without a gradient, as z moves by ``direction`` and t grows: one forward-mode product."""
        speed = expand(chart_speed(self.path, t), z)
        with torch.no_grad(), same_dropout(z), forward_mode():
            duals = make_dual(z, speed * direction), r, make_dual(t, torch.ones_like(t))
            return tangent(self.bare()(*duals)) / speed

    def with_end_derivative(self, z: Tensor, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``u`` and ``du/dtau_r``, both with a gradient."""
        speed = expand(chart_speed(self.path, r), z)
        with forward_mode():
            u = self(z, make_dual(r, torch.ones_like(r)), t)
            return unpack_dual(u).primal, tangent(u) / speed


def average_velocity(denoise: Denoiser, z: Tensor, r: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """A denoiser's average velocity ``u(z, r, t)``, ``[B, *S]``, at chart points ``z``."""
    x = expand(chart(denoise.path, t)[1], z) * z
    return denoise(x, t, {**cond, TARGET: r}).velocity.to(z)


def chart_speed(path: ProbabilityPath, t: Tensor) -> Tensor:
    """``dtau/dt``, ``[B]``: 1 on the linear path."""
    with dual_level():
        return tangent(chart(path, make_dual(t, torch.ones_like(t)))[0])


def tangent(dual: Tensor) -> Tensor:
    """The derivative that a forward-mode pass carried to ``dual``; zeros if none reached it."""
    found = unpack_dual(dual).tangent
    return torch.zeros_like(dual) if found is None else found


@contextlib.contextmanager
def same_dropout(like: Tensor) -> Iterator[None]:
    """Leave torch's random state as it was: the pass that follows drops the same activations as one inside."""
    with torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Derivatives along dual tensors, without torch's fused attention, which has none.

    ``torch.func.jvp`` would not do: it fails inside ``DistributedDataParallel``.
    """
    with sdpa_kernel(SDPBackend.MATH), dual_level():
        yield
