"""A person's own files: folders of images, zips of images, arrays in an ``.npz``.

Nothing is unpickled, and nothing is extracted from an archive to the disk.
"""

from __future__ import annotations

import json
import os
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from genkit.core import Codec, Condition, Data, Label, Spec
from genkit.core.files import format_error
from genkit.data.captions import Caption, read_captions
from genkit.data.codecs import Identity, MinMax, Standardize
from genkit.data.images import ImageSource
from genkit.data.in_memory import InMemory
from genkit.data.source import Split, check_split

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TEST_NAMES = ("test", "val")


# ------------------------------------------------------------------------------------------------- finding
def is_image(name: str) -> bool:
    """Whether a file is an image by its suffix, and not in a hidden folder or one that macOS adds."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a file or one of its folders is hidden, or added by macOS."""
    return any(p.startswith((".", "__MACOSX")) for p in PurePosixPath(name).parts)


def find_split(root: str, split: Split, suffix: str) -> tuple[Path, Path]:
    """Return the path of ``split`` and that of the training split, which determines the classes.

    ``root`` is the training split, or a folder that contains ``train{suffix}`` and ``test{suffix}`` (or ``val``).
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
    base = home or "DIR"
    raise ValueError(f"{top}: has no test split; arrange it as {base}/train{suffix} and {base}/test{suffix}")


def list_files(directory: Path, accept: Callable[[str], bool]) -> list[str]:
    """The accepted files in a folder and its subfolders, sorted by path. Links are followed, but no folder twice."""
    visited: set[str] = set()
    names: list[str] = []
    for base, folders, files in os.walk(directory, followlinks=True):
        if (real := os.path.realpath(base)) in visited:  # a link to a folder above would never end
            folders.clear()
            continue
        visited.add(real)
        names += (Path(base, name).relative_to(directory).as_posix() for name in files)
    return sorted(name for name in names if accept(name))


# ------------------------------------------------------------------------------------------------- images
@dataclass(frozen=True, eq=False)
class FolderFiles:
    """The images of a folder, an ``ImageFiles``."""

    root: Path
    names: Sequence[str]

    def read(self, i: int) -> bytes:
        return (self.root / self.names[i]).read_bytes()

    def location(self, i: int) -> str:
        return str(self.root / self.names[i])

    def captions(self) -> list[Caption]:
        """The captions that lie beside the images."""
        others = list_files(self.root, lambda name: not is_hidden(name) and not is_image(name))
        return read_captions(self.names, others, lambda name: (self.root / name).read_bytes(), str(self.root))


class ZipFiles:
    """The images of one archive, an ``ImageFiles``, read member by member. ``ValueError`` names a corrupt member."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()  # a ZipFile is not made for several threads
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as e:
            raise ValueError(f"{path}: cannot be opened as a zip: {format_error(e)}") from e
        self.names = sorted(n for n in self.archive.namelist() if is_image(n))
        if not self.names:
            raise ValueError(f"{path}: holds no images ({', '.join(IMAGE_SUFFIXES)})")

    def read_member(self, name: str) -> bytes:
        """Content of a member. ``ValueError`` if it is corrupt."""
        try:
            with self.lock:
                return self.archive.read(name)
        except Exception as e:  # a wrong checksum, a password, an unknown compression: each has its own class
            raise ValueError(f"{self.path}/{name}: cannot be read: {format_error(e)}") from e

    def read(self, i: int) -> bytes:
        return self.read_member(self.names[i])

    def location(self, i: int) -> str:
        return f"{self.path}/{self.names[i]}"

    def captions(self) -> list[Caption]:
        """The captions that lie beside the images."""
        others = [n for n in self.archive.namelist() if not is_hidden(n) and not is_image(n)]
        return read_captions(self.names, others, self.read_member, str(self.path))

    def labels(self) -> Tensor | None:
        """The classes ``[N]`` of the images in ``dataset.json``; None without it or if it has none."""
        if "dataset.json" not in self.archive.namelist():
            return None
        location = f"{self.path}/dataset.json"
        try:
            pairs = json.loads(self.read_member("dataset.json"))["labels"]
            if pairs is None:
                return None
            classes = {name.replace("\\", "/"): label for name, label in pairs}
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ValueError(f'{location}: needs {{"labels": [[name, class], ...]}} or null: {format_error(e)}') from e
        if len(classes) < len(pairs):
            raise ValueError(f"{location}: names an image twice")
        for name in self.names:
            if name not in classes:
                raise ValueError(f"{location}: gives no class to {name}")
            if type(classes[name]) is not int or classes[name] < 0:
                raise ValueError(f"{location}: the class of {name} is {classes[name]!r}; needs an integer from 0")
        if len(classes) > len(self.names):
            raise ValueError(f"{location}: {min(classes.keys() - set(self.names))} is not in the archive")
        return torch.tensor([classes[name] for name in self.names])


