"""Inception-v3 as the FID uses it: the network of 2015-12-05, on whose features every published FID is based.

The graph is TensorFlow's (Szegedy et al. 2016, with the deviations that Heusel et al. 2017 made a standard: average
pooling that does not count the padding, and a maximum instead of an average in the last block). The weights come from
``inception-2015-12-05.pt``, a TorchScript file that NVlabs published and clean-fid downloads; only its tensors are
read, its code is not run. Batch norm is folded into the convolutions, which halves the time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from genkit.core.files import format_error

NAME = "inception-2015-12-05.pt"
DIM = 2048
SIZE = 299  # input pixels per side
PLACE_CHANNELS, PLACES = 7, 7 * 17 * 17  # of mixed_6/conv: the features of sFID (Nash et al. 2021, appendix)
EPS = 1e-3  # of the batch norms
Weights = Mapping[str, Tensor]


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The tensors in ``file``: TorchScript, or safetensors with the same names. ``ValueError`` if it is neither."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"weights: given {file}, which is not a file; needs {NAME}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = torch.jit.load(str(file), map_location="cpu")
        return {k: v.detach() for k, v in (*network.named_parameters(), *network.named_buffers())}
    except Exception as e:  # both readers raise anything over a damaged file
        why = format_error(e)[:100]
        raise ValueError(f"weights: {file} cannot be read as {NAME}, or as safetensors: {why}") from e


# ------------------------------------------------------------------------------------------------ the network
class Conv(nn.Conv2d):
    """Convolution, batch norm without gain, ReLU; the norm is folded into the convolution."""

    def __init__(self, p: Weights, name: str, stride: int = 1, padding: int | tuple[int, int] = 0):
        try:
            weight, beta, mean, var = (p[f"layers.{name}.{k}"].double() for k in ("weight", "beta", "mean", "var"))
        except KeyError as e:
            raise ValueError(f"weights: no tensor {e.args[0]}; needs those of {NAME}") from None
        if weight.ndim != 4 or not beta.shape == mean.shape == var.shape == weight.shape[:1]:
            raise ValueError(f"weights: layers.{name} is not a convolution with a batch norm; needs those of {NAME}")
        out, inp, *kernel = weight.shape
        super().__init__(inp, out, (kernel[0], kernel[1]), stride, padding, device="meta")
        scale = (var + EPS).rsqrt()
        self.weight = nn.Parameter((weight * scale[:, None, None, None]).float(), requires_grad=False)
        self.bias = nn.Parameter((beta - mean * scale).float(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, H, W]`` to non-negative ``[B, C', H', W']``."""
        return F.relu_(super().forward(input))


class AveragePool(nn.Module):
    """3x3 average pooling of stride 1 that does not count the padding."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Branches(nn.Module):
    """Several branches on the same input, concatenated along the channels."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, sum of the branches' channels, H', W']``."""
        return torch.cat([branch(x) for branch in self.branches], 1)


ROW, COLUMN = (0, 3), (3, 0)  # paddings of 1x7 and 7x1 convolutions


def mixed_35(p: Weights, n: str) -> nn.Module:
    """A block at 35x35 pixels (Szegedy et al. 2016, figure 5); ``n`` is its name in the weights ``p``."""
    return Branches(
        Conv(p, f"{n}.conv"),
        nn.Sequential(Conv(p, f"{n}.tower.conv"), Conv(p, f"{n}.tower.conv_1", padding=2)),
        nn.Sequential(
            Conv(p, f"{n}.tower_1.conv"),
            Conv(p, f"{n}.tower_1.conv_1", padding=1),
            Conv(p, f"{n}.tower_1.conv_2", padding=1),
        ),
        nn.Sequential(AveragePool(), Conv(p, f"{n}.tower_2.conv")),
    )


def reduce_to_17(p: Weights, n: str) -> nn.Module:
    """The block that reduces 35x35 to 17x17 pixels (figure 10)."""
    return Branches(
        Conv(p, f"{n}.conv", 2),
        nn.Sequential(
            Conv(p, f"{n}.tower.conv"), Conv(p, f"{n}.tower.conv_1", padding=1), Conv(p, f"{n}.tower.conv_2", 2)
        ),
        nn.MaxPool2d(3, 2),
    )


