"""A share of a data set that is kept for evaluation: which samples it holds, and a view of files without the others."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genkit.config.numbers import Fraction
from genkit.data.captions import Caption, CaptionReader
from genkit.data.image_files import ListedFile
from genkit.data.images import ImageFiles
from genkit.data.source import Split

DEFAULT_SHARE = 0.1
SCALE = 2**64
HeldOut = Fraction | None
"""The type of the setting ``held_out`` of a source; None is decided when training begins."""


def name_hash(name: str) -> int:
    """A number in 0..2^64 that depends on the name only."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def is_held_out(names: Sequence[str], share: float) -> Tensor:
    """Which of the samples ``names`` are held out, bool ``[N]``: those whose hash is in the lowest ``share``.

    A sample stays where it is when others are added. No folder loses its last sample to the test split, and of ten or
    more samples at least one is held out.
    """
    hashes = [name_hash(name) for name in names]
    folders = [name.rpartition("/")[0] for name in names]
    # the sample of each folder that stays in training whatever the share is
    last = {folder: i for i, folder in sorted(enumerate(folders), key=lambda item: hashes[item[0]])}
    spare = [last[folder] != i for i, folder in enumerate(folders)]
    if not any(spare):
        spare = [True] * len(names)  # each sample has a folder of its own
    held = [free and value < share * SCALE for free, value in zip(spare, hashes, strict=True)]
    if share > 0 and len(names) >= 10 and not any(held):
        held[min((i for i, free in enumerate(spare) if free), key=hashes.__getitem__)] = True
    return torch.tensor(held, dtype=torch.bool)


def split_rows(names: Sequence[str], share: float, split: Split, location: object) -> Tensor:
    """The rows of a split ``[n]``. ``ValueError`` if the test split is empty."""
    held = is_held_out(names, share)
    rows = (held if split == "test" else ~held).nonzero().flatten()
    if split == "test" and not len(rows):
        raise ValueError(
            f"{location}: a share {share:g} of {len(names)} samples holds none out; give a larger --data.held-out"
        )
    return rows


def row_names(n: int) -> list[str]:
    """Names of samples that have none: their row."""
    return [f"row {i}" for i in range(n)]


@dataclass(eq=False)
class SelectedFiles:
    """Some of the images of a folder or an archive, an ``ImageFiles``."""

    files: ImageFiles
    rows: Sequence[int]
    names: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = [self.files.names[i] for i in self.rows]

    def read(self, i: int) -> bytes:
        """Content of image ``i``."""
        return self.files.read(self.rows[i])

    def location(self, i: int) -> str:
        """Path of image ``i``, for messages."""
        return self.files.location(self.rows[i])

    def listing(self) -> list[ListedFile]:
        """The listing of these images; of shards, all of them and which rows are selected."""
        every = self.files.listing()
        if len(every) == len(self.files.names):
            return [every[i] for i in self.rows]
        return [*every, ListedFile("rows", len(self.rows), zlib.crc32(torch.tensor(self.rows).numpy().tobytes()))]

    def select_captions(self, read: CaptionReader) -> list[Caption]:
        """The captions of these images, of those that ``read`` returns for all."""
        every = read()
        return [every[i] for i in self.rows]
