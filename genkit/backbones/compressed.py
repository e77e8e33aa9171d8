"""Frozen weights in fewer bits, under a LoRA: bfloat16, int8 with a scale for each row, or nf4 (Dettmers et al. 2023).

Only matrices and kernels of convolutions are changed: they are nearly all of a network. A layer expands its weight
when it is called, forwards and backwards, and computes in the type of its input (or of autocast), so that the weight of
one layer at a time is in memory in full. int8 is torchao's, nf4 bitsandbytes'.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_input, conv2d_input

from genkit.backbones.patches import PatchEmbedding1d, PatchEmbedding2d

BaseType = Literal["fp32", "bf16"]
Quantization = Literal["int8", "nf4"]
PACKAGES: Mapping[str, str] = {"int8": "torchao", "nf4": "bitsandbytes"}
NF4_BLOCK = 64  # weights that share a scale (Dettmers et al. 2023, section 3)


@dataclass(frozen=True)
class WeightFormat:
    """How frozen weights are kept in memory."""

    base: BaseType = "fp32"
    """of what is not quantised"""
    quantize: Quantization | None = None
    """of the weights of linear layers; None: none"""

    @property
    def active(self) -> bool:
        """Whether it differs from the weights as networks have them."""
        return self.base != "fp32" or self.quantize is not None

    def __str__(self) -> str:
        return " and ".join([*([self.quantize] if self.quantize else []), self.base])

    def of_layer(self, layer: nn.Module) -> str | None:
        """The format of a layer's weight: bf16, int8 or nf4; None if it stays."""
        if type(layer) is nn.Linear and self.quantize:
            return self.quantize
        return "bf16" if type(layer) in COMPRESSED and self.base == "bf16" else None


def require_package(quantize: str | None) -> None:
    """``ValueError`` if the package is missing that quantises."""
    if quantize and importlib.util.find_spec(PACKAGES[quantize]) is None:
        raise ValueError(
            f"quantize: {quantize} needs the package {PACKAGES[quantize]}; install it with: pip install "
            '"genkit-torch[quantize]"'
        )


def compress(nets: Mapping[str, nn.Module], weights: WeightFormat) -> None:
    """Keep the weights of layers of ``nets`` in the format ``weights``, in place and without gradient.

    A layer without weights yet (on the meta device) compresses those that are given to it. ``ValueError`` if a package
    is missing.
    """
    require_package(weights.quantize)
    for net in nets.values():
        for parent in list(net.modules()):
            for name, layer in list(parent.named_children()):
                if kind := weights.of_layer(layer):
                    setattr(parent, name, COMPRESSED[type(layer)](layer, kind))


def compressed_formats(nets: Mapping[str, nn.Module]) -> list[str]:
    """The formats of compressed layers in ``nets``: bf16, int8, nf4."""
    layers = [m for net in nets.values() for m in net.modules() if isinstance(m, CompressedLayer)]
    return sorted({layer.kind for layer in layers})


@torch.no_grad()
def adopt_tensor(net: nn.Module, name: str, value: Tensor) -> None:
    """Make ``value`` the parameter or buffer ``name`` of ``net``, in the type and on the device that it has there.

    Nothing is copied if it has these already. A compressed layer, or a network without memory for its weights (on the
    meta device), takes it too.
    """
    parent, _, last = name.rpartition(".")
    module = net.get_submodule(parent)
    old = module._parameters.get(last, module._buffers.get(last))
    assert old is not None
    device = value.device if old.device.type == "meta" else old.device
    if isinstance(module, CompressedLayer) and last == "weight":
        module.take_weight(value.to(device))
    elif last in module._parameters:
        module._parameters[last] = nn.Parameter(value.to(device, old.dtype), requires_grad=old.requires_grad)
    else:
        module._buffers[last] = value.to(device, old.dtype)


