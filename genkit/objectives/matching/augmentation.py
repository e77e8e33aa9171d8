"""Augmentation that does not leak into samples (Karras et al. 2022, appendix F.2, after Karras et al. 2020).

Pictures are flipped, scaled, rotated, stretched and shifted, and the network is told how by nine numbers. They are 0
for a picture that is left alone, and so they are when samples are drawn: what the network learns from turned pictures
about turned pictures helps, but it draws upright ones.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from genkit.core import Batch, Image, Scalar, Spec

NAMES = ("flip_x", "flip_y", "scale", "cos", "sin", "stretch_cos", "stretch_sin", "shift_x", "shift_y")
INPUTS = tuple(f"augment_{name}" for name in NAMES)
SCALE, SHIFT = 2**0.2, 1 / 8  # one standard deviation of scaling and stretching, and of shifts in widths (table 6)


def augment_inputs(spec: Spec) -> dict[str, Scalar]:
    """The inputs of the network that tell how a picture was transformed. ``ValueError`` for samples that are none."""
    if len(spec.shape) != 3 or spec.shape[1] != spec.shape[2]:
        raise ValueError(f"augment: turns square pictures (C, H, H), and samples are {spec.shape}; leave it out")
    for name, kind in spec.cond.items():
        if isinstance(kind, Image):
            raise ValueError(f"augment: turns the samples only, but condition {name!r} is a picture; leave it out")
    return dict.fromkeys(INPUTS, Scalar())


def augment_batch(batch: Batch, probability: float) -> Batch:
    """``batch`` with its pictures transformed, and how, as further conditions; each kind has this ``probability``.

    Half of the pictures are mirrored left to right, whatever the probability.
    """
    with torch.autocast(batch.x.device.type, enabled=False):
        numbers = draw_numbers(batch, probability)
        x = transform(batch.x, matrix_of(numbers))
    same = (numbers == 0).all(1)
    x = torch.where(same[:, None, None, None], batch.x, x)
    return replace(batch, x=x, cond={**batch.cond, **dict(zip(INPUTS, numbers.unbind(1), strict=True))})


def draw_numbers(batch: Batch, probability: float) -> Float[Tensor, "b 9"]:
    """The nine numbers of each picture, in the order of ``NAMES``; :func:`matrix_of` says what they mean."""
    chosen = batch.uniform(6) < probability
    mirrors, angles, normals = batch.uniform(2) < 0.5, (2 * batch.uniform(2) - 1) * math.pi, batch.normal(4)
    zero = torch.zeros_like(normals[:, 0])
    flip_x = mirrors[:, 0].to(zero)
    flip_y = (mirrors[:, 1] & chosen[:, 1]).to(zero)
    scale = torch.where(chosen[:, 2], normals[:, 0], zero)
    angle = torch.where(chosen[:, 3], angles[:, 0], zero)
    direction, stretch = angles[:, 1], torch.where(chosen[:, 4], normals[:, 1], zero)
    shift_x, shift_y = (torch.where(chosen[:, 5], n, zero) for n in (normals[:, 2], normals[:, 3]))
    return torch.stack(
        [flip_x, flip_y, scale, angle.cos() - 1, angle.sin(), stretch * direction.cos(), stretch * direction.sin(),
         shift_x, shift_y], 1
    )  # fmt: skip


def matrix_of(numbers: Float[Tensor, "b 9"]) -> Float[Tensor, "b 3 3"]:
    """The transform of points ``(x, y, 1)`` that these numbers stand for; x and y run from -1 to 1 over the picture.

    Flips come first, then scaling, rotation (x towards y), stretching along a direction, and the shift. The paper's two
    numbers of stretching stand for two transforms, along the direction and across it; here for the first.
    """
    flip_x, flip_y, scale, cos, sin, stretch_cos, stretch_sin, shift_x, shift_y = numbers.unbind(1)
    cos = cos + 1
    zoom = SCALE**scale
    matrix = linear(zoom * (1 - 2 * flip_x), 0 * cos, 0 * cos, zoom * (1 - 2 * flip_y))
    matrix = linear(cos, -sin, sin, cos) @ matrix
    stretch, direction = torch.hypot(stretch_cos, stretch_sin), torch.atan2(stretch_sin, stretch_cos)
    c, s = direction.cos(), direction.sin()
    longer = SCALE**stretch
    matrix = linear(c, -s, s, c) @ linear(longer, 0 * c, 0 * c, 1 / longer) @ linear(c, s, -s, c) @ matrix
    matrix[:, 0, 2], matrix[:, 1, 2] = 2 * SHIFT * shift_x, 2 * SHIFT * shift_y
    return matrix


def linear(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Float[Tensor, "b 3 3"]:
    """The matrices ``[[a, b, 0], [c, d, 0], [0, 0, 1]]``."""
    matrix = torch.zeros(len(a), 3, 3, dtype=a.dtype, device=a.device)
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1] = a, b, c, d
    matrix[:, 2, 2] = 1
    return matrix


def transform(x: Float[Tensor, "b c n n"], matrix: Float[Tensor, "b 3 3"], mode: str = "bicubic") -> Tensor:
    """Pictures whose content is moved by ``matrix``; what comes from outside is mirrored at the border.

    The paper filters with wavelets at twice the size; this is one bicubic interpolation.
    """
    (a, b, x0), (c, d, y0) = (row.unbind(1) for row in matrix[:, :2].unbind(1))
    inverse = linear(d, -b, -c, a)[:, :2] / (a * d - b * c)[:, None, None]
    inverse[:, :, 2] = -(inverse[:, :, :2] @ torch.stack([x0, y0], 1)[:, :, None])[:, :, 0]
    grid = F.affine_grid(inverse, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode=mode, padding_mode="reflection", align_corners=False)
