"""Vector quantisation: an autoencoder whose code is a map of entries of a codebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from genkit.core import NO_COND, Backbone, Batch, Cond, Denoiser, Generator, Loss, Phase, Spec, mean_flat
from genkit.objectives.autoencoders.autoencoder import ERRORS, Autoencoding, ErrorName, Latent, Posterior, certain


class Quantised(NamedTuple):
    """``code`` ``[B, C, *grid]`` are the nearest entries, ``entry`` ``[B, *grid]`` says which."""

    code: Tensor
    entry: Tensor


class Codebook(nn.Module):
    """``K`` vectors of ``C`` numbers, which follow the mean of the vectors that are nearest to them.

    The running means are those of van den Oord et al. (2017, appendix A.1). A batch is only gathered, and
    :meth:`after_step` moves the codebook, once a step: the answer is that of one rank with one batch.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    new_counts: Tensor
    new_sums: Tensor
    spare: Tensor
    luck: Tensor

    def __init__(self, num: int, dim: int):
        super().__init__()
        self.register_buffer("codes", torch.randn(num, dim))
        self.register_buffer("counts", torch.zeros(num))
        self.register_buffer("sums", torch.zeros(num, dim))
        gathered = {"new_counts": (num,), "new_sums": (num, dim), "spare": (num, dim), "luck": (num,)}
        for name, shape in gathered.items():  # empty at every checkpoint
            self.register_buffer(name, torch.zeros(shape), persistent=False)

    def forward(self, z: Tensor) -> Quantised:
        """The entries nearest to ``z`` ``[B, C, *grid]``."""
        flat = z.movedim(1, -1).to(self.codes)
        with torch.autocast(z.device.type, enabled=False):  # neighbours would be mistaken in bf16
            distance = self.codes.square().sum(1) - 2 * flat @ self.codes.T  # and |z|^2, the same for all
        index = distance.argmin(-1)
        return Quantised(self.codes[index].movedim(-1, 1).to(z), index)

    @torch.no_grad()
    def gather(self, z: Tensor, index: Tensor, luck: Tensor) -> None:
        """Count the vectors ``z`` ``[B, C, *grid]`` towards their entries, and keep the luckiest (``luck`` in (0, 1],
        ``[B, *grid]``) as spare entries: a choice by row, whatever the cut of the batch."""
        flat = z.movedim(1, -1).flatten(0, -2).to(self.codes)
        index, luck = index.flatten(), luck.flatten().to(flat)
        sound = torch.isfinite(flat).all(1)
        flat = torch.where(sound[:, None], flat, 0.0)
        self.new_counts.index_add_(0, index, sound.to(flat))
        self.new_sums.index_add_(0, index, flat)
        self.draw_lots(torch.cat([self.luck, luck * sound]), torch.cat([self.spare, flat]))

    def draw_lots(self, luck: Tensor, spare: Tensor) -> None:
        """Keep the luckiest K of some vectors."""
        best = luck.topk(len(self.codes))
        self.luck.copy_(best.values)
        self.spare.copy_(spare[best.indices])

    @torch.no_grad()
    def after_step(self, decay: float, revive: float) -> None:
        """One step of the running means, over all ranks; then entries that are hardly used become spare vectors."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.new_counts)
            dist.all_reduce(self.new_sums)
            everyone = [[torch.empty_like(v) for _ in range(dist.get_world_size())] for v in (self.luck, self.spare)]
            dist.all_gather(everyone[0], self.luck)
            dist.all_gather(everyone[1], self.spare)
            self.draw_lots(torch.cat(everyone[0]), torch.cat(everyone[1]))
        self.counts.lerp_(self.new_counts, 1 - decay)
        self.sums.lerp_(self.new_sums, 1 - decay)
        self.codes.copy_(torch.where((self.counts > 1e-12)[:, None], self.sums / self.counts[:, None], self.codes))
        mean = self.counts.mean()
        dead = self.counts < revive * mean
        rank = (dead.cumsum(0) - 1).clamp(min=0)  # the n-th dead entry takes the n-th spare vector
        dead &= self.luck[rank] > 0
        self.codes.copy_(torch.where(dead[:, None], self.spare[rank], self.codes))
        self.counts.copy_(torch.where(dead, mean, self.counts))
        self.sums.copy_(torch.where(dead[:, None], self.codes * mean, self.sums))
        for gathered in (self.new_counts, self.new_sums, self.spare, self.luck):
            gathered.zero_()


def check_codebook(codes: int, commit: float, decay: float, revive: float) -> None:
    """``ValueError`` for settings that no codebook can have."""
    if codes < 2:
        raise ValueError(f"codes: given {codes}; a codebook needs 2 entries or more, say 256")
    if not commit >= 0 or not 0 < decay < 1 or not 0 <= revive < 1:
        raise ValueError(
            f"given commit {commit}, decay {decay}, revive {revive}; "
            "allowed: commit from 0, decay in (0, 1), revive in [0, 1)"
        )


@dataclass(frozen=True)
class VQ(Autoencoding):
    """The VQ-VAE (van den Oord et al. 2017, eq. 3, with the codebook of its appendix A.1), and dead entries revived.

    The decoder's gradient reaches the encoder as if the code were the encoder's own answer (straight through).
    """

    is_generative: ClassVar[bool] = False
    usage: ClassVar[str] = "genkit report {run}"

    latent: Latent = (8, 4, 4)
    """C h w: h x w entries of C numbers, a size that fits the backbone; or D: a single entry"""
    codes: Annotated[int, Ge(2)] = 256
    """entries of the codebook"""
    error: ErrorName = "l2"
    """what is small between sample and reconstruction: squares or absolute values"""
    commit: Annotated[float, Ge(0)] = 0.25
    """weight of the distance from the encoder's answer to its entry (the paper's beta)"""
    decay: Annotated[float, Gt(0), Lt(1)] = 0.99
    """of the running means, per step"""
    revive: Annotated[float, Ge(0), Lt(1)] = 0.05
    """an entry used less than this share of the average one becomes a vector of the batch (Dhariwal et al. 2020,
    section 3.1: random restarts); 0: never"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_codebook(self.codes, self.commit, self.decay, self.revive)

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("vq", trains=("encoder", "decoder")),)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        return {
            "encoder": backbone.encoder(spec, self.latent),
            "decoder": backbone.decoder(spec, self.latent),
            "codebook": Codebook(self.codes, self.latent[0]),
        }

    def encode(self, nets: Mapping[str, nn.Module], x: Tensor, cond: Cond = NO_COND) -> Posterior:
        return certain(nets["codebook"](nets["encoder"](x, cond).to(x)).code)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("encoder", "decoder", "codebook")

    def nearest(self, nets: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        return nets["codebook"](z).code

    def decode(self, nets: Mapping[str, nn.Module], z: Tensor, cond: Cond = NO_COND) -> Tensor:
        return nets["decoder"](z, cond).to(z)

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        z = nets["encoder"](batch.x, batch.cond).to(batch.x)
        codebook = cast(Codebook, nets["codebook"])
        found = codebook(z)
        if codebook.training:
            codebook.gather(z, found.entry, 1 - batch.uniform(*found.entry.shape[1:]))
        out = self.decode(nets, straight_through(z, found.code), batch.cond)
        error = mean_flat(ERRORS[self.error](out - batch.x))
        away = mean_flat((z - found.code).square())
        use = found.entry.flatten().bincount(minlength=self.codes).float()
        logs = {"error": error.mean(), "commitment": away.mean(), "perplexity": perplexity(use)}
        return Loss(error + self.commit * away, {**logs, "codes_used": (use > 0).sum().float()})

    def after_step(self, nets: Mapping[str, nn.Module], step: int) -> None:
        cast(Codebook, nets["codebook"]).after_step(self.decay, self.revive)

    def warning(self, record: Mapping[str, Any]) -> str | None:
        if record["step"] < 500 or record["vq/perplexity"] >= 2:
            return None
        return (
            f"codebook collapse: a perplexity of {record['vq/perplexity']:.2f} of {self.codes}; "
            "try --objective.revive 0.05 or a lower --lr"
        )

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        raise ValueError("vq: draws nothing: it knows no law of its codes; a VAE does: genkit train --objective=vae")


def straight_through(z: Tensor, code: Tensor) -> Tensor:
    """``code``, with a gradient that goes to ``z`` unchanged (Bengio et al. 2013)."""
    return z + (code - z).detach()


def perplexity(counts: Tensor) -> Tensor:
    """``exp`` of the entropy of the frequencies: as many entries, used equally, would be as rich."""
    p = counts / counts.sum()
    return torch.special.entr(p).sum().exp()
