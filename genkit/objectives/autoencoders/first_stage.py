"""The first stage of latent diffusion (Rombach et al. 2022): a map of latents that looks right when it is decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from genkit.core import NO_COND, Backbone, Batch, Cond, Denoiser, Generator, Loss, Phase, Spec, mean_flat
from genkit.objectives.adversarial.games import Hinge
from genkit.objectives.autoencoders.autoencoder import ERRORS, Autoencoding, ErrorName, Latent, Posterior, certain
from genkit.objectives.autoencoders.perceptual import Edges
from genkit.objectives.autoencoders.vq import Codebook, check_codebook, perplexity, straight_through

GAME = Hinge()  # the game of Esser et al.'s code
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
WIDTH = 32  # channels of the first layer of patches; each next one has twice as many


# --------------------------------------------------------------------------------------------------- the latents
class Coded(NamedTuple):
    """``z`` is what the decoder gets in training, ``cost`` ``[B]`` what its law costs."""

    z: Tensor
    cost: Tensor
    logs: dict[str, Tensor]


class Code(ABC):
    """What the encoder's answer means, and what keeps latents near a law that a model can learn."""

    parts: ClassVar[tuple[str, ...]] = ()

    def answers(self, latent: Latent) -> Latent:
        """The shape of the encoder's answer."""
        return latent

    def memory(self, latent: Latent) -> dict[str, nn.Module]:
        return {}

    @abstractmethod
    def posterior(self, nets: Mapping[str, nn.Module], answer: Tensor) -> Posterior: ...

    @abstractmethod
    def learn(self, nets: Mapping[str, nn.Module], answer: Tensor, batch: Batch) -> Coded: ...

    def nearest(self, nets: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        return z

    def after_step(self, nets: Mapping[str, nn.Module]) -> None:  # noqa: B027  (a posterior has nothing to settle)
        """What moves without a gradient."""


@dataclass(frozen=True)
class KL(Code):
    """Normal posteriors, pulled a little to N(0, 1)."""

    weight: Annotated[float, Ge(0)] = 1e-6
    """of the KL divergence, in nats a dimension of the sample; Rombach et al. (2022, section G)"""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight: given {self.weight}; allowed from 0")

    def answers(self, latent: Latent) -> Latent:
        return (2 * latent[0], *latent[1:])

    def posterior(self, nets: Mapping[str, nn.Module], answer: Tensor) -> Posterior:
        mean, log_var = answer.chunk(2, 1)
        return Posterior(mean, log_var.clamp(-30, 20))

    def learn(self, nets: Mapping[str, nn.Module], answer: Tensor, batch: Batch) -> Coded:
        q = self.posterior(nets, answer)
        kl = q.kl().flatten(1).sum(1)
        z = q.draw(batch.normal(*q.mean.shape[1:]))
        return Coded(z, self.weight * kl / batch.x[0].numel(), {"kl": kl.mean()})


@dataclass(frozen=True)
class Entries(Code):
    """Entries of a codebook (van den Oord et al. 2017), as in ``--objective=vq``."""

    parts: ClassVar[tuple[str, ...]] = ("codebook",)

    codes: Annotated[int, Ge(2)] = 256
    """entries of the codebook"""
    commit: Annotated[float, Ge(0)] = 0.25
    """weight of the distance from the encoder's answer to its entry"""
    decay: Annotated[float, Gt(0), Lt(1)] = 0.99
    """of the running means, per step"""
    revive: Annotated[float, Ge(0), Lt(1)] = 0.05
    """an entry used less than this share of the average one becomes a vector of the batch; 0: never"""

    def __post_init__(self) -> None:
        check_codebook(self.codes, self.commit, self.decay, self.revive)

    def memory(self, latent: Latent) -> dict[str, nn.Module]:
        return {"codebook": Codebook(self.codes, latent[0])}

    def posterior(self, nets: Mapping[str, nn.Module], answer: Tensor) -> Posterior:
        return certain(self.nearest(nets, answer))

    def nearest(self, nets: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        return nets["codebook"](z).code

    def learn(self, nets: Mapping[str, nn.Module], answer: Tensor, batch: Batch) -> Coded:
        codebook = cast(Codebook, nets["codebook"])
        found = codebook(answer)
        if codebook.training:
            codebook.gather(answer, found.entry, 1 - batch.uniform(*found.entry.shape[1:]))
        away = mean_flat((answer - found.code).square())
        use = found.entry.flatten().bincount(minlength=self.codes).float()
        logs = {"commitment": away.mean(), "perplexity": perplexity(use)}
        return Coded(straight_through(answer, found.code), self.commit * away, logs)

    def after_step(self, nets: Mapping[str, nn.Module]) -> None:
        cast(Codebook, nets["codebook"]).after_step(self.decay, self.revive)


CODES: Mapping[str, type[Code]] = {"kl": KL, "vq": Entries}


# ----------------------------------------------------------------------------------------------------- the patches
class Patches(nn.Module):
    """A score for each patch of a picture, ``[B, 1, h, w]`` (PatchGAN: Isola et al. 2017, section 3.2.2).

    Without batch norm: a sample's scores do not depend on the others. Small pictures have fewer layers.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        layers: list[nn.Module] = []
        width, last = WIDTH, shape[0]
        side = min(shape[1:])
        while side >= 4 and len(layers) < 6:
            layers += [nn.Conv2d(last, width, 4, 2, 1), nn.LeakyReLU(0.2)]
            width, last, side = 2 * width, width, side // 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(last, 1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Balance(nn.Module):
    """``|grad L_rec| / (|grad L_GAN| + 1e-6)`` at the decoder's last layer (Esser et al. 2021, eq. 7), of the step
    before: both gradients are gathered over all micro-batches and ranks, so that the weight is that of one batch."""

    weight: Tensor
    rec: Tensor
    gan: Tensor

    def __init__(self, like: Tensor):
        super().__init__()
        self.register_buffer("weight", torch.zeros(()))
        for name in ("rec", "gan"):  # empty at every checkpoint
            self.register_buffer(name, torch.zeros(like.shape), persistent=False)

    def gather(self, rec: Tensor, gan: Tensor, last: Tensor) -> None:
        for kept, loss in ((self.rec, rec), (self.gan, gan)):
            kept += torch.autograd.grad(loss.sum(), last, retain_graph=True)[0].to(kept)

    @torch.no_grad()
    def after_step(self) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.rec)
            dist.all_reduce(self.gan)
        if bool(self.gan.any()):
            self.weight.copy_((self.rec.norm() / (self.gan.norm() + 1e-6)).clamp(0, 1e4))  # their code's limit
        self.rec.zero_()
        self.gan.zero_()


def last_layer(decoder: nn.Module) -> nn.Parameter:
    """The weight of the decoder's last linear map or convolution."""
    found = [m for m in decoder.modules() if isinstance(m, LAYERS)]
    return cast(nn.Parameter, found[-1].weight)


# ---------------------------------------------------------------------------------------------------- the objective
@dataclass(frozen=True)
class FirstStage(Autoencoding):
    """An autoencoder for latent diffusion (Rombach et al. 2022, section 3.1): errors of numbers, of what they look like
    and, from step ``start`` on, of what a discriminator of patches sees. Its latents are for ``--codec``.

    Conditions are left to the model of latents, which decodes without: its networks are told none. The log has
    ``error``, ``perceptual`` (0: the same), the code's own terms and, with an adversary, its ``weight``.
    """

    is_generative: ClassVar[bool] = False
    usage: ClassVar[str] = "genkit train --objective=flow --codec {run}"

    latent: Latent = (4, 4, 4)
    """C h w, a size that fits the backbone; or D for a vector"""
    code: Any = field(default_factory=KL, metadata={"table": "genkit.objectives.autoencoders.first_stage:CODES"})
    """kl (normal posteriors) or vq (entries of a codebook)"""
    error: ErrorName = "l1"
    """what is small between sample and reconstruction; absolute values are the papers' choice"""
    perceptual: Annotated[float, Ge(0)] | None = None
    """weight of the difference in looks; None: 1 for pictures, 0 for other samples"""
    looks: Any = field(default_factory=Edges, metadata={"table": "genkit.objectives.autoencoders.perceptual:LOOKS"})
    """by what pictures are compared: gradient (edges), random (fixed filters), or vgg11 or vgg16 of a local file, which
    --objective.looks.weights names (LPIPS without its learned weights)"""
    adversary: Annotated[float, Ge(0)] = 0.0
    """weight of the discriminator's opinion, times the adaptive weight; Esser et al. (2021) have 0.8; 0: none"""
    start: Annotated[int, Ge(0)] = 1000
    """the step at which the discriminator comes: late, when pictures are nearly right"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.perceptual or 0) < 0 or self.adversary < 0 or self.start < 0:
            raise ValueError(
                f"given perceptual {self.perceptual}, adversary {self.adversary}, start {self.start}; allowed from 0"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        return ("encoder", "decoder", *self.code.parts)

    @property
    def phases(self) -> Sequence[Phase]:
        first = Phase("reconstruct", trains=("encoder", "decoder"))
        return (first, Phase("discriminator", trains=("discriminator",))) if self.adversary else (first,)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        if len(spec.shape) != 3 and (self.perceptual or self.adversary):
            raise ValueError(f"perceptual and adversary are for pictures; samples are {spec.shape}: take 0 for both")
        spec = self.told(spec)
        decoder = backbone.decoder(spec, self.latent)
        nets = {"encoder": backbone.encoder(spec, self.code.answers(self.latent)), "decoder": decoder}
        nets |= self.code.memory(self.latent)
        if len(spec.shape) == 3 and self.perceptual != 0:
            nets["looks"] = self.looks.network(spec.shape[0])
        if self.adversary:
            nets |= {"discriminator": Patches(spec.shape), "balance": Balance(last_layer(decoder))}
        return nets

    def setup(self, spec: Spec) -> None:
        if len(spec.shape) == 3 and self.perceptual != 0:
            self.looks.prepare()

    def told(self, spec: Spec) -> Spec:
        return Spec(spec.shape)

    def encode(self, nets: Mapping[str, nn.Module], x: Tensor, cond: Cond = NO_COND) -> Posterior:
        return self.code.posterior(nets, nets["encoder"](x).to(x))

    def decode(self, nets: Mapping[str, nn.Module], z: Tensor, cond: Cond = NO_COND) -> Tensor:
        return nets["decoder"](z).to(z)

    def nearest(self, nets: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        return self.code.nearest(nets, z)

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        return {"reconstruct": self.rebuild, "discriminator": self.judge}[phase](nets, batch)

    def rebuild(self, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        """The autoencoder's loss."""
        coded: Coded = self.code.learn(nets, nets["encoder"](batch.x).to(batch.x), batch)
        out = self.decode(nets, coded.z)
        rec = mean_flat(ERRORS[self.error](out - batch.x))
        logs = {"error": rec.mean(), **coded.logs}
        if "looks" in nets:
            apart = nets["looks"](out, batch.x)
            rec = rec + (1.0 if self.perceptual is None else self.perceptual) * apart
            logs["perceptual"] = apart.mean()
        if not self.adversary:
            return Loss(rec + coded.cost, logs)
        balance = cast(Balance, nets["balance"])
        logs["weight"] = balance.weight.clone()
        if not self.begun(batch.step):
            return Loss(rec + coded.cost, logs)
        score = mean_flat(nets["discriminator"](out).float())
        opinion = GAME.generator(score, score)
        last = last_layer(nets["decoder"])
        if torch.is_grad_enabled() and last.requires_grad and balance.training:
            balance.gather(rec, opinion, last)
        return Loss(rec + coded.cost + self.adversary * balance.weight * opinion, logs)

    def judge(self, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        """The discriminator's loss: which patches are of samples, which of reconstructions."""
        if not self.begun(batch.step):
            return Loss(0 * mean_flat(nets["discriminator"](batch.x)), {})
        with torch.no_grad():
            q = self.encode(nets, batch.x)
            out = self.decode(nets, q.draw(batch.normal(*self.latent)))
        real, fake = nets["discriminator"](torch.cat([batch.x, out])).float().split(len(batch))
        right = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        return Loss(mean_flat(GAME.critic(real, fake)), {"accuracy": right})

    def begun(self, step: int | None) -> bool:
        return step is None or step >= self.start

    def after_step(self, nets: Mapping[str, nn.Module], step: int) -> None:
        self.code.after_step(nets)
        if self.adversary:
            cast(Balance, nets["balance"]).after_step()

    def warning(self, record: Mapping[str, Any]) -> str | None:
        used = record.get("reconstruct/perplexity")
        if record["step"] < 500 or used is None or used >= 2:
            return None
        return f"codebook collapse: a perplexity of {used:.2f}; try --objective.code.revive 0.05 or a lower --lr"

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        raise ValueError(
            "autoencoder: draws nothing: it knows no law of its latents; a model of them does: genkit train --codec RUN"
        )
