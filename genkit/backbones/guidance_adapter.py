"""An adapter that changes a network by the scale of guidance (Jensen et al. 2025, adapter guidance distillation).

A layer ``W`` becomes ``W + (w - 1) U diag(1 + g log w) D``: D and U are the low-rank factors of LoRA (Hu et al. 2022),
w is the scale of each sample, and g, one number for each rank, bends the response. The change is zero at ``w = 1``, and
where no scale is given the network is the original one, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genkit.core import SCALE_INPUT, expand


class ScaleInput:
    """Takes the scale out of a network's conditions and keeps it for the network's adapters."""

    def __init__(self) -> None:
        self.scale: Tensor | None = None

    def read(self, net: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook of ``net(x, label, cond)``."""
        x, label, cond = args
        self.scale = cond.get(SCALE_INPUT)
        return x, label, {k: v for k, v in cond.items() if k != SCALE_INPUT}


class GuidanceAdapter(nn.Module):
    """The low-rank change of a linear layer or convolution, which depends on the scale."""

    def __init__(self, layer: nn.Module, rank: int, strength: float, scale_input: ScaleInput):
        super().__init__()
        self.strength, self.scale_input = strength, scale_input
        self.down, self.up = low_rank_factors(layer, rank)
        self.gain = nn.Parameter(torch.zeros(rank, *[1] * (self.down.weight.ndim - 2)))
        nn.init.zeros_(self.up.weight)

    def add(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """A forward hook of the layer."""
        scale = self.scale_input.scale
        if scale is None:
            return y
        h = self.down(args[0])
        h = h * (1 + expand(scale.log(), h) * self.gain)
        return y + expand(self.strength * (scale - 1), y) * self.up(h)


def takes_scale(net: nn.Module) -> bool:
    """Whether a network has an adapter that takes the scale of guidance as an input."""
    return any(isinstance(module, GuidanceAdapter) for module in net.modules())


def low_rank_factors(layer: nn.Module, rank: int) -> tuple[Any, Any]:
    """The layers down to ``rank`` channels, of the size of ``layer``, and up again, without bias."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    conv: Any = type(layer)
    down = conv(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False)
    return down, conv(rank, layer.out_channels, 1, bias=False)


def add_guidance_adapter(net: nn.Module, layers: list[str], rank: int, strength: float) -> None:
    """Put an adapter around these layers of ``net``, in place; the rest of the network is frozen.

    ``net`` is called as ``net(x, label, cond)``; the scale of each sample is ``cond["guidance"]`` ``[B]``, at least 1.
    The network must not recompute activations in the backward pass, when the scale may be another.
    """
    scale_input = ScaleInput()
    net.requires_grad_(False)
    for name in layers:
        layer = net.get_submodule(name)
        adapter = GuidanceAdapter(layer, rank, strength, scale_input).to(next(layer.parameters()).device)
        layer.add_module("guidance_adapter", adapter)
        layer.register_forward_hook(adapter.add)
    net.register_forward_pre_hook(scale_input.read)
