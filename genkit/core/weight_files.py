"""Tensors of safetensors files, read one at a time into memory of their own.

A file that is read as a whole, or mapped and converted, is in memory twice for a while; here it is there once. The
tensors do not depend on the file any more, which may be replaced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genkit.core.files import format_error
from genkit.core.tensors import DTYPE_NAMES

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file, in bytes from its beginning."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own. ``ValueError`` if the file has become shorter."""
        count = math.prod(self.shape)
        content = torch.empty(count * self.dtype.itemsize, dtype=torch.uint8)
        with open(self.path, "rb") as file:
            file.seek(self.start)
            buffer: Any = content.numpy()
            if file.readinto(buffer) != len(content):
                raise ValueError(f"{self.path}: is cut off; restore it")
        return content.view(self.dtype).view(self.shape)


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors in a safetensors file by name. ``ValueError`` if it is missing or damaged."""
    try:
        with safe_open(path, "pt"):  # compares the header with the size of the file
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path}: cannot be read as safetensors: {format_error(e)}") from e
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is {entry['dtype']}; allowed: {', '.join(DTYPES)}")
    return {
        name: StoredTensor(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def list_weights(path: Path) -> dict[str, StoredTensor]:
    """The tensors in a safetensors file, or in all files that an index (``*.safetensors.index.json``) names."""
    stored: dict[str, StoredTensor] = {}
    for file in weight_files(path):
        stored |= list_tensors(file)
    return stored


def weight_files(path: Path) -> Sequence[Path]:
    """``path`` itself, or the files that the index there names. ``ValueError`` if the index is damaged."""
    if path.suffix != ".json":
        return [path]
    try:
        return [path.parent / name for name in sorted(set(json.loads(path.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"{path}: is no index of safetensors files: {format_error(e)}") from e
