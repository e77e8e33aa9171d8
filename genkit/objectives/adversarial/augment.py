"""DiffAugment (Zhao et al. 2020): the same random changes for real and generated samples, with a gradient through them.

``AUGMENTATIONS`` maps a name to ``augment(x, uniform) -> x`` for samples ``[B, C, *size]``, where ``uniform(*shape)``
draws ``[B, *shape]`` in [0, 1) row by row, so no sample depends on the others. Ranges are the paper's (section 3.2),
for samples of order one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

AugmentationName = Literal["color", "translation", "cutout"]
Uniform = Callable[..., Tensor]


def color(x: Tensor, uniform: Uniform) -> Tensor:
    """Brightness moved by up to half, saturation times 0 to 2, contrast times 0.5 to 1.5."""
    brightness, saturation, contrast = (uniform(1, *(1,) * (x.ndim - 2)) for _ in range(3))
    x = x + brightness - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * saturation if x.shape[1] > 1 else x
    mean = x.mean(tuple(range(1, x.ndim)), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def axis_indices(x: Tensor) -> list[Tensor]:
    """The index along each spatial axis, ``[1, 1, .., n, .., 1]``."""
    sizes = x.shape[2:]
    return [
        torch.arange(n, device=x.device).view(1, 1, *(n if k == axis else 1 for k in range(len(sizes))))
        for axis, n in enumerate(sizes)
    ]


def to_integers(u: Tensor, low: int, high: int) -> Tensor:
    """Integers ``low..high`` from uniform numbers in [0, 1)."""
    return (u * (high - low + 1)).long().clamp(max=high - low) + low


def translation(x: Tensor, uniform: Uniform) -> Tensor:
    """Shifted by up to an eighth of each side, at least one pixel, with zeros in the gap."""
    one = (1,) * (x.ndim - 1)
    for axis, index in enumerate(axis_indices(x), 2):
        n = x.shape[axis]
        reach = max(1, round(n / 8))
        source = index - to_integers(uniform(*one), -reach, reach)
        moved = x.gather(axis, source.clamp(0, n - 1).expand_as(x))
        x = torch.where((source >= 0) & (source < n), moved, 0.0)
    return x


def cutout(x: Tensor, uniform: Uniform) -> Tensor:
    """Zeros in a box of half of each side, whose centre may lie anywhere."""
    one = (1,) * (x.ndim - 1)
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for axis, index in enumerate(axis_indices(x), 2):
        n = x.shape[axis]
        first = to_integers(uniform(*one), 0, n - 1) - n // 4
        inside = inside & (index >= first) & (index < first + max(1, n // 2))
    return torch.where(inside, 0.0, x)


AUGMENTATIONS: Mapping[AugmentationName, Callable[[Tensor, Uniform], Tensor]] = {
    "color": color,
    "translation": translation,
    "cutout": cutout,
}
