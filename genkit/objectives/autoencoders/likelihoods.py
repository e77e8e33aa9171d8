"""``p(x | z)``: the distribution of a sample given a decoder's output. Log-probabilities are summed over dimensions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.config.numbers import Positive
from genkit.core import NO_COND, Backbone, Batch, Cond, Spec

LEVEL = 1 / 255  # half the distance between two neighbouring grey levels in [-1, 1]
FLOOR = math.log(LEVEL)  # no learned scale is smaller: a density of pixels would grow without end
ScaleName = Literal["fixed", "shared", "each"]


class DecoderOutput(NamedTuple):
    """A location ``[B, *S]`` and a log scale that broadcasts to it."""

    location: Tensor
    log_scale: Tensor


class DecoderHead(nn.Module):
    """A backbone's decoder with a scale: fixed, one learned number, or a second half of the decoder's channels."""

    def __init__(self, backbone: Backbone, spec: Spec, latent: tuple[int, ...], scale: ScaleName, start: float):
        super().__init__()
        channels = spec.shape[0] * (2 if scale == "each" else 1)
        self.decoder = backbone.decoder(Spec((channels, *spec.shape[1:]), spec.cond), latent)
        self.scale, self.start = scale, start
        self.log_scale = nn.Parameter(torch.tensor(math.log(start))) if scale == "shared" else None

    def forward(self, z: Tensor, cond: Cond = NO_COND) -> DecoderOutput:
        out = self.decoder(z, cond).to(z)
        if self.scale == "each":
            location, raw = out.chunk(2, 1)
            return DecoderOutput(location, FLOOR + F.softplus(raw + math.log(self.start) - FLOOR))
        if self.log_scale is None:
            return DecoderOutput(out, torch.full_like(out[:1], math.log(self.start)))
        return DecoderOutput(out, FLOOR + F.softplus(self.log_scale.to(out) - FLOOR))


class Likelihood(ABC):
    """A conditional distribution of a sample. Configuration only; a learned scale lives in the :class:`DecoderHead`."""

    is_discrete: ClassVar[bool] = False
    """whether :meth:`log_prob` is of the pixels themselves, not a density of continuous numbers"""
    needs_images: ClassVar[bool] = False
    """whether the samples have to be images in [-1, 1]"""

    @abstractmethod
    def decoder_head(self, backbone: Backbone, spec: Spec, latent: tuple[int, ...]) -> DecoderHead:
        """The decoder ``(z, cond) -> DecoderOutput``. ``ValueError`` if it does not suit the samples."""

    @abstractmethod
    def log_prob(self, out: DecoderOutput, x: Tensor) -> Tensor:
        """``log p(x | z)`` in nats, ``[B]``."""

    def target(self, batch: Batch) -> Tensor:
        """The samples that are modelled, ``[B, *S]``: the data, or black and white made of it."""
        return batch.x

    def mean(self, out: DecoderOutput) -> Tensor:
        """``E[x | z]`` in the model's units, ``[B, *S]``."""
        return out.location

    def check(self, spec: Spec) -> None:
        """``ValueError`` for samples that cannot have this distribution."""
        if self.needs_images and len(spec.shape) < 3:
            name = type(self).__name__.lower()
            raise ValueError(
                f"likelihood: {name} is a distribution of pixels; given samples of shape {spec.shape}; "
                "try --objective.likelihood=gaussian"
            )


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """``N(x; f(z), sigma^2)``, independent dimensions (Kingma & Welling 2014, appendix C.2)."""

    std: Positive = 0.5
    """sigma, in the model's units (pixels lie in [-1, 1]); the initial value if it is learned"""
    scale: ScaleName = "shared"
    """fixed; shared: one learned number (Rybkin et al. 2021, sigma-VAE); each: predicted for each dimension"""

    def __post_init__(self) -> None:
        refuse_small_std("std", self.std)

    def decoder_head(self, backbone: Backbone, spec: Spec, latent: tuple[int, ...]) -> DecoderHead:
        return DecoderHead(backbone, spec, latent, self.scale, self.std)

    def log_prob(self, out: DecoderOutput, x: Tensor) -> Tensor:
        standardized = (x - out.location) * (-out.log_scale).exp()
        return -(0.5 * standardized.square() + out.log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Black or white pixels from logits (Kingma & Welling 2014, appendix C.1). Drawn samples show the probability.

    Grey pixels are made black or white first, for encoder and decoder: their cross-entropy would be no likelihood.
    """

    is_discrete: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True

    binarise: Literal["dynamic", "threshold"] = "dynamic"
    """dynamic: white with the grey value as probability, drawn anew each time (Salakhutdinov & Murray 2008; Burda et
    al. 2016); threshold: white from 1/2"""

    def decoder_head(self, backbone: Backbone, spec: Spec, latent: tuple[int, ...]) -> DecoderHead:
        self.check(spec)
        return DecoderHead(backbone, spec, latent, "fixed", 1.0)

    def target(self, batch: Batch) -> Tensor:
        p = (batch.x + 1) / 2
        u = batch.uniform(*p.shape[1:]) if self.binarise == "dynamic" else torch.full_like(p, 0.5)
        return torch.where(u < p, 1.0, -1.0).to(p)

    def log_prob(self, out: DecoderOutput, x: Tensor) -> Tensor:
        return F.logsigmoid(x * out.location).flatten(1).sum(1)  # x = +-1: p(-1) = 1 - sigmoid(l) = sigmoid(-l)

    def mean(self, out: DecoderOutput) -> Tensor:
        return 2 * out.location.sigmoid() - 1


@dataclass(frozen=True)
class DiscretisedLogistic(Likelihood):
    """A logistic distribution's mass on each of 256 grey levels (Kingma et al. 2016, eq. 10 and appendix C.2)."""

    is_discrete: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True

    logistic_scale: Positive = 0.2
    """s of the logistic distribution, in [-1, 1], whose standard deviation is 1.81 s; the initial value if it is
    learned"""
    scale: ScaleName = "shared"
    """fixed; shared: one learned number; each: predicted for each dimension"""

    def __post_init__(self) -> None:
        refuse_small_std("logistic_scale", self.logistic_scale)

    def decoder_head(self, backbone: Backbone, spec: Spec, latent: tuple[int, ...]) -> DecoderHead:
        self.check(spec)
        return DecoderHead(backbone, spec, latent, self.scale, self.logistic_scale)

    def log_prob(self, out: DecoderOutput, x: Tensor) -> Tensor:
        """``log (sigmoid(b) - sigmoid(a))``, a and b the edges of the level; the first and the last reach to infinity.

        ``sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a-b))``, of which no factor is lost to rounding.
        """
        rate = (-out.log_scale).exp()
        a, b = ((x - out.location + d) * rate for d in (-LEVEL, LEVEL))
        black, white = x < -1 + LEVEL, x > 1 - LEVEL
        between = F.logsigmoid(b) + F.logsigmoid(-a) + (-torch.expm1(-2 * LEVEL * rate)).log()
        each = torch.where(black, F.logsigmoid(b), torch.where(white, F.logsigmoid(-a), between))
        return each.flatten(1).sum(1)


def refuse_small_std(name: str, value: float) -> None:
    """``ValueError`` for a scale below half a grey level."""
    if not value > LEVEL:
        raise ValueError(f"{name}: given {value}; allowed above 1/255, half a grey level in [-1, 1]; try 0.1")


LIKELIHOODS: Mapping[str, type[Likelihood]] = {
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "discretised-logistic": DiscretisedLogistic,
}