@dataclass(frozen=True, kw_only=True)
class LocalImages(ImageSource):
    """Base of the sources of a person's own images."""

    root: str = "data"
    """the training split, or the folder that contains both splits"""
    memory: Annotated[float, Ge(0)] = 2.0
    """GiB of decoded pixels up to which all are kept in memory; above, images are decoded when they are needed"""


@dataclass(frozen=True, kw_only=True)
class Folder(LocalImages):
    """Images in a folder. Two or more subfolders without an image beside them are the classes.

    Otherwise, and with ``labels`` off, all images below ``root`` are taken, without classes. The test split is
    ``root/test`` (or ``val``) beside ``root/train``, with the classes of the latter.
    """

    suffix: ClassVar[str] = ""

    def load(self, split: Split = "train") -> Data:
        path, train = find_split(self.root, split, "")
        files = FolderFiles(path, list_files(path, is_image))
        refuse_run_pictures(path, files.names)
        if not files.names:
            raise ValueError(f"{path}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        classes = sorted(p.name for p in train.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))
        flat = any(is_image(p.name) for p in train.iterdir() if p.is_file())
        if flat or len(classes) < 2 or not self.reads_labels:
            return self.from_files(files, {}, {}, self.memory, files.captions)
        class_of = [name.split("/")[0] for name in files.names]
        for name, c in zip(files.names, class_of, strict=True):
            if c not in classes:
                raise ValueError(f"{path / name}: {c} is not one of the classes of {train}")
        index = {c: i for i, c in enumerate(classes)}
        label = torch.tensor([index[c] for c in class_of])
        kind = Label(len(classes), tuple(classes))
        return self.from_files(files, {"label": label}, {"label": kind}, self.memory, files.captions)


def refuse_run_pictures(folder: Path, names: Sequence[str]) -> None:
    """``ValueError`` if one of the images ``names`` in ``folder`` is a plot or a grid in the directory of a run.

    What ``genkit sample --format png`` wrote, ``000000.png`` and so on, is data, also inside a run.
    """
    for parent in sorted({Path(name).parent for name in names if not Path(name).stem.isdecimal()}):
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
    """Images in a .zip, with classes if it contains ``dataset.json``: ``{"labels": [[name, class], ...]}`` or null.

    The layout of StyleGAN and EDM. Members are read, never extracted. The test split is ``test.zip`` beside
    ``train.zip``.
    """

    suffix: ClassVar[str] = ".zip"

    def load(self, split: Split = "train", class_names: tuple[str, ...] = ()) -> Data:
        """``class_names`` are the names of the classes, which the archive itself does not hold."""
        path, train = find_split(self.root, split, ".zip")
        files = ZipFiles(path)
        label = files.labels() if self.reads_labels else None
        if label is None:
            return self.from_files(files, {}, {}, self.memory, files.captions)
        train_label = label if path == train else ZipFiles(train).labels()
        kind = class_kind(label, train_label, class_names, path, train)
        return self.from_files(files, {"label": label}, {"label": kind}, self.memory, files.captions)


def class_kind(label: Tensor, train_label: Tensor | None, names: tuple[str, ...], path: Path, train: Path) -> Label:
    """The classes of the training split. ``ValueError`` if this split has others."""
    if train_label is None:
        raise ValueError(f"{path}: has classes, but {train} has none")
    num = len(names) or int(train_label.max()) + 1
    if int(label.max()) >= num:
        raise ValueError(f"{path}: has the class {int(label.max())}; {train} has 0..{num - 1}")
    return Label(num, names)


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
class Npz(ImageSource):
    """Arrays in an .npz: ``x`` and, if there are classes, ``y``; or ``arr_0`` and ``arr_1`` (guided-diffusion's names).

    Samples are images, uint8 ``[N, H, W]`` or ``[N, H, W, 1 or 3]``, or numbers, float ``[N, D]`` or ``[N, C, T]``.
    """

    suffix: ClassVar[str] = ".npz"

    root: str = "data.npz"
    """the file, or a folder that contains train.npz and test.npz"""
    codec: Literal["standardize", "min-max", "identity"] | None = None
    """how numbers are scaled for the model; None: standardize"""

    def load(self, split: Split = "train") -> Data:
        path, train = find_split(self.root, split, ".npz")
        x, label = read_npz(path)
        train_x, train_label = (x, label) if path == train else read_npz(train)
        cond: dict[str, Tensor] = {}
        kinds: dict[str, Condition] = {}
        if self.reads_labels and label is not None:
            cond, kinds = {"label": label}, {"label": class_kind(label, train_label, (), path, train)}
        if x.dtype == torch.uint8:
            if self.codec is not None:
                raise ValueError(f"{path}: holds images, to which --data.codec does not apply; given {self.codec}")
            return self.from_array(x, cond, kinds)
        if self.size is not None or self.channels is not None or self.flip or self.captions:
            raise ValueError(f"{path}: holds numbers, to which --data.size, channels, flip and captions do not apply")
        if x.shape[1:] != train_x.shape[1:]:
            raise ValueError(f"{path}: samples are {tuple(x.shape[1:])}, but {tuple(train_x.shape[1:])} in {train}")
        return InMemory(x, cond, Spec(tuple(x.shape[1:]), kinds), CODECS[self.codec or "standardize"](train_x))


def read_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    """uint8 images or float32 numbers ``[N, ...]``, and classes ``[N]`` or None. ``ValueError`` names what is wrong."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            keys = ("x", "y") if "x" in stored.files else ("arr_0", "arr_1")
            if keys[0] not in stored.files:
                raise ValueError(
                    f"it holds {', '.join(stored.files) or 'nothing'}; needs x (and y), or arr_0 (and arr_1)"
                )
            x, y = stored[keys[0]], stored[keys[1]] if keys[1] in stored.files else None
    except Exception as e:  # not a zip, a pickle (refused), truncated: each has its own class
        raise ValueError(f"{path}: cannot be read: {format_error(e)}") from e
    description = f"{path}: {keys[0]} is {x.dtype} {list(x.shape)}"
    if x.dtype == np.uint8:
        fits = x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3))
    else:
        fits = x.dtype.kind == "f" and x.ndim in (2, 3)
    if not fits or not x.size:
        raise ValueError(f"{description}; needs uint8 [N, H, W] or [N, H, W, 1 or 3], or float [N, D] or [N, C, T]")
    if x.dtype.kind == "f":
        x = x.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
        if len(bad):
            raise ValueError(f"{description}, of which {len(bad)} rows hold NaN or infinity, the first at {bad[0]}")
    if y is None:
        return torch.from_numpy(x), None
    if y.dtype.kind not in "iu" or y.shape != (len(x),) or y.min() < 0:
        raise ValueError(f"{path}: {keys[1]} is {y.dtype} {list(y.shape)}; needs [{len(x)}] integers from 0")
    return torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))
