"""What looks alike: distances of pictures that see edges or features, for the loss of a first stage.

Each is a frozen dataclass that makes a network ``(x [B, C, H, W], y) -> [B]``, of pictures in -1 .. 1: 0 for the same.
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

from genkit.core import mean_flat
from genkit.core.files import one_line
from genkit.core.tensors import cache

WIDTH = 32  # channels of the first layer of random features; each next one has twice as many


def apart(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """The distance of LPIPS (Zhang et al. 2018, eq. 1) without its learned weights, ``[B]``: in each layer of features
    ``[B, C, h, w]`` the squared distance of unit vectors, averaged over positions; then over layers."""
    found = []
    for pair in zip(x, y, strict=True):
        unit = [v / (v.square().sum(1, keepdim=True) + 1e-10).sqrt() for v in map(Tensor.float, pair)]
        found.append((unit[0] - unit[1]).square().sum(1).flatten(1).mean(1))
    return torch.stack(found).mean(0)


class Gradients(nn.Module):
    """The mean absolute difference of the pictures' own finite differences (Mathieu et al. 2016, eq. 6, alpha 1), over
    sizes from the whole to 2x2. It knows edges, and nothing of what they show."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gap, found = x - y, []  # differences are linear
        while min(gap.shape[-2:]) >= 2:
            found.append(mean_flat(gap.diff(dim=-1).abs()) + mean_flat(gap.diff(dim=-2).abs()))
            gap = F.avg_pool2d(gap, 2)
        return torch.stack(found).mean(0)


class RandomFeatures(nn.Module):
    """:func:`apart` in three layers of random filters.

    The filters come from a fixed seed and are never trained: no file is needed, and none is as good as VGG's.
    """

    def __init__(self, channels: int):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        widths = (channels, WIDTH, 2 * WIDTH, 4 * WIDTH)
        for i in range(3):
            filters = torch.randn(widths[i + 1], widths[i], 3, 3, generator=g) / (9 * widths[i] / 2) ** 0.5
            self.register_buffer(f"filters{i}", filters)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return apart(self.features(x), self.features(y))

    def features(self, x: Tensor) -> list[Tensor]:
        found = []
        for i in range(3):
            filters = cast(Tensor, self.get_buffer(f"filters{i}"))
            x = F.conv2d(x.to(filters), filters, stride=1 + (i > 0), padding=1).relu()
            found.append(x)
        return found


class VGGFeatures(nn.Module):
    """:func:`apart` in the last layer of VGG before each pooling, as far as the picture is large enough for one.

    It holds no weights itself: they are the same in every average, checkpoint and rank, and are read at first use.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in 0 .. 1, as torchvision's were

    def __init__(self, how: VGG):
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return apart(self.features(x), self.features(y))

    def features(self, x: Tensor) -> list[Tensor]:
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        x, found = ((x + 1) / 2 - mean) / std, []  # one channel becomes three
        for layer in loaded(self.how, x.device):
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
                if min(x.shape[-2:]) < 2:
                    break
            x = layer(x)
        return found


# ------------------------------------------------------------------------------------------------- the settings
class Looks(ABC):
    """What pictures are compared by."""

    @abstractmethod
    def network(self, channels: int) -> nn.Module:
        """For pictures of so many channels. Reads no file: a trained first stage needs none."""

    def prepare(self) -> None:  # noqa: B027  (most need nothing)
        """``ValueError`` where a file is missing that training needs."""


@dataclass(frozen=True)
class Edges(Looks):
    """The pictures' edges."""

    def network(self, channels: int) -> nn.Module:
        return Gradients()


@dataclass(frozen=True)
class RandomFilters(Looks):
    """Three layers of fixed random filters; not LPIPS."""

    def network(self, channels: int) -> nn.Module:
        return RandomFeatures(channels)


@dataclass(frozen=True)
class VGG(Looks):
    """Features of torchvision's VGG (Simonyan & Zisserman 2015), from a local file; LPIPS without learned weights."""

    weights: str | None = None
    """torchvision's file, or safetensors with the same names; None: where torch or genkit keeps it"""

    letter: ClassVar[str]
    """of the paper's table 1"""
    file: ClassVar[str]

    def network(self, channels: int) -> nn.Module:
        if channels not in (1, 3):
            raise ValueError(f"looks: VGG sees 1 or 3 channels, and samples have {channels}; take gradient or random")
        return VGGFeatures(self)

    def prepare(self) -> None:
        loaded(self, torch.device("cpu"))

    def find(self) -> Path:
        """The file of the weights. ``ValueError`` says where to get it."""
        kept = (Path(torch.hub.get_dir()) / "checkpoints" / self.file, cache() / self.file)
        places = [Path(self.weights)] if self.weights is not None else kept
        for place in places:
            if place.is_file():
                return place
        given = "no file of VGG's weights here" if self.weights is None else f"given {self.weights}, which is no file"
        raise ValueError(
            f"looks.weights: {given}; get https://download.pytorch.org/models/{self.file} and put it at {kept[1]}, or "
            "name it with --objective.looks.weights; --objective.looks=random needs none"
        )


@dataclass(frozen=True)
class VGG11(VGG):
    letter: ClassVar[str] = "A"
    file: ClassVar[str] = "vgg11-8a719046.pth"


@dataclass(frozen=True)
class VGG16(VGG):
    letter: ClassVar[str] = "D"
    file: ClassVar[str] = "vgg16-397923af.pth"


LOOKS: Mapping[str, type[Looks]] = {"gradient": Edges, "random": RandomFilters, "vgg11": VGG11, "vgg16": VGG16}


# ---------------------------------------------------------------------------------------------------- VGG's file
@lru_cache(maxsize=2)
def layers_of(how: VGG, device: torch.device) -> nn.Sequential:
    """VGG's convolutions, rectifiers and poolings with their weights, which nothing trains."""
    from torchvision.models.vgg import cfgs, make_layers

    where = how.find()
    stored = read(where, how)
    with torch.device("meta"):
        layers = make_layers(cfgs[how.letter])
    wanted = {f"features.{k}": v.shape for k, v in layers.state_dict().items()}
    odd = [k for k, shape in wanted.items() if k not in stored or stored[k].shape != shape]
    if odd:
        raise ValueError(f"looks.weights: {where} is not {how.file}: {odd[0]} is missing or of another shape")
    layers.load_state_dict({k.removeprefix("features."): stored[k].float() for k in wanted}, assign=True)
    return layers.to(device).eval().requires_grad_(False)


loaded = cast(Callable[[VGG, torch.device], nn.Sequential], torch.compiler.disable(layers_of))  # it reads a file


def read(where: Path, how: VGG) -> Mapping[str, Tensor]:
    """The tensors of a file of safetensors, or of torch's with nothing else in it: code in it is not run."""
    try:
        if where.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = torch.load(where, map_location="cpu", weights_only=True)
        if not isinstance(stored, Mapping) or not all(isinstance(v, Tensor) for v in stored.values()):
            raise ValueError("it is no table of tensors")
        return cast(Mapping[str, Tensor], stored)
    except Exception as e:  # both readers raise anything over a damaged file
        why = one_line(e)[:100]
        raise ValueError(f"looks.weights: {where} cannot be read as {how.file}, or as safetensors: {why}") from e
