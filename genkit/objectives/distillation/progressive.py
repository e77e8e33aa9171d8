"""Progressive distillation (Salimans & Ho 2022): a student takes in one step what its teacher takes in two, and again.

In the chart a step of DDIM is Euler's method of rectified flow, so the student's target is the mean velocity of the
teacher's two steps, on every path and for every prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from genkit.config import table
from genkit.config.numbers import Count
from genkit.core import (
    SCALE_INPUT,
    Backbone,
    Batch,
    Cond,
    Denoiser,
    Generator,
    Loss,
    Noise,
    Phase,
    Scalar,
    Spec,
    expand,
    mean_flat,
)
from genkit.diffusion.guidance import classifier_free, keep_mask, one_pass, shift_data
from genkit.diffusion.paths import chart, mix
from genkit.objectives.distillation.student import (
    ScaledDenoiser,
    Student,
    rows_of,
    same_times,
    starting_point,
    step_times,
)
from genkit.objectives.matching.matching import bound_velocity_error

AVERAGE_POWER = 9.0  # the average of a round spans about a tenth of it (Karras et al. 2024, section 3.1)


class Rounds(nn.Module):
    """How many rounds are finished, which says how many steps the student takes."""

    finished: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("finished", torch.zeros((), dtype=torch.long))


@dataclass(frozen=True)
class ProgressiveDistillation(Student):
    """Halve the steps of a sampler again and again (Salimans & Ho 2022, algorithm 2).

    In each round the student learns to go in one step where its teacher goes in two steps of DDIM; then it becomes the
    teacher. ``genkit train --init RUN --objective=progressive-distillation`` distils RUN, by default from 16 steps to
    one in four rounds.
    """

    of: Any = table("genkit.objectives:OBJECTIVES", "flow", kind="genkit.objectives.matching.matching:Matching")
    """objective of the model that is distilled; that of --init, unless it is given"""
    teacher_steps: Annotated[int, Ge(2), Le(4096)] = 16
    """steps of the model that is distilled, in the first round"""
    steps: Annotated[int, Ge(1), Le(2048)] = 1
    """steps of the student after the last round; teacher_steps divided by a power of 2"""
    round_steps: Count = 500
    """training steps of each round; the last one does not end"""
    teacher_guidance: Annotated[float, Gt(0), Le(100)] = 1.0
    """scale of classifier-free guidance of the teacher, which becomes part of the student"""
    guidance: Annotated[float, Ge(1), Le(100)] = 1.0
    """largest scale of guidance that the student takes as an input, so that --guidance 3 costs nothing; 1: none"""

    starts_from: ClassVar[Mapping[str, str | None]] = {"teacher": "net", "average": "net"}
    replaces_weights: ClassVar[bool] = True  # at the end of a round

    def __post_init__(self) -> None:
        self.require_teacher()
        if self.num_rounds < 1 or self.steps * 2**self.num_rounds != self.teacher_steps:
            raise ValueError(
                f"steps: given {self.steps} from teacher_steps {self.teacher_steps}; each round halves them, so they "
                f"differ by a power of 2; try teacher_steps {self.steps * 2 ** max(1, self.num_rounds)}"
            )
        if self.guidance > 1 and self.teacher_guidance != 1:
            raise ValueError("teacher_guidance: has no effect where the scale is an input; leave it out")
        self.require_null(self.guidance)
        self.require_null(self.teacher_guidance)

    @property
    def num_rounds(self) -> int:
        """How often the steps are halved."""
        return round(math.log2(self.teacher_steps / self.steps))

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("distill", trains=("net",)),)

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        return (1.0, self.guidance) if self.guidance > 1 else None

    def notes(self) -> Sequence[str]:
        steps = ", ".join(str(self.steps_in(k)) for k in range(self.num_rounds))
        needed = self.num_rounds * self.round_steps
        return [f"rounds   of {self.round_steps} training steps, to {steps} steps; needs --steps {needed} or more"]

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        if not spec.cond and (self.guidance > 1 or self.teacher_guidance != 1):
            raise ValueError("guidance: these data have no conditions to guide by; use 1")
        if self.guidance > 1:
            spec = replace(spec, cond={**spec.cond, SCALE_INPUT: Scalar()})
        nets = {name: self.new_network(backbone, spec) for name in ("net", "teacher", "average")}
        for name in ("teacher", "average"):
            nets[name].load_state_dict(nets["net"].state_dict())
        return {**nets, "rounds": Rounds()}

    def round_of(self, step: int | None) -> int:
        """The round of a training step, from 0; None stands for the end of training."""
        last = self.num_rounds - 1
        return last if step is None else min(step // self.round_steps, last)

    def steps_in(self, number: int) -> int:
        """The steps of the student in a round."""
        return self.teacher_steps // 2 ** (number + 1)

    def denoiser(self, net: nn.Module) -> Denoiser:
        """The denoiser of a student, or of the model that is distilled before the first round."""
        denoise = self.of.denoiser(net)
        return ScaledDenoiser(denoise) if self.guidance > 1 else denoise

    # -------------------------------------------------------------------------------------------------- the loss
    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        number = self.round_of(batch.step)
        cond = self.dropped(batch)
        if self.guidance > 1:
            scale = torch.where(keep_mask(batch.x, cond), self.guidance ** batch.uniform(), 1.0).to(batch.x)
            cond = {**cond, SCALE_INPUT: scale}
        student, teacher = self.denoiser(nets["net"]), self.guided_teacher(nets["teacher"], number)
        times = step_times(student.path, 2 * self.steps_in(number))
        index = 2 * (batch.uniform() * self.steps_in(number)).floor()
        t, middle, end = (rows_of(times, index + k, batch.x) for k in range(3))
        x0, x1 = self.of.endpoints(batch, t)
        x = mix(student.path, x0, x1, t)
        target = mean_velocity(teacher, x, (t, middle, end), cond)
        error = student(x, t, cond).velocity.float() - target
        bounded = error * bound_velocity_error(self.of.parametrization, student.path, t, error)
        return Loss(mean_flat(bounded.square()), {"steps": torch.tensor(float(self.steps_in(number)))})

    def guided_teacher(self, net: nn.Module, number: int) -> Denoiser:
        """The teacher of a round: guided in the first, which makes guidance a part of all later ones."""
        if number:
            return self.denoiser(net)
        if self.guidance > 1:
            return GuidedByScale(self.of.denoiser(net))
        return classifier_free(self.teacher_guidance)(self.of.denoiser(net))

    @torch.no_grad()
    def after_step(self, nets: Mapping[str, nn.Module], step: int) -> None:
        number, within = divmod(step, self.round_steps)
        if number >= self.num_rounds - 1:
            return
        weight = 1 - (within / (within + 1)) ** (AVERAGE_POWER + 1)
        for old, new in zip(nets["average"].parameters(), nets["net"].parameters(), strict=True):
            old.lerp_(new, weight)
        if within == self.round_steps - 1:
            for name in ("teacher", "net"):
                nets[name].load_state_dict(nets["average"].state_dict())
            nets["rounds"].finished.fill_(number + 1)  # type: ignore[operator]  # a buffer

    # -------------------------------------------------------------------------------------------------- its model
    def draw_in_steps(self, denoise: Denoiser, nets: Mapping[str, nn.Module]) -> Generator:
        """As many steps of DDIM as the student has learned so far."""
        student = ScaledDenoiser(denoise) if self.guidance > 1 else denoise
        steps = self.steps_in(int(nets["rounds"].finished))  # type: ignore[arg-type]  # a buffer

        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            x, t = starting_point(student.path, z)
            for end in same_times(step_times(student.path, steps)[1:], t):
                p = student(x, t, cond)
                x, t = mix(student.path, p.x0, p.x1, end), end
            return x

        return generate


@dataclass(frozen=True)
class GuidedByScale:
    """Classifier-free guidance with a scale for each sample, ``cond["guidance"]``, of a network that may take it too.

    Before the first round that input has no effect.
    """

    inner: Denoiser

    @property
    def path(self) -> Any:
        """The path of the model."""
        return self.inner.path

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Any:
        seen = {k: v for k, v in cond.items() if k != SCALE_INPUT}
        good, bad = one_pass(self.inner)(x, t, {**seen, SCALE_INPUT: torch.zeros_like(cond[SCALE_INPUT])})
        return shift_data(good, self.path, t, expand(cond[SCALE_INPUT] - 1, x) * (good.x0 - bad.x0))


@torch.no_grad()
def mean_velocity(teacher: Denoiser, x: Tensor, times: tuple[Tensor, Tensor, Tensor], cond: Cond) -> Tensor:
    """The mean velocity in the chart, ``[B, *S]``, of the teacher's two steps of DDIM from x at the three times.

    One step of DDIM with it leads to the same point (Salimans & Ho 2022, appendix G).
    """
    path, (t, middle, end) = teacher.path, times
    first = teacher(x, t, cond)
    second = teacher(mix(path, first.x0, first.x1, middle), middle, cond)
    z = mix(path, second.x0, second.x1, end)
    (tau_x, scale_x), (tau_z, scale_z) = chart(path, t), chart(path, end)
    return (x / expand(scale_x, x) - z / expand(scale_z, x)) / expand(tau_x - tau_z, x)
