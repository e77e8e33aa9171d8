"""A classifier of noisy samples, whose gradient guides other models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from genkit.core import (
    Backbone,
    Batch,
    Cond,
    Denoiser,
    Direction,
    Generator,
    Label,
    Loss,
    Objective,
    Phase,
    ProbabilityPath,
    Spec,
    Vector,
    expand,
)
from genkit.diffusion.guidance import NoisyClassifier
from genkit.diffusion.paths import Linear, chart, mix


@dataclass(frozen=True)
class Classifier(Objective):
    """``p(y | x_t)`` by cross-entropy on noisy samples of a path (Dhariwal & Nichol 2021, section 4.1).

    It draws no samples: ``genkit sample MODEL --classifier THIS`` guides a model on the same path by its gradient.
    """

    sampler: ClassVar[str | None] = None
    is_generative: ClassVar[bool] = False
    usage: ClassVar[str] = (
        "genkit train --objective=flow --objective.path={path} --config {run}/config.yaml\n"
        "genkit sample {runs}/latest{label} --classifier {run}"
    )
    validation_metrics: ClassVar[Mapping[str, Direction]] = {"loss": "lower", "accuracy": "higher"}

    path: ProbabilityPath = field(default_factory=Linear, metadata={"table": "genkit.diffusion.paths:PATHS"})
    """the path of the models that it will guide; vp for ddpm"""
    label: str = "label"
    """name of the condition that it predicts"""

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("classify", trains=("net",)),)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        return {"net": backbone.encoder(Spec(spec.shape, {"t": Vector((1,))}), (self.kind(spec).num,))}

    def kind(self, spec: Spec) -> Label:
        """The classes. ``ValueError`` if the data has no classes of this name."""
        classes = {k: v for k, v in spec.cond.items() if isinstance(v, Label)}
        if self.label not in classes:
            has = ", ".join(classes) or "none; take data with classes, such as digits or moons"
            raise ValueError(f"label: given {self.label!r}; classes of this data: {has}")
        return classes[self.label]

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        losses = self.validate(nets, batch)
        return Loss(losses["loss"], {"accuracy": losses["accuracy"].mean()})

    def validate(self, nets: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        t, y = 1 - batch.uniform(), batch.cond[self.label]
        out = logits(nets["net"], self.path, mix(self.path, batch.x, batch.normal(), t), t)
        return {"loss": F.cross_entropy(out, y, reduction="none"), "accuracy": (out.argmax(1) == y).float()}

    def classify(self, nets: Mapping[str, nn.Module]) -> NoisyClassifier:
        """The trained classifier, for :func:`genkit.diffusion.guidance.by_classifier`."""
        return NetClassifier(nets["net"], self.path, self.label)

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        raise ValueError("classifier: draws nothing; it guides another model: genkit sample MODEL --classifier THIS")


def logits(net: nn.Module, path: ProbabilityPath, x: Tensor, t: Tensor) -> Tensor:
    """Class scores ``[B, K]``.

    The network sees ``alpha x / (alpha^2 + sigma^2)``, the best linear estimate of data of unit variance, and chart
    time: then ``sigma^2 / alpha grad`` stays bounded up to pure noise, where alpha may be 0."""
    alpha, sigma = (expand(f(t), x) for f in (path.alpha, path.sigma))
    return net(alpha / (alpha**2 + sigma**2) * x, {"t": chart(path, t)[0][:, None]}).float()


@dataclass(frozen=True)
class NetClassifier:
    """A trained classifier: a :class:`~genkit.diffusion.guidance.NoisyClassifier`."""

    net: nn.Module
    path: ProbabilityPath
    label: str

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.label not in cond:
            raise ValueError(f"classifier: given no {self.label} to guide to; name a class, say --label 1")
        log_p = logits(self.net, self.path, x, t).log_softmax(1)
        return log_p.gather(1, cond[self.label][:, None])[:, 0]
