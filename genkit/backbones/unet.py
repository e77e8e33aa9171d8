"""The U-Net of DDPM and ADM for signals (C, T) and images (C, H, W)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from genkit.backbones.blocks import (
    BOX,
    CONV,
    FIR,
    Downsample,
    GroupNorm,
    MapAttention,
    Resample,
    ResBlock,
    Upsample,
    add_residual,
    crop_to,
    pad_to,
    remat,
    require_fraction,
    require_positive,
    zero_init,
)
from genkit.backbones.embed import Conditioner, Routed
from genkit.backbones.presets import UNET_PRESETS, describe_preset, require_filled
from genkit.config.names import NameIn
from genkit.config.numbers import Fraction, Layers, Positive, Width
from genkit.core import NO_COND, Backbone, Cond, Spec


@dataclass(frozen=True)
class UNet(Backbone):
    """U-Net (Ho et al. 2020; the residual blocks of Dhariwal & Nichol 2021), for ``(C, T)`` and ``(C, H, W)``.

    Levels with a shorter side under 4 are left out, so one default serves 8x8 (two levels) and 32x32 (three). Sizes
    that do not halve evenly are padded with zeros inside and cropped again.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = UNET_PRESETS

    preset: Annotated[str, NameIn("genkit.backbones.presets:UNET_PRESETS")] | None = None
    """a published network, whose settings are used where none are given"""
    width: Width = 32
    """channels at full size; on digits 48 needs more CPU seconds for the same loss"""
    mults: tuple[Width, ...] = (1, 2, 4)
    """channels of each level, in widths; each level halves the size"""
    num_blocks: Layers = 1
    """residual blocks of a level on the way down; one more on the way up"""
    attention: tuple[Width, ...] = (16,)
    """shorter sides of the levels with attention (14 or 7 for 28x28); the middle always has it"""
    head_size: Width = 64
    """channels of an attention head; 64 is 1.3 to 1.5 times faster than 8 at equal FLOPs, on CPUs"""
    up_attention: Literal["every", "last"] = "every"
    """blocks on the way up of a level with attention that have it: every one, or the last of the level (DDPM++)"""
    scale_shift: bool = True
    """scale and shift the second norm of a block by the embedding (ADM); off: add it to the features (DDPM)"""
    resample: Literal["conv", "block", "fir"] = "conv"
    """change of size: a convolution (DDPM), a residual block that averages pairs (BigGAN, ADM), or one with the filter
    1 3 3 1 (NCSN++)"""
    rescale: bool = False
    """divide the sums of residual blocks by sqrt(2), and project the skip connection where the size changes (NCSN++)"""
    residual_input: bool = False
    """add the input, convolved and halved level by level, on the way down (progressive growing, NCSN++)"""
    residual_border: bool = False
    """convolve that input also one place outside its border, where the filter reads it; off: zeros (fir only)"""
    stem: Width | None = None
    """channels of the first convolution. None: those of the first level"""
    waves: Width = 32
    """sinusoids of the time embedding"""
    wave_rates: tuple[float, ...] = ()
    """rates of these sinusoids, as many as there are, of networks of other programs (genkit import); none given: from
    1 down to nearly 1e-4, geometrically"""
    time_scale: Positive = 1000.0
    """factor of the time in its sinusoids; 1 in networks of other programs (genkit import)"""
    early_conditions: bool = False
    """add labels and vectors to the sinusoids, before the two layers of the time embedding (DDPM++, NCSN++ by Karras et
    al. 2022); off: after them"""
    norm_eps: Positive = 1e-5
    """added to the variance in norms; 1e-6 in DDPM++ and NCSN++"""
    dropout: Fraction = 0.0
    """dropout inside residual blocks; it costs as much as a convolution on a CPU"""
    checkpoint: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""

    def __post_init__(self):
        require_positive("UNet", width=(self.width,), mults=self.mults)
        require_positive("UNet", num_blocks=(self.num_blocks,), head_size=(self.head_size,), waves=(self.waves,))
        require_fraction("UNet", dropout=self.dropout)
        if len(self.wave_rates) not in (0, self.waves):
            raise ValueError(f"UNet: wave_rates has {len(self.wave_rates)} numbers; needs {self.waves}, one for each "
                             "of the waves, or none")  # fmt: skip
        require_filled(self)

    def denoiser(self, spec: Spec) -> nn.Module:
        return UNetDenoiser(self, spec)

    def notes(self, spec: Spec) -> Sequence[str]:
        """The levels, and the ``mults`` and sizes of ``attention`` that none of them has."""
        layout = Layout(self, spec)
        levels = [
            f"{'x'.join(map(str, size))}{' with attention' if attends else ''}"
            for size, attends in zip(layout.sizes, layout.attends, strict=True)
        ]
        text = f"levels   {', '.join(levels)}"
        idle = ", ".join(str(n) for n in self.attention if n not in map(min, layout.sizes))
        if not any(layout.attends):
            text += "; attention only in the middle" + (f", as no level's shorter side is {idle}" if idle else "")
        elif idle:
            text += f"; attention at {idle} has no effect"
        if unused := len(self.mults) - len(levels):
            text += f"; the last {unused} of {len(self.mults)} mults unused, as the level would be smaller than 4"
        return [*describe_preset(self), text]

    def encoder(self, spec: Spec, out: tuple[int, ...]) -> nn.Module:
        return UNetEncoder(self, spec, out)

    def decoder(self, spec: Spec, inp: tuple[int, ...]) -> nn.Module:
        return UNetDecoder(self, spec, inp)


