"""The states of captions on disk: each is computed once for an encoder, and training maps the files into memory.

    FOLDER/HASH.safetensors    one caption a row: key [rows, 2], text [rows, L, dim] and, of some encoders, mask, pooled

The key is half of the SHA-256 of a caption. Only the rows of a batch are copied, so memory does not grow with the
number of captions, and a file that is interrupted while it is written leaves the others as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from genkit.core.files import atomic_write
from genkit.core.progress import terminal_progress
from genkit.data.mapped_shards import MappedShards, map_tensors

KEY = "key"
PADDED = ("text", "mask")  # the states with one row for each token, of as many tokens as the longest caption of a file
SHARD_BYTES = 256 << 20  # of one file, which are in memory while it is written
TEXTS_AT_ONCE = 64  # that the encoder gets in one call

EncodeTexts = Callable[[Sequence[str]], Mapping[str, Tensor]]


class TextTable(Protocol):
    """What a model sees of T texts."""

    def __len__(self) -> int: ...
    def select(self, rows: Tensor) -> dict[str, Tensor]:
        """The conditions of the texts at ``rows`` Int ``[B]``, by name, ``[B, ...]``."""
        ...

    def stored(self, rows: Tensor) -> dict[str, Tensor]:
        """The texts at ``rows`` as a file holds them: with their keys, if they have any."""
        ...

    def chunks(self) -> list[range]:
        """Rows that may be selected together without much memory."""
        ...


@dataclass(eq=False)
class TextsInMemory:
    """Texts as bytes, ``[T, L]``, or other conditions of them by name, ``[T, ...]``."""

    values: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def select(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: value.index_select(0, rows) for name, value in self.values.items()}

    def stored(self, rows: Tensor) -> dict[str, Tensor]:
        return self.select(rows)

    def chunks(self) -> list[range]:
        return [range(len(self))]


@dataclass(eq=False)
class MappedTexts:
    """States in files: text i is row ``rows[i]`` of the ``shards``."""

    shards: MappedShards
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """Bytes of the states of a text."""
        tensors = self.shards.tensors[0]
        return sum(t[:1].numel() * t.element_size() for t in tensors.values())

    def select(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: value for name, value in self.stored(rows).items() if name != KEY}

    def stored(self, rows: Tensor) -> dict[str, Tensor]:
        places = self.rows.index_select(0, rows)
        return {name: self.shards.gather(name, places) for name in self.shards.names}

    def chunks(self) -> list[range]:
        step = max(1, SHARD_BYTES // max(1, self.width))
        return [range(i, min(i + step, len(self))) for i in range(0, len(self), step)]

    def find(self, texts: Sequence[str]) -> Tensor | None:
        """The indices of ``texts`` ``[N]``; None unless all are here."""
        if KEY not in self.shards:
            return None
        keys = self.shards.gather(KEY, self.rows)
        found = [(keys == key).all(1).nonzero().flatten() for key in text_keys(texts)]
        return torch.stack([places[0] for places in found]) if all(len(places) for places in found) else None


def known_texts(data: object) -> TextTable | None:
    """The texts of ``data``, if their samples have captions."""
    captions = getattr(data, "captions", None)
    return None if captions is None else captions.table


def text_keys(texts: Sequence[str]) -> Tensor:
    """The keys of texts, int64 ``[N, 2]``."""
    digests = b"".join(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:16] for text in texts)
    return torch.frombuffer(bytearray(digests), dtype=torch.int64).view(-1, 2) if texts else torch.zeros(0, 2).long()


def find_texts(folder: Path, texts: Sequence[str]) -> tuple[MappedTexts | None, list[str]]:
    """Those of the states of ``texts`` that are in the files of ``folder``, and the texts that are not, each once.

    The states are None if any is missing. Files that are damaged are passed over.
    """
    wanted = {tuple(key): text for key, text in zip(text_keys(texts).tolist(), texts, strict=True)}
    paths: list[Path] = []
    places: dict[tuple[int, ...], tuple[int, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            keys = map_tensors(path)[1][KEY].tolist()
        except (ValueError, KeyError):
            continue
        new = {tuple(key): (len(paths), row) for row, key in enumerate(keys)}
        if useful := {key: place for key, place in new.items() if key in wanted and key not in places}:
            paths.append(path)
            places |= useful
    missing = [text for key, text in wanted.items() if key not in places]
    if missing or not paths:
        return None, missing
    shards = MappedShards(paths, padded=PADDED)
    rows = [int(shards.starts[file]) + row for file, row in (places[tuple(k)] for k in text_keys(texts).tolist())]
    return MappedTexts(shards, torch.tensor(rows)), []


def open_texts(folder: Path, texts: Sequence[str], encode: EncodeTexts) -> MappedTexts:
    """The states of ``texts``; those that are not in ``folder`` are encoded and written first, with progress.

    ``ValueError`` if the folder cannot be written to.
    """
    found, missing = find_texts(folder, texts)
    if missing:
        write_texts(folder, missing, encode)
        found, missing = find_texts(folder, texts)
    assert found is not None
    assert not missing
    return found


def write_texts(folder: Path, texts: Sequence[str], encode: EncodeTexts) -> None:
    """Encode ``texts`` into new files of ``folder``, of at most about ``SHARD_BYTES``."""
    parts: list[dict[str, Tensor]] = []
    size = 0
    with terminal_progress() as progress:
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            chunk = texts[first : first + TEXTS_AT_ONCE]
            part = {**encode(chunk), KEY: text_keys(chunk)}
            parts.append(part)
            size += sum(value.numel() * value.element_size() for value in part.values())
            done = first + len(chunk)
            if size >= SHARD_BYTES or done == len(texts):
                content = join_states(parts)
                name = hashlib.sha256(content[KEY].numpy().tobytes()).hexdigest()[:32]
                save_states(folder / f"{name}.safetensors", content)
                parts, size = [], 0
            progress("encoding captions", done, len(texts))


def save_states(path: Path, content: Mapping[str, Tensor]) -> None:
    """Write one file of states. ``ValueError`` if its folder cannot be written to."""
    try:
        with atomic_write(path) as part:
            save_file({name: value.contiguous() for name, value in content.items()}, part)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path.parent}: cannot be written ({e}); set GENKIT_CACHE to another folder") from e


def join_states(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The states of several calls as one, those with one row a token padded with zeros to the longest."""
    return {name: torch.cat(pad_tokens(name, [part[name] for part in parts])) for name in parts[0]}


def pad_tokens(name: str, values: Sequence[Tensor]) -> list[Tensor]:
    """The values of the condition ``name``, each ``[B, L, ...]`` with the L of the longest if it has tokens."""
    if name not in PADDED:
        return list(values)
    longest = max(value.shape[1] for value in values)
    return [F.pad(v, (*(0, 0) * (v.ndim - 2), 0, longest - v.shape[1])) for v in values]
