"""The objective ``flow-map``: one network that jumps from any time to any earlier one, in one step or in many."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, cast

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from genkit.config import load_object
from genkit.config.paths import PathText
from genkit.core import (
    SCALE_INPUT,
    Backbone,
    Batch,
    Cond,
    Denoiser,
    Label,
    Loss,
    Objective,
    ProbabilityPath,
    Scalar,
    Spec,
    expand,
    mean_flat,
)
from genkit.diffusion.flow_map import NO_GUIDANCE, SPAN, FlowMapDenoiser
from genkit.diffusion.guidance import classifier_free, require_same_path
from genkit.diffusion.parametrization import refuse_singular
from genkit.diffusion.paths import Linear, chart
from genkit.objectives.flow_map.guidance import GuidedTeacher, draw_guidance, guided_velocity
from genkit.objectives.flow_map.learned import Jumps, LearnedMap
from genkit.objectives.flow_map.rules import RULES, Rule, Shortcut
from genkit.objectives.matching.flow import name_of
from genkit.objectives.matching.matching import Matching, PredictionName, bound_velocity_error
from genkit.objectives.matching.times import SMALLEST, LogitNormal, TimeDistribution

SLACK = 1.5  # of the radius of the data, which is that of some samples only
SLOW = 0.01  # of the 1000 rad of a network's time label


@dataclass(frozen=True)
class FlowMap(Matching):
    """Learn the average velocity between any two times of a path (Boffi et al. 2024; Geng et al. 2025).

    One to N steps from one network, from scratch, from another run's weights, or from a ``teacher``. In the chart every
    path is rectified flow, so each rule is written once and serves all paths. The prediction ``x0`` is pixel MeanFlow
    (Lu et al. 2026).
    """

    rule: Rule = field(default_factory=Shortcut, metadata={"table": "genkit.objectives.flow_map.rules:RULES"})
    """how it is learned: shortcut, improved, mean (MeanFlow), lagrangian, alpha or consistency"""
    path: ProbabilityPath = field(default_factory=Linear, metadata={"table": "genkit.diffusion.paths:PATHS"})
    """the path between data and noise"""
    prediction: PredictionName = "velocity"
    """what the network predicts of the straight line to the jump's end"""
    time_distribution: TimeDistribution = field(
        default_factory=lambda: LogitNormal(-0.4, 1.0),
        metadata={"table": "genkit.objectives.matching.times:TIME_DISTRIBUTIONS"},
    )
    """how both times are drawn: logit-normal, uniform, log-normal (of the noise level) or beta"""
    time_rate: Annotated[float, Gt(0)] | None = None
    """factor of the network's time label, for a moderate derivative in time. None: 0.01 if the rule takes one, else 1,
    as in other objectives; a run that starts from another's weights (--init) needs its rate, 1"""
    teacher: PathText | None = None
    """a run whose velocity is learned from in place of the data's: a flow, DDPM, EDM or flow map on the same path"""
    teacher_guidance: float = 1.0
    """scale of classifier-free guidance of the teacher, which becomes part of the model"""
    guidance: Annotated[float, Ge(1), Le(100)] = 1.0
    """largest scale of guidance that the network takes as an input, with an interval: --guidance 3 then costs one pass;
    1: none, and guidance takes two"""
    cond_dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """probability of training a sample without its conditions, for classifier-free guidance"""
    cond_dropout_each: Annotated[float, Ge(0), Lt(1)] = 0.0
    """probability of dropping each condition independently, so that any subset can be omitted when sampling"""
    data_radius: Annotated[float, Gt(0)] | None = None
    """largest root mean square of a sample in the model's numbers, within which the jumps point of which targets are
    made; None: one and a half times what is measured when a run begins"""

    open_settings = (*Matching.open_settings, "data_radius")
    loss_space = "velocity"
    policy_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        refuse_singular(self.parametrization, self.path)
        self.time_distribution.check(self.path)
        if self.rule.jumps_to_data and not self.keeps_data():
            raise ValueError(
                f"prediction: given {self.prediction} with the rule {name_of(RULES, self.rule)}, which a network that "
                "always predicts the same data would satisfy; allowed: velocity, v; or take another rule"
            )
        if self.time_distribution.loss_aware:
            raise ValueError("time_distribution: given loss-aware, which knows one time only; allowed: all others")
        if self.teacher is None and self.teacher_guidance != 1:
            raise ValueError(f"teacher_guidance: given {self.teacher_guidance}, but no teacher; name a run")
        if self.guidance > 1 and self.cond_dropout == 0:
            raise ValueError(
                f"guidance: given {self.guidance} with cond_dropout 0: there is nothing to guide away from; set "
                "--objective.cond-dropout 0.1"
            )
        if self.guidance > 1 and self.teacher_guidance != 1:
            raise ValueError("teacher_guidance: has no effect where the scale is an input; leave it out")
        if self.teacher is not None:  # independent of the working directory, and of what runs/latest becomes
            object.__setattr__(self, "teacher", os.path.realpath(self.teacher))

    def keeps_data(self) -> bool:
        """Whether the model's data are z itself at t = 0, whatever the network gives (Song et al. 2023, section 3)."""
        zero = torch.zeros(1, dtype=torch.float64)
        moved = self.parametrization.predict(self.path, zero, zero + SMALLEST, zero + 1).x0
        return bool(moved.abs() < 0.5)

    @property
    def label_rate(self) -> float:
        """The factor of the network's time label."""
        return self.time_rate or (SLOW if self.rule.differentiates_time else 1.0)

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        return (1.0, self.guidance) if self.guidance > 1 else None

    @property
    def sampler(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The default sampler: jumps to each time, or to the data and back if the rule has learned no others."""
        return "consistency" if self.rule.jumps_to_data else "flow_map"

    @property
    def policy_sampler(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The sampler of a policy: the map's own."""
        return self.sampler

    def setup(self, spec: Spec) -> None:
        if self.teacher is not None:
            run = load_teacher(self.teacher, self.teacher_guidance, self.path, torch.device("cpu"))[1]
            self.require_teacher(run.spec, spec, run.objective.knows_null)

    def require_teacher(self, theirs: Spec, ours: Spec, knows_null: bool) -> None:
        """``ValueError`` unless the samples and conditions ``theirs`` of a teacher are ``ours``, and the teacher was
        trained without conditions where it is asked without."""
        if theirs.shape != ours.shape:
            raise ValueError(f"teacher: given one of samples {theirs.shape}; the data have {ours.shape}")
        given, needed = (describe_conditions(spec) for spec in (theirs, ours))
        if given != needed:
            raise ValueError(
                f"teacher: given one with the conditions {given}; the data have {needed}; both need the same"
            )
        if not ours.cond or knows_null:
            return
        if self.guidance != 1 or self.teacher_guidance != 1:
            raise ValueError("teacher: given one that was never trained without its conditions: there is nothing to "
                             "guide away from; leave guidance and teacher_guidance at 1")  # fmt: skip
        if self.knows_null:
            raise ValueError("cond_dropout: the teacher was never trained without its conditions, so that there is "
                             "nothing to learn of it without them; take --objective.cond-dropout 0")  # fmt: skip

    @property
    def reference_runs(self) -> Mapping[str, str]:
        return {} if self.teacher is None else {"teacher": self.teacher}

    def refuse_init(self, other: Objective) -> None:
        if not isinstance(other, Matching):
            return
        if (other.path, other.parametrization) != (self.path, self.parametrization):
            raise ValueError(
                f"init: given a run on the path {other.path}, predicting {type(other.parametrization).__name__}; here "
                f"{self.path}, {type(self.parametrization).__name__}; both must agree: set --objective.path and "
                "--objective.prediction"
            )
        rate = other.label_rate if isinstance(other, FlowMap) else 1.0
        if rate != self.label_rate:
            slow = name_of(RULES, self.rule)
            raise ValueError(
                f"init: given a run whose time label has the rate {rate:g}, which rule {slow} takes at "
                f"{self.label_rate:g}; take a rule without a derivative in time (lagrangian, shortcut, alpha, "
                f"consistency), or --objective.time-rate {rate:g}"
            )

    def decide(self, data_std: Callable[[], float], data_radius: Callable[[], float] = lambda: math.inf) -> FlowMap:
        decided = cast(FlowMap, super().decide(data_std, data_radius))
        if self.data_radius is None and (measured := SLACK * data_radius()) < math.inf:
            decided = replace(decided, data_radius=float(f"{measured:.4g}"))
        return decided

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        if self.guidance > 1 and not spec.cond:
            raise ValueError(f"guidance: given {self.guidance}, but these data have no conditions to guide by; use 1")
        names = [SPAN, *(NO_GUIDANCE if self.guidance > 1 else ())]
        return {"net": backbone.denoiser(replace(spec, cond={**spec.cond, **dict.fromkeys(names, Scalar())}))}

    def denoiser(self, net: nn.Module) -> FlowMapDenoiser:
        return FlowMapDenoiser(
            net,
            self.path,
            self.parametrization,
            self.label_rate,
            only_to_data=self.rule.jumps_to_data,
            takes_guidance=self.guidance > 1,
        )

    # ------------------------------------------------------------------------------------------------------- loss
    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        cond = batch.drop(self.cond_dropout, self.cond_dropout_each)
        if self.guidance > 1:
            cond = {**cond, **draw_guidance(batch, cond, self.guidance)}
        u = self.learned_map(nets["net"], cond, self.open_teacher(batch.x.device))
        jumps = self.draw_jumps(batch, u)
        error = self.rule.error(u, jumps, batch.step)
        bounded = error * self.error_bound(jumps.t, error)
        squared, same = mean_flat(error.detach().square()), jumps.r == jumps.t
        logs = {"map": (squared * ~same).mean() / (1 - self.rule.share)}
        if self.rule.share:
            logs["velocity"] = (squared * same).mean() / self.rule.share
        return Loss(self.rule.weigh(bounded), logs)

    def learned_map(self, net: nn.Module, cond: Cond, teacher: Denoiser | None = None) -> LearnedMap:
        """The network's average velocity with the conditions of a batch, for training."""
        radius = self.data_radius or math.inf
        if self.guidance > 1 and SCALE_INPUT in cond:  # x + (scale - 1) (x - y) with x and y in the ball
            radius = (2 * cond[SCALE_INPUT] - 1) * radius
        return LearnedMap(replace(self.denoiser(net), only_to_data=False), cond, teacher, radius)

    def draw_jumps(self, batch: Batch, u: LearnedMap) -> Jumps:
        """A random jump on each sample's path, with the velocity to learn from."""
        r, t = self.rule.times(batch, lambda: self.time_distribution.sample(batch, self.path), self.path)
        x0, x1 = self.endpoints(batch, t)
        velocity = x1 - x0
        z = x0 + expand(chart(self.path, t)[0], x0) * velocity
        if u.teacher is not None:
            return Jumps(z, r, t, u.velocity(z, t), x0, x1, exact=True)
        if self.guidance > 1:
            velocity = guided_velocity(u, z, t, velocity)
        return Jumps(z, r, t, velocity, x0, x1)

    def error_bound(self, t: Tensor, like: Tensor) -> Tensor:
        """The factor that keeps the network's share of the error within bounds, ``[B, 1, ...]``."""
        return bound_velocity_error(self.parametrization, self.path, t, like)

    def open_teacher(self, device: torch.device) -> Denoiser | None:
        """The teacher, guided, on ``device``."""
        if self.teacher is None:
            return None
        teacher = load_teacher(self.teacher, self.teacher_guidance, self.path, device)[0]
        return GuidedTeacher(teacher) if self.guidance > 1 else teacher


@lru_cache(maxsize=4)
def load_teacher(run: str, guidance: float, path: ProbabilityPath, device: torch.device) -> tuple[Denoiser, Any]:
    """The denoiser of a run, guided, and the run. ``ValueError`` if it is on another path."""
    teacher = load_object("genkit.training.run:load_run")(run, device=device.type)
    require_same_path("teacher", teacher.denoiser.path, path)
    return classifier_free(guidance)(teacher.denoiser), teacher


def describe_conditions(spec: Spec) -> str:
    """The conditions of a spec in words, as far as they decide what a network of them can be asked."""
    parts = [f"{name} ({kind.num} classes)" if isinstance(kind, Label) else name for name, kind in spec.cond.items()]
    return ", ".join(sorted(parts)) or "none"
