"""A person's own files: folders of images, zips of images, arrays in an ``.npz``. Nothing is unpickled."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from genkit.config.numbers import NonNegative, Width
from genkit.config.paths import PathText
from genkit.core import Codec, Condition, Data, Label, Spec
from genkit.core.arrays import open_npz
from genkit.core.files import format_error
from genkit.core.messages import warn_once
from genkit.data.captions import FILES, Caption
from genkit.data.classes import abbreviate_list, class_kind, folder_classes, folder_labels, sort_naturally
from genkit.data.codecs import Identity, MinMax, Standardize, loses_digits
from genkit.data.held_out import DEFAULT_SHARE, HeldOut, SelectedFiles, row_names, split_rows
from genkit.data.image_files import (
    FolderFiles,
    ZipFiles,
    is_hidden,
    names_below_top,
    refuse_splits,
    warn_of_others,
)
from genkit.data.images import ImageFiles, ImageSource, OnDisk, decode, height_width
from genkit.data.in_memory import InMemory
from genkit.data.source import DataSource, Split, check_split

TEST_NAMES = ("test", "val", "valid", "validation")


# ------------------------------------------------------------------------------------------------- finding
def find_split(root: str, split: Split, suffix: str) -> tuple[Path, Path]:
    """Return the path of ``split`` and that of the training split, which determines the classes.

    ``root`` is the training split, or a folder that contains ``train{suffix}`` and ``test{suffix}`` (or another of
    ``TEST_NAMES``).
    """
    check_split(split)
    top = Path(root).expanduser()
    if not top.exists():
        raise ValueError(f"{top}: there is no such file or folder; name yours with --data.root")
    home, train = None, top
    inside = top / f"train{suffix}"
    if inside.exists() and (suffix or any((top / name).is_dir() for name in TEST_NAMES)):
        home, train = top, inside
    elif top.name == f"train{suffix}":
        home = top.parent
    if train.is_dir() != (suffix == ""):
        needs = f"a {suffix} file, or a folder with train{suffix}" if suffix else "a folder of images"
        raise ValueError(f"{top}: is not {needs}")
    if split == "train":
        return train, train
    for test in [home / f"{name}{suffix}" for name in TEST_NAMES] if home else []:
        if test.exists():
            return test, train
    base = home or (top if train.is_dir() else top.parent)
    raise ValueError(
        f"{top}: has no test split; arrange it as {base}/train{suffix} and {base}/test{suffix}, or hold out a share of "
        f"it: --data.held-out {DEFAULT_SHARE:g}"
    )


def has_test_split(root: str, suffix: str) -> bool:
    """Whether there is a test split beside the training split. ``ValueError`` if there is no training split."""
    _, train = find_split(root, "train", suffix)
    try:
        return find_split(root, "test", suffix)[0] != train
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------- images
S = TypeVar("S", bound="LocalSource")


@dataclass(frozen=True, kw_only=True)
class LocalSource(ImageSource):
    """Base of the sources of a person's own files, of which a share is held out if there is no test split."""

    root: PathText = "data"
    """the training split, or the folder that contains both splits"""
    held_out: HeldOut = None
    """share of the training split that is kept for evaluation and is its test split, chosen by a hash of each file's
    name (of an npz: its row); None: 0.1 when training begins, unless there is a test split"""

    def with_decisions(self: S) -> S:
        if self.held_out is not None:
            return self
        share = 0.0 if has_test_split(self.root, self.suffix or "") else DEFAULT_SHARE
        return self.with_fields(held_out=share)

    def with_decisions_of(self: S, earlier: DataSource) -> S:
        if not isinstance(earlier, LocalSource) or self.held_out is not None:
            return self
        return self.with_fields(held_out=earlier.held_out)

    def find(self, split: Split) -> tuple[Path, Path]:
        """:func:`find_split`; if a share is held out, both splits are in the training split's file or folder."""
        check_split(split)
        return find_split(self.root, "train" if self.held_out else split, self.suffix or "")


