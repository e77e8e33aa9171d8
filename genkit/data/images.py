"""Pictures: how they are decoded, how they are held, and the data sets that are the same for everybody.

Pixels are uint8 ``[N, C, H, W]`` until the codec takes them: a quarter of the memory of floats, and an augmentation
of a whole batch is one tensor operation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from genkit.codecs import Pixels
from genkit.core import Batch, Codec, Data, Draw, Image, Label, Spec, expand

Split = Literal["train", "test"]
Size = Annotated[int, Ge(1)] | tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] | None
Channels = Literal[1, 3] | None
DIGITS = tuple("0123456789")


# ----------------------------------------------------------------------------------------------- in memory
def flipped(batch: Batch, spec: Spec, draw: Draw) -> Batch:
    """Half of the samples mirrored left to right, together with the pictures among their conditions."""
    mirror = draw.uniform() < 0.5
    flip = lambda v: torch.where(expand(mirror, v), v.flip(-1), v)  # noqa: E731
    cond = {k: flip(v) if isinstance(spec.cond[k], Image) else v for k, v in batch.cond.items()}
    return replace(batch, x=flip(batch.x), cond=cond)


@dataclass(frozen=True, eq=False)
class InMemory:
    """Samples in one tensor: ``x`` uint8 or float ``[N, *S]``, ``cond`` of ``[N, ...]`` tensors; ``flip`` augments."""

    x: Tensor
    cond: Mapping[str, Tensor]
    spec: Spec
    codec: Codec
    flip: bool = False

    def __post_init__(self) -> None:
        if tuple(self.x.shape[1:]) != tuple(self.spec.shape):
            raise ValueError(f"samples have shape {tuple(self.x.shape[1:])}; the spec says {tuple(self.spec.shape)}")
        if self.flip and self.x.ndim != 4:
            raise ValueError(f"flip mirrors pictures; these samples have shape {tuple(self.spec.shape)}")
        self.spec.check(self.cond, len(self.x))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        batch = Batch(self.x.index_select(0, indices), {k: v.index_select(0, indices) for k, v in self.cond.items()})
        return flipped(batch, self.spec, draw) if self.flip else batch


# ----------------------------------------------------------------------------------------------- the sources
@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """What every source of pictures can be asked for. Frozen: the configuration, not the pixels."""

    size: Size = None  # None: as found. Otherwise the largest centred crop of this shape, resized to it (H, or H W)
    channels: Channels = None  # None: as found
    flip: bool = False  # mirror half of the pictures of a batch, left to right

    @abstractmethod
    def load(self, split: Split = "train") -> Data: ...

    def from_array(self, pixels: Tensor, labels: Tensor | None, kind: Label | None) -> InMemory:
        """``pixels`` uint8 ``[N, H, W]`` or ``[N, H, W, C]``, as these options want them."""
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        x = pixels.movedim(-1, 1).contiguous()
        spec = Spec(tuple(x.shape[1:]), {} if kind is None else {"label": kind})
        cond = {} if labels is None else {"label": labels.long()}
        return InMemory(x, cond, spec, Pixels(), self.flip)


def check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is unknown; allowed: train, test")


@dataclass(frozen=True, kw_only=True)
class Digits(Source):
    """1,797 handwritten digits, 8x8 grey, that come with scikit-learn: no network. A fifth of each class is held out."""

    def load(self, split: Split = "train") -> InMemory:
        from sklearn.datasets import load_digits

        check_split(split)
        digits = load_digits()
        held_out = np.zeros(len(digits.target), dtype=bool)
        shuffle = np.random.RandomState(0)  # numpy promises its numbers for ever; the split must never change
        for c in range(10):
            of_class = shuffle.permutation(np.flatnonzero(digits.target == c))
            held_out[of_class[: round(len(of_class) / 5)]] = True
        rows = np.flatnonzero(held_out == (split == "test"))
        pixels = torch.from_numpy(np.round(digits.images[rows] * 255 / 16).astype(np.uint8))
        return self.from_array(pixels, torch.from_numpy(digits.target[rows]), Label(10, DIGITS))
