"""The magnitude-preserving U-Net of EDM2 (Karras et al. 2024, configuration G), for images (C, H, W).

Every layer keeps activations of unit variance: weights are used with unit norm per output, sums are averages of unit
norm, and there are no biases and no group norms. Only two kinds of learned gain change magnitudes, and they start at 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from genkit.backbones.blocks import (
    attend,
    crop_to,
    pad_to,
    remat,
    require_fraction,
    require_positive,
)
from genkit.backbones.dropout import Dropout
from genkit.backbones.embed import ScalarEmbed, embedder_of, module_name, require_routes
from genkit.backbones.presets import EDM2_PRESETS, describe_preset, require_filled
from genkit.config.names import NameIn
from genkit.config.numbers import Fraction, Layers, Width
from genkit.core import NO_COND, Backbone, Cond, Spec
from genkit.core.weights import Fused

EPSILON = 1e-4  # added to norms (Karras et al. 2024, eq. 47)
SKIP_BALANCE, LABEL_BALANCE = 0.3, 0.5  # t of mp_sum in blocks, and of time and conditions (table 6)
LARGEST = 256.0  # activations are clipped to +- this (table 6)


@dataclass(frozen=True)
class EDM2(Backbone):
    """Magnitude-preserving U-Net (Karras et al. 2024, config G), for ``(C, H, W)``.

    It takes Label, Vector, Scalar and Frames conditions. Sizes that do not halve evenly are padded and cropped.
    """

    routes: ClassVar[tuple[str, ...]] = ("global",)
    axes: ClassVar[tuple[int, ...]] = (2,)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = EDM2_PRESETS

    preset: Annotated[str, NameIn("genkit.backbones.presets:EDM2_PRESETS")] | None = None
    """a published network, whose settings are used where none are given"""
    width: Width = 32
    """channels at full size"""
    mults: tuple[Width, ...] = (1, 2, 4)
    """channels of each level, in widths; each level halves the size"""
    num_blocks: Layers = 1
    """residual blocks of a level on the way down; one more on the way up"""
    attention: tuple[Width, ...] = (16, 8)
    """shorter sides of the levels with attention; the middle always has it"""
    head_size: Width = 64
    """channels of an attention head; one head where it does not divide the channels"""
    dropout: Fraction = 0.0
    """dropout inside residual blocks"""
    checkpoint: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""

    def __post_init__(self):
        require_positive("EDM2", width=(self.width,), mults=self.mults)
        require_positive("EDM2", num_blocks=(self.num_blocks,), head_size=(self.head_size,))
        require_fraction("EDM2", dropout=self.dropout)
        require_filled(self)

    def denoiser(self, spec: Spec) -> nn.Module:
        return EDM2Denoiser(self, spec)

    def notes(self, spec: Spec) -> Sequence[str]:
        """The preset, and what replaces its settings."""
        return describe_preset(self)


# -------------------------------------------------------------------------------------- magnitude-preserving parts
def normalize(x: Tensor, axes: Sequence[int]) -> Tensor:
    """``x`` divided by its root mean square over ``axes`` (eq. 47 and 60), in float32 or wider inside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=tuple(axes), keepdim=True)
    return (wide / (EPSILON + norm / math.sqrt(math.prod(x.shape[a] for a in axes)))).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU divided by the root mean square that it gives a standard normal input (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)`` (eq. 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a: Float[Tensor, "b n ..."], b: Float[Tensor, "b m ..."], t: float = 0.5) -> Tensor:
    """``a`` and ``b`` joined along axis 1, with shares ``(1 - t)^2`` and ``t^2`` of the whole's variance (eq. 103)."""
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale / math.sqrt(n) * (1 - t)), b * (scale / math.sqrt(m) * t)], 1)