# ---------------------------------------------------------------------------------------------------------- the weight
class CompressedLayer(nn.Module):
    """A layer whose ``weight`` is compressed; ``kind`` says how. It has the attributes of the layer ``source``."""

    kind: str
    weight: Any

    def __init__(self, source: nn.Module, kind: str):
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in source.__dict__.items() if k not in self.__dict__})
        self.kind, self.training = kind, source.training
        weight, bias = source._parameters["weight"], source._parameters["bias"]
        assert weight is not None
        self.size = weight.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.register_parameter("weight", nn.Parameter(weight.detach(), requires_grad=False))
        if weight.device.type != "meta":
            self.take_weight(weight.detach())

    @torch.no_grad()
    def take_weight(self, weight: Tensor) -> None:
        """Keep ``weight`` compressed."""
        del self.weight
        if self.kind == "nf4":
            from bitsandbytes.functional import quantize_4bit  # lazy: optional, slow to import

            packed, state = quantize_4bit(weight.float().contiguous(), quant_type="nf4", blocksize=NF4_BLOCK)
            self.register_buffer("absmax", state.absmax, persistent=False)
            self.register_buffer("code", state.code, persistent=False)
            weight = packed
        elif self.kind == "int8":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_  # lazy: optional, slow to import

            holder = nn.Linear(1, 1, bias=False, device="meta")  # draws no random numbers
            holder.weight = nn.Parameter(weight.float(), requires_grad=False)
            quantize_(holder, Int8WeightOnlyConfig())
            weight = holder.weight.data
        else:
            weight = weight.to(torch.bfloat16)
        self.weight = nn.Parameter(weight, requires_grad=False)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight in full, in ``dtype``."""
        if self.kind == "nf4":
            from bitsandbytes.functional import QuantState, dequantize_4bit  # lazy: optional, slow to import

            state = QuantState(
                self.get_buffer("absmax"), self.size, self.get_buffer("code"), NF4_BLOCK, "nf4", torch.float32
            )
            return dequantize_4bit(self.weight, state).to(dtype)
        return (self.weight.dequantize() if self.kind == "int8" else self.weight).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.bias
        out = FrozenMap.apply(x, self)
        assert isinstance(out, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        return out if bias is None else out + self.shaped_bias(bias).to(out.dtype)

    def shaped_bias(self, bias: Tensor) -> Tensor:
        """The bias ``[D]`` as it is added to the layer's output."""
        return bias

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The output without bias, of a weight in full."""
        raise NotImplementedError  # of each kind of layer

    def pull_back(self, gradient: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
        """The gradient of the input, which has ``shape``."""
        raise NotImplementedError  # of each kind of layer


class FrozenMap(torch.autograd.Function):
    """A linear map by a compressed weight, of which no copy in full is kept for the backward pass."""

    @staticmethod
    def forward(x: Tensor, layer: CompressedLayer) -> Tensor:
        return layer.apply_weight(x, layer.dense(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """What the derivatives need: the layer, and the shape of the input."""
        ctx.layer, ctx.shape = inputs[1], inputs[0].shape

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return ctx.layer.pull_back(gradient, ctx.shape, ctx.layer.dense(gradient.dtype)), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """The map of the input's tangent."""
        tangent = tangents[0]
        assert tangent is not None
        return ctx.layer.apply_weight(tangent, ctx.layer.dense(tangent.dtype))


class CompressedLinear(CompressedLayer, nn.Linear):
    """A linear layer with a compressed weight."""

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def pull_back(self, gradient: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
        return gradient @ weight


class CompressedConv(CompressedLayer):
    """A convolution with a compressed kernel."""

    def shaped_bias(self, bias: Tensor) -> Tensor:
        return bias.view(-1, *(1,) * (len(self.size) - 2))

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, None)  # type: ignore[operator]  # of nn.Conv1d and nn.Conv2d

    def pull_back(self, gradient: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
        layer: Any = self
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            x = torch.zeros(shape, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
            with torch.enable_grad():
                return torch.autograd.grad(self.apply_weight(x, weight), x, gradient)[0]
        rule = conv2d_input if len(shape) == 4 else conv1d_input
        return rule(shape, weight, gradient, layer.stride, layer.padding, layer.dilation, layer.groups)


class CompressedConv1d(CompressedConv, nn.Conv1d):
    """:class:`CompressedConv` of sequences."""


class CompressedConv2d(CompressedConv, nn.Conv2d):
    """:class:`CompressedConv` of pictures."""


COMPRESSED: Mapping[type[nn.Module], type[CompressedLayer]] = {
    nn.Linear: CompressedLinear,
    nn.Conv1d: CompressedConv1d,
    nn.Conv2d: CompressedConv2d,
    PatchEmbedding1d: CompressedConv1d,
    PatchEmbedding2d: CompressedConv2d,
}