class ImageContainer(ImageFiles, Protocol):
    """Images of a folder, an archive or shards, with captions."""

    def captions(self) -> list[Caption]:
        """The captions that lie beside the images."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalImages(LocalSource):
    """Base of the sources of a person's own images in files."""

    memory: NonNegative = 2.0
    """GiB of decoded pixels up to which all are kept in memory; above, images are decoded when they are needed"""
    alpha: Literal["white", "weight"] = "white"
    """what an alpha channel means: white, the image lies on white; weight, it is the weight of each pixel in the loss
    of a path objective, and colours are as stored"""
    bucket: Width | None = None
    """train on images in their own aspect ratio, a batch of one shape at a time: of about the area of ``size``, with
    sides that are multiples of this number of pixels (64, say); None: all are cropped to ``size``"""

    @abstractmethod
    def open_files(self, path: Path) -> ImageContainer:
        """The images in ``path``."""

    def preview(self) -> tuple[tuple[int, ...], int]:
        files = self.open_files(self.find("train")[0])
        return decode(files.read(0), files.location(0), self.size, self.channels).shape, len(files.names)

    def from_split(
        self, split: Split, files: ImageContainer, label: Tensor | None, kind: Label | None
    ) -> InMemory | OnDisk:
        """The images of a split by these settings, with classes ``label`` ``[N]`` of all ``files`` if there are any."""
        chosen: ImageFiles = files
        captions, num_held_out = files.captions, 0
        if self.held_out:
            rows = split_rows(files.names, self.held_out, split, self.root)
            selected = chosen = SelectedFiles(files, rows.tolist())
            captions = partial(selected.select_captions, files.captions)
            num_held_out = len(rows) if split == "test" else len(files.names) - len(rows)
            label = None if label is None else label[rows]
        cond, kinds = ({}, {}) if label is None or kind is None else ({"label": label}, {"label": kind})
        if self.bucket is not None and self.size is None:
            raise ValueError(
                f"bucket: given {self.bucket}, but no size, whose area images are to have; give --data.size"
            )
        weighted = self.alpha == "weight"
        data = self.from_files(chosen, cond, kinds, self.memory, captions, weighted, self.bucket)
        return replace(data, num_held_out=num_held_out)


@dataclass(frozen=True, kw_only=True)
class Folder(LocalImages):
    """Images in a folder. Two or more subfolders without an image beside them are the classes.

    Otherwise, and with ``labels`` off, all images below ``root`` are taken, without classes. The test split is
    ``root/test`` (or ``val``, ``valid``, ``validation``) beside ``root/train``, with the classes of the latter.
    """

    suffix: ClassVar[str] = ""

    def open_files(self, path: Path) -> FolderFiles:
        return FolderFiles.open(path)

    def load(self, split: Split = "train") -> Data:
        path, train = self.find(split)
        files = FolderFiles.open(path)
        refuse_run_pictures(path, files.names)
        refuse_splits(path, files.names, f"name the one to train on, or call them {path}/train and {path}/test")
        warn_of_others(path, files.others, self.captions == (FILES,))
        train_names = files.names if path == train else FolderFiles.open(train).names
        classes = folder_classes(train_names, train, self.labels is True) if self.reads_labels else ()
        if not classes:
            return self.from_split(split, files, None, None)
        folders = {p.name for p in train.iterdir() if p.is_dir() and not is_hidden(p.name)}
        if empty := sort_naturally(folders - set(classes)):
            warn_once(f"{train}: {len(empty)} folders hold no images and are no classes: {abbreviate_list(empty)}")
        label = folder_labels(files.names, classes, path, train)
        return self.from_split(split, files, label, Label(len(classes), classes))


