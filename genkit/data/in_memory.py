"""Samples in memory: one tensor, and one for each of their conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genkit.core import Batch, Codec, Draw, Image, Spec, expand
from genkit.data.captions import Captions


def random_flip(batch: Batch, spec: Spec, draw: Draw) -> Batch:
    """``batch`` with half of the images mirrored left to right, together with the images among their conditions."""
    mirrored = draw.uniform() < 0.5

    def flip(v: Tensor) -> Tensor:
        return torch.where(expand(mirrored, v), v.flip(-1), v)

    cond = {k: flip(v) if isinstance(spec.cond[k], Image) else v for k, v in batch.cond.items()}
    return replace(batch, x=flip(batch.x), cond=cond)


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

    def __post_init__(self) -> None:
        if tuple(self.x.shape[1:]) != tuple(self.spec.shape):
            raise ValueError(f"samples have shape {tuple(self.x.shape[1:])}; the spec says {tuple(self.spec.shape)}")
        if self.flip and self.x.ndim != 4:
            raise ValueError(f"flip mirrors images; these samples have shape {tuple(self.spec.shape)}")
        self.spec.check(self.cond, len(self.x))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        """The samples at ``indices`` ``[B]``, augmented by ``draw``."""
        batch = Batch(self.x.index_select(0, indices), {k: v.index_select(0, indices) for k, v in self.cond.items()})
        batch = random_flip(batch, self.spec, draw) if self.flip else batch
        return batch if self.captions is None else self.captions.add(batch, indices, draw)
