"""A flow that starts near a typical sample: the anchored prior, for one or two steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from genkit.backbones import MLP
from genkit.config.numbers import Positive
from genkit.core import (
    Backbone,
    Batch,
    Cond,
    Denoiser,
    Generator,
    Label,
    Loss,
    Noise,
    Objective,
    Phase,
    Spec,
    keep_target,
)
from genkit.objectives.matching.flow import Flow
from genkit.objectives.matching.matching import Matching, PredictionName

HEAD = MLP(width=128, depth=2)


class AnchorBank(nn.Module):
    """The anchors ``[K, *S]``, and a head that predicts the probability of each from the conditions."""

    centers: Tensor

    def __init__(self, kind: Label, spec: Spec, name: str):
        super().__init__()
        self.register_buffer("centers", torch.tensor(kind.centers).reshape(kind.num, *spec.shape))
        self.cond_names = [k for k in spec.cond if k != name]
        head_spec = Spec((kind.num,), {k: spec.cond[k] for k in self.cond_names})
        self.head = HEAD.decoder(head_spec, (1,))

    def forward(self, cond: Cond, like: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, K]``, and the anchors."""
        names = (*self.cond_names, "keep")
        others = {k: v for k, v in cond.items() if k in names or keep_target(k) in self.cond_names}
        return self.head(like.new_zeros(len(like), 1), others).float(), self.centers


@dataclass(frozen=True)
class AnchoredFlow(Flow):
    """A flow from ``N(anchor, std^2)``, where the anchor is one of the k-means centres of the data (``data.anchors``).

    In training each sample starts from the centre nearest to it. A head, trained jointly by cross-entropy, learns the
    probability of each centre under the conditions, and a sample's own seed draws from it. As the choice between modes
    is made before the first step, one or two steps are enough where a normal source needs 8 to 16.
    """

    prediction: PredictionName = "x0"
    """what the network predicts"""
    std: Positive = 0.3
    """standard deviation about an anchor, in the model's units"""
    anchor: str = "anchor"
    """the condition that holds the index of the nearest centre"""
    policy_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source.is_normal or not self.coupling.independent:
            raise ValueError("anchored: brings its own source; allowed: source normal and coupling independent")

    @property
    def is_diffusion(self) -> bool:
        return False

    def describe(self) -> str:
        return "an anchored flow"

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("denoise", trains=("net", "bank")),)

    # its points are not those of a path from noise to samples
    level_errors, preservation_loss = Objective.level_errors, Objective.preservation_loss

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        kind = spec.cond.get(self.anchor)
        if not isinstance(kind, Label) or not kind.centers:
            raise ValueError(f"anchored: the data have no classes {self.anchor!r} with centres; give --data.anchors 32")
        return {**super().networks(backbone, spec), "bank": AnchorBank(kind, spec, self.anchor)}

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        if self.anchor not in batch.cond:
            raise ValueError(f"anchored: the batch has no condition {self.anchor!r}")
        nearest = batch.cond[self.anchor]
        logits, centers = nets["bank"](batch.cond, batch.x)
        flow = super().loss(phase, nets, replace(batch, x1=centers[nearest])).per_sample
        choice = nn.functional.cross_entropy(logits, nearest, reduction="none")
        return Loss(flow + choice, {"flow": flow.detach().mean(), "choice": choice.detach().mean()}, choice)

    @property
    def chosen_condition(self) -> str:
        return self.anchor

    def choice_log_probs(self, nets: Mapping[str, nn.Module], cond: Cond, like: Tensor) -> Tensor:
        return nets["bank"](cond, like)[0].log_softmax(1)

    def endpoints(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        assert batch.x1 is not None, "loss puts the centres there"
        return batch.x, batch.x1 + self.std * batch.normal()

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        """A generator that draws an anchor by the head, unless the conditions name one."""
        generate = Matching.generator(self, nets, sampling)

        def from_anchor(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            with torch.no_grad():
                logits, centers = nets["bank"](cond, z)
            if self.anchor not in cond:
                normal = noise((1,))[:, 0] if noise else torch.randn(len(z), device=z.device)
                cumulative = logits.double().softmax(1).cumsum(1)
                index = torch.searchsorted(cumulative, torch.special.ndtr(normal.double())[:, None])[:, 0]
                cond = {**cond, self.anchor: index.clamp(max=len(centers) - 1)}
            return generate(centers[cond[self.anchor]] + self.std * z, cond, noise)

        return from_anchor
