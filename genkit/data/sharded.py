"""Images in shards: tar files of webdataset, parquet and arrow files. They are read by row, in any order.

Training permutes the shards and mixes the rows of ``window`` shards at a time, so that reading stays local.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from genkit.config.numbers import Count
from genkit.config.paths import PathText
from genkit.core import Data, Label
from genkit.data.classes import class_kind
from genkit.data.held_out import DEFAULT_SHARE, SelectedFiles
from genkit.data.images import OnDisk, decode
from genkit.data.local_files import ImageContainer, LocalImages
from genkit.data.parquet_files import TableRows
from genkit.data.shard_paths import find_shards, is_pattern, is_remote
from genkit.data.source import Split, check_split
from genkit.data.tar_files import RowClasses, TarShards


class ShardedFiles(ImageContainer, Protocol):
    """Images in shards."""

    @property
    def starts(self) -> np.ndarray:
        """The first row of each shard, and the number of rows."""
        ...

    def labels(self, as_names: bool = False) -> RowClasses | None:
        """The classes; None without any. ``as_names``: whole numbers are names too, as the training split has it."""
        ...


@dataclass(frozen=True, kw_only=True)
class ShardedImages(LocalImages):
    """Base of the sources of images in shards."""

    suffixes: ClassVar[tuple[str, ...]] = ()

    window: Count | None = 16
    """shards whose samples are mixed at a time, after the shards are shuffled; None: all"""

    @abstractmethod
    def open_shards(self, paths: Sequence[Path]) -> ShardedFiles:
        """The images in ``paths``."""

    def open_files(self, path: Path) -> ShardedFiles:
        return self.open_shards([path])

    def find_files(self, split: Split) -> tuple[list[Path], list[Path]]:
        """:func:`find_shards`; if a share is held out, both splits are in the training split's files."""
        check_split(split)
        return find_shards(self.root, "train" if self.held_out else split, self.suffixes)

    def preview(self) -> tuple[tuple[int, ...], int]:
        files = self.open_shards(self.find_files("train")[1])
        return decode(files.read(0), files.location(0), self.size, self.channels).shape, len(files.names)

    def with_decisions(self) -> ShardedImages:
        if self.held_out is not None:
            return self
        try:
            own_test = bool(find_shards(self.root, "test", self.suffixes)[0])
        except ValueError:
            own_test = False
        return self.with_fields(held_out=0.0 if own_test else DEFAULT_SHARE)

    def with_absolute_root(self) -> ShardedImages:
        if is_remote(self.root):
            return self
        if is_pattern(self.root):
            return self.with_fields(root=str(Path(self.root).expanduser().absolute()))
        return super().with_absolute_root()

    def load(self, split: Split = "train") -> Data:
        paths, train_paths = self.find_files(split)
        files = self.open_shards(paths)
        label = kind = None
        if self.reads_labels:
            train = files if paths == train_paths else self.open_shards(train_paths)
            label, kind = shard_classes(files, train, self.root)
            if label is None and self.labels:
                raise ValueError(f"{self.root}: has no classes, which --data.labels needs; leave it out")
        data = self.from_split(split, files, label, kind)
        if not isinstance(data, OnDisk):
            return data
        starts = torch.as_tensor(files.starts)
        if isinstance(data.files, SelectedFiles):
            starts = torch.searchsorted(torch.as_tensor(data.files.rows), starts)
        return replace(data, shard_starts=starts, window=self.window)


def shard_classes(files: ShardedFiles, train: ShardedFiles, root: str) -> tuple[Tensor | None, Label | None]:
    """The classes ``[N]`` of the images and their kind, which the training split decides; or None.

    ``ValueError`` if this split has a class that the training split has not.
    """
    own = files.labels()
    if own is None:
        return None, None
    of_training = own if files is train else train.labels()
    if of_training is None:
        raise ValueError(f"{root}: the test split has classes, but the training split has none")
    if own.numbered and not of_training.numbered:  # a test split may happen to have only those that are numbers
        own = files.labels(as_names=True) or own
    label, names, _ = own
    train_label, train_names, _ = of_training
    if names and files is not train:
        number = {name: i for i, name in enumerate(train_names)}
        if unknown := next((name for name in names if name not in number), None):
            raise ValueError(f"{root}: the test split has the class {unknown}, which the training split has not")
        label = torch.tensor([number[name] for name in names])[label]
    return label, class_kind(label, train_label, train_names, root, root)


@dataclass(frozen=True, kw_only=True)
class Webdataset(ShardedImages):
    """Images in uncompressed tar files, as webdataset writes them: ``1.jpg``, ``1.cls``, ``1.txt`` or ``1.json``.

    ``root`` is a file, a pattern such as ``train-{000..099}.tar``, or a folder. The test split is in files whose names
    begin with test or val. Nothing is unpacked, and files with pickles are refused.
    """

    suffix: ClassVar[str] = ".tar"
    suffixes: ClassVar[tuple[str, ...]] = (".tar",)

    root: PathText = "data"
    """a tar file, a pattern (train-{000..099}.tar, or with * and ?), or a folder of tar files; also of a data set of
    the hub: hf://datasets/OWNER/NAME[@REVISION][/FILES]"""

    def open_shards(self, paths: Sequence[Path]) -> TarShards:
        return TarShards(paths)


@dataclass(frozen=True, kw_only=True)
class Parquet(ShardedImages):
    """Images in parquet or arrow files with pictures as bytes, as Hugging Face datasets stores them.

    ``root`` is a file, a pattern, or a folder: of files, of the folders train and test, or of a downloaded repository.
    """

    suffix: ClassVar[str] = ".parquet"
    suffixes: ClassVar[tuple[str, ...]] = (".parquet", ".arrow")

    root: PathText = "data"
    """a parquet or arrow file, a pattern, or a folder of such files; also of a data set of the hub:
    hf://datasets/OWNER/NAME[@REVISION][/FILES]"""
    image_column: str | None = None
    """the column of pictures; None: image, img, jpg, png, webp or picture"""
    label_column: str | None = None
    """the column of classes; None: label, fine_label, cls, class or y"""
    text_column: str | None = None
    """the column of captions, for --data.captions files; None: text, caption, txt or prompt"""

    def open_shards(self, paths: Sequence[Path]) -> TableRows:
        return TableRows(paths, self.image_column, self.label_column, self.text_column)