class MPLayer(nn.Module):
    """A linear layer (``size`` 0) or a convolution of ``size`` x ``size``, without bias, whose weights have unit norm.

    The stored weights have unit root mean square: they are brought back to it after each optimizer step (forced weight
    normalization, section 2.3), by :meth:`project_weights`.
    """

    def __init__(self, inp: int, out: int, size: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, inp, *([size] * 2 if size else [])))
        self.project_weights()

    @torch.no_grad()
    def project_weights(self) -> None:
        """Give the weights of each output unit root mean square."""
        self.weight.copy_(self._normal())

    def _normal(self) -> Tensor:
        return normalize(self.weight, range(1, self.weight.ndim))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self._normal() * (gain / math.sqrt(self.weight[0].numel()))
        return F.linear(x, weight) if x.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Gain(nn.Module):
    """A learned number that starts at 0."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        return self.value


class MPFourier(nn.Module):
    """Random waves of a time label ``[B] -> [B, dim]``: ``sqrt(2) cos(2 pi (f label + p))`` (eq. 75 and 76).

    Frequencies are normal and phases uniform; they are the same in every network of this width.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, dim: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        frequencies = torch.randn(dim, generator=generator, device="cpu")
        phases = torch.rand(dim, generator=generator, device="cpu")
        device = torch.empty(()).device  # that of the network
        self.register_buffer("frequencies", 2 * math.pi * frequencies.to(device), persistent=False)
        self.register_buffer("phases", 2 * math.pi * phases.to(device), persistent=False)

    def forward(self, label: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return math.sqrt(2) * (label[:, None] * self.frequencies + self.phases).cos()


class ConditionEmbed(nn.Module):
    """Time and conditions as one vector of unit variance, ``[B] -> [B, dim]`` (figure 21).

    Each condition is embedded as in other backbones, and its vector normalised (the paper normalises the table of
    classes over classes instead). Scalars are added to the sum, as they begin without effect.
    """

    def __init__(self, spec: Spec, waves: int, dim: int):
        super().__init__()
        self.waves = MPFourier(waves)
        self.time = MPLayer(waves, dim)
        self.names = tuple(spec.cond)
        self.embed = nn.ModuleDict({module_name(n): embedder_of(kind)(kind, dim) for n, kind in spec.cond.items()})

    def forward(self, label: Tensor, cond: Cond) -> Float[Tensor, "b d"]:
        emb = self.time(self.waves(label).to(self.time.weight.dtype))
        everyone = torch.ones(len(label), dtype=torch.bool, device=label.device)
        sees_any = cond.get("keep", everyone)
        given, scalars = [], []
        for name in self.names:
            embed = cast(Any, self.embed[module_name(name)])
            part = embed(cond[name], sees_any & cond.get(f"keep.{name}", everyone)) if name in cond else embed.null
            if isinstance(embed, ScalarEmbed):
                scalars.append(part)
            else:
                given.append(normalize(part.expand(emb.shape), (1,)))
        if given:
            together = sum(given[1:], given[0]) / math.sqrt(len(given))
            emb = mp_sum(emb, together, LABEL_BALANCE)
        return mp_silu(sum(scalars, emb))


class MPBlock(nn.Module):
    """A residual block of the encoder or the decoder, with attention by choice (figure 21)."""

    def __init__(self, cfg: EDM2, inp: int, out: int, emb: int, *, decodes: bool, resample: str = "", attends: bool):
        super().__init__()
        self.decodes, self.resample, self.checkpoint = decodes, resample, cfg.checkpoint
        self.conv1 = MPLayer(inp if decodes else out, out, 3)
        self.emb = MPLayer(emb, out)
        self.emb_gain = Gain()
        self.conv2 = MPLayer(out, out, 3)
        self.skip = MPLayer(inp, out, 1) if inp != out else None
        self.dropout = Dropout(cfg.dropout)
        self.heads = out // cfg.head_size if out % cfg.head_size == 0 else 1
        self.qkv = MPLayer(out, 3 * out, 1) if attends else None
        self.proj = MPLayer(out, out, 1) if attends else None

    def shard_blocks(self) -> list[nn.Module]:
        """The modules that sharded training gathers one by one: the block itself."""
        return [self]

    def fused_weights(self) -> dict[str, Fused]:
        """Queries, keys and values."""
        return {"qkv.weight": Fused(3, interleaved=True)}

    def forward(self, x: Float[Tensor, "b c h w"], emb: Float[Tensor, "b e"]) -> Tensor:
        return remat(self._forward, self.checkpoint, x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample:
            x = F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
        if not self.decodes:
            x = normalize(x if self.skip is None else self.skip(x), (1,))
        y = self.conv1(mp_silu(x))
        y = mp_silu(y * (1 + self.emb(emb, self.emb_gain()))[:, :, None, None].to(y.dtype))
        y = self.conv2(self.dropout(y))
        if self.decodes and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, y, SKIP_BALANCE)
        if self.qkv is not None and self.proj is not None:
            x = mp_sum(x, self.proj(self._attend(self.qkv(x))), SKIP_BALANCE)
        return x.clamp(-LARGEST, LARGEST)

    def _attend(self, qkv: Float[Tensor, "b c3 h w"]) -> Float[Tensor, "b c h w"]:
        """Cosine attention: queries, keys and values have unit root mean square (section 2.2)."""
        parts = qkv.flatten(2).unflatten(1, (self.heads, -1, 3)).permute(3, 0, 1, 4, 2)  # 3 B heads N d
        q, k, v = normalize(parts, (4,)).unbind(0)
        return attend(q, k, v).transpose(2, 3).flatten(1, 2).unflatten(2, qkv.shape[2:])


class EDM2Denoiser(nn.Module):
    """``(x [B, C, H, W], label [B], cond) -> [B, C, H, W]``. Zero when initialised. Its features are the mean of the
    middle."""

    def __init__(self, cfg: EDM2, spec: Spec):
        super().__init__()
        if len(spec.shape) != 3:
            raise ValueError(f"EDM2: given samples of shape {spec.shape}; allowed (C, H, W); try --backbone=unet")
        require_routes(cfg, spec, "--backbone=unet or --backbone=dit")
        self.size = spec.shape[1:]
        side = min(self.size)
        levels = max(i + 1 for i in range(len(cfg.mults)) if i == 0 or -(-side // 2**i) >= 4)
        self.padded = tuple(-(-n // 2 ** (levels - 1)) * 2 ** (levels - 1) for n in self.size)
        attends = [min(self.padded) // 2**i in cfg.attention for i in range(levels)]
        widths = [cfg.width * m for m in cfg.mults[:levels]]
        emb, self.feature_dim = max(widths), widths[-1]
        self.cond = ConditionEmbed(spec, widths[0], emb)

        have = widths[0]
        self.first = MPLayer(spec.shape[0] + 1, have, 3)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [have]
        for i, width in enumerate(widths):
            if i:
                self.down.append(MPBlock(cfg, have, have, emb, decodes=False, resample="down", attends=False))
                skips.append(have)
            for _ in range(cfg.num_blocks):
                self.down.append(MPBlock(cfg, have, width, emb, decodes=False, attends=attends[i]))
                skips.append(have := width)
        self.middle = nn.ModuleList(MPBlock(cfg, have, have, emb, decodes=True, attends=a) for a in (True, False))
        for i, width in reversed([*enumerate(widths)]):
            if i < levels - 1:
                self.up.append(MPBlock(cfg, have, have, emb, decodes=True, resample="up", attends=False))
            for _ in range(cfg.num_blocks + 1):
                self.up.append(MPBlock(cfg, have + skips.pop(), width, emb, decodes=True, attends=attends[i]))
                have = width
        self.last = MPLayer(have, spec.shape[0], 3)
        self.gain = Gain()

    def edge_layers(self) -> list[nn.Module]:
        """The first and the last layer."""
        return [self.first, self.last]

    def forward(
        self, x: Float[Tensor, "b ..."], label: Float[Tensor, " b"], cond: Cond = NO_COND, features: bool = False
    ) -> Float[Tensor, "b ..."]:
        emb = self.cond(label, cond)
        h = pad_to(torch.cat([x, torch.ones_like(x[:, :1])], 1), self.padded)  # the ones stand for biases
        h = self.first(h)
        skips = [h]
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        if features:
            return h.flatten(2).mean(2)
        for block in self.up:
            h = block(h if cast(MPBlock, block).resample else mp_cat(h, skips.pop()), emb)
        return crop_to(self.last(h, self.gain()), self.size)
