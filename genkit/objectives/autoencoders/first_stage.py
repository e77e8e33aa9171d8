"""The first stage of latent diffusion (Rombach et al. 2022): an autoencoder trained for realistic pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from genkit.config.numbers import Fraction, Natural, NonNegative
from genkit.core import NO_COND, Backbone, Batch, Cond, Denoiser, Generator, Loss, Phase, Spec, mean_flat
from genkit.objectives.adversarial.losses import Hinge
from genkit.objectives.autoencoders.autoencoder import (
    RECONSTRUCTION_LOSSES,
    EncoderDecoder,
    LatentShape,
    Posterior,
    ReconstructionLoss,
    point_posterior,
)
from genkit.objectives.autoencoders.perceptual import EdgeDistance, PerceptualDistance
from genkit.objectives.autoencoders.vq import FIRST_WARNING, Codebook, perplexity, refuse_codebook, straight_through

PATCH_LOSS = Hinge()  # the loss of Esser et al.'s code
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
WIDTH = 32  # channels of the patch discriminator's first layer; each next one has twice as many


# --------------------------------------------------------------------------------------------------- the bottleneck
class Encoded(NamedTuple):
    """Latents ``z`` ``[B, *latent]`` for the decoder in training, and their regularisation ``cost`` ``[B]``."""

    z: Tensor
    cost: Tensor
    logs: dict[str, Tensor]


class Bottleneck(ABC):
    """What the encoder's output means, and what keeps the distribution of latents easy to learn."""

    codec_networks: ClassVar[tuple[str, ...]] = ()
    """names of the networks that encoding and decoding need besides encoder and decoder"""

    def encoder_shape(self, latent: LatentShape) -> LatentShape:
        """The shape of the encoder's output for latents of shape ``latent``."""
        return latent

    def networks(self, latent: LatentShape) -> dict[str, nn.Module]:
        """Its own networks."""
        return {}

    @abstractmethod
    def posterior(self, nets: Mapping[str, nn.Module], out: Tensor) -> Posterior:
        """The posterior of the encoder's output ``out``."""

    @abstractmethod
    def encode_in_training(self, nets: Mapping[str, nn.Module], out: Tensor, batch: Batch) -> Encoded:
        """Latents with a gradient, and their cost."""

    def quantize(self, nets: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        """The nearest latents that the decoder was trained on."""
        return z

    def after_step(self, nets: Mapping[str, nn.Module]) -> None:  # noqa: B027  (a normal posterior has nothing to move)
        """Move what changes without a gradient."""


@dataclass(frozen=True)
class KL(Bottleneck):
    """Normal posteriors, pulled slightly to N(0, 1)."""

    weight: NonNegative = 1e-6
    """weight of the KL divergence, in nats a dimension of the sample (Rombach et al. 2022, section G)"""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight: given {self.weight}; allowed from 0")

    def encoder_shape(self, latent: LatentShape) -> LatentShape:
        return (2 * latent[0], *latent[1:])

    def posterior(self, nets: Mapping[str, nn.Module], out: Tensor) -> Posterior:
        mean, log_var = out.chunk(2, 1)
        return Posterior(mean, log_var.clamp(-30, 20))

    def encode_in_training(self, nets: Mapping[str, nn.Module], out: Tensor, batch: Batch) -> Encoded:
        q = self.posterior(nets, out)
        kl = q.kl().flatten(1).sum(1)
        z = q.sample(batch.normal(*q.mean.shape[1:]))
        return Encoded(z, self.weight * kl / batch.x[0].numel(), {"kl": kl.mean()})


@dataclass(frozen=True)
class VectorQuantizer(Bottleneck):
    """Entries of a codebook (van den Oord et al. 2017), as in ``--objective=vq``."""

    codec_networks: ClassVar[tuple[str, ...]] = ("codebook",)

    codebook_size: Annotated[int, Ge(2)] = 256
    """entries of the codebook"""
    commitment_weight: NonNegative = 0.25
    """weight of the squared distance from the encoder's output to its entry"""
    ema_decay: Annotated[float, Gt(0), Lt(1)] = 0.99
    """decay of the running means per step"""
    restart_threshold: Fraction = 0.05
    """restart an entry, at a vector of the batch, if its use is below this fraction of the mean; 0: never"""

    def __post_init__(self) -> None:
        refuse_codebook(self.codebook_size, self.commitment_weight, self.ema_decay, self.restart_threshold)

    def networks(self, latent: LatentShape) -> dict[str, nn.Module]:
        return {"codebook": Codebook(self.codebook_size, latent[0])}

    def posterior(self, nets: Mapping[str, nn.Module], out: Tensor) -> Posterior:
        return point_posterior(self.quantize(nets, out))

    def quantize(self, nets: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        return nets["codebook"](z).vectors

    def encode_in_training(self, nets: Mapping[str, nn.Module], out: Tensor, batch: Batch) -> Encoded:
        codebook = cast(Codebook, nets["codebook"])
        quantized = codebook(out)
        if codebook.training:
            codebook.record(out, quantized.indices, 1 - batch.uniform(*quantized.indices.shape[1:]))
        commitment = mean_flat((out - quantized.vectors).square())
        use = codebook.count(quantized.indices)
        logs = {"commitment": commitment.mean(), "perplexity": perplexity(use)}
        return Encoded(straight_through(out, quantized.vectors), self.commitment_weight * commitment, logs)

    def after_step(self, nets: Mapping[str, nn.Module]) -> None:
        cast(Codebook, nets["codebook"]).update(self.ema_decay, self.restart_threshold)


BOTTLENECKS: Mapping[str, type[Bottleneck]] = {"kl": KL, "vq": VectorQuantizer}


# ------------------------------------------------------------------------------------------------- the discriminator
class PatchDiscriminator(nn.Module):
    """A score for each patch of a picture, ``[B, 1, h, w]`` (PatchGAN: Isola et al. 2017, section 3.2.2).

    It has no batch norm, so a sample's scores do not depend on the others. Small pictures have fewer layers.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        layers: list[nn.Module] = []
        channels, width, side = shape[0], WIDTH, min(shape[1:])
        while side >= 4 and len(layers) < 6:
            layers += [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
            channels, width, side = width, 2 * width, side // 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class AdaptiveWeight(nn.Module):
    """The adversarial term's weight ``|grad L_rec| / (|grad L_GAN| + 1e-6)`` (Esser et al. 2021, eq. 7).

    The gradients are those at the decoder's last layer in the step before, gathered over all micro-batches and ranks,
    so the weight is that of one batch.
    """

    weight: Tensor
    rec: Tensor
    gan: Tensor

    def __init__(self, like: Tensor):
        super().__init__()
        self.register_buffer("weight", torch.zeros(()))
        for name in ("rec", "gan"):  # empty at every checkpoint
            self.register_buffer(name, torch.zeros(like.shape), persistent=False)

    def record(self, rec: Tensor, gan: Tensor, last: Tensor) -> None:
        """Gather the gradients of both losses ``[B]`` at the parameter ``last``."""
        for total, loss in ((self.rec, rec), (self.gan, gan)):
            total += torch.autograd.grad(loss.sum(), last, retain_graph=True)[0].to(total)

    @torch.no_grad()
    def update(self) -> None:
        """Set the weight from the gradients gathered on all ranks since the last update."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.rec)
            dist.all_reduce(self.gan)
        weight = (self.rec.norm() / (self.gan.norm() + 1e-6)).clamp(0, 1e4)  # their code's limit
        self.weight.copy_(torch.where(self.gan.any(), weight, self.weight))
        self.rec.zero_()
        self.gan.zero_()


def last_layer(decoder: nn.Module) -> nn.Parameter:
    """The weight of the decoder's last linear map or convolution."""
    return cast(nn.Parameter, [m for m in decoder.modules() if isinstance(m, LAYERS)][-1].weight)


# ---------------------------------------------------------------------------------------------------- the objective
@dataclass(frozen=True)
class FirstStage(EncoderDecoder):
    """An autoencoder for latent diffusion (Rombach et al. 2022, section 3.1), for ``--codec``.

    Its loss is the reconstruction error, a perceptual distance and, from step ``adversarial_start`` on, the loss
    against a patch discriminator. Conditions are left to the model of latents, so its networks see none. The log has
    ``error``, ``perceptual`` (0: identical), the bottleneck's terms and, with a discriminator, its ``weight``.
    """

    is_generative: ClassVar[bool] = False
    usage: ClassVar[str] = "genkit train --objective=flow --codec {run}"

    latent: LatentShape = (4, 4, 4)
    """shape of the latent: C h w, a size that fits the backbone; or D for a vector"""
    bottleneck: Any = field(
        default_factory=KL, metadata={"table": "genkit.objectives.autoencoders.first_stage:BOTTLENECKS"}
    )
    """kl (normal posteriors) or vq (entries of a codebook)"""
    reconstruction_loss: ReconstructionLoss = "l1"
    """error between sample and reconstruction: squared (l2) or absolute (l1, the papers' choice)"""
    perceptual_weight: NonNegative | None = None
    """weight of the perceptual distance; None: 1 for pictures, 0 for other samples"""
    perceptual: PerceptualDistance = field(
        default_factory=EdgeDistance,
        metadata={"table": "genkit.objectives.autoencoders.perceptual:PERCEPTUAL_DISTANCES"},
    )
    """the perceptual distance: gradient (edges), random (fixed filters), or vgg11 or vgg16 from a local file, which
    --objective.perceptual.weights names (LPIPS without its learned weights)"""
    adversarial_weight: NonNegative = 0.0
    """weight of the adversarial term, times the adaptive weight; 0.8 in Esser et al. (2021); 0: no discriminator"""
    adversarial_start: Natural = 1000
    """first step of the discriminator, late enough that pictures are nearly right"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.perceptual_weight or 0) < 0 or self.adversarial_weight < 0 or self.adversarial_start < 0:
            raise ValueError(
                f"given perceptual_weight {self.perceptual_weight}, adversarial_weight {self.adversarial_weight}, "
                f"adversarial_start {self.adversarial_start}; allowed from 0"
            )

    @property
    def codec_networks(self) -> tuple[str, ...]:
        return ("encoder", "decoder", *self.bottleneck.codec_networks)

    @property
    def needs_whole_networks(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """With an adversary: its adaptive weight reads the decoder's last layer."""
        return self.adversarial_weight > 0

    @property
    def phases(self) -> Sequence[Phase]:
        reconstruct = Phase("reconstruct", trains=("encoder", "decoder"))
        if not self.adversarial_weight:
            return (reconstruct,)
        return (reconstruct, Phase("discriminator", trains=("discriminator",)))

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        if len(spec.shape) != 3 and (self.perceptual_weight or self.adversarial_weight):
            raise ValueError(
                f"perceptual_weight and adversarial_weight are for pictures; samples are {spec.shape}: take 0 for both"
            )
        spec = self.codec_spec(spec)
        decoder = backbone.decoder(spec, self.latent)
        nets = {"encoder": backbone.encoder(spec, self.bottleneck.encoder_shape(self.latent)), "decoder": decoder}
        nets |= self.bottleneck.networks(self.latent)
        if self.is_perceptual(spec):
            nets["looks"] = self.perceptual.network(spec.shape[0])
        if self.adversarial_weight:
            nets |= {"discriminator": PatchDiscriminator(spec.shape), "balance": AdaptiveWeight(last_layer(decoder))}
        return nets

    def setup(self, spec: Spec) -> None:
        if self.is_perceptual(spec):
            self.perceptual.setup()

    def is_perceptual(self, spec: Spec) -> bool:
        """Whether samples of this shape are compared by the perceptual distance."""
        return len(spec.shape) == 3 and self.perceptual_weight != 0

    def codec_spec(self, spec: Spec) -> Spec:
        return Spec(spec.shape)

    def encode(self, nets: Mapping[str, nn.Module], x: Tensor, cond: Cond = NO_COND) -> Posterior:
        return self.bottleneck.posterior(nets, nets["encoder"](x).to(x))

    def decode(self, nets: Mapping[str, nn.Module], z: Tensor, cond: Cond = NO_COND) -> Tensor:
        return nets["decoder"](z).to(z)

    def quantize(self, nets: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        return self.bottleneck.quantize(nets, z)

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        return {"reconstruct": self.autoencoder_loss, "discriminator": self.discriminator_loss}[phase](nets, batch)

    def autoencoder_loss(self, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        """The loss of encoder and decoder."""
        # reconstruction: the numbers, and how they look
        encoded: Encoded = self.bottleneck.encode_in_training(nets, nets["encoder"](batch.x).to(batch.x), batch)
        out = self.decode(nets, encoded.z)
        rec = mean_flat(RECONSTRUCTION_LOSSES[self.reconstruction_loss](out - batch.x))
        logs = {"error": rec.mean(), **encoded.logs}
        if "looks" in nets:
            distance = nets["looks"](out, batch.x)
            rec = rec + (1.0 if self.perceptual_weight is None else self.perceptual_weight) * distance
            logs["perceptual"] = distance.mean()
        if not self.adversarial_weight:
            return Loss(rec + encoded.cost, logs)
        # the adversarial term, with the adaptive weight of the step before
        adaptive = cast(AdaptiveWeight, nets["balance"])
        logs["weight"] = adaptive.weight.clone()
        if not self.is_adversarial(batch.step):
            return Loss(rec + encoded.cost, logs)
        score = mean_flat(nets["discriminator"](out).float())
        adversarial = PATCH_LOSS.generator_loss(score, score)
        last = last_layer(nets["decoder"])
        if torch.is_grad_enabled() and last.requires_grad and adaptive.training:
            adaptive.record(rec, adversarial, last)
        return Loss(rec + encoded.cost + self.adversarial_weight * adaptive.weight * adversarial, logs)

    def validate(self, nets: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        # without the discriminator, which moves: its scores at two steps cannot be compared
        return {"loss": replace(self, adversarial_weight=0.0).autoencoder_loss(nets, batch).per_sample}

    def discriminator_loss(self, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        """The discriminator's loss: which patches are of samples, which of reconstructions."""
        if not self.is_adversarial(batch.step):
            return Loss(0 * mean_flat(nets["discriminator"](batch.x)), {})
        with torch.no_grad():
            q = self.encode(nets, batch.x)
            out = self.decode(nets, q.sample(batch.normal(*self.latent)))
        real, fake = nets["discriminator"](torch.cat([batch.x, out])).float().split(len(batch))
        accuracy = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        return Loss(mean_flat(PATCH_LOSS.discriminator_loss(real, fake)), {"accuracy": accuracy})

    def is_adversarial(self, step: int | None) -> bool:
        """Whether the discriminator takes part at this step; outside training (None) it does."""
        return step is None or step >= self.adversarial_start

    def after_step(self, nets: Mapping[str, nn.Module], step: int) -> None:
        self.bottleneck.after_step(nets)
        if self.adversarial_weight:
            cast(AdaptiveWeight, nets["balance"]).update()

    def warning(self, record: Mapping[str, Any]) -> str | None:
        used = record.get("reconstruct/perplexity")
        if record["step"] < FIRST_WARNING or used is None or used >= 2:
            return None
        return (
            f"codebook collapse: a perplexity of {used:.2f}; try --objective.bottleneck.restart-threshold 0.05 or a "
            "lower --lr"
        )

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        raise ValueError(
            "autoencoder: draws nothing: its latents have no distribution; train a model: genkit train --codec RUN"
        )
