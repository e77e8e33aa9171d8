"""What the students of a trained model share: what that model is, its guidance, and the times of their own steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genkit.core import SCALE_INPUT, Backbone, Cond, Denoiser, Generator, Objective, Prediction, ProbabilityPath, Spec
from genkit.core.device import send
from genkit.diffusion.paths import chart, end_time, mix, times_at
from genkit.objectives.flow_map.flow_map import FlowMap
from genkit.objectives.matching.guidance_distillation import GuidanceDistillation
from genkit.objectives.matching.matching import Matching


class Student(Objective):
    """A network ``net`` that learns from a copy of itself, the ``teacher``, trained by the objective ``of``.

    ``genkit train --init RUN --objective=NAME`` distils RUN: all networks start from its weights, and the teacher stays
    in the checkpoints, so that nothing else is needed later. A student draws in a fixed number of steps of its own.
    """

    of: Any
    """objective of the model that is distilled"""

    sampler: ClassVar[str | None] = None
    starts_from: ClassVar[Mapping[str, str | None]] = {"teacher": "net"}

    def require_teacher(self) -> None:
        """``ValueError`` if ``of`` is not sampled in steps."""
        kind = type(self.of).__name__
        if not isinstance(self.of, Matching) or isinstance(self.of, FlowMap | GuidanceDistillation):
            raise ValueError(f"of: given {kind}, whose steps cannot be distilled; allowed: flow, ddpm, edm")
        if not self.of.sampler or self.of.time_distribution.loss_aware:
            raise ValueError(f"of: given {kind} in one pass or with loss-aware times; allowed: flow, ddpm, edm without")

    def require_null(self, guidance: float) -> None:
        """``ValueError`` for guidance of a teacher that was never trained without its conditions."""
        if guidance != 1 and not self.of.knows_null:
            raise ValueError(
                f"guidance: given {guidance:g}, but this teacher was never trained without its conditions: there is "
                "nothing to guide away from; use 1"
            )

    def decide(self, data_std: Callable[[], float], data_radius: Callable[[], float] = lambda: math.inf) -> Student:
        return replace(self, of=self.of.decide(data_std, data_radius))  # type: ignore[type-var]  # a dataclass

    def refuse_init(self, other: Objective) -> None:
        if other != self.of:
            kind = type(other).__name__
            raise ValueError(f"of: differs from the objective of the run, a {kind}; leave --objective.of out")

    @property
    def needs_pairs(self) -> bool:
        return self.of.needs_pairs

    def new_network(self, backbone: Backbone, spec: Spec) -> nn.Module:
        """A network of the kind that is distilled."""
        return self.of.networks(backbone, spec)["net"]

    def dropped(self, batch: Any) -> Cond:
        """The conditions of a batch, dropped as often as in the teacher's training."""
        return batch.drop(self.of.cond_dropout, self.of.cond_dropout_each)

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        if sampling is not None:
            raise ValueError("sampler: a distilled model takes steps of its own; leave the sampler out")
        return self.of.generator({"net": nets["net"]}, lambda denoise: self.draw_in_steps(denoise, nets))

    def draw_in_steps(self, denoise: Denoiser, nets: Mapping[str, nn.Module]) -> Generator:
        """The generator of a student whose network is the denoiser's."""
        raise NotImplementedError


@dataclass(frozen=True)
class ScaledDenoiser:
    """A denoiser whose network takes the scale of guidance as an input: ``cond["guidance"]`` ``[B]``, 1 if absent.

    The network sees ``1 - 1 / scale``, which is 0 without guidance.
    """

    inner: Denoiser

    @property
    def path(self) -> ProbabilityPath:
        return self.inner.path

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        scale = cond.get(SCALE_INPUT, x.new_ones(len(x)))
        return self.inner(x, t, {**cond, SCALE_INPUT: 1 - 1 / scale})


@lru_cache(maxsize=64)
def step_times(path: ProbabilityPath, steps: int) -> Tensor:
    """The times of ``steps`` equal steps of chart time from noise to data, ``[steps + 1]``, float64, falling to 0."""
    end = chart(path, torch.full((1,), end_time(path), dtype=torch.float64))[0]
    return times_at(path, torch.linspace(1, 0, steps + 1, dtype=torch.float64) * end)


def starting_point(path: ProbabilityPath, z: Tensor) -> tuple[Tensor, Tensor]:
    """Where samplers start with the noise ``z`` ``[B, *S]``: ``(x, times [B])``."""
    t = torch.full_like(z.flatten(1)[:, 0], end_time(path))
    return mix(path, torch.zeros_like(z), z, t), t


def rows_of(times: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """``times[index]`` ``[B]`` on the device and in the precision of ``like``."""
    return send(times, like.device)[index.long()].to(like.dtype)


def same_times(times: Tensor, like: Tensor) -> Sequence[Tensor]:
    """Each of ``times`` for all rows of ``like``, ``[B]``."""
    return [like.new_full((len(like),), value) for value in times.tolist()]
