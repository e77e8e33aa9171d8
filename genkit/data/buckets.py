"""Aspect-ratio buckets: pictures of one shape in each batch, of about one area, so that hardly anything is cropped.

The shape of a picture follows from its own, so there is no list of shapes to choose from. The order of the batches is a
pure function of (seed, draw, step), and every bucket advances at the pace of its number of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from genkit.core import seed_of

MAX_RATIO = 4.0  # of the sides of a bucket: longer pictures are cropped to it


def bucket_shape(height: int, width: int, area: int, step: int) -> tuple[int, int]:
    """The shape of about ``area`` pixels and of the picture's own ratio, with sides that are multiples of ``step``.

    The shorter side is rounded first and the longer one follows from it, so that the resized picture overlaps the shape
    by at most half a step on either axis (unless its ratio is above ``MAX_RATIO``).
    """
    ratio = min(max(height, width) / min(height, width), MAX_RATIO)
    short = max(1, round(math.sqrt(area / ratio) / step)) * step
    long = max(1, round(short * ratio / step)) * step
    return (long, short) if height > width else (short, long)


@dataclass(eq=False)
class Buckets:
    """Which of K shapes each of N pictures has."""

    shapes: Sequence[tuple[int, int]]
    """height and width of each bucket ``[K]``"""
    of: Tensor
    """the bucket of each picture, Int ``[N]``"""
    stored: Tensor
    """height and width of each picture as it is stored, Int ``[N, 2]``"""

    @staticmethod
    def build(stored: Tensor, area: int, step: int) -> Buckets:
        """The buckets of pictures of these heights and widths ``[N, 2]``."""
        shapes = [bucket_shape(h, w, area, step) for h, w in stored.tolist()]
        distinct = sorted(set(shapes))
        number = {shape: k for k, shape in enumerate(distinct)}
        return Buckets(distinct, torch.tensor([number[shape] for shape in shapes]), stored)

    def sizes(self, rows: Tensor) -> Tensor:
        """What networks are told of the size of pictures of one bucket, float ``[B, 6]``: height and width as stored,
        top and left of the crop, height and width of the bucket (Podell et al. 2023, section 2.2)."""
        stored = self.stored[rows].float()
        shape = torch.tensor(self.shapes[int(self.of[rows[0]])], dtype=torch.float32).expand(len(rows), 2)
        resized = (stored * (shape / stored).amax(1, keepdim=True)).round()
        return torch.cat([stored, ((resized - shape) / 2).floor().clamp(min=0), shape], 1)

    def describe(self, batch: int) -> str:
        """The number of shapes and their range, and what is repeated or cropped, in words."""
        counts = self.of.bincount(minlength=len(self.shapes))
        by_ratio = sorted(self.shapes, key=lambda shape: shape[0] / shape[1])
        first, last = ("x".join(map(str, shape)) for shape in (by_ratio[0], by_ratio[-1]))
        small, ratio = int((counts < batch).sum()), self.stored.amax(1) / self.stored.amin(1)
        long = int((ratio > MAX_RATIO).sum())
        return (
            f"{len(self.shapes)} shapes from {first} to {last}"
            + (f"; {small} have fewer images than a batch, which then repeats some" if small else "")
            + (f"; {long} images longer than {MAX_RATIO:g} to 1 are cropped to that" if long else "")
        )


class BucketOrder:
    """The pictures of each batch, all of one bucket.

    In epoch e bucket b, of n pictures, has batches ``floor(e n / B)`` to ``floor((e + 1) n / B)`` of its own endless
    stream of permutations: after any number of epochs each picture was seen that often, but for less than one batch of
    its bucket.
    """

    def __init__(self, buckets: Buckets, batch: int, seed: int):
        self.rows = [(buckets.of == k).nonzero().flatten() for k in range(len(buckets.shapes))]
        self.counts = torch.tensor([len(rows) for rows in self.rows])
        self.batch, self.seed = batch, seed
        self.turns = lru_cache(maxsize=8)(self._turns)

    def batches_before(self, epoch: int) -> Tensor:
        """The batches of each bucket before ``epoch`` ``[K]``."""
        return self.counts * epoch // self.batch

    def _turns(self, draw: int, epoch: int) -> Tensor:
        """The bucket of each batch of an epoch."""
        per_bucket = self.batches_before(epoch + 1) - self.batches_before(epoch)
        turns = torch.repeat_interleave(torch.arange(len(self.rows)), per_bucket)
        return turns[
            torch.randperm(len(turns), generator=torch.Generator().manual_seed(seed_of(self.seed, draw, epoch)))
        ]

    def epoch_of(self, step: int) -> int:
        """The epoch in which batch ``step`` lies."""
        low, high = 0, (step + len(self.rows) + 1) * self.batch // int(self.counts.sum()) + 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if int(self.batches_before(middle + 1).sum()) > step else (middle + 1, high)
        return low

    def indices(self, step: int, draw: int) -> Tensor:
        """The pictures of one batch ``[B]``."""
        epoch = self.epoch_of(step)
        before, turns = self.batches_before(epoch), self.turns(draw, epoch)
        place = step - int(before.sum())
        bucket = int(turns[place])
        first = (int(before[bucket]) + int((turns[:place] == bucket).sum())) * self.batch
        rows, last = self.rows[bucket], first + self.batch
        passes = range(first // len(rows), (last - 1) // len(rows) + 1)
        order = torch.cat([self.permutation(bucket, draw, p) for p in passes])
        skipped = passes.start * len(rows)
        return rows[order[first - skipped : last - skipped]]

    def permutation(self, bucket: int, draw: int, number: int) -> Tensor:
        """The order of a bucket's pictures in a pass over them."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, draw, bucket, number))
        return torch.randperm(len(self.rows[bucket]), generator=generator)
