"""Drawn samples, and a count of the work that they took."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from genkit.core import pictures
from genkit.core.progress import Progress, silent
from genkit.training.ranks import SINGLE, Ranks

FRAME_MILLISECONDS = 150  # of a trajectory's picture: 20 steps take three seconds


@dataclass(frozen=True)
class Samples:
    """Drawn samples. Unpacks into ``(x, cond)``."""

    x: Tensor
    """``[n, *S]``, decoded: uint8 for images, the data's own units otherwise"""
    cond: Mapping[str, Tensor]
    """the condition of each, ``[n, ...]``"""
    evaluations: int = 1
    """forward passes of the networks for each sample"""
    network_rows: float = 1.0
    """rows that went through the network for each sample: guidance by a second pass doubles it"""
    names: Sequence[str] = ()
    """of the classes, or the prompts that come in turn: the headings of the grid"""
    frames: Sequence[Tensor] = field(default=(), repr=False)
    """decoded predictions after each step, ``[n, *S]``, if a trajectory was asked for"""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.x, self.cond))

    def __len__(self) -> int:
        return len(self.x)

    @property
    def images(self) -> list[Image.Image]:
        """The samples as PIL images. ``ValueError`` if they are not images."""
        if self.x.ndim != 4:
            raise ValueError(f"images: these samples have shape {tuple(self.x.shape[1:])}; take .x or .grid()")
        return [pictures.to_pil(image) for image in self.x.permute(0, 2, 3, 1).numpy()]

    def grid(self) -> Image.Image:
        """All samples as one picture: a grid of images, a scatter plot of points, a sheet of curves."""
        return pictures.draw_samples(self.x, self.cond, self.names)

    def animation(self, path: str | Path) -> Path:
        """Write the trajectory as a GIF. ``ValueError`` if none was recorded."""
        if not self.frames:
            raise ValueError("animation: no trajectory was recorded; draw with run.sample(..., trajectory=True)")
        frames = pictures.draw_frames(self.frames, self.cond, self.names)
        return pictures.save_gif(frames, Path(path), FRAME_MILLISECONDS)

    def _repr_png_(self) -> bytes:
        """The PNG that a notebook displays."""
        return self.grid()._repr_png_()  # type: ignore[attr-defined]


def draw_batches(
    draw: Callable[[range], Tensor],
    n: int,
    batch: int,
    ranks: Ranks = SINGLE,
    consume: Callable[[int, Tensor], None] | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Samples ``[n, *S]`` of ``draw(rows)``, in batches that ``ranks`` take in turn: any number of them draws the same.

    The main rank gets all samples, the others none, ``[0, *S]``. With ``consume(first, x)`` each rank hands over what
    it has drawn, and no rank keeps any. A ``ValueError`` or ``OSError`` of one rank is raised on all.
    """
    blocks = [range(i, min(i + batch, n)) for i in range(0, n, batch)]
    samples = torch.empty(0)
    progress("sampling", 0, n)
    for first in range(0, len(blocks), ranks.world):
        part, error = None, None
        try:
            if first + ranks.rank < len(blocks):
                rows = blocks[first + ranks.rank]
                part = draw(rows)
                if consume is not None:
                    consume(rows.start, part)
                    part = part[:0]
        except (ValueError, OSError) as e:
            error = e
        ranks.raise_together(error)
        parts = ranks.gather(part)
        if first == 0:
            kept = n if ranks.is_main and consume is None else 0
            samples = parts[0].new_empty(kept, *parts[0].shape[1:])
        if len(samples):
            for rows, x in zip(blocks[first:], parts, strict=False):
                samples[rows.start : rows.stop] = x
        progress("sampling", min((first + ranks.world) * batch, n), n)
    return samples


@dataclass
class CallCount:
    """Forward passes of some networks, and the rows that went through them."""

    calls: int = 0
    rows: int = 0


@contextlib.contextmanager
def count_calls(nets: Mapping[str, nn.Module]) -> Iterator[CallCount]:
    """Count the forward passes of ``nets`` while the context lasts."""
    count = CallCount()

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        count.calls += 1
        count.rows += len(args[0])

    handles = [net.register_forward_hook(hook) for net in nets.values()]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
