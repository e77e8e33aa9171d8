"""The images of a folder or a zip: which files count, and which are left out.

Nothing is extracted from an archive to the disk.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from genkit.core.files import format_error
from genkit.core.messages import warn_once
from genkit.data.captions import Caption, read_captions

logger = logging.getLogger("genkit")
IMAGE_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".avif", ".bmp", ".dib", ".gif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx",
)  # fmt: skip
COMPANIONS = {  # known files beside images that are not images; no warning mentions them
    "dataset.json", "labels.txt", "samples.json", "captions.jsonl", "metadata.jsonl", "metadata.csv",
    "Thumbs.db", "desktop.ini",
}  # fmt: skip
MAX_MEMBER = 2**29  # bytes of an archive's member: an image of 178 million pixels is smaller, a bomb is not
SECONDS_UNTIL_SAID = 5.0  # between messages while the files of a large tree are listed
HIDDEN = (".", "__MACOSX")  # begin the names of files and folders that are left out
TRAIN_WORDS = ("train", "training")  # names of folders that hold a split, in any case
TEST_WORDS = ("test", "testing", "val", "valid", "validation", "dev", "eval")
CAPTION_SUFFIXES = (".txt", ".jsonl", ".csv")


def is_image(name: str) -> bool:
    """Whether a file is an image by its suffix, and not in a hidden folder or one that macOS adds."""
    return has_image_suffix(name) and not is_hidden(name)


def has_image_suffix(name: str) -> bool:
    """Whether a file is an image by its suffix."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file or one of its folders is hidden, or added by macOS."""
    return any(p.startswith(HIDDEN) for p in PurePosixPath(name).parts)


def list_files(directory: Path) -> list[str]:
    """The files in a folder and its subfolders that are not hidden, sorted by path.

    Links are followed, but no folder twice. ``ValueError`` names a folder that cannot be read. A long walk says
    which folder it has reached.
    """

    said = time.monotonic()
    visited: set[str] = set()
    names: list[str] = []
    pending = [("", os.fspath(directory))]
    while pending:
        prefix, folder = pending.pop()
        if (real := os.path.realpath(folder)) in visited:  # a link to a folder above would never end
            continue
        visited.add(real)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(HIDDEN):
                        continue
                    if entry.is_dir():
                        pending.append((f"{prefix}{entry.name}/", entry.path))
                    else:
                        names.append(prefix + entry.name)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be read ({error.strerror})") from error
        if time.monotonic() - said > SECONDS_UNTIL_SAID:
            said = time.monotonic()
            logger.info("%s: still listing files, %d so far; now in %s", directory, len(names), folder)
    return sorted(names)


def warn_of_others(root: Path, others: Iterable[str], with_captions: bool) -> None:
    """Say how many files that are no images were left out, by suffix."""
    skipped = [PurePosixPath(name) for name in others]
    skipped = [path for path in skipped if path.name not in COMPANIONS]
    if with_captions:
        skipped = [path for path in skipped if path.suffix.lower() not in CAPTION_SUFFIXES]
    if skipped:
        counts = Counter(path.suffix.lower() or path.name for path in skipped)
        kinds = ", ".join(f"{n} x {suffix}" for suffix, n in counts.most_common(6))
        warn_once(f"{root}: {len(skipped)} files are no images and were left out: {kinds}, such as {skipped[0]}")


class ListedFile(NamedTuple):
    """What is known of a file without reading it."""

    name: str
    size: int
    checksum: int = 0
    """CRC-32 of its content where an archive states it, else 0"""
    changed: int = 0
    """time of change in nanoseconds"""


def list_status(path: Path, name: str) -> ListedFile:
    """Size and time of change of the file ``path``, under the name ``name``."""
    status = os.stat(path)
    return ListedFile(name, status.st_size, changed=status.st_mtime_ns)


