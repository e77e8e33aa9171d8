"""Pictures: how they are decoded and how they are held.

Pixels are uint8 ``[N, C, H, W]`` until the codec takes them: a quarter of the memory of floats, and an augmentation
of a whole batch is one tensor operation.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from genkit.core import Batch, Codec, Condition, Data, Draw, Image, Spec, expand
from genkit.core.files import one_line
from genkit.data.captions import FILES, Captions, Texts, captioned
from genkit.data.codecs import Pixels
from genkit.data.source import DataSource

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

T = TypeVar("T")
Size = Annotated[int, Ge(1)] | tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] | None
Channels = Literal[1, 3] | None

MEMORY = 2.0  # GiB of decoded pixels up to which a data set is held in memory; a field of the sources that read files
LONG = 2000  # pictures from which on decoding shows a progress bar
CHUNK = 64  # pictures that one task of the thread pool decodes
GREY = ("1", "L", "LA", "La")  # Pillow's names; palettes count as colour, 16 bits are handled apart


# ------------------------------------------------------------------------------------------------- decoding
def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def pixels_of(picture: Picture, size: Size = None, channels: Channels = None) -> np.ndarray:
    """uint8 ``[C, H, W]``: turned upright (EXIF), without transparency (on white), 16 bits brought to 8, and cropped
    around the centre to the shape of ``size`` before it is resized (Lanczos, antialiased). ``ValueError`` for floats.
    """
    from PIL import Image as pil
    from PIL import ImageOps

    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):
        wide = np.asarray(picture).astype(np.float64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("it has more than 16 bits a pixel")
        picture = pil.fromarray(np.round(wide / 257).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("its pixels are floats, whose range is unknown; save 8 or 16 bits")
    grey = picture.mode in GREY
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = pil.alpha_composite(pil.new("RGBA", picture.size, "white"), picture)
    mode = "L" if (channels or (1 if grey else 3)) == 1 else "RGB"
    picture = picture if picture.mode == mode else picture.convert(mode)
    if size is not None:
        height, width = height_width(size)
        zoom = min(picture.width / width, picture.height / height)
        w, h = max(1, round(width * zoom)), max(1, round(height * zoom))
        left, top = (picture.width - w) // 2, (picture.height - h) // 2
        picture = picture.crop((left, top, left + w, top + h))
        if (w, h) != (width, height):
            picture = picture.resize((width, height), pil.Resampling.LANCZOS, reducing_gap=3.0)
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def decode(blob: bytes, name: str, size: Size = None, channels: Channels = None) -> np.ndarray:
    """``pixels_of`` an encoded picture. ``ValueError`` that names it where it is not one, is truncated or corrupt."""
    from PIL import Image as pil

    try:
        with pil.open(io.BytesIO(blob)) as picture:
            return pixels_of(picture, size, channels)
    except pil.UnidentifiedImageError as e:
        raise ValueError(f"{name}: is not a picture that Pillow can read") from e
    except Exception as e:  # Pillow's plug-ins raise anything over a corrupt file
        raise ValueError(f"{name}: cannot be decoded: {one_line(e)}") from e


def progress(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """``items``, with a bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, what, total, console=console, transient=True, disable=not console.is_terminal)


# -------------------------------------------------------------------------------------------------- holding
def flipped(batch: Batch, spec: Spec, draw: Draw) -> Batch:
    """Half of the samples mirrored left to right, together with the pictures among their conditions."""
    mirror = draw.uniform() < 0.5
    flip = lambda v: torch.where(expand(mirror, v), v.flip(-1), v)  # noqa: E731
    cond = {k: flip(v) if isinstance(spec.cond[k], Image) else v for k, v in batch.cond.items()}
    return replace(batch, x=flip(batch.x), cond=cond)


@dataclass(eq=False)
class InMemory:
    """Samples in one tensor: ``x`` uint8 or float ``[N, *S]``, ``cond`` of ``[N, ...]`` tensors; ``flip`` augments.

    ``captions`` are drawn anew each time.
    """

    x: Tensor
    cond: Mapping[str, Tensor]
    spec: Spec
    codec: Codec
    flip: bool = False
    captions: Captions | None = None

    def __post_init__(self) -> None:
        if tuple(self.x.shape[1:]) != tuple(self.spec.shape):
            raise ValueError(f"samples have shape {tuple(self.x.shape[1:])}; the spec says {tuple(self.spec.shape)}")
        if self.flip and self.x.ndim != 4:
            raise ValueError(f"flip mirrors pictures; these samples have shape {tuple(self.spec.shape)}")
        self.spec.check(self.cond, len(self.x))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        batch = Batch(self.x.index_select(0, indices), {k: v.index_select(0, indices) for k, v in self.cond.items()})
        batch = flipped(batch, self.spec, draw) if self.flip else batch
        return batch if self.captions is None else self.captions.add(batch, indices, draw)


class Files(Protocol):
    """Encoded pictures, in a fixed order. ``read`` is called from several threads at once."""

    @property
    def names(self) -> Sequence[str]: ...
    def read(self, i: int) -> bytes: ...
    def where(self, i: int) -> str:
        """The file's name as a person would look for it."""
        ...


