"""Blocks that the families share: norms, attention, residual blocks, resampling, padding.

Under autocast the norms stay in the dtype of their input (their statistics are float32 inside the kernel) instead of
converting to float32 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from genkit.backbones.dropout import Dropout
from genkit.core.weights import Fused

CONV: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d}


def zero_init(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters set to zero, so that a residual branch starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def remat(function: Callable[..., Tensor], active: bool, *args) -> Tensor:
    """``function(*args)``, with its activations recomputed in the backward pass if ``active`` (Chen et al. 2016)."""
    if active and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def pad_to(x: Float[Tensor, "b c *size"], size: Sequence[int]) -> Tensor:
    """Append zeros to each spatial axis up to ``size``: the border that convolutions see anyway.

    Their gradient is deterministic; that of replicated borders is not, on CUDA.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    padding: list[int] = []
    for have, want in zip(x.shape[:1:-1], reversed(size), strict=True):
        padding += [0, want - have]
    return F.pad(x, padding)


def crop_to(x: Float[Tensor, "b c *padded"], size: Sequence[int]) -> Tensor:
    """The inverse of ``pad_to``."""
    for axis, n in enumerate(size, 2):
        x = x.narrow(axis, 0, n)
    return x


# ---------------------------------------------------------------------------------------------------------- norm
def num_groups(channels: int) -> int:
    """At most 32 groups of at least 4 channels (Karras et al. 2022, table 7 counts likewise), dividing ``channels``."""
    return max(g for g in range(1, min(32, max(channels // 4, 1)) + 1) if channels % g == 0)


def group_norm(
    x: Float[Tensor, "b c *size"], weight: Float[Tensor, "b c"], bias: Float[Tensor, "b c"], eps: float = 1e-5
) -> Tensor:
    """``weight norm(x) + bias``, with a weight and a bias for each sample.

    The batch is passed as further groups of one sample, so that the kernel applies weight and bias; its backward pass
    is also 5 to 8 times faster on CPUs than that of the plain call.
    """
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = weight.to(x.dtype).flatten(), bias.to(x.dtype).flatten()
        joined = x.reshape(1, -1, *x.shape[2:])
        return F.group_norm(joined, num_groups(int(x.shape[1])) * len(x), weight, bias, eps).view(x.shape)


class GroupNorm(nn.Module):
    """GroupNorm (Wu & He 2018), ``[B, C, *size]``."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "b c *size"]) -> Tensor:
        return group_norm(x, self.weight.expand(len(x), -1), self.bias.expand(len(x), -1), self.eps)


def rms_norm(x: Float[Tensor, "*b d"]) -> Tensor:
    """``x / sqrt(mean(x^2))`` over the last axis (Zhang & Sennrich 2019), in float32 or wider inside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def modulate(
    x: Float[Tensor, "b n d"],
    shift: Float[Tensor, "b d"],
    scale: Float[Tensor, "b d"],
    rms: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """adaLN: ``(1 + scale) norm(x) + shift`` (Peebles & Xie 2023, section 3.2), by layer norm or :func:`rms_norm`."""
    normal = rms_norm(x) if rms else F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift.unsqueeze(1), normal, 1 + scale.unsqueeze(1))


# ----------------------------------------------------------------------------------------------------- attention
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "b 1 1 l"] | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` over ``[B, heads, N, d]`` (Vaswani et al. 2017, eq. 1).

    Written out on the CPU up to the size at which the fused kernel is faster (measured, forward and backward: 128 keys
    in float32, 1024 in bf16; at the usual 16 to 256 it is 1.2 to 4 times faster written out), and where dual tensors
    carry a forward-mode derivative, which the fused kernels do not have. They have no second one either: for a gradient
    penalty or ``torch.func.jvp``, call the network under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
    """
    half, dual = q.dtype in (torch.bfloat16, torch.float16), unpack_dual(q).tangent is not None
    if not dual and (q.device.type != "cpu" or k.shape[2] > (1024 if half else 128)):
        return F.scaled_dot_product_attention(q, k, v, mask)
    score = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    # under autocast softmax returns float32; its kernel sums in it anyway
    with torch.autocast(q.device.type, enabled=False):
        weights = softmax_of_dual(score) if dual else score.softmax(-1)
    return weights @ v


def softmax_of_dual(score: Tensor) -> Tensor:
    """Softmax over the last axis, whose forward-mode derivative has a gradient; that of torch's is found in place."""
    exponential = (score - score.detach().amax(-1, keepdim=True)).exp()
    return exponential / exponential.sum(-1, keepdim=True)


class Attention(nn.Module):
    """Multi-head attention ``[B, N, dim] -> [B, N, dim]``, to itself, or to a context ``[B, L, context]`` with a mask.

    One head if ``head_size`` does not divide ``dim``. ``qk_norm`` normalises queries and keys of each head by
    :func:`rms_norm` with learned scales (Henry et al. 2020; Dehghani et al. 2023).
    """

    def __init__(self, dim: int, head_size: int, context: int = 0, qk_norm: bool = False):
        super().__init__()
        self.heads = dim // head_size if dim % head_size == 0 else 1
        self.q = nn.Linear(dim, dim) if context else None
        self.kv = nn.Linear(context or dim, 2 * dim if context else 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.scales = nn.Parameter(torch.ones(2, dim // self.heads)) if qk_norm else None

    def fused_weights(self) -> dict[str, Fused]:
        """Keys and values, and queries without a context."""
        return {"kv.weight": Fused(3 if self.q is None else 2)}

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Tensor | None = None,
        mask: Tensor | None = None,
        angles: Float[Tensor, "n half"] | None = None,
    ) -> Tensor:
        """``angles`` rotate queries and keys (:func:`rotate`)."""
        projected = self._split_heads(self.kv(x if self.q is None else context))
        q, k, v = projected if self.q is None else (*self._split_heads(self.q(x)), *projected)
        if self.scales is not None:
            q, k = (rms_norm(y) * scale.to(y.dtype) for y, scale in zip((q, k), self.scales, strict=True))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        y = attend(q, k, v, None if mask is None else mask[:, None, None])
        return self.out(y.transpose(1, 2).flatten(2))

    def _split_heads(self, y: Float[Tensor, "b n kd"]) -> Sequence[Tensor]:
        """``[B, N, k dim]`` as k tensors ``[B, heads, N, dim / heads]``."""
        size = self.out.in_features // self.heads
        return y.unflatten(-1, (-1, self.heads, size)).permute(2, 0, 3, 1, 4).unbind(0)


def rotate(y: Float[Tensor, "b heads n d"], angles: Float[Tensor, "n half"]) -> Tensor:
    """Rotate the pairs ``(y[i], y[i + d/2])`` by ``angles`` (Su et al. 2021, eq. 34, with the halves as pairs)."""
    a, b = y.chunk(2, -1)
    cos, sin = angles.cos().to(y.dtype), angles.sin().to(y.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class MapAttention(nn.Module):
    """Residual attention of a map ``[B, C, *size]`` to itself (Ho et al. 2020, appendix B), then to any tokens."""

    def __init__(self, channels: int, head_size: int, context: int = 0, rescale: bool = False, eps: float = 1e-5):
        super().__init__()
        self.rescale = rescale
        self.norm = GroupNorm(channels, eps)
        self.self_attention = Attention(channels, head_size)
        zero_init(self.self_attention.out)
        self.cross_norm = nn.LayerNorm(channels) if context else None
        self.cross = Attention(channels, head_size, context) if context else None
        if self.cross:
            zero_init(self.cross.out)

    def forward(
        self, x: Float[Tensor, "b c *size"], tokens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        y = self.self_attention(self.norm(x).flatten(2).transpose(1, 2))
        if self.cross and self.cross_norm:
            y = y + self.cross(self.cross_norm(x.flatten(2).transpose(1, 2) + y), tokens, mask)
        return add_residual(x, y.transpose(1, 2).reshape(x.shape), self.rescale)


# ------------------------------------------------------------------------------------------------------ residual
def add_residual(x: Tensor, y: Tensor, rescale: bool) -> Tensor:
    """``x + y``, divided by sqrt(2) with ``rescale``, which keeps the variance (Song et al. 2021, appendix H)."""
    return (x + y) * 0.5**0.5 if rescale else x + y


class ResBlock(nn.Module):
    """The residual block of ADM (Dhariwal & Nichol 2021): norm, SiLU, conv; AdaGN, SiLU, conv. ``[B, inp, *size]``.

    AdaGN is ``(1 + scale) norm(h) + shift`` with scale and shift from the embedding (section 3). Without
    ``scale_shift`` the embedding is added before the norm (Ho et al. 2020). ``resample`` is applied to the input of the
    first convolution and to the skip connection (Brock et al. 2019, figure 15), which ``rescale`` projects then, and
    divides the sum by sqrt(2) (Song et al. 2021, appendix H).
    """

    def __init__(
        self,
        dims: int,
        inp: int,
        out: int,
        emb: int,
        dropout: float = 0.0,
        *,
        scale_shift: bool = True,
        rescale: bool = False,
        resample: Callable[[Tensor], Tensor] | None = None,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.resample, self.rescale, self.eps = resample, rescale, eps
        self.norm1 = GroupNorm(inp, eps)
        self.conv1 = CONV[dims](inp, out, 3, padding=1)
        self.emb = nn.Linear(emb, 2 * out if scale_shift else out)
        self.norm2 = None if scale_shift else GroupNorm(out, eps)
        self.conv2 = zero_init(CONV[dims](out, out, 3, padding=1))
        projects = inp != out or (rescale and resample is not None)
        self.skip = CONV[dims](inp, out, 1) if projects else None
        self.dropout = Dropout(dropout)

    def fused_weights(self) -> dict[str, Fused]:
        """Scale and shift."""
        return {"emb.weight": Fused(2)} if self.norm2 is None else {}

    def forward(self, x: Float[Tensor, "b c *size"], emb: Float[Tensor, "b e"]) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h, condition = self.conv1(h), self.emb(emb)
        if self.norm2 is None:
            scale, shift = condition.chunk(2, 1)
            h = group_norm(h, 1 + scale, shift, self.eps)
        else:
            h = self.norm2(h + condition.unflatten(1, (-1, *(1,) * (h.ndim - 2))))
        h = self.conv2(self.dropout(F.silu(h)))
        return add_residual(x if self.skip is None else self.skip(x), h, self.rescale)


# ------------------------------------------------------------------------------------------------------ resampling
BOX, FIR = (1, 1), (1, 3, 3, 1)
"""Taps of the filters: averages of pairs (Dhariwal & Nichol 2021), and one against aliasing (Song et al. 2021)."""


class Resample(nn.Module):
    """Halve or double each axis of ``[B, C, *size]`` by a filter with these taps on each channel.

    Down: filter and keep every second value, of an even number. Up: put zeros between the values and filter, with a
    gain of 2 for each axis. Zeros lie outside; with ``border`` the input has the values that the filter reads there.
    """

    def __init__(self, dims: int, taps: tuple[int, ...], up: bool, border: bool = False):
        super().__init__()
        self.dims, self.is_box, self.up = dims, taps == BOX, up
        self.padding = 0 if border else (len(taps) - 1) // 2
        line = torch.tensor(taps) / sum(taps) * (2 if up else 1)
        kernel = (line if dims == 1 else torch.outer(line, line))[None, None]
        self.kernel: Tensor
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Tensor:
        if self.is_box:
            if self.up:
                return F.interpolate(x, scale_factor=2.0, mode="nearest")
            return F.avg_pool1d(x, 2) if self.dims == 1 else F.avg_pool2d(x, 2)
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, *(-1,) * self.dims)
        padding, groups = self.padding, x.shape[1]
        if self.up:
            spread = F.conv_transpose1d if self.dims == 1 else F.conv_transpose2d
            return spread(x, kernel, stride=2, padding=padding, groups=groups)
        return (F.conv1d if self.dims == 1 else F.conv2d)(x, kernel, stride=2, padding=padding, groups=groups)


class Downsample(nn.Module):
    """Halve the size, by a convolution of stride 2."""

    def __init__(self, dims: int, channels: int):
        super().__init__()
        self.conv = CONV[dims](channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "b c *size"], _: object = None) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the size, by repetition and a convolution."""

    def __init__(self, dims: int, channels: int):
        super().__init__()
        self.conv = CONV[dims](channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c *size"], _: object = None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def require_positive(family: str, **fields: Sequence[int]) -> None:
    """``ValueError`` unless every field holds one or more numbers, all of them at least 1."""
    for name, numbers in fields.items():
        if not numbers or min(numbers) < 1:
            given = numbers[0] if len(numbers) == 1 else tuple(numbers)
            raise ValueError(f"{family}: {name} is {given}; needs {'at least one number, ' if not numbers else ''}>= 1")


def require_fraction(family: str, **fields: float) -> None:
    """``ValueError`` unless every field is in [0, 1)."""
    for name, value in fields.items():
        if not 0 <= value < 1:
            raise ValueError(f"{family}: {name} is {value}; allowed 0 <= {name} < 1")


class TokenPool(nn.Module):
    """Sequences of conditions as one vector, ``[B, L, dim] -> [B, dim]``, for a network without cross-attention.

    Each of ``HEADS`` learned queries averages the tokens that exist by its softmax (Lee et al. 2019, section 3.2, with
    the keys as values), and two layers combine the averages.
    """

    HEADS = 4

    def __init__(self, dim: int):
        super().__init__()
        self.query = nn.Linear(dim, self.HEADS, bias=False)
        self.layers = nn.Sequential(nn.Linear(self.HEADS * dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, tokens: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        scores = self.query(tokens).float().masked_fill(~mask[..., None], -math.inf)
        return self.layers((scores.softmax(1).to(tokens.dtype).transpose(1, 2) @ tokens).flatten(1))