@dataclass(frozen=True, eq=False)
class FolderFiles:
    """The images of a folder, an ``ImageFiles``."""

    root: Path
    names: Sequence[str]
    others: Sequence[str] = ()
    """files that are no images"""

    @staticmethod
    def open(root: Path) -> FolderFiles:
        """List a folder. ``ValueError`` if it holds no images."""
        every = list_files(root)
        names = [name for name in every if has_image_suffix(name)]
        if not names:
            raise ValueError(f"{root}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        return FolderFiles(root, names, [name for name in every if not has_image_suffix(name)])

    def read(self, i: int) -> bytes:
        return (self.root / self.names[i]).read_bytes()

    def location(self, i: int) -> str:
        return str(self.root / self.names[i])

    def listing(self) -> list[ListedFile]:
        return [list_status(self.root / name, name) for name in self.names]

    def captions(self) -> list[Caption]:
        """The captions that lie beside the images."""
        return read_captions(self.names, self.others, lambda name: (self.root / name).read_bytes(), str(self.root))


def names_below_top(names: Sequence[str]) -> list[str]:
    """The names of images without the folders that all of them share."""
    top = os.path.commonpath([os.path.dirname(name) for name in names])
    return [name[len(top) + 1 :] if top else name for name in names]


def refuse_splits(path: Path, names: Sequence[str], advice: str) -> None:
    """``ValueError`` if the top folders of the images ``names`` are a training and a test split: test images would be
    trained on, and the splits taken for classes."""
    below = names_below_top(names)
    tops = {name.partition("/")[0] for name in below if "/" in name}
    splits = {top for top in tops if top.lower() in (*TRAIN_WORDS, *TEST_WORDS)}
    if {top.lower() for top in splits}.intersection(TRAIN_WORDS) and len(splits) > 1 and all("/" in n for n in below):
        raise ValueError(f"{path}: holds the splits {', '.join(sorted(splits))}, which are no classes; {advice}")


class ZipFiles:
    """The images of one archive, an ``ImageFiles``, read member by member. ``ValueError`` names a corrupt member."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()  # a ZipFile is not made for several threads
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as e:
            raise ValueError(f"{path}: cannot be opened as a zip: {format_error(e)}") from e
        every = sorted(n for n in self.archive.namelist() if not n.endswith("/") and not is_hidden(n))
        self.names = [n for n in every if is_image(n)]
        self.others = [n for n in every if not is_image(n)]
        if not self.names:
            raise ValueError(f"{path}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        if twice := next((name for name, count in Counter(every).items() if count > 1), None):
            raise ValueError(f"{path}/{twice}: is in the archive more than once, and only one of them can be read; "
                             "write the archive again")  # fmt: skip
        refuse_splits(
            path, self.names, "make an archive of each, train.zip and test.zip in one folder, and name that folder"
        )

    def read_member(self, name: str) -> bytes:
        """Content of a member. ``ValueError`` if it is corrupt."""
        if (size := self.archive.getinfo(name).file_size) > MAX_MEMBER:
            raise ValueError(f"{self.path}/{name}: inflates to {size / 2**20:.0f} MiB; allowed {MAX_MEMBER >> 20} MiB")
        try:
            with self.lock:
                return self.archive.read(name)
        except Exception as e:  # a wrong checksum, a password, an unknown compression: each has its own class
            raise ValueError(f"{self.path}/{name}: cannot be read: {format_error(e)}") from e

    def read(self, i: int) -> bytes:
        return self.read_member(self.names[i])

    def location(self, i: int) -> str:
        return f"{self.path}/{self.names[i]}"

    def listing(self) -> list[ListedFile]:
        members = (self.archive.getinfo(name) for name in self.names)
        return [ListedFile(m.filename, m.file_size, m.CRC) for m in members]

    def captions(self) -> list[Caption]:
        """The captions that lie beside the images."""
        return read_captions(self.names, self.others, self.read_member, str(self.path))

    @property
    def has_index(self) -> bool:
        """Whether there is a ``dataset.json``, which determines the classes, even if it has none."""
        return "dataset.json" in self.others

    def labels(self) -> Tensor | None:
        """The classes ``[N]`` of the images in ``dataset.json``; None without it or if it has none."""
        if not self.has_index:
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
