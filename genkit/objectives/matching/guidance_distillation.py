"""Distil classifier-free guidance into an adapter of a trained network (Jensen et al. 2025, arXiv 2503.07274).

Guidance takes two passes a step. Here a small adapter, which takes the scale as an input, learns to predict in one pass
what the network and its guidance predict in two. It learns on the guided trajectories themselves, the points at which a
sampler will ask, so it needs only the conditions of the data. The network itself is frozen: without a scale it is what
it was.
"""

# what a model is comes from the one whose guidance is distilled, so fields and class variables become properties
# pyright: reportIncompatibleVariableOverride=false
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from genkit.backbones.guidance_adapter import takes_scale
from genkit.config import table
from genkit.config.numbers import Count
from genkit.core import SCALE_INPUT, Backbone, Batch, Cond, Denoiser, Generator, Loss, Objective, Phase, Spec, expand
from genkit.diffusion.guidance import one_pass, shift_data
from genkit.diffusion.paths import chart, mix, times_at
from genkit.objectives.matching.matching import Matching, PathSample

GuidanceScale = Annotated[float, Ge(1), Le(100)]
HALVINGS = 40  # of an interval of times, which are then right to float32
MIN_TAU = 1e-3  # the last point of a trajectory: below it the guided prediction hardly differs


class Target(NamedTuple):
    """Points of guided trajectories, and what guidance predicts there."""

    sample: PathSample
    scale: Tensor
    cond: Cond


@dataclass(frozen=True)
class GuidanceDistillation(Matching):
    """Predict in one pass what a model with classifier-free guidance predicts in two (Jensen et al. 2025, eq. 7).

    ``genkit distill RUN`` trains it, as an adapter of that run.
    """

    of: Any = table("genkit.objectives:OBJECTIVES", "flow", kind="genkit.objectives.matching.matching:Matching")
    """objective of the model whose guidance is distilled"""
    low: GuidanceScale = 1.0
    """smallest scale of guidance"""
    high: GuidanceScale = 6.0
    """largest scale of guidance"""
    points: Count = 10
    """Euler steps of each guided trajectory, all of which are trained on"""

    open_settings = ()

    def __post_init__(self) -> None:
        if not isinstance(self.of, Matching) or isinstance(self.of, GuidanceDistillation) or not self.of.sampler:
            kind = type(self.of).__name__
            raise ValueError(f"of: given {kind}, which is not sampled in steps; allowed: flow, ddpm, edm")
        if self.low >= self.high:
            raise ValueError(f"low: given {self.low}, which is not below high = {self.high}")

    # what the model is, and how it is sampled: as the one whose guidance is distilled
    @property
    def path(self) -> Any:
        """The path of the model."""
        return self.of.path

    @property
    def prediction(self) -> Any:
        """What the network of the model predicts."""
        return self.of.prediction

    @property
    def loss_space(self) -> Any:
        """The space of the model's loss."""
        return self.of.loss_space

    @property
    def natural_space(self) -> Any:
        return self.of.natural_space

    @property
    def sigma_data(self) -> Any:
        """The standard deviation of the data that the model was made for."""
        return self.of.sigma_data

    @property
    def loss_weight(self) -> Any:
        """The weight of the model's loss."""
        return self.of.loss_weight

    @property
    def source(self) -> Any:
        """Where the model's path starts."""
        return self.of.source

    @property
    def cond_dropout(self) -> Any:
        """How often the model was trained without its conditions."""
        return self.of.cond_dropout

    @property
    def cond_dropout_each(self) -> Any:
        """How often each condition was dropped."""
        return self.of.cond_dropout_each

    @property
    def parametrization(self) -> Any:
        """What the network's input and output mean."""
        return self.of.parametrization

    @property
    def is_diffusion(self) -> bool:
        return self.of.is_diffusion

    @property
    def sampler(self) -> Any:
        """The model's default sampler."""
        return self.of.sampler

    @property
    def guidance_range(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def usage(self) -> str:
        """The command that samples with guidance."""
        return f"genkit sample {{run}} --guidance {min(3.0, self.high):g}{{label}} --n 16"

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("distill", trains=("net",)),)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        if not spec.cond:
            raise ValueError("guidance-distillation: these data have no conditions to guide by")
        if getattr(backbone, "checkpoint", False):
            raise ValueError("checkpoint: recomputed activations would see another scale of guidance; turn it off")
        return {"net": self.of.networks(backbone, spec)["net"]}

    def decide(
        self, data_std: Callable[[], float], data_radius: Callable[[], float] = lambda: math.inf
    ) -> GuidanceDistillation:
        return replace(self, of=self.of.decide(data_std, data_radius))

    def notes(self) -> Sequence[str]:
        return ()

    def check(self, nets: Mapping[str, nn.Module]) -> None:
        if not takes_scale(nets["net"]):
            raise ValueError(
                "guidance-distillation: trains an adapter of a run; use genkit distill RUN, or give --init RUN, "
                "--lora=guidance and --lora.rank 16"
            )

    def denoiser(self, net: nn.Module) -> Denoiser:
        return self.of.denoiser(net)

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        return self.of.generator(nets, sampling)

    # -------------------------------------------------------------------------------------------------- the loss
    # its points are not those of a path from noise to samples
    level_errors, preservation_loss = Objective.level_errors, Objective.preservation_loss

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        net = nets["net"]
        with torch.no_grad():
            targets = list(self.guided_trajectory(self.denoiser(net), batch))
        # one pass over all points, which is faster, and which DistributedDataParallel needs
        points = [t.sample for t in targets]
        ends = [torch.cat(parts) for parts in zip(*((p.x, p.t, p.x0, p.x1) for p in points), strict=True)]
        sample = PathSample(*ends)
        cond = {k: torch.cat([t.cond[k] for t in targets]) for k in targets[0].cond}
        x_in, label = self.parametrization.inputs(self.path, sample.x, sample.t)
        out = net(x_in, label, {**cond, SCALE_INPUT: torch.cat([t.scale for t in targets])}).float()
        # a learned variance, in further channels, is not adapted
        losses = self.of.squared_error(sample, out[:, : sample.x.shape[1]])
        return Loss(losses.view(len(targets), -1).mean(0), {})

    def guided_trajectory(self, denoise: Denoiser, batch: Batch) -> Iterator[Target]:
        """The points of one guided trajectory for each sample, from noise on, with the predictions of guidance.

        The scale and the placement of the steps are random for each sample.
        """
        scale = self.low + (self.high - self.low) * batch.uniform()
        offset = batch.uniform()
        cond = batch.drop(0.0, 0.0)
        t = torch.ones_like(offset).to(batch.x.dtype)
        last = chart(self.path, t)[0]  # VP and VE end before tau = 1
        x1 = self.of.endpoints(batch, t)[1]
        x = expand(self.path.sigma(t), x1) * x1
        predict_both = one_pass(denoise)
        for k in range(self.points + 1):
            good, bad = predict_both(x, t, cond)
            guided = shift_data(good, self.path, t, expand(scale - 1, x) * (good.x0 - bad.x0))
            yield Target(PathSample(x, t, guided.x0, guided.x1), scale, cond)
            tau = last * (1 - (k + offset) / self.points).clamp(min=MIN_TAU)
            t = times_at(self.path, tau, HALVINGS).to(x.dtype)
            x = mix(self.path, guided.x0, guided.x1, t)
