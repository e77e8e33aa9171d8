"""Rows of safetensors files that are mapped into memory, not read: ranks share the pages, and data may exceed memory.

A row is copied when a batch asks for it. The pages that were touched stay in the system's cache, but are given back by
this process now and then, so that its resident memory does not grow with the data.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from genkit.core.weight_files import list_tensors

KEPT_BYTES = 4 << 30  # of mapped pages, above which this process gives them back
MEMORY = Path("/proc/self/statm")


def map_tensors(path: Path) -> tuple[mmap.mmap, dict[str, Tensor]]:
    """The tensors of a safetensors file, mapped read-only. ``ValueError`` if it is missing or damaged."""
    stored = list_tensors(path)
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for name, entry in stored.items():
        count = math.prod(entry.shape)
        if not count:
            tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the memory cannot be written to
            values = torch.frombuffer(content, dtype=entry.dtype, count=count, offset=entry.start)
        tensors[name] = values.reshape(entry.shape)
    return content, tensors


class MappedShards:
    """The rows of several safetensors files, one file after the other: tensors by name, ``[rows, ...]`` in each file.

    Tensors that are named in ``padded`` are ``[rows, L, ...]`` with an L of each file's own, up to which the rows of
    shorter files are padded with zeros. ``ValueError`` if a file is missing or damaged, or holds other tensors than the
    first.
    """

    def __init__(self, paths: Sequence[Path], padded: Sequence[str] = ()):
        self.paths, self.padded = list(paths), padded
        mapped = [map_tensors(path) for path in self.paths]
        self.maps = [content for content, _ in mapped]
        self.tensors = [tensors for _, tensors in mapped]
        for path, tensors in zip(self.paths, self.tensors, strict=True):
            if describe_rows(tensors, padded) != describe_rows(self.tensors[0], padded):
                raise ValueError(f"{path}: holds other tensors than {self.paths[0].name}; encode again")
        counts = [len(next(iter(tensors.values()))) for tensors in self.tensors]
        self.starts = torch.tensor([0, *accumulate(counts)])
        self.resident = mapped_bytes()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __contains__(self, name: str) -> bool:
        return name in self.tensors[0]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return tuple(sorted(self.tensors[0]))

    def row_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a row of a tensor, of the longest if it is padded."""
        shapes = (tuple(tensors[name].shape[1:]) for tensors in self.tensors)
        return max(shapes) if name in self.padded else next(shapes)

    def gather(self, name: str, indices: Tensor, column: Tensor | None = None) -> Tensor:
        """The rows at ``indices`` ``[B]``; of a tensor ``[rows, columns, ...]`` only one ``column`` ``[B]`` of each.

        Rows are copied file by file, in their order within it.
        """
        order = indices.argsort()
        rows = indices[order]
        columns = None if column is None else column[order]
        shape = self.row_shape(name)
        num = shape[0] if column is not None else 1
        shape = shape if column is None else shape[1:]
        new = torch.zeros if name in self.padded else torch.empty
        out = new(len(rows), *shape, dtype=self.tensors[0][name].dtype)
        cuts = torch.searchsorted(rows, self.starts).tolist()
        for shard, (first, last) in enumerate(pairwise(cuts)):
            if first == last:
                continue
            local = (rows[first:last] - self.starts[shard]) * num
            if columns is not None:
                local = local + columns[first:last]
            stored = self.tensors[shard][name]
            flat = stored if column is None else stored.flatten(0, 1)
            if name in self.padded:
                out[first:last, : flat.shape[1]] = flat.index_select(0, local)
            else:
                torch.index_select(flat, 0, local, out=out[first:last])
        self.release_pages()
        gathered = torch.empty_like(out)
        gathered[order] = out
        return gathered

    def release_pages(self) -> None:
        """If over ``KEPT_BYTES`` have become resident, give the pages back: they leave this process, not the cache.

        The system maps as much around a row as it sees fit (2 MiB at a time on some), so it is asked, not computed.
        """
        if mapped_bytes() - self.resident > KEPT_BYTES:
            for content in self.maps:
                content.madvise(mmap.MADV_DONTNEED)


def mapped_bytes() -> int:
    """The resident bytes of this process that belong to files; 0 where the system does not say."""
    try:
        return int(MEMORY.read_bytes().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


def describe_rows(
    tensors: Mapping[str, Tensor], padded: Sequence[str] = ()
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of a row of each tensor, without the length of those that are ``padded``.

    ``ValueError`` if the tensors differ in their number of rows.
    """
    if len({len(t) if t.ndim else -1 for t in tensors.values()}) != 1:
        raise ValueError("shards: need tensors with equal numbers of rows")
    return {name: (t.dtype, tuple(t.shape[2 if name in padded else 1 :])) for name, t in tensors.items()}
