"""Images in tar files, as webdataset writes them, read by an index of offsets: in any order, and without unpacking.

A sample is what lies side by side under one name up to the first dot: ``0001.jpg``, ``0001.cls`` (its class) and
``0001.txt`` (its caption), or both in ``0001.json``. The index of a file is written to genkit's cache once, and used
until the file's size or time of change differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genkit.core.arrays import open_npz, save_npz
from genkit.core.files import file_stamp, format_error
from genkit.core.messages import warn_once
from genkit.core.tensors import cache_folder
from genkit.data.captions import Caption, collapse_space, decode_utf8
from genkit.data.classes import sort_naturally
from genkit.data.image_files import IMAGE_SUFFIXES, MAX_MEMBER, ListedFile, is_hidden, list_status

LAYOUT = 1  # of the stored index
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
MAX_TEXT = 2**24  # bytes of a class, a caption or a JSON member
LABEL_KEYS = ("label", "cls", "class", "y")
TEXT_KEYS = ("caption", "text", "txt")
BLOCK = 512  # bytes of a header; one of zeros ends an archive


class PackedTexts(Sequence[str]):
    """Many short texts in one array of bytes, a tenth of the memory of strings."""

    def __init__(self, content: np.ndarray, ends: np.ndarray) -> None:
        self.content, self.ends = content, ends

    @staticmethod
    def pack(texts: Sequence[str]) -> PackedTexts:
        """Pack ``texts``."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        return PackedTexts(np.frombuffer(b"".join(encoded), np.uint8), ends)

    @staticmethod
    def join(parts: Sequence[PackedTexts]) -> PackedTexts:
        """All texts of several packs in one."""
        shifts = np.cumsum([0, *(len(p.content) for p in parts[:-1])])
        ends = [p.ends + shift for p, shift in zip(parts, shifts, strict=True)]
        return PackedTexts(np.concatenate([p.content for p in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        first = int(self.ends[i - 1]) if i else 0
        return self.content[first : int(self.ends[i])].tobytes().decode("utf-8", "surrogateescape")


@dataclass
class Members:
    """One sample's parts while a tar is scanned: offset and size of each, by extension."""

    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def image(self, path: Path) -> str:
        """The extension of the image. ``ValueError`` unless there is exactly one."""
        images = [e for e in self.parts if f".{e.rpartition('.')[2]}" in IMAGE_SUFFIXES]
        if len(images) != 1:
            listed = ", ".join(images) or f"none of {', '.join(self.parts)}"
            raise ValueError(f"{path}/{self.key}: needs one image; holds {listed}")
        return images[0]


def iterate_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The files in a tar. ``ValueError`` if it is no tar, compressed, cut off, or followed by something else."""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.offset_data + member.size > size:
                    raise ValueError(f"{path}/{member.name}: the file is cut off; download or write it again")
                vars(archive)["members"] = []  # else all of them stay in memory
                if member.isdir() or is_hidden(member.name):
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError(f"{path}/{member.name}: is a link or a sparse file; allowed: plain files")
                yield member
            end = archive.offset
    except (tarfile.TarError, OSError, EOFError) as e:
        raise ValueError(f"{path}: cannot be read as an uncompressed tar: {format_error(e)}") from e
    with open(path, "rb") as file:
        file.seek(end)
        rest = file.read(1 << 20)
    if len(rest) < BLOCK or any(rest):
        raise ValueError(f"{path}: does not end as a tar does (cut off, or several in one file); write it again")


def scan_samples(path: Path) -> Iterator[Members]:
    """The samples of a tar, one after the other. ``ValueError`` for a pickle, or a name that comes twice."""
    sample: Members | None = None
    seen: set[str] = set()
    for member in iterate_members(path):
        name = PurePosixPath(member.name)
        stem, _, extension = name.name.partition(".")
        key, extension = str(name.with_name(stem)), extension.lower()
        if extension.rpartition(".")[2] in PICKLES:
            raise ValueError(f"{path}/{member.name}: is a pickle, which can run code and is never read; write json")
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            if key in seen:
                raise ValueError(f"{path}/{member.name}: a sample of this name came before; give each its own")
            seen.add(key)
            sample = Members(key)
        if extension in sample.parts:
            raise ValueError(f"{path}/{member.name}: comes twice")
        sample.parts[extension] = (member.offset_data, member.size)
    if sample is not None:
        yield sample


def build_index(path: Path) -> dict[str, np.ndarray]:
    """Names, offsets and sizes of the images of a tar, and class and caption of each as text ("" without)."""
    names, labels, captions, places, others = [], [], [], [], 0
    with open(path, "rb") as file:

        def read_text(sample: Members, extension: str) -> str:
            offset, size = sample.parts[extension]
            location = f"{path}/{sample.key}.{extension}"
            if size > MAX_TEXT:
                raise ValueError(f"{location}: has {size} bytes; allowed {MAX_TEXT}")
            file.seek(offset)
            return decode_utf8(file.read(size), location)

        for sample in scan_samples(path):
            image = sample.image(path)
            label, caption = "", ""
            if "json" in sample.parts:
                label, caption = parse_json(read_text(sample, "json"), f"{path}/{sample.key}.json")
            label = read_text(sample, "cls").strip() if "cls" in sample.parts else label
            caption = read_text(sample, "txt") if "txt" in sample.parts else caption
            names.append(f"{sample.key}.{image}")
            labels.append(label)
            captions.append(collapse_space(caption))
            places.append(sample.parts[image])
            others += len(sample.parts.keys() - {image, "json", "cls", "txt"})
    if not names:
        raise ValueError(f"{path}: holds no samples")
    if others:
        warn_once(f"{path}: {others} members are no image, class or caption and were left out")
    packed = {}
    for name, texts in (("names", names), ("labels", labels), ("captions", captions)):
        pack = PackedTexts.pack(texts)
        packed |= {f"{name}.content": pack.content, f"{name}.ends": pack.ends}
    return {**packed, "places": np.array(places, dtype=np.int64)}


def parse_json(content: str, location: str) -> tuple[str, str]:
    """Class and caption in a JSON member, "" for what it does not have."""
    try:
        item = json.loads(content)
        label = next((item[k] for k in LABEL_KEYS if k in item), "")
        caption = next((item[k] for k in TEXT_KEYS if k in item), "")
    except (ValueError, TypeError) as e:
        raise ValueError(f"{location}: is no JSON object: {format_error(e)}") from e
    if isinstance(label, bool) or not isinstance(label, int | str) or not isinstance(caption, str):
        raise ValueError(f"{location}: needs a whole number or a name as {LABEL_KEYS[0]}, and text as {TEXT_KEYS[0]}")
    return str(label), caption


def find_index(path: Path) -> dict[str, np.ndarray]:
    """:func:`build_index`, remembered in genkit's cache."""
    stamp = np.array([LAYOUT, *file_stamp(path)], dtype=np.int64)
    key = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()
    stored = cache_folder() / "tar-index" / f"{key[:32]}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError), open_npz(stored) as index:
        if np.array_equal(index["stamp"], stamp):
            return {name: index[name] for name in index.files}
    index = {**build_index(path), "stamp": stamp}
    with contextlib.suppress(OSError):  # a cache that cannot be written to: the index is made each time
        save_npz(stored, index)
    return index


class TarShards:
    """The images of several tar files in order, an ``ImageFiles``. ``ValueError`` names what is damaged."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        with ThreadPoolExecutor(4) as pool:
            indices = list(pool.map(find_index, self.paths))

        def join(name: str) -> PackedTexts:
            return PackedTexts.join([PackedTexts(i[f"{name}.content"], i[f"{name}.ends"]) for i in indices])

        self.keys, self.label_texts, self.caption_texts = join("names"), join("labels"), join("captions")
        self.places = np.concatenate([index["places"] for index in indices])
        counts = [len(index["places"]) for index in indices]
        self.starts = np.concatenate([[0], np.cumsum(counts)])

    @property
    def names(self) -> Sequence[str]:
        return self.keys

    def shard_of(self, i: int) -> int:
        """The number of the file that holds image ``i``."""
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def location(self, i: int) -> str:
        return f"{self.paths[self.shard_of(i)]}/{self.keys[i]}"

    def read(self, i: int) -> bytes:
        offset, size = (int(v) for v in self.places[i])
        if size > MAX_MEMBER:
            raise ValueError(f"{self.location(i)}: has {size >> 20} MiB; allowed {MAX_MEMBER >> 20} MiB")
        try:
            with open(self.paths[self.shard_of(i)], "rb", buffering=0) as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as e:
            raise ValueError(f"{self.location(i)}: cannot be read: {format_error(e)}") from e
        if len(content) < size:
            raise ValueError(f"{self.location(i)}: the file is cut off; download or write it again")
        return content

    def captions(self) -> list[Caption]:
        """The captions in txt or json. ``ValueError`` names an image without one."""
        captions = [Caption(text, self.location(i)) for i, text in enumerate(self.caption_texts)]
        for caption in captions:
            if not caption.text:
                raise ValueError(f"{caption.location}: has no caption in a txt, or in {TEXT_KEYS[0]} of a json")
        return captions

    def labels(self, as_names: bool = False) -> RowClasses | None:
        """:func:`number_classes` of the texts in cls or json; None if there are none."""
        return number_classes(self.label_texts, self.location, as_names)

    def listing(self) -> list[ListedFile]:
        return [list_status(path, path.name) for path in self.paths]


class RowClasses(NamedTuple):
    """The classes of samples."""

    label: Tensor
    """Int ``[N]``"""
    names: tuple[str, ...]
    """() if the classes are numbers without names"""
    numbered: bool
    """whether the files state numbers, else names, which ``label`` counts in their order"""


def number_classes(texts: Sequence[str], location: Callable[[int], str], as_names: bool = False) -> RowClasses | None:
    """Classes and their names, () if all are whole numbers, unless these are read ``as_names``; None if all texts are
    empty.

    ``ValueError`` names a sample without a class among others with one, or with a number below 0.
    """
    distinct = {text: i for i, text in reversed(list(enumerate(texts)))}
    if distinct.keys() <= {""}:
        return None
    if "" in distinct:
        raise ValueError(f"{location(distinct[''])}: has no class, and others have one")
    if not as_names and all(text.removeprefix("-").isdecimal() for text in distinct):
        if below := next((text for text in distinct if text.startswith("-")), None):
            raise ValueError(f"{location(distinct[below])}: has the class {below}, which marks a sample without one; "
                             "leave such samples out, or the classes: --data.labels=false")  # fmt: skip
        return RowClasses(torch.tensor([int(text) for text in texts]), (), True)
    names = tuple(sort_naturally(distinct))
    number = {name: i for i, name in enumerate(names)}
    return RowClasses(torch.tensor([number[text] for text in texts]), names, False)
