"""Embeddings of time, positions and conditions.

A condition takes one of three routes, which follows from its kind (``embedder_of``): summed into the global embedding
that scales and shifts every block (Label, Vector, Frames), concatenated to the sample's channels (Image), or a sequence
for cross-attention (Tokens, Text; Vector and Frames whose steps are ``tokens``). Each condition owns a learned null
(classifier-free guidance, Ho & Salimans 2022), which replaces it if its key is absent, and for each sample with
``cond["keep"]`` or ``cond["keep.NAME"]`` False. The choice is made by ``torch.where``, never by a branch on values, so
that all its parameters take part in the graph whenever the key is there, as ``DistributedDataParallel`` needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from genkit.backbones.blocks import Attention, TokenPool
from genkit.backbones.cameras import CAMERA_ENCODERS
from genkit.core import Backbone, Cond, Condition, Frames, Image, Label, Scalar, Spec, Text, Tokens, Vector


def sinusoid(position: Float[Tensor, "*n"], dim: int, period: float = 10_000.0) -> Float[Tensor, "*n {dim}"]:
    """``[cos(p w_i), sin(p w_i)]`` with ``w_i = period^(-i / (dim/2))`` (Vaswani et al. 2017, section 3.5), float32."""
    rates = torch.exp(torch.arange(dim // 2, device=position.device) * (-math.log(period) / (dim // 2)))
    angles = position.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def grid_positions(grid: Sequence[int], dim: int) -> Float[Tensor, "n {dim}"]:
    """Fixed positions of a 1-D or 2-D grid in row-major order, ``dim / len(grid)`` numbers for each axis."""
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in grid), indexing="ij")
    return torch.cat([sinusoid(a.flatten(), dim // len(grid)) for a in axes], -1)


def grid_angles(grid: Sequence[int], dim: int, period: float = 10_000.0) -> Float[Tensor, "n {dim}"]:
    """Angles of rotary positions of a 1-D or 2-D grid in row-major order: ``dim / len(grid)`` for each axis, of
    ``p period^(-i / n)`` (Su et al. 2021, section 3.2; axis by axis as Heo et al. 2024, section 3.1)."""
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in grid), indexing="ij")
    count = dim // len(grid)
    rates = torch.exp(torch.arange(count) * (-math.log(period) / count))
    return torch.cat([a.flatten()[:, None] * rates for a in axes], -1)


class TimeEmbed(nn.Module):
    """A time label of order one, ``[B] -> [B, dim]``: sinusoids of ``scale`` x label, then two layers.

    The usual factor, 1000, is that of DDPM, whose integer time runs to 1000 (Ho et al. 2020, appendix B): the fastest
    sinusoid turns 1000 rad over the path, the slowest 0.1 rad. A label log(sigma) / 4 (Karras et al. 2022) has the same
    order. ``rates`` ``[num_waves]`` replace those of :func:`sinusoid` (NCSN++ has random ones: Song et al. 2021,
    appendix C). ``given`` ``[B, 2 num_waves]`` is added to the sinusoids.
    """

    def __init__(self, dim: int, num_waves: int = 32, scale: float = 1000.0, rates: Sequence[float] = ()):
        super().__init__()
        self.num_waves, self.scale = num_waves, scale
        self.rates: Tensor | None
        self.register_buffer("rates", torch.tensor(rates) if rates else None, persistent=False)
        self.layer1 = nn.Linear(2 * num_waves, dim)
        self.layer2 = nn.Linear(dim, dim)

    def forward(self, label: Float[Tensor, " b"], given: Tensor | None = None) -> Float[Tensor, "b d"]:
        if self.rates is None:
            waves = sinusoid(self.scale * label, 2 * self.num_waves)
        else:
            angles = (self.scale * label).float()[..., None] * self.rates
            waves = torch.cat([angles.cos(), angles.sin()], -1)
        waves = waves if given is None else waves + given
        return self.layer2(F.silu(self.layer1(waves.to(self.layer1.weight.dtype))))


# ------------------------------------------------------------------------------------------------ one condition
class Embedder(nn.Module):
    """A condition's embedding with its learned null: ``embed(value, keep [B])``."""

    route: str
    """global, channels or tokens"""
    masked = False
    """whether ``cond["mask"]`` says which of its tokens exist"""

    def __init__(self, kind: Any, dim: int):
        super().__init__()
        self.null = nn.Parameter(torch.randn(dim))

    def token_mask(self, value: Tensor) -> Bool[Tensor, "b l"]:
        """The tokens of a sequence that exist, before any mask."""
        return torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)


