"""Encoders of a camera's images, ``[B, C, H, W] -> [B, dim]``, trained with the model (``CAMERA_ENCODERS``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit.backbones.blocks import CONV, GroupNorm
from genkit.core.files import format_error

GROUP = 16  # channels of a group of the norms of a ResNet, as in diffusion_policy's
SMALLEST = 8  # shorter side of the map in which the convolutional networks end
FEATURES = 64  # channels of a ResNet's map, before its places are read
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in whose units torchvision's weights see


def require_compact(side: Sequence[int], size: tuple[int, int]) -> None:
    """Raise ``ValueError`` if images of ``size`` (H, W) end as a map of more than 4:1 of :data:`SMALLEST`."""
    if max(side) > 4 * SMALLEST:
        h, w = size
        raise ValueError(f"frames: given pictures of {h}x{w}, too long for this encoder; allowed: up to 4:1, say "
                         f"{h}x{h}")  # fmt: skip


def camera_cnn(channels: int, size: tuple[int, int], dim: int) -> nn.Sequential:
    """A small convolutional network, whose input is in [-1, 1].

    An image is halved by convolutions (with GroupNorm, which averaged weights need: Chi et al. 2023, section 3.2) to a
    map of shorter side 8. A linear layer reads the whole map, so positions are kept. With maps of side 4, or without
    GroupNorm, it took longer to start learning. ``ValueError`` for images of more than 4:1.
    """
    widths = (16, 32, 64, 64)
    layers: list[nn.Module] = []
    inp, side = channels, list(size)
    for i in range(max(1, math.ceil(math.log2(min(size) / SMALLEST)))):
        width = widths[min(i, len(widths) - 1)]
        layers += [CONV[2](inp, width, 3, stride=2, padding=1), GroupNorm(width), nn.SiLU()]
        inp, side = width, [-(-n // 2) for n in side]
    require_compact(side, size)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inp * math.prod(side), dim))


def camera_patches(channels: int, size: tuple[int, int], dim: int) -> nn.Sequential:
    """A network for images of 64x64 and more, in a third of the time of :func:`camera_cnn`; its input is in [-1, 1].

    Patches of 4x4 pixels become features (as of Dosovitskiy et al. 2021), convolutions with GroupNorm halve the map
    until its shorter side is at most 8, and a linear layer reads the whole map, so positions are kept. ``ValueError``
    for images of more than 4:1.
    """
    patch, widths = 4, (32, 64)
    side = [-(-n // patch) for n in size]
    layers: list[nn.Module] = [CONV[2](channels, widths[0], patch, stride=patch), GroupNorm(widths[0]), nn.SiLU()]
    inp = widths[0]
    while min(side) > SMALLEST:
        layers += [CONV[2](inp, widths[1], 3, stride=2, padding=1), GroupNorm(widths[1]), nn.SiLU()]
        inp, side = widths[1], [-(-n // 2) for n in side]
    require_compact(side, size)
    padding = nn.ZeroPad2d((0, -size[1] % patch, 0, -size[0] % patch))
    return nn.Sequential(padding, *layers, nn.Flatten(), nn.Linear(inp * math.prod(side), dim))


class CameraResNet(nn.Module):
    """A ResNet of torchvision (He et al. 2016) with GroupNorm in place of BatchNorm, as in Chi et al. 2023, section
    3.2. Its input is in [-1, 1]; a 1x1 convolution and a linear layer read its map, so positions are kept."""

    mean: Tensor
    std: Tensor

    def __init__(self, depth: int, channels: int, size: tuple[int, int], dim: int):
        super().__init__()
        from torchvision.models import resnet  # lazy: only for this encoder

        make = {18: resnet.resnet18, 34: resnet.resnet34}[depth]
        network = make(weights=None, norm_layer=lambda c: nn.GroupNorm(c // GROUP, c))
        network.fc = nn.Identity()  # type: ignore[assignment]  # of torchvision, which has a Linear there
        network.avgpool = nn.Identity()  # type: ignore[assignment]  # the same: an AdaptiveAvgPool2d
        if channels != 3:
            network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.channels, self.network = channels, network
        colours = [numbers if channels == 3 else (sum(numbers) / 3,) * channels for numbers in (MEAN, STD)]
        for name, numbers in zip(("mean", "std"), colours, strict=True):
            self.register_buffer(name, torch.tensor(numbers)[:, None, None], persistent=False)
        side = [-(-n // 32) for n in size]
        self.reduce = nn.Conv2d(512, FEATURES, 1)
        self.read = nn.Linear(FEATURES * math.prod(side), dim)

    def forward(self, x: Tensor) -> Tensor:
        net = self.network
        x = ((x + 1) / 2 - self.mean.to(x)) / self.std.to(x)
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return self.read(torch.relu(self.reduce(x)).flatten(1))

    def load_pretrained(self, stored: Mapping[str, Tensor], file: Path) -> None:
        """Take torchvision's weights; those of the norms become their scale and shift, and running statistics are not
        used. ``ValueError`` if one is missing or of another shape."""
        wanted = self.network.state_dict()
        if self.channels != 3 and "conv1.weight" in stored:  # of grey images: the colours weigh the same
            colour = stored["conv1.weight"].mean(1, keepdim=True) * 3 / self.channels
            stored = {**stored, "conv1.weight": colour.expand(-1, self.channels, -1, -1)}
        odd = [k for k, v in wanted.items() if k not in stored or stored[k].shape != v.shape]
        if odd:
            raise ValueError(f"camera_weights: {file} does not fit this ResNet: {odd[0]} is missing or of another "
                             "shape; give torchvision's resnet18 or resnet34, as --data.camera-encoder is")  # fmt: skip
        self.network.load_state_dict({k: stored[k].to(v) for k, v in wanted.items()})


def resnet(depth: int) -> Callable[[int, tuple[int, int], int], nn.Module]:
    """A maker of :class:`CameraResNet` of this depth."""
    return lambda channels, size, dim: CameraResNet(depth, channels, size, dim)


CAMERA_ENCODERS: Mapping[str, Callable[[int, tuple[int, int], int], nn.Module]] = {
    "cnn": camera_cnn,
    "patches": camera_patches,
    "resnet18": resnet(18),
    "resnet34": resnet(34),
}  # (channels, size, dim) -> network


def load_camera_weights(nets: Mapping[str, nn.Module], file: str | Path) -> int:
    """Load torchvision's weights into every ResNet of a camera in ``nets``; their number.

    The file is safetensors, or torch's with nothing but tensors in it: code in it is not run. ``ValueError`` if it
    cannot be read or does not fit, or no camera has a ResNet.
    """
    path = Path(file).expanduser()
    found = [m for net in nets.values() for m in net.modules() if isinstance(m, CameraResNet)]
    if not found:
        raise ValueError(
            f"camera_weights: given {file}, but no camera has a ResNet; give --data.camera-encoder resnet18"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # lazy: only for this encoder

            stored: Any = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(stored, Mapping) or not all(isinstance(v, Tensor) for v in stored.values()):
            raise ValueError("it is no table of tensors")
    except Exception as e:  # both readers raise anything over a damaged file
        raise ValueError(f"camera_weights: {path} cannot be read: {format_error(e)[:120]}") from e
    for module in found:
        module.load_pretrained(stored, path)
    return len(found)
