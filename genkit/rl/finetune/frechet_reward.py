"""The reward ``frechet``: each sample's share of minus the Fréchet distance between samples and data in some features.

The mean reward is minus the distance, with its gradient (FD-loss; Yang et al. 2026, arXiv 2604.28190). A model that has
been trained by a distance is better by that distance: cards say so and refuse to rank by the same features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genkit.core import Cond, Draw
from genkit.evaluation.evaluator import default_features
from genkit.evaluation.metrics import Moments
from genkit.evaluation.metrics.features import Classifier
from genkit.evaluation.metrics.frechet import frechet_contributions
from genkit.evaluation.trained_features import FRECHET
from genkit.training.run import Run

DIFFERENTIABLE = ("classifier", "raw")


@dataclass(frozen=True)
class FrechetReward:
    """Minus the contributions ``[B]`` of samples to the Fréchet distance of their features from the data's.

    It is the distance of the rows of a call, of which there must be more than features, or of a population.
    """

    extract: Callable[[Tensor], Tensor]
    """differentiable features ``[B, D]`` of decoded samples (pictures in [0, 1])"""
    reference: Moments
    """of the data"""
    population: Moments | None = None
    """of all samples that the distance is of; None: the rows of a call"""

    def within(self, population: Moments) -> FrechetReward:
        """The reward of samples as a part of a ``population`` with these moments."""
        if (population.n or 0) <= self.reference.dim:
            raise ValueError(
                f"reward: {FRECHET} of {population.n} samples in {self.reference.dim} features; needs more samples "
                "than features: a larger --method.population"
            )
        return replace(self, population=population)

    def __call__(self, x: Tensor, cond: Cond) -> Tensor:
        features = self.extract(x)
        if self.population is None and len(features) <= self.reference.dim:
            raise ValueError(
                f"reward: {FRECHET} of {len(features)} samples at a time in {self.reference.dim} features; needs more "
                "samples than features: a larger --samples, --method.batch and --eval-samples and no --micro-batch, or "
                "--method direct"
            )
        return -frechet_contributions(features, self.reference, self.population).to(x.dtype)


def is_frechet(reward: str) -> bool:
    """Whether a reward is named ``frechet`` or ``frechet:FEATURES``."""
    return reward.partition(":")[0] == FRECHET


def resolve_frechet(reward: str, base: Run) -> str:
    """``frechet:FEATURES``, with the features that suit the data if none are named. ``ValueError`` for others."""
    name = reward.partition(":")[2] or default_features(base.data_spec)
    if name not in DIFFERENTIABLE:
        raise ValueError(
            f"reward: given {reward}, whose features ({name}) have no gradient; allowed: "
            f"{', '.join(f'{FRECHET}:{features}' for features in DIFFERENTIABLE)}"
        )
    return f"{FRECHET}:{name}"


def load_frechet(reward: str, base: Run) -> FrechetReward:
    """The reward of a resolved name, against the training data of ``base``: for cached latents those that were encoded.

    Samples of a model of latents are compared as decoded; the gradient goes through the decoder.
    """
    name = reward.partition(":")[2]
    data = base.config.data.decoded_source().load("train")
    x = data.batch(torch.arange(len(data)), Draw((0,), 0, len(data))).x
    real = x.float() / 255 if x.dtype == torch.uint8 else x
    extract: Callable[[Tensor], Tensor] = torch.nn.Flatten()
    if name == "classifier":
        network = Classifier().load("cpu", data).network.to(base.device).eval().requires_grad_(False)
        extract = lambda x: network(255 * x.clamp(0, 1)).features  # noqa: E731
    with torch.no_grad():
        features = torch.cat([extract(part.to(base.device)) for part in real.split(1024)])
    return FrechetReward(extract, Moments.of(features))