def refuse_run_pictures(folder: Path, names: Sequence[str]) -> None:
    """``ValueError`` if one of the images ``names`` in ``folder`` is a plot or a grid in the directory of a run.

    What ``genkit sample --format png`` wrote, ``000000.png`` and so on, is data, also inside a run.
    """
    parts = (name.rpartition("/") for name in names)
    for parent in sorted({folder for folder, _, file in parts if not os.path.splitext(file)[0].isdecimal()}):
        directory = (folder / parent).resolve()
        run = next((p for p in (directory, *directory.parents) if is_run_directory(p)), None)
        if run is not None:
            raise ValueError(
                f"{folder}: has the plots and grids of the run {run}, which are no data; draw samples first: "
                f"genkit sample {run} --format png"
            )


def is_run_directory(path: Path) -> bool:
    """Whether training wrote this directory: a configuration with an environment or a log."""
    return (path / "config.yaml").is_file() and any((path / name).is_file() for name in ("env.json", "log.jsonl"))


@dataclass(frozen=True, kw_only=True)
class Zip(LocalImages):
    """Images in a .zip, with classes as in a folder of images: two or more top folders without an image beside them.

    If it contains ``dataset.json``, ``{"labels": [[name, class], ...]}`` or null, that decides (the layout of StyleGAN
    and EDM). Members are read, never extracted. The test split is ``test.zip`` beside ``train.zip``.
    """

    suffix: ClassVar[str] = ".zip"

    def open_files(self, path: Path) -> ZipFiles:
        return ZipFiles(path)

    def load(self, split: Split = "train", class_names: tuple[str, ...] = ()) -> Data:
        """``class_names`` are the names of the classes of ``dataset.json``, which does not hold them."""
        path, train = self.find(split)
        files = ZipFiles(path)
        warn_of_others(path, files.others, self.captions == (FILES,))
        label = kind = None
        if self.reads_labels:
            train_files = files if path == train else ZipFiles(train)
            label, kind = zip_classes(files, train_files, class_names, self.labels is True)
        return self.from_split(split, files, label, kind)


def zip_classes(
    files: ZipFiles, train: ZipFiles, names: tuple[str, ...], required: bool = False
) -> tuple[Tensor | None, Label | None]:
    """The classes ``[N]`` of the images in an archive and their kind, which the training split decides; or None.

    ``ValueError`` if there are none and they are ``required``.
    """
    if files.has_index or train.has_index:
        label = files.labels()
        if label is None:
            return None, None
        return label, class_kind(label, label if files is train else train.labels(), names, files.path, train.path)
    classes = folder_classes(names_below_top(train.names), train.path, required)
    if not classes:
        return None, None
    label = folder_labels(names_from_class(files.names, classes), classes, files.path, train.path)
    return label, Label(len(classes), classes)


