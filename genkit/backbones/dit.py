"""The diffusion transformer with adaLN-Zero, for signals (C, T) and images (C, H, W)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, MultipleOf
from jaxtyping import Float
from torch import Tensor, nn

from genkit.backbones.blocks import (
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
from genkit.backbones.embed import Conditioner, Routed, grid_angles, grid_positions
from genkit.backbones.patches import NUM_AXES, embed_patches, unembed_patches
from genkit.backbones.presets import DIT_PRESETS, describe_preset, require_filled
from genkit.config.names import NameIn
from genkit.config.numbers import Fraction, Layers, Natural, Positive, Width
from genkit.core import NO_COND, Backbone, Cond, Spec
from genkit.core.weights import Fused


@dataclass(frozen=True)
class DiT(Backbone):
    """Diffusion transformer (Peebles & Xie 2023), for ``(C, T)`` and ``(C, H, W)``.

    Sizes that ``patch`` does not divide are padded with zeros inside and cropped again.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = DIT_PRESETS

    preset: Annotated[str, NameIn("genkit.backbones.presets:DIT_PRESETS")] | None = None
    """a published network, whose settings are used where none are given: XL/2 has patches of 2x2"""
    width: Annotated[int, Ge(4), Le(1_000_000), MultipleOf(4)] = 128
    """features of a token; 6 blocks of 128 have 2M parameters and cost as much as the default U-Net"""
    depth: Layers = 6
    """blocks"""
    patch: Width = 2
    """side of a patch, which is one token: 16 tokens at 8x8, 256 at 32x32; 1 for short signals (action chunks)"""
    head_size: Width = 64
    """features of an attention head; 64 as in the paper's larger models"""
    ratio: Width = 4
    """hidden width of the MLP, in widths; of swiglu two thirds of it, which has three matrices instead of two"""
    norm: Literal["layer", "rms"] = "layer"
    """norm that the conditions modulate: layer norm, or RMSNorm, which does not subtract the mean"""
    qk_norm: bool = False
    """normalise queries and keys of each head by RMSNorm, with learned scales"""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """MLP of the blocks: GELU as in the paper, or SwiGLU (Shazeer 2020)"""
    rope: bool = False
    """rotary positions in attention, axis by axis, besides the fixed ones that are added to the tokens"""
    bottleneck: Natural = 0
    """features between the two layers that embed a patch (JiT, Li & He 2025); 0: one layer, without a bottleneck"""
    class_tokens: Natural = 0
    """tokens that are the embedded conditions with learned positions, and attend with the others (JiT); 0: none"""
    class_tokens_start: Natural = 0
    """block at which the class tokens join"""
    registers: Natural = 0
    """learned tokens that attend with the others and are dropped at the end (Darcet et al. 2024)"""
    waves: Width = 32
    """sinusoids of the time embedding"""
    time_scale: Positive = 1000.0
    """factor of the time in its sinusoids; 1 in flows of other programs (genkit import)"""
    norm_eps: Positive = 1e-5
    """what layer norm adds to the variance; 1e-6 in the paper's code"""
    dropout: Fraction = 0.0
    """dropout inside the blocks; 0 as in the paper"""
    checkpoint: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""

    def __post_init__(self):
        require_positive("DiT", width=(self.width,), depth=(self.depth,), patch=(self.patch,))
        require_positive("DiT", head_size=(self.head_size,), ratio=(self.ratio,))
        if self.width % 4:
            raise ValueError(f"DiT: width is {self.width}; needs a multiple of 4, for sine and cosine on two axes")
        require_positive("DiT", waves=(self.waves,))
        require_fraction("DiT", dropout=self.dropout)
        require_filled(self)
        if self.class_tokens_start >= self.depth:
            raise ValueError(f"DiT: class_tokens_start is {self.class_tokens_start}; allowed 0 to {self.depth - 1}, as "
                             f"depth is {self.depth}")  # fmt: skip
        if self.rope and self.actual_head_size % 4:
            raise ValueError(f"DiT: rope rotates pairs on two axes, and a head has {self.actual_head_size} features; "
                             "needs a multiple of 4")  # fmt: skip

    @property
    def actual_head_size(self) -> int:
        """Features of a head: all of them if ``head_size`` does not divide ``width``."""
        return self.head_size if self.width % self.head_size == 0 else self.width

    def notes(self, spec: Spec) -> Sequence[str]:
        """The preset, and what replaces its settings."""
        return describe_preset(self)

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
        d, self.rms, self.gated = cfg.width, cfg.norm == "rms", cfg.mlp == "swiglu"
        self.eps = cfg.norm_eps
        hidden = cfg.ratio * d * 2 // 3 if self.gated else cfg.ratio * d
        self.emb = nn.Linear(d, 6 * d)
        self.attention = Attention(d, cfg.head_size, qk_norm=cfg.qk_norm)
        self.cross_norm = nn.LayerNorm(d) if context else None
        self.cross = Attention(d, cfg.head_size, context) if context else None
        self.layer1 = nn.Linear(d, 2 * hidden if self.gated else hidden)
        self.layer2 = nn.Linear(hidden, d)
        self.dropout = Dropout(cfg.dropout)
        self.apply(xavier)
        zero_init(self.emb)
        if self.cross:
            zero_init(self.cross.out)

    def fused_weights(self) -> dict[str, Fused]:
        """Shift, scale and gate of both halves, and the gate of SwiGLU."""
        return {"emb.weight": Fused(6), **({"layer1.weight": Fused(2)} if self.gated else {})}

    def forward(
        self,
        h: Float[Tensor, "b n d"],
        emb: Float[Tensor, "b d"],
        tokens: Tensor | None,
        mask: Tensor | None,
        angles: Tensor | None = None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.emb(emb).chunk(6, 1)
        y = self.attention(modulate(h, shift1, scale1, self.rms, self.eps), angles=angles)
        h = torch.addcmul(h, gate1[:, None], y)
        if self.cross and self.cross_norm:
            h = h + self.cross(self.cross_norm(h), tokens, mask)
        y = self.layer1(modulate(h, shift2, scale2, self.rms, self.eps))
        if self.gated:
            gate, y = y.chunk(2, -1)
            y = F.silu(gate) * y
        else:
            y = F.gelu(y, approximate="tanh")
        return torch.addcmul(h, gate2[:, None], self.layer2(self.dropout(y)))


class Trunk(nn.Module):
    """Patches, positions, conditions and blocks, which all networks of the family share."""

    def __init__(self, cfg: DiT, spec: Spec, channels: int, time: bool):
        super().__init__()
        if len(spec.shape) - 1 not in NUM_AXES:
            raise ValueError(
                f"DiT: given samples of shape {spec.shape}; allowed (C, T) or (C, H, W); try --backbone=mlp"
            )
        d, self.size, self.cfg = cfg.width, spec.shape[1:], cfg
        self.grid = tuple(-(-n // cfg.patch) for n in self.size)
        self.padded = tuple(n * cfg.patch for n in self.grid)
        self.cond = Conditioner(spec, d, time, cfg.waves, cfg.time_scale)
        channels += self.cond.num_channels
        self.patches = self._patch_embedding(channels) if channels else None
        self.positions: Tensor
        self.register_buffer("positions", grid_positions(self.grid, d), persistent=False)
        self.angles: Tensor | None
        angles = grid_angles(self.grid, cfg.actual_head_size // 2) if cfg.rope else None
        self.register_buffer("angles", angles, persistent=False)
        self.registers = nn.Parameter(0.02 * torch.randn(cfg.registers, d)) if cfg.registers else None
        self.class_tokens = nn.Parameter(0.02 * torch.randn(cfg.class_tokens, d)) if cfg.class_tokens else None
        self.blocks = nn.ModuleList(DiTBlock(cfg, d if self.cond.has_tokens else 0) for _ in range(cfg.depth))
        self.emb_last = nn.Linear(d, 2 * d)
        self.cond.apply(xavier)
        zero_init(self.emb_last)

    def shard_blocks(self) -> list[nn.Module]:
        """The modules that sharded training gathers one by one."""
        return list(self.blocks)

    def fused_weights(self) -> dict[str, Fused]:
        """Shift and scale."""
        return {"emb_last.weight": Fused(2)}

    def edge_layers(self) -> list[nn.Module]:
        """The patch embedding."""
        return [] if self.patches is None else [self.patches]

    def _patch_embedding(self, channels: int) -> nn.Module:
        """One convolution, or two layers with a bottleneck between them (Li & He 2025, section 4.3)."""
        cfg, axes = self.cfg, len(self.size)
        if not cfg.bottleneck:
            return embed_patches(axes, channels, cfg.width, cfg.patch)
        first = embed_patches(axes, channels, cfg.bottleneck, cfg.patch, bias=False)
        return nn.Sequential(first, embed_patches(axes, cfg.bottleneck, cfg.width, 1))

    def conditions(self, like: Tensor, label: Tensor | None, cond: Cond) -> Routed:
        """The embedded conditions, with the activation that every block would otherwise apply itself."""
        c = self.cond(like, self.size, label, cond)
        return c._replace(emb=F.silu(c.emb))

    def further_tokens(self, block: int, c: Routed) -> Float[Tensor, "b k d"] | None:
        """The tokens that join the others before ``block``: registers, and class tokens."""
        joined = []
        if block == 0 and self.registers is not None:
            joined.append(self.registers.expand(len(c.emb), -1, -1))
        if block == self.cfg.class_tokens_start and self.class_tokens is not None:
            given = 0 if c.given is None else c.given[:, None]
            joined.append((given + self.class_tokens).expand(len(c.emb), -1, -1))
        return torch.cat(joined, 1) if joined else None

    def forward(self, x: Tensor | None, tokens: Tensor | None, c: Routed) -> Float[Tensor, "b d *grid"]:
        """From a map ``x`` ``[B, C, *size]`` or from ``tokens`` ``[B, N, D]``; Image conditions are added to either."""
        h = (self.positions if tokens is None else tokens + self.positions).expand(len(c.emb), -1, -1)
        if self.patches is not None:
            maps = torch.cat([v for v in (x, c.channels) if v is not None], 1)
            h = h + self.patches(pad_to(maps, self.padded)).flatten(2).transpose(1, 2)
        count, angles = h.shape[1], self.angles
        for i, block in enumerate(self.blocks):
            if (further := self.further_tokens(i, c)) is not None:
                h = torch.cat([h, further.to(h.dtype)], 1)
                if angles is not None:
                    angles = F.pad(angles, (0, 0, 0, further.shape[1]))  # they have no position: they do not turn
            h = remat(block, self.cfg.checkpoint, h, c.emb, c.tokens, c.mask, angles)
        shift, scale = self.emb_last(c.emb).chunk(2, 1)
        h = modulate(h[:, :count], shift, scale, self.cfg.norm == "rms", self.cfg.norm_eps)
        return h.transpose(1, 2).unflatten(2, self.grid)


class DiTDenoiser(nn.Module):
    """``(x [B, *S], label [B], cond) -> [B, *S]``. Zero when initialised. Its features are the mean token."""

    def __init__(self, cfg: DiT, spec: Spec):
        super().__init__()
        self.feature_dim = cfg.width
        self.trunk = Trunk(cfg, spec, spec.shape[0], time=True)
        self.last = zero_init(unembed_patches(len(spec.shape) - 1, cfg.width, spec.shape[0], cfg.patch))

    def edge_layers(self) -> list[nn.Module]:
        """The last layer."""
        return [self.last]

    def forward(
        self, x: Float[Tensor, "b ..."], label: Float[Tensor, " b"], cond: Cond = NO_COND, features: bool = False
    ) -> Float[Tensor, "b ..."]:
        h = self.trunk(x, None, self.trunk.conditions(x, label, cond))
        return h.flatten(2).mean(2) if features else crop_to(self.last(h), self.trunk.size)


class DiTEncoder(nn.Module):
    """``(x [B, *S], cond) -> [B, *out]``: a vector ``(D,)`` of the mean token, a map ``(C, *grid)`` token by token."""

    def __init__(self, cfg: DiT, spec: Spec, out: tuple[int, ...]):
        super().__init__()
        self.trunk = Trunk(cfg, spec, spec.shape[0], time=False)
        require_grid(self.trunk, cfg, out)
        self.is_map = len(out) > 1
        self.last = embed_patches(1, cfg.width, out[0], 1)

    def edge_layers(self) -> list[nn.Module]:
        """The last layer."""
        return [self.last]

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
        self.last = unembed_patches(len(spec.shape) - 1, cfg.width, spec.shape[0], cfg.patch)

    def edge_layers(self) -> list[nn.Module]:
        """The first and the last layer."""
        return [self.first, self.last]

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
