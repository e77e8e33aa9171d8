"""Batches, and random numbers that are a function of (seed, step, row) only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.core.conditions import RESERVED, Cond, keep_target
from genkit.core.device import send


def seed_of(*key: int) -> int:
    """A 63-bit seed from several integers (FNV-1a over their bytes), the same on every machine.

    torch's generator on the CPU reads the lower 32 bits. So of 100,000 blocks of random numbers one or two pairs are
    equal by chance, which does no harm to training.
    """
    h = 0xCBF29CE484222325
    for k in key:
        for byte in (k & (2**64 - 1)).to_bytes(8, "little"):
            h = ((h ^ byte) * 0x100000001B3) & (2**64 - 1)
    return h >> 1


class Draw:
    """The random numbers of rows ``start..stop`` of one global batch.

    They depend on ``key`` and on the row only: two ranks with half the rows each, or four micro-batches, draw what one
    rank with one batch draws. One generator serves ``BLOCK`` rows, so that a step costs a few generators rather than
    one per row.
    """

    BLOCK = 16

    def __init__(self, key: Sequence[int], start: int, stop: int, device: torch.device | str = "cpu"):
        self.start, self.stop, self.device = start, stop, torch.device(device)
        self.blocks = range(start // self.BLOCK, -(-stop // self.BLOCK))
        self.generators = [torch.Generator(self.device).manual_seed(seed_of(*key, b)) for b in self.blocks]

    def _rows(self, function: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        blocks = [function(self.BLOCK, *shape, generator=g, device=self.device) for g in self.generators]
        first = self.start - self.blocks.start * self.BLOCK
        return torch.cat(blocks)[first : first + self.stop - self.start]

    def normal(self, *shape: int) -> Tensor:
        """Standard normals, ``[rows, *shape]``."""
        return self._rows(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), ``[rows, *shape]``."""
        return self._rows(torch.rand, shape)

    def integers(self) -> Tensor:
        """Uniform integers below 2^62, int64 ``[rows]``."""
        return self._rows(lambda n, **kw: torch.randint(2**62, (n,), **kw), ())


@dataclass(frozen=True)
class Batch:
    """Samples ``x`` ``[B, *S]`` with conditions, optional loss weights ``[B]`` and random numbers.

    If ``draw`` is None, random numbers come from torch's global generator, for interactive use. ``x1`` is the source
    of each sample, in the model's units, if the data are pairs (source, sample). ``step`` counts the training steps
    before this one, for losses that change over training (a KL weight that rises, a discriminator that starts late);
    None, outside training, stands for the end of training. ``place_weight`` ``[B, 1, *axes]`` in [0, 1] is the weight
    of each place of a sample in the loss, on a grid that may be finer than that of the sample.
    """

    x: Tensor
    cond: Cond = field(default_factory=dict)
    weight: Tensor | None = None
    draw: Draw | None = None
    x1: Tensor | None = None
    step: int | None = None
    place_weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def normal(self, *shape: int) -> Tensor:
        """Standard normals ``[B, *shape]``, by default in the shape of a sample, with device and dtype of ``x``."""
        shape = shape or tuple(self.x.shape[1:])
        value = self.draw.normal(*shape) if self.draw else torch.randn(len(self), *shape, device=self.x.device)
        return value.to(self.x) if self.x.is_floating_point() else value

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), ``[B, *shape]``, in the dtype of ``x`` if that is a floating-point type."""
        value = self.draw.uniform(*shape) if self.draw else torch.rand(len(self), *shape, device=self.x.device)
        return value.to(self.x) if self.x.is_floating_point() else value

    def drop(self, probability: float, each: float = 0.0) -> Cond:
        """The conditions, dropped for each *sample* with ``probability`` (Ho & Salimans 2022, Algorithm 1).

        Each condition is also dropped independently with probability ``each``, so that any subset can be given, or
        guided by (Brooks et al. 2023, section 3.2.1).
        """
        cond = dict(self.cond)
        if self.cond and probability > 0:
            cond["keep"] = self.uniform() >= probability
        names = sorted(k for k in self.cond if k not in RESERVED and keep_target(k) is None)
        if names and each > 0:
            stay = self.uniform(len(names)) >= each
            cond |= {f"keep.{name}": stay[:, i] for i, name in enumerate(names)}
        return cond

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``, without waiting for it."""
        target = torch.device(device)
        return replace(
            self,
            x=send(self.x, target),
            cond={k: send(v, target) for k, v in self.cond.items()},
            weight=None if self.weight is None else send(self.weight, target),
            x1=None if self.x1 is None else send(self.x1, target),
            place_weight=None if self.place_weight is None else send(self.place_weight, target),
        )


def expand(v: Tensor, like: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1, ..., 1]`` with as many dimensions as ``like``."""
    return v.reshape(-1, *(1,) * (like.ndim - 1))


def mean_flat(x: Tensor) -> Tensor:
    """The mean over all but the batch dimension, ``[B, *S] -> [B]``."""
    return x.flatten(1).mean(1)


def pool_weight(weight: Tensor, x: Tensor) -> Tensor:
    """The weight of each place ``[B, 1, H, W]``, averaged over what a place of ``x`` ``[B, C, h, w]`` covers."""
    return F.adaptive_avg_pool2d(weight.to(x), (x.shape[2], x.shape[3]))