class LabelEmbed(Embedder):
    """A class index ``[B] -> [B, dim]``."""

    route = "global"

    def __init__(self, kind: Label, dim: int):
        super().__init__(kind, dim)
        self.table = nn.Embedding(kind.num, dim)

    def forward(self, value: Tensor, keep: Bool[Tensor, " b"]) -> Tensor:
        return torch.where(keep[:, None], self.table(value), self.null)


class VectorEmbed(Embedder):
    """Numbers ``[B, *shape] -> [B, dim]``: shifted, scaled and clipped as their kind says, then two layers."""

    route = "global"
    shift: Tensor
    scale: Tensor

    def __init__(self, kind: Vector, dim: int):
        super().__init__(kind, dim)
        for name, numbers, default in (("shift", kind.shift, 0.0), ("scale", kind.scale, 1.0)):
            if numbers and len(numbers) != kind.shape[-1]:
                raise ValueError(f"vector: given {len(numbers)} numbers of {name} for a last axis of {kind.shape[-1]}")
            self.register_buffer(name, torch.tensor(numbers or default), persistent=False)  # they are in the spec
        self.limit = math.inf if kind.limit is None else kind.limit
        self.layers = nn.Sequential(nn.Linear(math.prod(kind.shape), dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, value: Tensor, keep: Bool[Tensor, " b"]) -> Tensor:
        value = ((value - self.shift) / self.scale).clamp(-self.limit, self.limit)
        return torch.where(keep[:, None], self.layers(value.flatten(1).to(self.null.dtype)), self.null)


class ScalarEmbed(Embedder):
    """A number of order one, ``[B] -> [B, dim]``: waves of at most ``FASTEST`` rad, then two layers without biases.

    Networks are differentiated by such numbers, and the derivative has the rate of the fastest wave as a factor: hence
    not the 1000 rad of :class:`TimeEmbed`. The embedding of 0, and of an absent number, is 0; so is any when
    initialised, so that a network that gets a number starts as it was without.

    The second layer is divided by ``sqrt(dim)``: a step of Adam moves all its ``dim`` inputs at once, the same way for
    every sample with that number. Without this the long jumps of a flow map moved faster than their targets, which are
    the network's own, and training diverged.
    """

    route = "global"
    NUM_WAVES, SLOWEST, FASTEST = 8, 0.25, 8.0
    null: Tensor
    rates: Tensor

    def __init__(self, kind: Scalar, dim: int):
        super().__init__(kind, dim)
        del self.null
        self.register_buffer("null", torch.zeros(()), persistent=False)
        rates = torch.logspace(math.log10(self.SLOWEST), math.log10(self.FASTEST), self.NUM_WAVES)
        self.register_buffer("rates", rates, persistent=False)
        self.layer1 = nn.Parameter(torch.randn(dim, 2 * self.NUM_WAVES) / self.NUM_WAVES**0.5)
        self.scaled_layer2 = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, value: Float[Tensor, " b"], keep: Bool[Tensor, " b"]) -> Tensor:
        angles = value.to(self.rates.dtype)[:, None] * self.rates
        waves = torch.cat([1 - angles.cos(), angles.sin()], 1).to(self.layer1.dtype)
        return F.linear(F.silu(F.linear(waves, self.layer1)), self.scaled_layer2 / len(self.scaled_layer2) ** 0.5)


def scalar_keys(net: nn.Module) -> set[str]:
    """The parameters of a network that embed its Scalar inputs, by name. While these are new they change nothing."""
    embeds = [(name, module) for name, module in net.named_modules() if isinstance(module, ScalarEmbed)]
    return {f"{name}.{key}" for name, module in embeds for key in module.state_dict()}


class ImageEmbed(Embedder):
    """A picture ``[B, C, *size]``, unchanged; its null is one learned colour."""

    route = "channels"

    def __init__(self, kind: Image, dim: int):
        super().__init__(kind, kind.channels)

    def forward(self, value: Tensor, keep: Bool[Tensor, " b"]) -> Tensor:
        ones = (1,) * (value.ndim - 2)
        return torch.where(keep.view(-1, 1, *ones), value.to(self.null.dtype), self.null.view(-1, *ones))


