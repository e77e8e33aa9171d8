"""Vector quantisation: an autoencoder whose latent is a map of entries of a codebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from genkit.config.numbers import Fraction, NonNegative
from genkit.core import NO_COND, Backbone, Batch, Cond, Denoiser, Generator, Loss, Phase, Spec, mean_flat
from genkit.objectives.autoencoders.autoencoder import (
    RECONSTRUCTION_LOSSES,
    EncoderDecoder,
    LatentShape,
    Posterior,
    ReconstructionLoss,
    point_posterior,
)

FIRST_WARNING = 500  # steps before which a codebook in little use has not collapsed yet


class Quantized(NamedTuple):
    """The nearest ``vectors`` of a codebook, ``[B, C, *grid]``, and their ``indices``, Int ``[B, *grid]``."""

    vectors: Tensor
    indices: Tensor


class Codebook(nn.Module):
    """``K`` vectors of ``C`` numbers, each following the mean of the encoder outputs that are nearest to it.

    The running means are those of van den Oord et al. (2017, appendix A.1). :meth:`record` only gathers a batch and
    :meth:`update` moves the codebook, once a step, so the result is that of one rank with one batch.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    new_counts: Tensor
    new_sums: Tensor
    restart_vectors: Tensor
    restart_priority: Tensor

    def __init__(self, num: int, dim: int):
        super().__init__()
        self.register_buffer("codes", torch.randn(num, dim))
        self.register_buffer("counts", torch.zeros(num))
        self.register_buffer("sums", torch.zeros(num, dim))
        # gathered during a step, empty at every checkpoint
        self.register_buffer("new_counts", torch.zeros(num), persistent=False)
        self.register_buffer("new_sums", torch.zeros(num, dim), persistent=False)
        self.register_buffer("restart_vectors", torch.zeros(num, dim), persistent=False)
        self.register_buffer("restart_priority", torch.zeros(num), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        """The entries nearest to ``z`` ``[B, C, *grid]``."""
        flat = z.movedim(1, -1).to(self.codes)
        with torch.autocast(z.device.type, enabled=False):  # neighbours would be mistaken in bf16
            distance = self.codes.square().sum(1) - 2 * flat @ self.codes.T  # without |z|^2, the same for all
        index = distance.argmin(-1)
        return Quantized(self.codes[index].movedim(-1, 1).to(z), index)

    def count(self, indices: Tensor) -> Tensor:
        """How often each entry occurs among ``indices``, ``[K]`` (``bincount`` would make the host wait)."""
        flat = indices.flatten()
        return torch.zeros_like(self.counts).index_add_(0, flat, self.counts.new_ones(len(flat)))

    @torch.no_grad()
    def record(self, z: Tensor, index: Tensor, priority: Tensor) -> None:
        """Count the vectors ``z`` ``[B, C, *grid]`` towards their entries, and keep some for restarts.

        Those of highest ``priority``, random in (0, 1], ``[B, *grid]``, are kept: a choice by row, however the batch is
        split.
        """
        flat = z.movedim(1, -1).flatten(0, -2).to(self.codes)
        index, priority = index.flatten(), priority.flatten().to(flat)
        finite = torch.isfinite(flat).all(1)
        flat = torch.where(finite[:, None], flat, 0.0)
        self.new_counts.index_add_(0, index, finite.to(flat))
        self.new_sums.index_add_(0, index, flat)
        self._keep_highest(
            torch.cat([self.restart_priority, priority * finite]), torch.cat([self.restart_vectors, flat])
        )

    def _keep_highest(self, priority: Tensor, vectors: Tensor) -> None:
        best = priority.topk(len(self.codes))
        self.restart_priority.copy_(best.values)
        self.restart_vectors.copy_(vectors[best.indices])

    @torch.no_grad()
    def update(self, decay: float, restart_threshold: float) -> None:
        """One step of the running means, over all ranks; then entries in little use restart at recorded vectors."""
        self._gather_ranks()
        # running means
        self.counts.lerp_(self.new_counts, 1 - decay)
        self.sums.lerp_(self.new_sums, 1 - decay)
        self.codes.copy_(torch.where((self.counts > 1e-12)[:, None], self.sums / self.counts[:, None], self.codes))
        # restarts: the n-th dead entry takes the n-th restart vector
        mean = self.counts.mean()
        dead = self.counts < restart_threshold * mean
        rank = (dead.cumsum(0) - 1).clamp(min=0)
        dead &= self.restart_priority[rank] > 0
        self.codes.copy_(torch.where(dead[:, None], self.restart_vectors[rank], self.codes))
        self.counts.copy_(torch.where(dead, mean, self.counts))
        self.sums.copy_(torch.where(dead[:, None], self.codes * mean, self.sums))
        for gathered in (self.new_counts, self.new_sums, self.restart_vectors, self.restart_priority):
            gathered.zero_()

    def _gather_ranks(self) -> None:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        dist.all_reduce(self.new_counts)
        dist.all_reduce(self.new_sums)
        priorities = [torch.empty_like(self.restart_priority) for _ in range(dist.get_world_size())]
        vectors = [torch.empty_like(self.restart_vectors) for _ in range(dist.get_world_size())]
        dist.all_gather(priorities, self.restart_priority)
        dist.all_gather(vectors, self.restart_vectors)
        self._keep_highest(torch.cat(priorities), torch.cat(vectors))


def refuse_codebook(size: int, commitment_weight: float, ema_decay: float, restart_threshold: float) -> None:
    """``ValueError`` for settings that no codebook can have."""
    if size < 2:
        raise ValueError(f"codebook_size: given {size}; a codebook needs 2 entries or more, say 256")
    if not commitment_weight >= 0 or not 0 < ema_decay < 1 or not 0 <= restart_threshold < 1:
        raise ValueError(
            f"given commitment_weight {commitment_weight}, ema_decay {ema_decay}, restart_threshold "
            f"{restart_threshold}; allowed: commitment_weight from 0, ema_decay in (0, 1), restart_threshold in [0, 1)"
        )


@dataclass(frozen=True)
class VQ(EncoderDecoder):
    """The VQ-VAE (van den Oord et al. 2017, eq. 3, with the codebook of its appendix A.1), with restarts of dead
    entries.

    The decoder's gradient reaches the encoder as if the entries were the encoder's own output (straight through).
    """

    is_generative: ClassVar[bool] = False
    usage: ClassVar[str] = "genkit report {run}"

    latent: LatentShape = (8, 4, 4)
    """shape of the latent: C h w for h x w entries of C numbers, a size that fits the backbone; or D for one entry"""
    codebook_size: Annotated[int, Ge(2)] = 256
    """entries of the codebook"""
    reconstruction_loss: ReconstructionLoss = "l2"
    """error between sample and reconstruction: squared (l2) or absolute (l1)"""
    commitment_weight: NonNegative = 0.25
    """weight of the squared distance from the encoder's output to its entry (the paper's beta)"""
    ema_decay: Annotated[float, Gt(0), Lt(1)] = 0.99
    """decay of the running means per step"""
    restart_threshold: Fraction = 0.05
    """restart an entry, at a vector of the batch, if its use is below this fraction of the mean (random restarts,
    Dhariwal et al. 2020, section 3.1); 0: never"""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_codebook(self.codebook_size, self.commitment_weight, self.ema_decay, self.restart_threshold)

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("vq", trains=("encoder", "decoder")),)

    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        return {
            "encoder": backbone.encoder(spec, self.latent),
            "decoder": backbone.decoder(spec, self.latent),
            "codebook": Codebook(self.codebook_size, self.latent[0]),
        }

    def encode(self, nets: Mapping[str, nn.Module], x: Tensor, cond: Cond = NO_COND) -> Posterior:
        return point_posterior(nets["codebook"](nets["encoder"](x, cond).to(x)).vectors)

    @property
    def codec_networks(self) -> tuple[str, ...]:
        return ("encoder", "decoder", "codebook")

    def quantize(self, nets: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        return nets["codebook"](z).vectors

    def decode(self, nets: Mapping[str, nn.Module], z: Tensor, cond: Cond = NO_COND) -> Tensor:
        return nets["decoder"](z, cond).to(z)

    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        z = nets["encoder"](batch.x, batch.cond).to(batch.x)
        codebook = cast(Codebook, nets["codebook"])
        quantized = codebook(z)
        if codebook.training:
            codebook.record(z, quantized.indices, 1 - batch.uniform(*quantized.indices.shape[1:]))
        out = self.decode(nets, straight_through(z, quantized.vectors), batch.cond)
        error = mean_flat(RECONSTRUCTION_LOSSES[self.reconstruction_loss](out - batch.x))
        commitment = mean_flat((z - quantized.vectors).square())
        use = codebook.count(quantized.indices)
        logs = {"error": error.mean(), "commitment": commitment.mean(), "perplexity": perplexity(use)}
        return Loss(error + self.commitment_weight * commitment, {**logs, "codes_used": (use > 0).sum().float()})

    def after_step(self, nets: Mapping[str, nn.Module], step: int) -> None:
        cast(Codebook, nets["codebook"]).update(self.ema_decay, self.restart_threshold)

    def warning(self, record: Mapping[str, Any]) -> str | None:
        if record["step"] < FIRST_WARNING or record["vq/perplexity"] >= 2:
            return None
        return (
            f"codebook collapse: a perplexity of {record['vq/perplexity']:.2f} of {self.codebook_size}; "
            "try --objective.restart-threshold 0.05 or a lower --lr"
        )

    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        raise ValueError("vq: draws nothing: its latents have no distribution; try genkit train --objective=vae")


def straight_through(z: Tensor, vectors: Tensor) -> Tensor:
    """``vectors``, with a gradient that goes to ``z`` unchanged (Bengio et al. 2013)."""
    return z + (vectors - z).detach()


def perplexity(counts: Tensor) -> Tensor:
    """``exp`` of the entropy of the frequencies: the number of entries, used equally, with the same entropy."""
    p = counts / counts.sum()
    return torch.special.entr(p).sum().exp()
