"""Samples in memory: one tensor, and one for each of their conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genkit.core import Batch, Codec, Draw, Image, Spec, expand
from genkit.data.captions import Captions


def random_flip(batch: Batch, spec: Spec, draw: Draw) -> Batch:
    """``batch`` with half of the images mirrored left to right, with their weights and the images among their
    conditions."""
    mirrored = draw.uniform() < 0.5

    def flip(v: Tensor) -> Tensor:
        return torch.where(expand(mirrored, v), v.flip(-1), v)

    cond = {k: flip(v) if isinstance(spec.cond[k], Image) else v for k, v in batch.cond.items()}
    weight = None if batch.place_weight is None else flip(batch.place_weight)
    return replace(batch, x=flip(batch.x), cond=cond, place_weight=weight)


@dataclass(eq=False)
class InMemory:
    """Samples in one tensor: ``x`` uint8 or float ``[N, *S]``, ``cond`` of tensors ``[N, ...]``.

    ``flip`` mirrors half of a batch; one of a sample's ``captions`` is drawn each time. ``ValueError`` if ``x`` or
    ``cond`` do not fit ``spec``.
    """

    x: Tensor
    cond: Mapping[str, Tensor]
    spec: Spec
    codec: Codec
    flip: bool = False
    captions: Captions | None = None
    num_held_out: int = 0
    """samples that are held out of the training split"""
    place_weight: Tensor | None = None
    """weight of each pixel in the loss, uint8 ``[N, 1, H, W]``, 255 for 1"""

    def __post_init__(self) -> None:
        if tuple(self.x.shape[1:]) != tuple(self.spec.shape):
            raise ValueError(f"samples have shape {tuple(self.x.shape[1:])}; the spec says {tuple(self.spec.shape)}")
        if self.flip and self.x.ndim != 4:
            raise ValueError(f"flip mirrors images; these samples have shape {tuple(self.spec.shape)}")
        self.spec.check(self.cond, len(self.x))

    def __len__(self) -> int:
        return len(self.x)

    @property
    def weighted(self) -> bool:
        """Whether each pixel has a weight in the loss."""
        return self.place_weight is not None

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        """The samples at ``indices`` ``[B]``, augmented by ``draw``."""
        cond = {k: v.index_select(0, indices) for k, v in self.cond.items()}
        weight = None if self.place_weight is None else self.place_weight.index_select(0, indices).float() / 255
        batch = Batch(self.x.index_select(0, indices), cond, place_weight=weight)
        batch = random_flip(batch, self.spec, draw) if self.flip else batch
        return batch if self.captions is None else self.captions.add(batch, indices, draw)
