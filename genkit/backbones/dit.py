"""The diffusion transformer with adaLN-Zero, for signals (C, T) and images (C, H, W)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, MultipleOf
from jaxtyping import Float
from torch import Tensor, nn

from genkit.backbones.blocks import (
    CONV,
    Attention,
    crop_to,
    modulate,
    pad_to,
    remat,
    require_fraction,
    require_positive,
    zero_init,
)
from genkit.backbones.dropout import Dropout
from genkit.backbones.embed import Conditioner, Routed, grid_positions
from genkit.config.numbers import Fraction, Layers, Width
from genkit.core import NO_COND, Backbone, Cond, Spec

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


@dataclass(frozen=True)
class DiT(Backbone):
    """Diffusion transformer (Peebles & Xie 2023), for ``(C, T)`` and ``(C, H, W)``.

    Sizes that ``patch`` does not divide are padded with zeros inside and cropped again.
    """

    width: Annotated[int, Ge(4), Le(1_000_000), MultipleOf(4)] = 128
    """features of a token; 6 blocks of 128 have 2M parameters and cost as much as the default U-Net"""
    depth: Layers = 6
    """blocks"""
    patch: Width = 2
    """side of a patch, which is one token: 16 tokens at 8x8, 256 at 32x32; 1 for short signals (action chunks)"""
    head_size: Width = 64
    """features of an attention head; 64 as in the paper's larger models"""
    ratio: Width = 4
    """hidden width of the MLP, in widths"""
    dropout: Fraction = 0.0
    """dropout inside the blocks; 0 as in the paper"""
    checkpoint: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""

    def __post_init__(self):
        require_positive("DiT", width=(self.width,), depth=(self.depth,), patch=(self.patch,))
        require_positive("DiT", head_size=(self.head_size,), ratio=(self.ratio,))
        if self.width % 4:
            raise ValueError(f"DiT: width is {self.width}; needs a multiple of 4, for sine and cosine on two axes")
        require_fraction("DiT", dropout=self.dropout)

    def denoiser(self, spec: Spec) -> nn.Module:
        return DiTDenoiser(self, spec)

    def encoder(self, spec: Spec, out: tuple[int, ...]) -> nn.Module:
        return DiTEncoder(self, spec, out)

    def decoder(self, spec: Spec, inp: tuple[int, ...]) -> nn.Module:
        return DiTDecoder(self, spec, inp)


def xavier(layer: nn.Module) -> None:
    """Initialise a linear layer as the paper does: Xavier weights, zero biases."""
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