def names_from_class(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The names of images from the folder of their class on; images of one class share that folder too."""
    below = names_below_top(names)
    if all(name.partition("/")[0] in classes for name in below):
        return below
    shared = os.path.commonpath([os.path.dirname(name) for name in names]).split("/")
    depth = next((i for i, folder in enumerate(shared) if folder in classes), None)
    return below if depth is None else [name.split("/", depth)[-1] for name in names]


# ------------------------------------------------------------------------------------------------- arrays
def fit_identity(x: Tensor) -> Identity:
    """The codec that changes nothing, fitted like the others."""
    return Identity()


CODECS: Mapping[str, Callable[[Tensor], Codec]] = {
    "standardize": Standardize.fit,
    "min-max": MinMax.fit,
    "identity": fit_identity,
}


@dataclass(frozen=True, kw_only=True)
class Npz(LocalSource):
    """Arrays in an .npz: ``x`` and, if there are classes, ``y``; or ``arr_0`` and ``arr_1`` (guided-diffusion's names).

    Samples are images, uint8 ``[N, H, W]`` or ``[N, H, W, 1 or 3]``, or numbers, float ``[N, D]`` or ``[N, C, T]``.
    """

    suffix: ClassVar[str] = ".npz"

    root: PathText = "data.npz"
    """the file, or a folder that contains train.npz and test.npz"""
    codec: Literal["standardize", "min-max", "identity"] | None = None
    """how numbers are scaled for the model; None: standardize"""

    def preview(self) -> tuple[tuple[int, ...], int]:
        x, _ = read_npz(self.find("train")[0])
        if x.dtype != torch.uint8:
            return tuple(x.shape[1:]), len(x)
        stored = (*x.shape[1:3], x.shape[3] if x.ndim == 4 else 1)
        return (self.channels or stored[2], *(height_width(self.size) if self.size else stored[:2])), len(x)

    def load(self, split: Split = "train") -> Data:
        path, train = self.find(split)
        x, label = read_npz(path)
        train_x, train_label = (x, label) if path == train else read_npz(train)
        num_held_out = 0
        if self.held_out:
            names = row_names(len(x))
            rows, of_training = (split_rows(names, self.held_out, s, path) for s in (split, "train"))
            x, train_x, label = x[rows], x[of_training], None if label is None else label[rows]
            num_held_out = len(names) - len(of_training)
        cond: dict[str, Tensor] = {}
        kinds: dict[str, Condition] = {}
        if self.reads_labels and label is not None:
            cond, kinds = {"label": label}, {"label": class_kind(label, train_label, (), path, train)}
        if x.dtype == torch.uint8:
            if self.codec is not None:
                raise ValueError(f"{path}: holds images, to which --data.codec does not apply; given {self.codec}")
            return replace(self.from_array(x, cond, kinds), num_held_out=num_held_out)
        if self.size is not None or self.channels is not None or self.flip or self.captions:
            raise ValueError(f"{path}: holds numbers, to which --data.size, channels, flip and captions do not apply")
        if x.shape[1:] != train_x.shape[1:]:
            raise ValueError(f"{path}: samples are {tuple(x.shape[1:])}, but {tuple(train_x.shape[1:])} in {train}")
        codec = CODECS[self.codec or "standardize"](train_x)
        return InMemory(x, cond, Spec(tuple(x.shape[1:]), kinds), codec, num_held_out=num_held_out)


def read_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    """uint8 images or numbers ``[N, ...]``, and classes ``[N]`` or None. ``ValueError`` names what is wrong.

    Numbers are float32, or float64 where float32 would lose what distinguishes them (a time in seconds, say): the codec
    casts them, after centring.
    """
    try:
        with open_npz(path) as stored:
            keys = ("x", "y") if "x" in stored.files else ("arr_0", "arr_1")
            if keys[0] not in stored.files:
                raise ValueError(
                    f"it holds {', '.join(stored.files) or 'nothing'}; needs x (and y), or arr_0 (and arr_1)"
                )
            x, y = stored[keys[0]], stored[keys[1]] if keys[1] in stored.files else None
            others = [name for name in stored.files if name not in keys]
    except Exception as e:  # not a zip, a pickle (refused), truncated: each has its own class
        raise ValueError(f"{path}: cannot be read: {format_error(e)}") from e
    if others:
        warn_once(f"{path}: only {' and '.join(keys)} are read; left out: {abbreviate_list(others)}")
    description = f"{path}: {keys[0]} is {x.dtype} {list(x.shape)}"
    if x.dtype == np.uint8:
        fits = x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3))
    else:
        fits = x.dtype.kind == "f" and x.ndim in (2, 3)
    if not fits or not x.size:
        raise ValueError(f"{description}; needs uint8 [N, H, W] or [N, H, W, 1 or 3], or float [N, D] or [N, C, T]")
    if x.dtype.kind == "f":
        exact = x.astype(np.float64)
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
        if len(bad):
            raise ValueError(f"{description}, of which {len(bad)} rows hold NaN or infinity, the first at {bad[0]}")
        x = exact if loses_digits(torch.from_numpy(exact)) else x
    if y is None:
        return torch.from_numpy(x), None
    if y.dtype.kind not in "iu" or y.shape != (len(x),) or y.min() < 0:
        raise ValueError(f"{path}: {keys[1]} is {y.dtype} {list(y.shape)}; needs [{len(x)}] integers from 0")
    return torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))
