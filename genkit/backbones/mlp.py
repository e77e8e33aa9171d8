"""A residual perceptron with adaptive layer norm, for vectors; other shapes are flattened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from genkit.backbones.blocks import modulate, remat, require_fraction, require_positive, zero_init
from genkit.backbones.dropout import Dropout
from genkit.backbones.embed import Conditioner, require_routes
from genkit.config.numbers import Fraction, Layers, Width
from genkit.core import NO_COND, Backbone, Cond, Spec
from genkit.core.weights import Fused


@dataclass(frozen=True)
class MLP(Backbone):
    """Residual blocks ``h + gate W2 silu(W1 adaLN(h))``: the DiT block (Peebles & Xie 2023) without its attention.

    It takes Label, Vector and Frames conditions, and sequences (Text, Tokens) as the average that learned queries make.
    """

    routes: ClassVar[tuple[str, ...]] = ("global", "tokens")
    axes: ClassVar[tuple[int, ...]] = (0, 1, 2)

    width: Width = 256
    """features of a layer; 256 x 4 blocks (1.5M parameters) fit the 2-D toys and low-dimensional states"""
    depth: Layers = 4
    """residual blocks"""
    dropout: Fraction = 0.0
    """dropout inside the blocks; it costs as much as a layer on a CPU"""
    checkpoint: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""

    def __post_init__(self):
        require_positive("MLP", width=(self.width,), depth=(self.depth,))
        require_fraction("MLP", dropout=self.dropout)

    def denoiser(self, spec: Spec) -> nn.Module:
        return MLPDenoiser(MLPNet(self, spec, spec.shape, spec.shape, time=True))

    def encoder(self, spec: Spec, out: tuple[int, ...]) -> nn.Module:
        return MLPNet(self, spec, spec.shape, out)

    def decoder(self, spec: Spec, inp: tuple[int, ...]) -> nn.Module:
        return MLPNet(self, spec, inp, spec.shape)


class MLPBlock(nn.Module):
    """adaLN-Zero block of one hidden layer, ``[B, 1, width] -> [B, 1, width]``."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.emb = zero_init(nn.Linear(width, 3 * width))  # adaLN-Zero: the gate starts at 0, the block as the identity
        self.layer1 = nn.Linear(width, width)
        self.layer2 = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def fused_weights(self) -> dict[str, Fused]:
        """Shift, scale and gate."""
        return {"emb.weight": Fused(3)}

    def forward(self, h: Float[Tensor, "b 1 d"], emb: Float[Tensor, "b d"]) -> Tensor:
        shift, scale, gate = self.emb(emb).chunk(3, 1)
        y = F.silu(self.layer1(modulate(h, shift, scale)))
        return h + gate.unsqueeze(1) * self.layer2(self.dropout(y))


class MLPNet(nn.Module):
    """``[B, *inp] -> [B, *out]``. There is no norm before the last layer, so the output may grow with the input."""

    def __init__(self, cfg: MLP, spec: Spec, inp: tuple[int, ...], out: tuple[int, ...], time: bool = False):
        super().__init__()
        require_routes(cfg, spec, "--backbone=unet or --backbone=dit")
        self.out_shape, self.checkpoint = tuple(out), cfg.checkpoint
        self.cond = Conditioner(spec, cfg.width, time, pool=True)
        self.first = nn.Linear(math.prod(inp), cfg.width)
        self.blocks = nn.ModuleList(MLPBlock(cfg.width, cfg.dropout) for _ in range(cfg.depth))
        self.last = nn.Linear(cfg.width, math.prod(out))

    def shard_blocks(self) -> list[nn.Module]:
        """The modules that sharded training gathers one by one."""
        return list(self.blocks)

    def edge_layers(self) -> list[nn.Module]:
        """The first and the last layer."""
        return [self.first, self.last]

    def forward(
        self, x: Float[Tensor, "b ..."], cond: Cond = NO_COND, label: Tensor | None = None, features: bool = False
    ) -> Tensor:
        emb = F.silu(self.cond(x, (), label, cond).emb)
        h = self.first(x.flatten(1))[:, None]
        for block in self.blocks:
            h = remat(block, self.checkpoint, h, emb)
        return h[:, 0] if features else self.last(h[:, 0]).unflatten(1, self.out_shape)


class MLPDenoiser(nn.Module):
    """``(x [B, *S], label [B], cond) -> [B, *S]``. Zero when initialised. Its features are the last hidden layer."""

    def __init__(self, net: MLPNet):
        super().__init__()
        self.net, self.feature_dim = net, net.last.in_features
        zero_init(net.last)

    def forward(
        self, x: Float[Tensor, "b ..."], label: Float[Tensor, " b"], cond: Cond = NO_COND, features: bool = False
    ) -> Float[Tensor, "b ..."]:
        return self.net(x, cond, label, features)
