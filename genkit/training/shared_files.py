"""Tensor files that several ranks write together, each its rows: one safetensors file, as one process would write it.

So a checkpoint does not depend on the number of ranks, and everything that reads one reads these.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from genkit.core.tensors import DTYPE_NAMES

T = TypeVar("T")
ORDER = list(DTYPE_NAMES)
Regions = list[tuple[int, int]]  # (offset in a file, bytes)


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor, from ``start`` on, on the CPU; a whole tensor begins at 0."""

    rows: Tensor
    shape: tuple[int, ...]
    start: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows."""
        return tuple(self.rows.shape) == self.shape

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.rows.element_size()

    @property
    def skipped_bytes(self) -> int:
        """Bytes of the tensor before these rows."""
        return self.start * math.prod(self.shape[1:]) * self.rows.element_size()


Pieces = Mapping[str, Piece]


class Exchange:
    """Ranks that write a file together. They have a process group of their own, for they do it beside training."""

    def __init__(self, writers: int) -> None:
        """The first ``writers`` ranks have all rows; the others have copies."""
        self.group: Any = dist.new_group(backend="gloo")
        self.rank, self.writers = dist.get_rank(), writers

    def all(self, work: Callable[[], T]) -> list[T]:
        """What ``work()`` returns on each rank. An error of one is raised on all, as an ``OSError``."""
        result, error = None, None
        try:
            result = work()
        except Exception as e:  # passed on to the other ranks, which would wait for this one
            error = f"rank {self.rank}: {e}"
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, (result, error), group=self.group)
        if found := next((e for _, e in answers if e), None):
            raise OSError(found)
        return [r for r, _ in answers]

    def once(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns on the first rank, on every rank."""
        return self.all(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]


def write_together(folder: Path | None, files: Mapping[str, Pieces], exchange: Exchange) -> None:
    """Write ``files`` of rows into ``folder``, which the first rank knows. All ranks call it; on all it raises
    ``OSError`` if one fails, or if what one has written does not arrive."""
    place = exchange.once(lambda: prepare_files(folder, files))
    written = exchange.all(lambda: {name: write_rows(Path(place, name), p, exchange) for name, p in files.items()})
    exchange.once(lambda: compare_written(Path(place), written))


def prepare_files(folder: Path | None, files: Mapping[str, Pieces]) -> str:
    """Make each file, with its header and of its size."""
    assert folder is not None
    for name, pieces in files.items():
        header, _, size = lay_out(pieces)
        with open(folder / name, "wb") as f:
            f.write(header)
            f.truncate(size)
    return str(folder)


def lay_out(pieces: Pieces) -> tuple[bytes, dict[str, int], int]:
    """The header of a safetensors file, the offsets of its tensors and its size, which no rank's share changes."""
    order = sorted(pieces, key=lambda name: (-ORDER.index(pieces[name].rows.dtype), name))
    entries, offset, offsets = {}, 0, {}
    for name in order:
        piece = pieces[name]
        end = offset + piece.num_bytes
        entries[name] = {
            "dtype": DTYPE_NAMES[piece.rows.dtype],
            "shape": list(piece.shape),
            "data_offsets": [offset, end],
        }
        offsets[name], offset = offset, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {k: first + v for k, v in offsets.items()}, first + offset


def write_rows(path: Path, pieces: Pieces, exchange: Exchange) -> tuple[Regions, int]:
    """Write this rank's rows, and on the first rank what is whole; where, and their check sum."""
    _, offsets, _ = lay_out(pieces)
    regions, total = [], 0
    if exchange.rank >= exchange.writers:
        return regions, total
    with open(path, "r+b") as f:
        for name, piece in pieces.items():
            if piece.rows.numel() == 0 or (piece.is_whole and exchange.rank):
                continue
            content = piece.rows.contiguous().reshape(-1).view(torch.uint8).numpy().data
            offset = offsets[name] + piece.skipped_bytes
            f.seek(offset)
            f.write(content)
            regions.append((offset, content.nbytes))
            total = zlib.crc32(content, total)
        f.flush()
        os.fsync(f.fileno())
    return regions, total


def compare_written(folder: Path, written: list[dict[str, tuple[Regions, int]]]) -> None:
    """``OSError`` if a rank's rows are not in a file as the rank wrote them: ranks need a file system that they share,
    and some lose neighbouring bytes that two machines write at once."""
    for rank, files in enumerate(written):
        for name, (regions, expected) in files.items():
            total = 0
            with open(folder / name, "rb") as f:
                for offset, size in regions:
                    f.seek(offset)
                    total = zlib.crc32(f.read(size), total)
            if total != expected:
                raise OSError(f"{folder / name}: what rank {rank} wrote did not arrive; all ranks need the same file "
                              "system")  # fmt: skip