class DiTBlock(nn.Module):
    """adaLN-Zero block (Peebles & Xie 2023, figure 3); with tokens, cross-attention between its two halves."""

    def __init__(self, cfg: DiT, context: int):
        super().__init__()
        d = cfg.width
        self.emb = nn.Linear(d, 6 * d)
        self.attention = Attention(d, cfg.head_size)
        self.cross_norm = nn.LayerNorm(d) if context else None
        self.cross = Attention(d, cfg.head_size, context) if context else None
        self.layer1 = nn.Linear(d, cfg.ratio * d)
        self.layer2 = nn.Linear(cfg.ratio * d, d)
        self.dropout = Dropout(cfg.dropout)
        self.apply(xavier)
        zero_init(self.emb)
        if self.cross:
            zero_init(self.cross.out)

    def forward(self, h: Float[Tensor, "b n d"], emb: Float[Tensor, "b d"], tokens: Tensor | None, mask: Tensor | None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.emb(emb).chunk(6, 1)
        h = torch.addcmul(h, gate1[:, None], self.attention(modulate(h, shift1, scale1)))
        if self.cross and self.cross_norm:
            h = h + self.cross(self.cross_norm(h), tokens, mask)
        y = F.gelu(self.layer1(modulate(h, shift2, scale2)), approximate="tanh")
        return torch.addcmul(h, gate2[:, None], self.layer2(self.dropout(y)))


class Trunk(nn.Module):
    """Patches, positions, conditions and blocks, which all networks of the family share."""

    def __init__(self, cfg: DiT, spec: Spec, channels: int, time: bool):
        super().__init__()
        if len(spec.shape) - 1 not in CONV:
            raise ValueError(
                f"DiT: given samples of shape {spec.shape}; allowed (C, T) or (C, H, W); try --backbone=mlp"
            )
        d, self.size, self.checkpoint = cfg.width, spec.shape[1:], cfg.checkpoint
        self.grid = tuple(-(-n // cfg.patch) for n in self.size)
        self.padded = tuple(n * cfg.patch for n in self.grid)
        self.cond = Conditioner(spec, d, time)
        channels += self.cond.num_channels
        self.patches = CONV[len(self.size)](channels, d, cfg.patch, cfg.patch) if channels else None
        self.positions: Tensor
        self.register_buffer("positions", grid_positions(self.grid, d), persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(cfg, d if self.cond.has_tokens else 0) for _ in range(cfg.depth))
        self.emb_last = nn.Linear(d, 2 * d)
        self.cond.apply(xavier)
        zero_init(self.emb_last)

    def shard_blocks(self) -> list[nn.Module]:
        """The modules that sharded training gathers one by one."""
        return list(self.blocks)

    def conditions(self, like: Tensor, label: Tensor | None, cond: Cond) -> Routed:
        """The embedded conditions, with the activation that every block would otherwise apply itself."""
        c = self.cond(like, self.size, label, cond)
        return c._replace(emb=F.silu(c.emb))

    def forward(self, x: Tensor | None, tokens: Tensor | None, c: Routed) -> Float[Tensor, "b d *grid"]:
        """From a map ``x`` ``[B, C, *size]`` or from ``tokens`` ``[B, N, D]``; Image conditions are added to either."""
        h = (self.positions if tokens is None else tokens + self.positions).expand(len(c.emb), -1, -1)
        if self.patches is not None:
            maps = torch.cat([v for v in (x, c.channels) if v is not None], 1)
            h = h + self.patches(pad_to(maps, self.padded)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = remat(block, self.checkpoint, h, c.emb, c.tokens, c.mask)
        h = modulate(h, *self.emb_last(c.emb).chunk(2, 1))
        return h.transpose(1, 2).unflatten(2, self.grid)


class DiTDenoiser(nn.Module):
    """``(x [B, *S], label [B], cond) -> [B, *S]``. Zero when initialised."""

    def __init__(self, cfg: DiT, spec: Spec):
        super().__init__()
        self.trunk = Trunk(cfg, spec, spec.shape[0], time=True)
        self.last = zero_init(TRANSPOSED[len(spec.shape) - 1](cfg.width, spec.shape[0], cfg.patch, cfg.patch))

    def forward(
        self, x: Float[Tensor, "b ..."], label: Float[Tensor, " b"], cond: Cond = NO_COND
    ) -> Float[Tensor, "b ..."]:
        return crop_to(self.last(self.trunk(x, None, self.trunk.conditions(x, label, cond))), self.trunk.size)


class DiTEncoder(nn.Module):
    """``(x [B, *S], cond) -> [B, *out]``: a vector ``(D,)`` of the mean token, a map ``(C, *grid)`` token by token."""

    def __init__(self, cfg: DiT, spec: Spec, out: tuple[int, ...]):
        super().__init__()
        self.trunk = Trunk(cfg, spec, spec.shape[0], time=False)
        require_grid(self.trunk, cfg, out)
        self.is_map = len(out) > 1
        self.last = CONV[1](cfg.width, out[0], 1)

    def forward(self, x: Float[Tensor, "b ..."], cond: Cond = NO_COND) -> Tensor:
        h = self.trunk(x, None, self.trunk.conditions(x, None, cond)).flatten(2)
        h = self.last(h if self.is_map else h.mean(2, keepdim=True))
        return h.unflatten(2, self.trunk.grid) if self.is_map else h[:, :, 0]


class DiTDecoder(nn.Module):
    """``(z [B, *inp], cond) -> [B, *S]``: a vector is added to every token, a map gives one vector to each token."""

    def __init__(self, cfg: DiT, spec: Spec, inp: tuple[int, ...]):
        super().__init__()
        self.trunk = Trunk(cfg, spec, 0, time=False)
        require_grid(self.trunk, cfg, inp)
        self.first = nn.Linear(inp[0], cfg.width)
        self.last = TRANSPOSED[len(spec.shape) - 1](cfg.width, spec.shape[0], cfg.patch, cfg.patch)

    def forward(self, z: Float[Tensor, "b c *grid"], cond: Cond = NO_COND) -> Tensor:
        tokens = z.flatten(2).transpose(1, 2) if z.ndim > 2 else z[:, None]
        h = self.trunk(None, self.first(tokens), self.trunk.conditions(z, None, cond))
        return crop_to(self.last(h), self.trunk.size)


def require_grid(trunk: Trunk, cfg: DiT, latent: tuple[int, ...]) -> None:
    """``ValueError`` if a latent map has another size than the grid of tokens."""
    if len(latent) > 1 and tuple(latent[1:]) != trunk.grid:
        raise ValueError(
            f"DiT: given a latent of size {tuple(latent[1:])}; patch {cfg.patch} on {trunk.size} makes {trunk.grid}; "
            f"try --backbone.patch={max(1, math.ceil(trunk.size[0] / latent[1]))}"
        )
