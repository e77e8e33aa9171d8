"""Time, positions and conditions as numbers a network can use.

A condition takes one of three routes, and its kind alone says which (``EMBEDDERS``): summed into the global embedding
that scales and shifts every block (Label, Vector), concatenated to the sample's channels (Image), or a sequence for
cross-attention (Tokens). Each condition owns a learned null (classifier-free guidance, Ho & Salimans 2022), which
stands where its key is absent and for each sample whose ``cond["keep"]`` is False. The choice is made by
``torch.where`` and never by a branch on values, so that all its parameters take part in the graph whenever the key is
there: ``DistributedDataParallel`` needs that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from genkit.core import Cond, Image, Label, Spec, Tokens, Vector


def sinusoid(position: Float[Tensor, "*n"], dim: int, period: float = 10_000.0) -> Float[Tensor, "*n {dim}"]:
    """``[cos(p w_i), sin(p w_i)]`` with ``w_i = period^(-i / (dim/2))`` (Vaswani et al. 2017, section 3.5), in float32."""
    rates = torch.exp(torch.arange(dim // 2, device=position.device) * (-math.log(period) / (dim // 2)))
    angles = position.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def grid_positions(grid: Sequence[int], dim: int) -> Float[Tensor, "n {dim}"]:
    """Fixed positions of a 1-D or 2-D grid in row-major order, ``dim / len(grid)`` numbers an axis (Dosovitskiy 2021)."""
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in grid), indexing="ij")
    return torch.cat([sinusoid(a.flatten(), dim // len(grid)) for a in axes], -1)


class TimeEmbed(nn.Module):
    """A time label of order one, ``[B] -> [B, dim]``: sinusoids of 1000 x label, then two layers.

    The factor is that of DDPM, whose integer time runs to 1000 (Ho et al. 2020, appendix B): the fastest sinusoid turns
    1000 rad over the path, the slowest 0.1 rad. A label log(sigma) / 4 (Karras et al. 2022) has the same order.
    """

    def __init__(self, dim: int, num_waves: int = 128):
        super().__init__()
        self.num_waves = num_waves
        self.layers = nn.Sequential(nn.Linear(2 * num_waves, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, label: Float[Tensor, "b"]) -> Float[Tensor, "b d"]:
        return self.layers(sinusoid(1000 * label, 2 * self.num_waves).to(self.layers[0].weight.dtype))


# ------------------------------------------------------------------------------------------------ one condition
class LabelEmbed(nn.Module):
    """A class index ``[B] -> [B, dim]``."""

    route = "global"

    def __init__(self, kind: Label, dim: int):
        super().__init__()
        self.table = nn.Embedding(kind.num, dim)
        self.null = nn.Parameter(torch.randn(dim))

    def forward(self, value: Tensor, keep: Bool[Tensor, "b"]) -> Tensor:
        return torch.where(keep[:, None], self.table(value), self.null)


class VectorEmbed(nn.Module):
    """An array ``[B, *shape] -> [B, dim]``: two layers."""

    route = "global"

    def __init__(self, kind: Vector, dim: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(math.prod(kind.shape), dim), nn.SiLU(), nn.Linear(dim, dim))
        self.null = nn.Parameter(torch.randn(dim))

    def forward(self, value: Tensor, keep: Bool[Tensor, "b"]) -> Tensor:
        return torch.where(keep[:, None], self.layers(value.flatten(1).to(self.null.dtype)), self.null)


class ImageEmbed(nn.Module):
    """A picture ``[B, C, *size]``, as it is; its null is one learned colour."""

    route = "channels"

    def __init__(self, kind: Image, dim: int):
        super().__init__()
        self.null = nn.Parameter(torch.randn(kind.channels))

    def forward(self, value: Tensor, keep: Bool[Tensor, "b"]) -> Tensor:
        ones = (1,) * (value.ndim - 2)
        return torch.where(keep.view(-1, 1, *ones), value.to(self.null.dtype), self.null.view(-1, *ones))


class TokensEmbed(nn.Module):
    """A sequence ``[B, L, D] -> [B, L + 1, dim]``, the learned null first. Tokens bring their own positions."""

    route = "tokens"

    def __init__(self, kind: Tokens, dim: int):
        super().__init__()
        self.layer = nn.Linear(kind.dim, dim)
        self.null = nn.Parameter(torch.randn(dim))

    def forward(self, value: Tensor, keep: Bool[Tensor, "b"]) -> Tensor:
        tokens = self.layer(value.to(self.null.dtype))
        return torch.cat([self.null.to(tokens.dtype).expand(len(value), 1, -1), tokens], 1)


EMBEDDERS: dict[type, type[nn.Module]] = {
    Label: LabelEmbed,
    Vector: VectorEmbed,
    Image: ImageEmbed,
    Tokens: TokensEmbed,
}


# ------------------------------------------------------------------------------------------------ all conditions
class Routed(NamedTuple):
    """The conditions of one batch: global ``[B, E]``, ``channels`` ``[B, C, *size]``, ``tokens`` ``[B, L, E]`` + mask."""

    emb: Tensor
    channels: Tensor | None
    tokens: Tensor | None
    mask: Tensor | None


class Conditioner(nn.Module):
    """Time and conditions of a batch, embedded and routed.

    ``time`` False serves encoders and decoders, which have no time: a learned constant takes its place, so that the
    blocks are the same in every cut.
    """

    def __init__(self, spec: Spec, dim: int, time: bool = True):
        super().__init__()
        self.time = TimeEmbed(dim) if time else None
        self.constant = None if time else nn.Parameter(torch.randn(dim))
        routes: dict[str, dict[str, nn.Module]] = {"global": {}, "channels": {}, "tokens": {}}
        for name, kind in spec.cond.items():
            embedder = EMBEDDERS[type(kind)]
            routes[str(embedder.route)][name] = embedder(kind, dim)
        self.names = {route: list(modules) for route, modules in routes.items()}
        self.embed = nn.ModuleDict({route: nn.ModuleList(modules.values()) for route, modules in routes.items()})
        self.num_channels = sum(m.null.numel() for m in routes["channels"].values())
        self.has_tokens = bool(routes["tokens"])

    def _route(self, route: str):
        return zip(self.names[route], self.embed[route], strict=True)

    def forward(self, like: Float[Tensor, "b ..."], size: Sequence[int], label: Tensor | None, cond: Cond) -> Routed:
        """``like`` gives batch size and device; ``size`` is that of a sample's picture, for the null of an Image."""
        batch = len(like)
        everyone = torch.ones(batch, dtype=torch.bool, device=like.device)
        keep = cond.get("keep", everyone)

        emb = self.time(label) if self.time else self.constant.expand(batch, -1)
        for name, embed in self._route("global"):
            emb = emb + (embed(cond[name], keep) if name in cond else embed.null)

        channels = [
            embed(cond[name], keep) if name in cond else embed.null.view(-1, *(1,) * len(size)).expand(batch, -1, *size)
            for name, embed in self._route("channels")
        ]

        tokens, masks, mask = [], [], cond.get("mask")
        for name, embed in self._route("tokens"):
            if name not in cond:
                tokens.append(embed.null.expand(batch, 1, -1))
                masks.append(everyone[:, None])
                continue
            tokens.append(embed(cond[name], keep))
            seen = keep[:, None].expand(batch, cond[name].shape[1])
            if mask is not None:  # the mask belongs to the first sequence that is there, as in Spec.check
                seen, mask = seen & mask, None
            masks += [~seen.any(1, keepdim=True), seen]  # the null is seen where nothing else is: no row is all masked
        return Routed(
            emb,
            torch.cat(channels, 1) if channels else None,
            torch.cat(tokens, 1) if tokens else None,
            torch.cat(masks, 1) if masks else None,
        )


def require_routes(family: str, spec: Spec, routes: Collection[str], hint: str) -> None:
    """``ValueError`` where ``spec`` has a condition that ``family`` has no way to use."""
    for name, kind in spec.cond.items():
        if EMBEDDERS[type(kind)].route not in routes:
            allowed = ", ".join(k.__name__ for k, e in EMBEDDERS.items() if e.route in routes)
            raise ValueError(
                f"{family}: condition {name!r} is of kind {type(kind).__name__}; allowed here: {allowed}; try {hint}"
            )
