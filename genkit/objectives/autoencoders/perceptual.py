"""Perceptual distances: distances between pictures by their edges or features, for the loss of a first stage.

Each is a frozen dataclass that makes a network ``(x [B, C, H, W], y) -> [B]`` for pictures in [-1, 1]: 0 if identical.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.config.paths import PathText
from genkit.core import mean_flat
from genkit.core.files import format_error
from genkit.core.tensors import cache_folder

WIDTH = 32  # channels of the first layer of random features; each next one has twice as many


# ------------------------------------------------------------------------------------------------- the networks
def feature_distance(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """The distance of LPIPS (Zhang et al. 2018, eq. 1) without its learned weights, ``[B]``.

    In each layer of features ``[B, C, h, w]`` the squared distance of unit vectors, averaged over positions; then the
    mean over layers.
    """
    distances = []
    for pair in zip(x, y, strict=True):
        unit = [v / (v.square().sum(1, keepdim=True) + 1e-10).sqrt() for v in map(Tensor.float, pair)]
        distances.append((unit[0] - unit[1]).square().sum(1).flatten(1).mean(1))
    return torch.stack(distances).mean(0)


class GradientDifference(nn.Module):
    """The mean absolute difference of the pictures' finite differences (Mathieu et al. 2016, eq. 6, alpha 1).

    It is averaged over sizes from the whole to 2x2. It compares edges only, not what they show.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        difference = x - y  # finite differences are linear
        distances = []
        while min(difference.shape[-2:]) >= 2:
            distances.append(mean_flat(difference.diff(dim=-1).abs()) + mean_flat(difference.diff(dim=-2).abs()))
            difference = F.avg_pool2d(difference, 2)
        return torch.stack(distances).mean(0)


class RandomFeatures(nn.Module):
    """:func:`feature_distance` in three layers of random filters.

    The filters come from a fixed seed and are never trained: no file is needed, but VGG's features are better.
    """

    def __init__(self, channels: int):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        widths = (channels, WIDTH, 2 * WIDTH, 4 * WIDTH)
        for i in range(3):
            filters = torch.randn(widths[i + 1], widths[i], 3, 3, generator=g) / (9 * widths[i] / 2) ** 0.5
            self.register_buffer(f"filters{i}", filters)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return feature_distance(self.features(x), self.features(y))

    def features(self, x: Tensor) -> list[Tensor]:
        """The features of each layer, ``[B, C, h, w]``."""
        layers = []
        for i in range(3):
            filters = cast(Tensor, self.get_buffer(f"filters{i}"))
            x = F.conv2d(x.to(filters), filters, stride=1 + (i > 0), padding=1).relu()
            layers.append(x)
        return layers


class VGGFeatures(nn.Module):
    """:func:`feature_distance` in the last layer of VGG before each pooling that the picture is large enough for.

    It holds no weights itself: they are the same in every average, checkpoint and rank, and are read at first use.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in [0, 1], as torchvision's were

    def __init__(self, settings: VGG):
        super().__init__()
        self.settings = settings
        # outside compiled code, for it reads a file; not at import, for torch._dynamo takes a second
        self.load_vgg = cast(Callable[[VGG, torch.device], nn.Sequential], torch.compiler.disable(make_vgg))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return feature_distance(self.features(x), self.features(y))

    def features(self, x: Tensor) -> list[Tensor]:
        """The features before each pooling, ``[B, C, h, w]``."""
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        x = ((x + 1) / 2 - mean) / std  # one channel becomes three
        layers = []
        for layer in self.load_vgg(self.settings, x.device):
            if isinstance(layer, nn.MaxPool2d):
                layers.append(x)
                if min(x.shape[-2:]) < 2:
                    break
            x = layer(x)
        return layers


# ------------------------------------------------------------------------------------------------- the settings
class PerceptualDistance(ABC):
    """A distance between pictures. Its fields are configuration."""

    @abstractmethod
    def network(self, channels: int) -> nn.Module:
        """The network ``(x, y) -> [B]``. It reads no file, because a trained first stage needs none."""

    def setup(self) -> None:  # noqa: B027  (most need nothing)
        """Called before training. ``ValueError`` if a file is missing that training needs."""


@dataclass(frozen=True)
class EdgeDistance(PerceptualDistance):
    """The pictures' edges."""

    def network(self, channels: int) -> nn.Module:
        return GradientDifference()