@dataclass(eq=False)
class OnDisk:
    """Pictures that are decoded when they are asked for: those that do not fit into memory."""

    files: Files
    cond: Mapping[str, Tensor]
    spec: Spec
    size: Size = None
    channels: Channels = None
    flip: bool = False
    captions: Captions | None = None
    codec: Codec = Pixels()  # noqa: RUF009  (frozen)

    def __len__(self) -> int:
        return len(self.files.names)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The decoded pictures, uint8 ``[B, C, H, W]``. ``ValueError`` names the file that differs or is corrupt."""
        out = np.empty((len(indices), *self.spec.shape), dtype=np.uint8)
        for row, i in enumerate(indices):
            pixels = decode(self.files.read(i), self.files.where(i), self.size, self.channels)
            if pixels.shape != self.spec.shape:
                raise ValueError(self._differs(i, pixels.shape))
            out[row] = pixels
        return torch.from_numpy(out)

    def _differs(self, i: int, shape: tuple[int, ...]) -> str:
        one, other = self.files.where(i), self.files.where(0)
        (c, *hw), (first_c, *first_hw) = shape, self.spec.shape
        if hw != first_hw:
            h, w, first_h, first_w = *hw, *first_hw
            side = min(*hw, *first_hw)
            return f"{one} is {h}x{w}, but {other} is {first_h}x{first_w}: choose one size, say --data.size={side}"
        colour = {1: "grey", 3: "colour"}
        return f"{one} is {colour[c]}, but {other} is {colour[first_c]}: choose with --data.channels=1 or 3"

    def finish(self, x: Tensor, indices: Tensor, draw: Draw) -> Batch:
        """What ``read`` gave, with its conditions and augmented."""
        batch = Batch(x, {k: v.index_select(0, indices) for k, v in self.cond.items()})
        batch = flipped(batch, self.spec, draw) if self.flip else batch
        return batch if self.captions is None else self.captions.add(batch, indices, draw)

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        return self.finish(self.read(indices.tolist()), indices, draw)

    def in_memory(self) -> InMemory:
        """All of it decoded, by a pool of threads (Pillow lets go of the interpreter while it decodes)."""
        n = len(self)
        x = torch.empty((n, *self.spec.shape), dtype=torch.uint8)

        def fill(start: int) -> None:
            x[start : start + CHUNK] = self.read(range(start, min(start + CHUNK, n)))

        starts = range(0, n, CHUNK)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            done = pool.map(fill, starts)
            for _ in progress(done, len(starts), "decoding") if n > LONG else done:
                pass
        return InMemory(x, self.cond, self.spec, self.codec, self.flip, self.captions)


# ----------------------------------------------------------------------------------------------- the sources
@dataclass(frozen=True, kw_only=True)
class ImageSource(DataSource):
    """What the sources of images have in common."""

    words: ClassVar[tuple[str, ...]] = ()  # what captions call the classes; (): by their names

    size: Size = None  # None: as found. Otherwise the largest centred crop of this shape, resized to it (H, or H W)
    channels: Channels = None  # None: as found
    flip: bool = False  # mirror half of the pictures of a batch, left to right
    labels: bool | None = None  # false: leave out the classes, where there are any; None: where there are captions
    captions: tuple[str, ...] = ()  # wordings such as "a handwritten {label}", one drawn each time; files: beside them
    text_length: Annotated[int, Ge(1)] = 256  # bytes of the longest caption, or prompt, that the model reads
    encoder: str | None = None  # a text encoder of transformers, frozen: folder or hub id; None: one learned from bytes

    @property
    def random_flip(self) -> bool:
        return self.flip

    @property
    def captions_from_labels(self) -> bool:
        return self.captions not in ((), (FILES,))

    @property
    def wants_labels(self) -> bool:
        return not self.captions if self.labels is None else self.labels

    @property
    def needs_classes(self) -> bool:
        """Whether anything hangs on the classes: a condition, or a wording."""
        return self.wants_labels or self.captions_from_labels

    def conditions(
        self, cond: Mapping[str, Tensor], kinds: Mapping[str, Condition], texts: Texts | None = None
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Condition], Captions | None]:
        """The classes and the captions that are asked for; ``texts`` opens those that lie beside the pictures."""
        found = captioned(self.captions, cond, kinds, self.words, self.text_length, self.encoder, texts)
        cond, kinds = (cond, kinds) if self.wants_labels else ({}, {})
        return (cond, kinds, None) if found is None else (cond, {**kinds, "text": found[1]}, found[0])

    def from_files(
        self, files: Files, cond: Mapping[str, Tensor], kinds: Mapping[str, Condition], memory: float,
        texts: Texts | None = None,
    ) -> Data:  # fmt: skip
        """Pictures from files, as these options want them; the first one says what the others must look like."""
        first = decode(files.read(0), files.where(0), self.size, self.channels)
        cond, kinds, captions = self.conditions(cond, kinds, texts)
        spec = Spec(first.shape, kinds)
        spec.check(cond, len(files.names))
        data = OnDisk(files, cond, spec, self.size, self.channels, self.flip, captions)
        return data.in_memory() if len(data) * first.size <= memory * 2**30 else data

    def from_array(self, pixels: Tensor, cond: Mapping[str, Tensor], kinds: Mapping[str, Condition]) -> InMemory:
        """Pictures uint8 ``[N, H, W]`` or ``[N, H, W, C]``, as these options want them."""
        from PIL import Image as pil

        cond, kinds, captions = self.conditions(cond, kinds)
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        n, *found, c = pixels.shape
        wanted = height_width(self.size) if self.size else tuple(found)
        if wanted != tuple(found) or (self.channels or c) != c:
            pictures = (pil.fromarray(p.squeeze(-1) if c == 1 else p) for p in pixels.numpy())
            if n > LONG:
                pictures = progress(pictures, n, "resizing")
            x = torch.from_numpy(np.stack([pixels_of(p, self.size, self.channels) for p in pictures]))
        else:
            x = pixels.movedim(-1, 1).contiguous()
        return InMemory(x, cond, Spec(tuple(x.shape[1:]), kinds), Pixels(), self.flip, captions)