def mixed_17(p: Weights, n: str) -> nn.Module:
    """A block at 17x17 pixels (figure 6, n = 7)."""
    return Branches(
        Conv(p, f"{n}.conv"),
        nn.Sequential(
            Conv(p, f"{n}.tower.conv"),
            Conv(p, f"{n}.tower.conv_1", padding=ROW),
            Conv(p, f"{n}.tower.conv_2", padding=COLUMN),
        ),
        nn.Sequential(
            Conv(p, f"{n}.tower_1.conv"),
            Conv(p, f"{n}.tower_1.conv_1", padding=COLUMN),
            Conv(p, f"{n}.tower_1.conv_2", padding=ROW),
            Conv(p, f"{n}.tower_1.conv_3", padding=COLUMN),
            Conv(p, f"{n}.tower_1.conv_4", padding=ROW),
        ),
        nn.Sequential(AveragePool(), Conv(p, f"{n}.tower_2.conv")),
    )


def reduce_to_8(p: Weights, n: str) -> nn.Module:
    """The block that reduces 17x17 to 8x8 pixels."""
    return Branches(
        nn.Sequential(Conv(p, f"{n}.tower.conv"), Conv(p, f"{n}.tower.conv_1", 2)),
        nn.Sequential(
            Conv(p, f"{n}.tower_1.conv"),
            Conv(p, f"{n}.tower_1.conv_1", padding=ROW),
            Conv(p, f"{n}.tower_1.conv_2", padding=COLUMN),
            Conv(p, f"{n}.tower_1.conv_3", 2),
        ),
        nn.MaxPool2d(3, 2),
    )


def mixed_8(p: Weights, n: str, pool: nn.Module) -> nn.Module:
    """A block at 8x8 pixels (figure 7), with its pooling."""

    def fork(tower: str) -> nn.Module:
        return Branches(
            Conv(p, f"{n}.{tower}_mixed_conv", padding=(0, 1)), Conv(p, f"{n}.{tower}_mixed_conv_1", padding=(1, 0))
        )

    return Branches(
        Conv(p, f"{n}.conv"),
        nn.Sequential(Conv(p, f"{n}.tower_conv"), fork("tower")),
        nn.Sequential(Conv(p, f"{n}.tower_1_conv"), Conv(p, f"{n}.tower_1_conv_1", padding=1), fork("tower_1")),
        nn.Sequential(pool, Conv(p, f"{n}.tower_2_conv")),
    )


class InceptionV3(nn.Module):
    """``x [B, 3, 299, 299]`` in [-1, 1] to features ``[B, 2048]`` (pool3) and logits ``[B, 1008]``, both float32.

    There are logits only if ``weights`` have ``output.weight`` (NVlabs' file does); they omit its bias, as Salimans et
    al. 2016 did for the inception score. ``dtype`` is that of the convolutions. ``ValueError`` if tensors are missing
    or do not fit together.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype = torch.float32):
        super().__init__()
        p = weights
        self.layers = nn.Sequential(
            Conv(p, "conv", 2),
            Conv(p, "conv_1"),
            Conv(p, "conv_2", padding=1),
            nn.MaxPool2d(3, 2),
            Conv(p, "conv_3"),
            Conv(p, "conv_4"),
            nn.MaxPool2d(3, 2),
            *(mixed_35(p, f"mixed{i}") for i in ("", "_1", "_2")),
            reduce_to_17(p, "mixed_3"),
            *(mixed_17(p, f"mixed_{i}") for i in (4, 5, 6, 7)),
            reduce_to_8(p, "mixed_8"),
            mixed_8(p, "mixed_9", AveragePool()),
            mixed_8(p, "mixed_10", nn.MaxPool2d(3, 1, 1)),
        )
        self.places: Tensor | None = None
        """of the last input, ``[B, 7, H, W]``"""
        mixed_6 = self.layers[13]
        assert isinstance(mixed_6, Branches)
        mixed_6.branches[0].register_forward_hook(self.keep_places)
        self.layers.to(dtype=dtype).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        output = weights.get("output.weight")
        self.output = None if output is None else nn.Parameter(output.float(), requires_grad=False)
        self.dtype = dtype
        try:
            features, _ = self(torch.zeros(1, 3, 75, 75))  # the smallest input that reaches the last block
        except RuntimeError as e:
            raise ValueError(f"weights: their shapes do not fit together ({e}); needs those of {NAME}") from e
        self.dim = features.shape[1]
        self.eval()

    def keep_places(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        """A hook that keeps the first channels of ``mixed_6/conv``."""
        self.places = output[:, :PLACE_CHANNELS].float()

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``[B, D]`` and logits ``[B, 1008]``, or None for the logits."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 must mean fp32
            maps = self.layers(x)
        features = maps.float().mean((2, 3))
        return features, None if self.output is None else features @ self.output.T