class Layout:
    """The sizes and channels of a U-Net's levels on data of this shape, down to a latent of shape ``latent`` if
    given."""

    def __init__(self, cfg: UNet, spec: Spec, latent: tuple[int, ...] | None = None):
        if len(spec.shape) - 1 not in CONV:
            raise ValueError(
                f"UNet: given samples of shape {spec.shape}; allowed (C, T) or (C, H, W); try --backbone=mlp"
            )
        self.cfg, self.spec = cfg, spec
        self.size = spec.shape[1:]
        self.dims = len(self.size)
        shrunk = [tuple(-(-n // 2**i) for n in self.size) for i in range(len(cfg.mults))]
        levels = max(i + 1 for i, s in enumerate(shrunk) if i == 0 or min(s) >= 4)
        if latent is not None and len(latent) > 1:  # a map: stop at the level of its size
            if latent[1:] not in shrunk:
                allowed = ", ".join("x".join(map(str, s)) for s in shrunk)
                raise ValueError(f"UNet: given a latent of size {latent[1:]}; {len(cfg.mults)} mults reach {allowed}; "
                                 f"try --objective.latent {latent[0]} {' '.join(map(str, shrunk[-1]))}")  # fmt: skip
            levels = shrunk.index(latent[1:]) + 1
        self.sizes = [tuple(n * 2 ** (levels - 1 - i) for n in shrunk[levels - 1]) for i in range(levels)]
        self.channels = [cfg.width * m for m in cfg.mults[:levels]]
        self.emb = 4 * cfg.width
        self.attends = [min(s) in cfg.attention for s in self.sizes]

    def padded(self, size: Sequence[int]) -> tuple[int, ...]:
        """``size``, which need not be that of the spec, made large enough to be halved evenly at each level."""
        multiple = 2 ** (len(self.sizes) - 1)
        return tuple(-(-n // multiple) * multiple for n in size)

    def stage(self, inp: int, out: int, attend: bool, tokens: bool, up: bool = False) -> Stage:
        """A stage from ``inp`` to ``out`` channels."""
        block, attention = self.block(inp, out), None
        if attend:
            attention = MapAttention(
                out, self.cfg.head_size, self.emb if tokens else 0, self.cfg.rescale, self.cfg.norm_eps
            )
        return Stage(self.cfg, block, attention, self.resample(out, up=True) if up else None)

    def block(self, inp: int, out: int, resample: Resample | None = None) -> ResBlock:
        """A residual block."""
        cfg = self.cfg
        return ResBlock(self.dims, inp, out, self.emb, cfg.dropout, scale_shift=cfg.scale_shift, rescale=cfg.rescale,
                        resample=resample, eps=cfg.norm_eps)  # fmt: skip

    def resample(self, channels: int, up: bool) -> nn.Module:
        """The module ``(x, emb)`` that halves or doubles the size."""
        if self.cfg.resample == "conv":
            return (Upsample if up else Downsample)(self.dims, channels)
        return self.block(channels, channels, Resample(self.dims, FIR if self.cfg.resample == "fir" else BOX, up))


class Stage(nn.Module):
    """A residual block, attention if its level has it, and upsampling after the last block of a level."""

    def __init__(self, cfg: UNet, block: ResBlock, attention: MapAttention | None, up: nn.Module | None):
        super().__init__()
        self.checkpoint = cfg.checkpoint
        self.block, self.attention, self.up = block, attention, up

    def shard_blocks(self) -> list[nn.Module]:
        """The modules that sharded training gathers one by one: the stage itself."""
        return [self]

    def _forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.block(x, emb)
        x = x if self.attention is None else self.attention(x, tokens, mask)
        return x if self.up is None else self.up(x, emb)

    def forward(self, x: Float[Tensor, "b c *size"], c: Routed) -> Tensor:
        return remat(self._forward, self.checkpoint, x, c.emb, c.tokens, c.mask)


class Shrink(nn.Module):
    """The step down to the next level."""

    def __init__(self, layout: Layout, channels: int):
        super().__init__()
        self.checkpoint = layout.cfg.checkpoint
        self.down = layout.resample(channels, up=False)

    def forward(self, x: Float[Tensor, "b c *size"], c: Routed) -> Tensor:
        return remat(self.down, self.checkpoint, x, c.emb)


class ResidualInput(nn.Module):
    """The input of a level, convolved and halved, ``[B, inp, *size] -> [B, out, *size / 2]`` (Song et al. 2021)."""

    def __init__(self, layout: Layout, inp: int, out: int):
        super().__init__()
        taps = FIR if layout.cfg.resample == "fir" else BOX
        border = layout.cfg.residual_border and taps == FIR
        self.conv = CONV[layout.dims](inp, out, 3, padding=2 if border else 1)
        self.shrink = Resample(layout.dims, taps, up=False, border=border)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Tensor:
        return self.shrink(self.conv(x))


class DownPath(nn.Module):
    """The way down, ``[B, inp, *size] -> [B, C, *bottom]``, and the skip connections for the way up."""

    def __init__(self, layout: Layout, inp: int, tokens: bool):
        super().__init__()
        have = layout.cfg.stem or layout.channels[0]
        self.first = CONV[layout.dims](inp, have, 3, padding=1)
        self.steps = nn.ModuleList()
        self.inputs = nn.ModuleList()  # one for each level below the first, if there are any
        self.skip_channels = [have]
        for i, (out, attend) in enumerate(zip(layout.channels, layout.attends, strict=True)):
            if i:
                is_conv = layout.cfg.resample == "conv"
                self.steps.append(layout.resample(have, up=False) if is_conv else Shrink(layout, have))
                if layout.cfg.residual_input:
                    self.inputs.append(ResidualInput(layout, inp, have))
                    inp = have
                self.skip_channels.append(have)
            for _ in range(layout.cfg.num_blocks):
                self.steps.append(layout.stage(have, out, attend, tokens))
                self.skip_channels.append(have := out)

    def edge_layers(self) -> list[nn.Module]:
        """The convolutions of the input."""
        return [self.first, *self.inputs]

    def forward(self, x: Tensor, c: Routed) -> tuple[Tensor, list[Tensor]]:
        h, inputs = self.first(x), iter(self.inputs)
        skips = [h]
        for step in self.steps:
            h = step(h, c)
            if not isinstance(step, Stage) and self.inputs:
                h = x = add_residual(h, next(inputs)(x), rescale=True)
            skips.append(h)
        return h, skips


class Middle(nn.Module):
    """Block, attention, block at the smallest size."""

    def __init__(self, layout: Layout, tokens: bool):
        super().__init__()
        channels = layout.channels[-1]
        self.stages = nn.ModuleList(layout.stage(channels, channels, attend, tokens) for attend in (True, False))

    def forward(self, h: Tensor, c: Routed) -> Tensor:
        for stage in self.stages:
            h = stage(h, c)
        return h


class UpPath(nn.Module):
    """The way up, ``[B, C, *bottom] -> [B, out, *size]``, with ``skip_channels`` of skip connections, last block
    first."""

    def __init__(self, layout: Layout, out: int, skip_channels: list[int], tokens: bool):
        super().__init__()
        skip_channels, have = list(skip_channels), layout.channels[-1]
        self.stages = nn.ModuleList()
        for i in reversed(range(len(layout.channels))):
            for last in [False] * layout.cfg.num_blocks + [True]:
                inp, have = have + skip_channels.pop(), layout.channels[i]
                attend = layout.attends[i] and (last or layout.cfg.up_attention == "every")
                self.stages.append(layout.stage(inp, have, attend, tokens, up=last and i > 0))
        self.norm = GroupNorm(have, layout.cfg.norm_eps)
        self.last = CONV[layout.dims](have, out, 3, padding=1)

    def edge_layers(self) -> list[nn.Module]:
        """The last convolution."""
        return [self.last]

    def forward(self, h: Tensor, skips: list[Tensor] | list[Tensor | None], c: Routed) -> Tensor:
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            h = stage(h if skip is None else torch.cat([h, skip], 1), c)
        return self.last(F.silu(self.norm(h)))


class UNetDenoiser(nn.Module):
    """``(x [B, *S], label [B], cond) -> [B, *S]``. Zero when initialised. Its features are the mean of the middle."""

    def __init__(self, cfg: UNet, spec: Spec):
        super().__init__()
        self.layout = Layout(cfg, spec)
        self.feature_dim = self.layout.channels[-1]
        self.cond = Conditioner(spec, self.layout.emb, waves=cfg.waves, scale=cfg.time_scale, rates=cfg.wave_rates,
                                early=cfg.early_conditions)  # fmt: skip
        self.down = DownPath(self.layout, spec.shape[0] + self.cond.num_channels, self.cond.has_tokens)
        self.middle = Middle(self.layout, self.cond.has_tokens)
        self.up = UpPath(self.layout, spec.shape[0], self.down.skip_channels, self.cond.has_tokens)
        zero_init(self.up.last)

    def forward(
        self, x: Float[Tensor, "b ..."], label: Float[Tensor, " b"], cond: Cond = NO_COND, features: bool = False
    ) -> Float[Tensor, "b ..."]:
        c = embed_conditions(self.cond, self.layout, x, label, cond)
        h, skips = self.down(with_channels(x, c, self.layout), c)
        h = self.middle(h, c)
        return h.flatten(2).mean(2) if features else crop_to(self.up(h, skips, c), x.shape[2:])


class UNetEncoder(nn.Module):
    """``(x [B, *S], cond) -> [B, *out]``: the way down and a head.

    A vector ``(D,)`` is one linear layer of the whole last map; a map ``(C, h, w)`` stops at the level of that size.
    """

    def __init__(self, cfg: UNet, spec: Spec, out: tuple[int, ...]):
        super().__init__()
        self.layout = Layout(cfg, spec, out)
        self.cond = Conditioner(spec, self.layout.emb, time=False)
        self.down = DownPath(self.layout, spec.shape[0] + self.cond.num_channels, self.cond.has_tokens)
        self.middle = Middle(self.layout, self.cond.has_tokens)
        channels = self.layout.channels[-1]
        self.norm = GroupNorm(channels, cfg.norm_eps)
        flat = nn.Sequential(nn.Flatten(), nn.Linear(channels * math.prod(self.layout.sizes[-1]), out[0]))
        self.last = flat if len(out) == 1 else CONV[self.layout.dims](channels, out[0], 3, padding=1)

    def edge_layers(self) -> list[nn.Module]:
        """The head."""
        return [self.last]

    def forward(self, x: Float[Tensor, "b ..."], cond: Cond = NO_COND) -> Tensor:
        c = embed_conditions(self.cond, self.layout, x, None, cond)
        h, _ = self.down(with_channels(x, c, self.layout), c)
        return self.last(F.silu(self.norm(self.middle(h, c))))


class UNetDecoder(nn.Module):
    """``(z [B, *inp], cond) -> [B, *S]``: a projection and the way up.

    There are no skip connections; an Image condition is concatenated at the first block of full size.
    """

    def __init__(self, cfg: UNet, spec: Spec, inp: tuple[int, ...]):
        super().__init__()
        self.layout = layout = Layout(cfg, spec, inp)
        self.cond = Conditioner(spec, layout.emb, time=False)
        bottom = (layout.channels[-1], *layout.sizes[-1])
        flat = nn.Sequential(nn.Linear(inp[0], math.prod(bottom)), nn.Unflatten(1, bottom))
        self.first = flat if len(inp) == 1 else CONV[layout.dims](inp[0], bottom[0], 3, padding=1)
        self.middle = Middle(layout, self.cond.has_tokens)
        per_level = cfg.num_blocks + 1
        self.blank = len(layout.channels) * per_level - per_level
        skip_channels = [0] * cfg.num_blocks + [self.cond.num_channels] + [0] * self.blank
        self.up = UpPath(layout, spec.shape[0], skip_channels, self.cond.has_tokens)

    def edge_layers(self) -> list[nn.Module]:
        """The projection."""
        return [self.first]

    def forward(self, z: Float[Tensor, "b ..."], cond: Cond = NO_COND) -> Tensor:
        c = embed_conditions(self.cond, self.layout, z, None, cond)
        image = None if c.channels is None else pad_to(c.channels, self.layout.sizes[0])
        skips = [*[None] * self.layout.cfg.num_blocks, image, *[None] * self.blank]
        return crop_to(self.up(self.middle(self.first(z), c), skips, c), self.layout.size)


def embed_conditions(embed: Conditioner, layout: Layout, like: Tensor, label: Tensor | None, cond: Cond) -> Routed:
    """The embedded conditions, with the activation that every block would otherwise apply itself."""
    c = embed(like, layout.size, label, cond)
    return c._replace(emb=F.silu(c.emb))


def with_channels(x: Tensor, c: Routed, layout: Layout) -> Tensor:
    """The sample and its Image conditions as one padded map."""
    return pad_to(x if c.channels is None else torch.cat([x, c.channels.to(x.dtype)], 1), layout.padded(x.shape[2:]))
