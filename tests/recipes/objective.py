"""An objective in one file and one line: MeanFlow (Geng et al. 2025), which draws a sample in one evaluation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit.core import (
    Backbone,
    Batch,
    Cond,
    Denoiser,
    Generator,
    Loss,
    Noise,
    Objective,
    Phase,
    Scalar,
    Spec,
    expand,
    mean_flat,
)


@dataclass(frozen=True)
class MeanFlow(Objective):
    """Learn the average velocity ``u(x, r, t)`` between two times of a straight path, r < t (Geng et al. 2025).

    The network sees t as its time label and t - r as a condition. The regression target follows from the identity
    ``u = v - (t - r) du/dt`` with ``v = x1 - x0``; the total derivative along the path is one forward-mode product.
    """

    same: Annotated[float, Ge(0), Le(1)] = 0.75
    """share of the samples with r = t, which learn the velocity itself"""
    cond_dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """probability of training a sample without its conditions"""

    sampler: ClassVar[str | None] = None

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("match", trains=("net",)),)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        return {"net": backbone.denoiser(Spec(spec.shape, {**spec.cond, "span": Scalar()}))}

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        times = batch.uniform(2)
        t = times.amax(1)
        span = torch.where(batch.uniform() < self.same, 0.0, t - times.amin(1))
        x0, x1, cond = batch.x, batch.normal(), batch.drop(self.cond_dropout)
        v = x1 - x0
        x = x0 + expand(t, v) * v

        def u(x: Tensor, t: Tensor, span: Tensor) -> Tensor:
            return average_velocity(nets["net"], x, t, span, cond)

        one = torch.ones_like(t)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
            out, derivative = torch.func.jvp(u, (x, t, span), (v, one, one))[:2]
        target = v - expand(span, v) * derivative
        return Loss(mean_flat((out - target.detach()) ** 2), {})

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        if sampling is not None:
            raise ValueError("sampler: has no effect on MeanFlow, which draws in one evaluation; leave it out")

        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            one = torch.ones(len(z), dtype=z.dtype, device=z.device)
            return z - average_velocity(nets["net"], z, one, one, cond)

        return generate


def average_velocity(net: nn.Module, x: Tensor, t: Tensor, span: Tensor, cond: Cond) -> Tensor:
    """``u(x, t - span, t)``, ``[B, *S]``; ``t`` and ``span`` are ``[B]``.

    Networks turn a time label into waves of up to 1000 rad; a hundredth of t keeps the derivative in t moderate.
    """
    return net(x, t / 100, {**cond, "span": span}).to(x)