class TokensEmbed(Embedder):
    """A sequence ``[B, L, D] -> [B, L + 1, dim]``, the learned null first. Tokens bring their own positions."""

    route = "tokens"
    masked = True

    def __init__(self, kind: Tokens, dim: int):
        super().__init__(kind, dim)
        self.layer = nn.Linear(kind.dim, dim)

    def forward(self, value: Tensor, keep: Bool[Tensor, " b"]) -> Tensor:
        tokens = self.layer(value.to(self.null.dtype))
        return torch.cat([self.null.to(tokens.dtype).expand(len(value), 1, -1), tokens], 1)


class TextBlock(nn.Module):
    """Pre-norm transformer block (Xiong et al. 2020, figure 1b), ``[B, L, dim]``, which ignores masked tokens.

    Its positions come from a convolution of each channel (Chu et al. 2023, section 3.2), so a word means the same at
    any position, also at positions that were empty in training."""

    def __init__(self, dim: int, head_size: int, span: int):
        super().__init__()
        self.near = nn.Conv1d(dim, dim, span, padding=span // 2, groups=dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, head_size)
        self.layer1, self.layer2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, h: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"]) -> Tensor:
        h = h + self.near((h * mask[..., None]).transpose(1, 2)).transpose(1, 2)
        h = h + self.attention(self.norm1(h), mask=mask)
        return h + self.layer2(F.gelu(self.layer1(self.norm2(h)), approximate="tanh"))


class TextEmbed(Embedder):
    """Bytes ``[B, L] -> [B, L + 1, dim]``, the learned null first: a small transformer, trained with the network.

    Neighbouring bytes are combined first (a convolution, Kim et al. 2016, section 2.2), since a letter alone means
    nothing. Padding is ignored, so its length does not matter. On a CPU, equal texts of a batch are read once.
    """

    route = "tokens"
    WIDTH, DEPTH, HEAD, SPAN = 64, 2, 32, 5

    def __init__(self, kind: Text, dim: int):
        super().__init__(kind, dim)
        self.table = nn.Embedding(257, self.WIDTH)
        self.spell = nn.Conv1d(self.WIDTH, self.WIDTH, self.SPAN, padding=self.SPAN // 2)
        self.blocks = nn.ModuleList(TextBlock(self.WIDTH, self.HEAD, self.SPAN) for _ in range(self.DEPTH))
        self.norm = nn.LayerNorm(self.WIDTH)
        self.layer = nn.Linear(self.WIDTH, dim)

    def token_mask(self, value: Tensor) -> Bool[Tensor, "b l"]:
        return value != 0

    def forward(self, value: Tensor, keep: Bool[Tensor, " b"]) -> Tensor:
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            tokens = self.read(value)
        else:
            texts, rows = value.unique(dim=0, return_inverse=True)
            tokens = self.read(texts).index_select(0, rows)
        return torch.cat([self.null.to(tokens.dtype).expand(len(value), 1, -1), tokens], 1)

    def read(self, value: Tensor) -> Tensor:
        """The tokens ``[B, L, dim]`` of texts ``[B, L]``, without the null."""
        exists = self.token_mask(value)
        h = self.table(value.long()) * exists[..., None]
        h = h + F.gelu(self.spell(h.transpose(1, 2)).transpose(1, 2))
        first = torch.arange(value.shape[1], device=value.device) == 0
        for block in self.blocks:
            h = block(h, exists | first)  # an empty text attends to its first token, which is ignored later
        return self.layer(self.norm(h))


class FramesEmbed(Embedder):
    """Pictures ``[B, To, C, H, W] -> [B, dim]``: one encoder a camera, the same at all steps, trained with the network
    (:mod:`genkit.backbones.cameras`); then the steps and cameras are combined."""

    route = "global"

    def __init__(self, kind: Frames, dim: int):
        super().__init__(kind, dim)
        self.num_steps, self.crop = kind.shape[0], kind.crop
        self.channels = list(kind.cameras or kind.shape[1:2])
        h, w = kind.cropped[2:]
        make = CAMERA_ENCODERS[kind.encoder or "cnn"]
        cameras = [make(channels, (h, w), dim) for channels in self.channels]
        self.see = cameras[0] if len(cameras) == 1 else nn.ModuleList(cameras)
        self.add_layers(dim)

    def add_layers(self, dim: int) -> None:
        """The layers after the encoders."""
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(self.num_steps * len(self.channels) * dim, dim))

    def features(self, value: Tensor) -> Float[Tensor, "b n d"]:
        """The features of each camera at each step, ``[B, To * cameras, dim]``."""
        if self.crop and value.shape[-2:] != self.crop:
            top, left = ((n - k) // 2 for n, k in zip(value.shape[-2:], self.crop, strict=True))
            value = value[..., top : top + self.crop[0], left : left + self.crop[1]]
        x = value.to(self.null.dtype) / 127.5 - 1
        cameras = self.see if isinstance(self.see, nn.ModuleList) else [self.see]
        parts = zip(cameras, x.flatten(0, 1).split(self.channels, 1), strict=True)
        return torch.stack([see(part) for see, part in parts], 1).unflatten(0, value.shape[:2]).flatten(1, 2)

    def forward(self, value: Tensor, keep: Bool[Tensor, " b"]) -> Tensor:
        return torch.where(keep[:, None], self.layers(self.features(value).flatten(1)), self.null)


class FrameTokens(FramesEmbed):
    """Pictures ``[B, To, C, H, W] -> [B, 1 + To * cameras, dim]``, the learned null first: a token for each camera at
    each step, with a learned position."""

    route = "tokens"

    def add_layers(self, dim: int) -> None:
        self.place = nn.Parameter(torch.randn(self.num_steps * len(self.channels), dim) / dim**0.5)

    def token_mask(self, value: Tensor) -> Bool[Tensor, "b l"]:
        return torch.ones(len(value), len(self.place), dtype=torch.bool, device=value.device)

    def forward(self, value: Tensor, keep: Bool[Tensor, " b"]) -> Tensor:
        tokens = self.features(value) + self.place
        return torch.cat([self.null.to(tokens.dtype).expand(len(value), 1, -1), tokens], 1)


class VectorTokens(VectorEmbed):
    """Numbers ``[B, L, D] -> [B, 1 + L, dim]``, the learned null first: a token for each row, scaled and embedded as in
    :class:`VectorEmbed`, with a learned position."""

    route = "tokens"

    def __init__(self, kind: Vector, dim: int):
        if len(kind.shape) != 2:
            raise ValueError(f"vector: given shape {kind.shape}; tokens need (steps, numbers)")
        super().__init__(replace(kind, shape=kind.shape[1:]), dim)
        self.place = nn.Parameter(torch.randn(kind.shape[0], dim) / dim**0.5)

    def forward(self, value: Tensor, keep: Bool[Tensor, " b"]) -> Tensor:
        value = ((value - self.shift) / self.scale).clamp(-self.limit, self.limit)
        tokens = self.layers(value.to(self.null.dtype)) + self.place
        return torch.cat([self.null.to(tokens.dtype).expand(len(value), 1, -1), tokens], 1)


EMBEDDERS: dict[type, type[Embedder]] = {
    Label: LabelEmbed,
    Vector: VectorEmbed,
    Image: ImageEmbed,
    Tokens: TokensEmbed,
    Text: TextEmbed,
    Frames: FramesEmbed,
    Scalar: ScalarEmbed,
}
TOKEN_EMBEDDERS: dict[type, type[Embedder]] = {Vector: VectorTokens, Frames: FrameTokens}  # of those with ``tokens``


def embedder_of(kind: Condition) -> type[Embedder]:
    """The embedder of a condition, by its kind, and by whether its steps are tokens."""
    return (TOKEN_EMBEDDERS if getattr(kind, "tokens", False) else EMBEDDERS)[type(kind)]


# ------------------------------------------------------------------------------------------------ all conditions
class Routed(NamedTuple):
    """The conditions of one batch, by route: ``emb`` (global) ``[B, E]``, ``channels`` ``[B, C, *size]``, ``tokens``
    ``[B, L, E]`` with their ``mask`` ``[B, L]``; ``given`` ``[B, E]`` is ``emb`` without the time, None without
    conditions or if these are early."""

    emb: Tensor
    channels: Tensor | None
    tokens: Tensor | None
    mask: Tensor | None
    given: Tensor | None = None


class Constant(nn.Module):
    """A learned constant in place of the time embedding in encoders and decoders, which share the denoiser's blocks."""

    def __init__(self, dim: int):
        super().__init__()
        self.value = nn.Parameter(torch.randn(dim))

    def forward(self, label: None) -> Float[Tensor, " d"]:
        return self.value


class Conditioner(nn.Module):
    """Time and conditions of a batch, embedded and routed.

    With ``early`` the global conditions are added to the sinusoids of the time, before its two layers (Karras et al.
    2022, in DDPM++ and NCSN++), and not after them. With ``pool`` the tokens become part of the global embedding.
    """

    def __init__(
        self, spec: Spec, dim: int, time: bool = True, waves: int = 32, scale: float = 1000.0,
        rates: Sequence[float] = (), early: bool = False, pool: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.start = TimeEmbed(dim, waves, scale, rates) if time else Constant(dim)
        self.early = early and time
        self.names: dict[str, list[str]] = {"global": [], "channels": [], "tokens": []}
        self.embed = nn.ModuleDict()
        for name, kind in spec.cond.items():
            embedder = embedder_of(kind)
            self.names[embedder.route].append(name)
            is_early = self.early and embedder.route == "global"
            self.embed[module_name(name)] = embedder(kind, 2 * waves if is_early else dim)
        self.num_channels = sum(e.null.numel() for _, e in self._on("channels"))
        self.pool = TokenPool(dim) if pool and self.names["tokens"] else None
        self.has_tokens = bool(self.names["tokens"]) and self.pool is None

    def _on(self, route: str) -> list[tuple[str, Embedder]]:
        return [(name, cast(Embedder, self.embed[module_name(name)])) for name in self.names[route]]

    def forward(self, like: Float[Tensor, "b ..."], size: Sequence[int], label: Tensor | None, cond: Cond) -> Routed:
        """``like`` gives batch size and device; ``size`` is a picture's, for the null of an Image."""
        # the samples that see each condition
        batch = len(like)
        everyone = torch.ones(batch, dtype=torch.bool, device=like.device)
        sees_any = cond.get("keep", everyone)
        keep = {k: sees_any & cond[f"keep.{k}"] if f"keep.{k}" in cond else sees_any for k in cond}

        parts = [embed(cond[name], keep[name]) if name in cond else embed.null for name, embed in self._on("global")]
        if self.early and parts:
            start, parts = self.start(label, sum(parts[1:], parts[0])), []
        else:
            start = self.start(label)
        emb, given = start.expand(batch, -1), None
        for part in parts:
            emb, given = emb + part, part.expand(emb.shape) if given is None else given + part

        # further channels
        channels = []
        for name, embed in self._on("channels"):
            null = embed.null.view(-1, *(1,) * len(size)).expand(batch, -1, *size)
            channels.append(embed(cond[name], keep[name]) if name in cond else null)

        # tokens and their mask
        tokens, masks, mask = [], [], cond.get("mask")
        for name, embed in self._on("tokens"):
            if name not in cond:
                tokens.append(embed.null.expand(batch, 1, -1))
                masks.append(everyone[:, None])
                continue
            tokens.append(embed(cond[name], keep[name]))
            visible = keep[name][:, None] & embed.token_mask(cond[name])
            if embed.masked and mask is not None:  # it belongs to the first such sequence in cond, as in Spec.check
                visible, mask = visible & mask, None
            masks += [~visible.any(1, keepdim=True), visible]  # the null is visible if nothing else is
        maps = torch.cat(channels, 1) if channels else None
        if not tokens:
            return Routed(emb, maps, None, None, given)
        sequence, mask = torch.cat(tokens, 1), torch.cat(masks, 1)
        if self.pool is None:
            return Routed(emb, maps, sequence, mask, given)
        pooled = self.pool(sequence, mask)
        return Routed(emb + pooled, maps, None, None, pooled if given is None else given + pooled)


def module_name(name: str) -> str:
    """The name of a condition ("observation.state", "type") as a module may have it."""
    return "on_" + name.replace(".", "-")


def require_routes(backbone: Backbone, spec: Spec, hint: str) -> None:
    """``ValueError`` if ``spec`` has a condition that ``backbone`` has no route for; ``hint`` says what to try."""
    for name, kind in spec.cond.items():
        if embedder_of(kind).route not in backbone.routes:
            of_data = {k: e for k, e in EMBEDDERS.items() if k is not Scalar}
            allowed = ", ".join(k.__name__ for k, e in of_data.items() if e.route in backbone.routes)
            raise ValueError(
                f"{type(backbone).__name__}: condition {name!r} is of kind {type(kind).__name__}; allowed here: "
                f"{allowed}; try {hint}"
            )