@dataclass(frozen=True)
class RandomFilterDistance(PerceptualDistance):
    """Three layers of fixed random filters; not LPIPS."""

    def network(self, channels: int) -> nn.Module:
        return RandomFeatures(channels)


@dataclass(frozen=True)
class VGG(PerceptualDistance):
    """Features of torchvision's VGG (Simonyan & Zisserman 2015), from a local file; LPIPS without learned weights."""

    weights: PathText | None = None
    """torchvision's file, or safetensors with the same names; None: in the cache of torch or of genkit"""

    letter: ClassVar[str]
    """column of the paper's table 1"""
    file: ClassVar[str]
    """torchvision's file name"""

    def network(self, channels: int) -> nn.Module:
        if channels not in (1, 3):
            raise ValueError(
                f"perceptual: VGG sees 1 or 3 channels, and samples have {channels}; take gradient or random"
            )
        return VGGFeatures(self)

    def setup(self) -> None:
        make_vgg(self, torch.device("cpu"))

    def find_weights(self) -> Path:
        """The file of the weights. ``ValueError`` says how to get it."""
        caches = (Path(torch.hub.get_dir()) / "checkpoints" / self.file, cache_folder() / self.file)
        for path in [Path(self.weights)] if self.weights is not None else caches:
            if path.is_file():
                return path
        given = "no file of VGG's weights here" if self.weights is None else f"given {self.weights}, which is no file"
        raise ValueError(
            f"perceptual.weights: {given}; get https://download.pytorch.org/models/{self.file} and put it at "
            f"{caches[1]}, or name it with --objective.perceptual.weights; --objective.perceptual=random needs none"
        )


@dataclass(frozen=True)
class VGG11(VGG):
    """VGG with 11 layers."""

    letter: ClassVar[str] = "A"
    file: ClassVar[str] = "vgg11-8a719046.pth"


@dataclass(frozen=True)
class VGG16(VGG):
    """VGG with 16 layers, as in LPIPS."""

    letter: ClassVar[str] = "D"
    file: ClassVar[str] = "vgg16-397923af.pth"


PERCEPTUAL_DISTANCES: Mapping[str, type[PerceptualDistance]] = {
    "gradient": EdgeDistance,
    "random": RandomFilterDistance,
    "vgg11": VGG11,
    "vgg16": VGG16,
}


# ---------------------------------------------------------------------------------------------------- VGG's file
@lru_cache(maxsize=2)
def make_vgg(settings: VGG, device: torch.device) -> nn.Sequential:
    """VGG's convolutions, rectifiers and poolings with their weights, which nothing trains."""
    from torchvision.models.vgg import cfgs, make_layers  # lazy: only for this distance

    path = settings.find_weights()
    stored = read_weights(path, settings)
    with torch.device("meta"):
        layers = make_layers(cfgs[settings.letter])
    wanted = {f"features.{k}": v.shape for k, v in layers.state_dict().items()}
    odd = [k for k, shape in wanted.items() if k not in stored or stored[k].shape != shape]
    if odd:
        raise ValueError(f"perceptual.weights: {path} is not {settings.file}: {odd[0]} is missing or of another shape")
    layers.load_state_dict({k.removeprefix("features."): stored[k].float() for k in wanted}, assign=True)
    return layers.to(device).eval().requires_grad_(False)


def read_weights(path: Path, settings: VGG) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file, or of torch's with nothing else in it: code in it is not run."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # lazy: only for this distance

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(stored, Mapping) or not all(isinstance(v, Tensor) for v in stored.values()):
            raise ValueError("it is no table of tensors")
        return cast(Mapping[str, Tensor], stored)
    except Exception as e:  # both readers raise anything over a damaged file
        reason = format_error(e)[:100]
        raise ValueError(
            f"perceptual.weights: {path} cannot be read as {settings.file}, or as safetensors: {reason}"
        ) from e
