"""Images: decoding, images on disk, and the base class of image sources.

Pixels are uint8 ``[N, C, H, W]`` until the codec converts them: a quarter of the memory of floats, and an augmentation
of a whole batch is one tensor operation.
"""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from genkit.config.numbers import Count, Width
from genkit.config.paths import PathText
from genkit.core import SIZES_INPUT, Batch, Codec, Condition, Draw, Spec
from genkit.core.files import format_error
from genkit.core.messages import warn_once
from genkit.core.progress import terminal_progress
from genkit.data.buckets import Buckets
from genkit.data.captions import FILES, CaptionReader, Captions, are_sentences, load_captions
from genkit.data.codecs import Pixels
from genkit.data.image_files import ListedFile
from genkit.data.in_memory import InMemory, random_flip
from genkit.data.source import DataSource

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

T = TypeVar("T")
Size = Width | tuple[Width, Width] | None
Channels = Literal[1, 3] | None

PROGRESS_FROM = 2000  # number of images above which decoding shows a progress bar
CHUNK = 64  # images that one task of the thread pool decodes
PAGED_FORMATS = ("GIF", "TIFF", "WEBP", "PNG", "AVIF")  # whose further pages are images of their own (not a JPEG's)
OPENING = threading.Lock()  # filters of warnings are not made for several threads
ORIENTATION, SIDEWAYS = 0x0112, 5  # the tag of EXIF, and the first of its values that turn a picture by 90 degrees
GREY_MODES = ("1", "L", "LA", "La")  # of Pillow; palettes count as colour, 16 bits are handled separately


# ------------------------------------------------------------------------------------------------- decoding
def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """``size`` as (height, width); one number means a square."""
    return (size, size) if isinstance(size, int) else size


def to_pixels(image: PILImage, size: Size = None, channels: Channels = None, keeps_alpha: bool = False) -> np.ndarray:
    """uint8 ``[C, H, W]`` of an image, upright (EXIF), on white if it is transparent, with 16 bits reduced to 8.

    With ``size`` it is cropped around the centre to that aspect ratio and then resized (Lanczos, antialiased). If it
    ``keeps_alpha``, the colours are as stored, and its alpha channel (255 without one) is a further, last channel.
    ``ValueError`` for float pixels.
    """
    from PIL import Image as pil  # lazy: speed
    from PIL import ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "I" and image.format == "TIFF":  # 32 bits, unlike the 16 that Pillow widens for other formats
        raise ValueError("its pixels are 32-bit integers of unknown range; save 8 or 16 bits")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.float64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("it has more than 16 bits a pixel")
        image = pil.fromarray(np.round(wide / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save 8 or 16 bits")
    grey = image.mode in GREY_MODES
    alpha = None
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if keeps_alpha:
            alpha = image.getchannel("A")
        else:
            image = pil.alpha_composite(pil.new("RGBA", image.size, "white"), image)
    mode = "L" if (channels or (1 if grey else 3)) == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    layers = [image, *([alpha or pil.new("L", image.size, 255)] if keeps_alpha else [])]
    arrays = [np.asarray(layer if size is None else fit_size(layer, size)) for layer in layers]
    return np.concatenate([a[None] if a.ndim == 2 else a.transpose(2, 0, 1) for a in arrays])


def fit_size(image: PILImage, size: int | tuple[int, int]) -> PILImage:
    """The largest centred crop of an image that has the aspect ratio of ``size``, resized to it."""
    from PIL import Image as pil  # lazy: speed

    height, width = height_width(size)
    zoom = min(image.width / width, image.height / height)
    w, h = max(1, round(width * zoom)), max(1, round(height * zoom))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    image = image.crop((left, top, left + w, top + h))
    if (w, h) != (width, height):
        image = image.resize((width, height), pil.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def open_image(content: bytes, formats: Sequence[str] | None = None) -> PILImage:
    """``PIL.Image.open`` of an encoded image, of one of ``formats``, without Pillow's warning of a large image."""
    from PIL import Image as pil  # lazy: speed

    with OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", pil.DecompressionBombWarning)
        return pil.open(io.BytesIO(content), formats=None if formats is None else tuple(formats))


def decode(
    content: bytes,
    name: str,
    size: Size = None,
    channels: Channels = None,
    paged: set[str] | None = None,
    keeps_alpha: bool = False,
) -> np.ndarray:
    """:func:`to_pixels` of an encoded image. ``ValueError`` names it if it is no image, truncated or corrupt.

    Of an animation or a file of several pages the first is taken, and ``name`` is added to ``paged``.
    """
    from PIL import Image as pil  # lazy: speed

    try:
        with open_image(content) as image:
            if image.width * image.height > (pil.MAX_IMAGE_PIXELS or math.inf):
                warn_once(f"{name}: has {image.width}x{image.height} pixels; it is decoded all the same")
            if paged is not None and image.format in PAGED_FORMATS and getattr(image, "is_animated", False):
                paged.add(name)
            return to_pixels(image, size, channels, keeps_alpha)
    except pil.UnidentifiedImageError as e:
        raise ValueError(f"{name}: is not an image that Pillow can read") from e
    except Exception as e:  # Pillow's plug-ins raise anything over a corrupt file
        raise ValueError(f"{name}: cannot be decoded: {format_error(e)}") from e


def stored_sizes(files: ImageFiles) -> Tensor:
    """Height and width of each image, upright (EXIF), Int ``[N, 2]``; only the headers of plain files are read.

    ``ValueError`` names what is no image.
    """

    def measure(i: int) -> tuple[int, int]:
        from PIL import Image as pil  # lazy: speed

        location = files.location(i)
        try:
            with pil.open(location) if os.path.isfile(location) else open_image(files.read(i)) as image:
                turned = image.getexif().get(ORIENTATION, 1) >= SIDEWAYS
                return (image.width, image.height) if turned else (image.height, image.width)
        except (OSError, ValueError, SyntaxError) as e:
            raise ValueError(f"{location}: is not an image that Pillow can read: {format_error(e)}") from e

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return torch.tensor(list(pool.map(measure, range(len(files.names)))))


def with_progress(items: Iterable[T], total: int, name: str) -> Iterator[T]:
    """``items``, with a progress bar on standard error if that is a terminal."""
    with terminal_progress() as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress(name, done, total)


# --------------------------------------------------------------------------------------------------- on disk
class ImageFiles(Protocol):
    """Encoded images in a fixed order. ``read`` is called from several threads at once."""

    @property
    def names(self) -> Sequence[str]:
        """Paths below the root, in order."""
        ...

    def read(self, i: int) -> bytes:
        """Content of file ``i``."""
        ...

    def location(self, i: int) -> str:
        """Path of file ``i``, for messages."""
        ...

    def listing(self) -> list[ListedFile]:
        """The files, or the shards that hold them, which together stand for the content."""
        ...


@dataclass(eq=False)
class OnDisk:
    """Images that are decoded when they are needed, because all of them do not fit into memory."""

    rows_per_task: ClassVar[int] = 16

    files: ImageFiles
    cond: Mapping[str, Tensor]
    spec: Spec
    size: Size = None
    channels: Channels = None
    flip: bool = False
    captions: Captions | None = None
    codec: Codec = Pixels()  # noqa: RUF009  (frozen)
    num_held_out: int = 0
    """samples that are held out of the training split"""
    shard_starts: Tensor | None = None
    """the first row of each shard, and the number of rows, if rows of one shard are fast to read one after the other"""
    window: int | None = None
    """shards whose rows are mixed at a time; None: all"""
    weighted: bool = False
    """whether the alpha channel is the weight of each pixel in the loss"""
    buckets: Buckets | None = None
    """shapes for batches of training; elsewhere all images have the shape of ``spec``"""
    paged: set[str] = field(default_factory=set, init=False)
    """images of which only the first page is taken, as far as they were read"""
    warned: bool = field(default=False, init=False)

    def __len__(self) -> int:
        return len(self.files.names)

    def read(self, indices: Sequence[int], size: Size = None) -> Tensor:
        """Decoded images, of this ``size`` or that of the data, uint8 ``[B, C, H, W]``, with their alpha as one more
        channel if they are ``weighted``.

        ``ValueError`` names a file that is corrupt or has another shape.
        """
        channels, *axes = self.spec.shape
        shape = (channels + self.weighted, *(axes if size is None else height_width(size)))
        out = np.empty((len(indices), *shape), dtype=np.uint8)
        for row, i in enumerate(indices):
            content, location = self.files.read(i), self.files.location(i)
            pixels = decode(content, location, size or self.size, self.channels, self.paged, self.weighted)
            if pixels.shape != shape:
                raise ValueError(self._describe_mismatch(i, (pixels.shape[0] - self.weighted, *pixels.shape[1:])))
            out[row] = pixels
        return torch.from_numpy(out)

    def _describe_mismatch(self, i: int, shape: tuple[int, ...]) -> str:
        odd, first = self.files.location(i), self.files.location(0)
        (c, h, w), (first_c, first_h, first_w) = shape, self.spec.shape
        if (h, w) != (first_h, first_w):
            side = min(h, w, first_h, first_w)
            return f"{odd} is {h}x{w}, but {first} is {first_h}x{first_w}: choose one size, say --data.size={side}"
        colour = {1: "grey", 3: "colour"}
        return f"{odd} is {colour[c]}, but {first} is {colour[first_c]}: choose with --data.channels=1 or 3"

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        """The images at ``indices`` ``[B]``, augmented by ``draw``."""
        return self.finish(self.read(indices.tolist()), indices, draw)

    def training_batch(self, indices: Tensor, draw: Draw) -> Batch:
        """The same in the shape of their bucket, with their sizes as a condition, if there are buckets."""
        if self.buckets is None:
            return self.batch(indices, draw)
        batch = self.finish(
            self.read(indices.tolist(), self.buckets.shapes[int(self.buckets.of[indices[0]])]), indices, draw
        )
        return replace(batch, cond={**batch.cond, SIZES_INPUT: self.buckets.sizes(indices)})

    def finish(self, x: Tensor, indices: Tensor, draw: Draw) -> Batch:
        """A batch of decoded images ``x``, augmented by ``draw``, with their conditions."""
        if self.paged and not self.warned:
            self.warned = True
            warn_once(f"{min(self.paged)}: has several pages; only the first of each such image is taken")
        x, weight = (x[:, :-1].contiguous(), x[:, -1:].float() / 255) if self.weighted else (x, None)
        batch = Batch(x, {k: v.index_select(0, indices) for k, v in self.cond.items()}, place_weight=weight)
        batch = random_flip(batch, self.spec, draw) if self.flip else batch
        return batch if self.captions is None else self.captions.add(batch, indices, draw)

    def in_memory(self) -> InMemory:
        """All images, decoded by a pool of threads (Pillow releases the interpreter lock while it decodes)."""
        n = len(self)
        channels, *axes = self.spec.shape
        x = torch.empty((n, channels + self.weighted, *axes), dtype=torch.uint8)

        def fill(start: int) -> None:
            x[start : start + CHUNK] = self.read(range(start, min(start + CHUNK, n)))

        starts = range(0, n, CHUNK)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            done = pool.map(fill, starts)
            for _ in with_progress(done, len(starts), "decoding") if n > PROGRESS_FROM else done:
                pass
        if self.paged:
            count = f"{len(self.paged)} of {n} images have"
            warn_once(f"{count} several pages, of which only the first is taken, such as {min(self.paged)}")
        x, weight = (x[:, :-1].contiguous(), x[:, -1:].contiguous()) if self.weighted else (x, None)
        return InMemory(x, self.cond, self.spec, self.codec, self.flip, self.captions, place_weight=weight)


# ----------------------------------------------------------------------------------------------- the sources
@dataclass(frozen=True, kw_only=True)
class ImageSource(DataSource):
    """Base of all sources of images: their shape, augmentation, and conditions on classes and captions."""

    class_words: ClassVar[tuple[str, ...]] = ()
    """names of the classes in captions; (): those in the label"""

    size: Size = None
    """height, or height and width: the largest centred crop of that shape, resized to it; None: as stored"""
    channels: Channels = None
    """1 grey, 3 colour; None: as stored"""
    flip: bool = False
    """mirror half of the images of a batch left to right"""
    labels: bool | None = None
    """condition on the class of each image, if there are classes; None: unless there are captions"""
    captions: tuple[str, ...] = ()
    """templates such as "a handwritten {label}", one drawn each time; files: texts beside the images; or a sentence for
    all images"""
    text_length: Count = 256
    """bytes of the longest caption or prompt that the model reads"""
    encoder: PathText | None = None
    """a frozen text encoder of transformers, a folder or hub id, or diffusers:DIR, all those of a pipeline; None: those
    of --init diffusers:DIR, else bytes and an encoder trained with the model"""

    @property
    def random_flip(self) -> bool:
        return self.flip

    @property
    def captions_from_labels(self) -> bool:
        return self.captions not in ((), (FILES,)) and not are_sentences(self.captions)

    @property
    def keeps_labels(self) -> bool:
        """Whether samples are conditioned on their class, if there are classes."""
        return not self.captions if self.labels is None else self.labels

    @property
    def reads_labels(self) -> bool:
        """Whether classes are needed at all: for the condition, or for captions."""
        return self.keeps_labels or self.captions_from_labels

    def build_conditions(
        self,
        num: int,
        cond: Mapping[str, Tensor],
        kinds: Mapping[str, Condition],
        read_captions: CaptionReader | None = None,
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Condition], Captions | None]:
        """Select classes and captions of ``num`` images as these settings say; ``read_captions`` reads those beside
        them."""
        captioned = load_captions(
            self.captions, cond, kinds, self.class_words, self.text_length, self.encoder, read_captions, num
        )
        if not self.keeps_labels:
            cond, kinds = {}, {}
        if captioned is None:
            return cond, kinds, None
        captions, text_kinds = captioned
        return cond, {**kinds, **text_kinds}, captions

    def from_files(
        self,
        files: ImageFiles,
        cond: Mapping[str, Tensor],
        kinds: Mapping[str, Condition],
        memory: float,
        read_captions: CaptionReader | None = None,
        weighted: bool = False,
        bucket: int | None = None,
    ) -> InMemory | OnDisk:
        """The images of ``files`` by these settings, in memory if they need at most ``memory`` GiB.

        The first image determines the shape of all. If they are ``weighted``, their alpha is a weight. With a
        ``bucket``, the step of the sides of shapes, they stay on the disk, and training sees them in their own ratio.
        """
        first = decode(files.read(0), files.location(0), self.size, self.channels)
        cond, kinds, captions = self.build_conditions(len(files.names), cond, kinds, read_captions)
        spec = Spec(first.shape, kinds)
        spec.check(cond, len(files.names))
        data = OnDisk(files, cond, spec, self.size, self.channels, self.flip, captions, weighted=weighted)
        if bucket is not None:
            return replace(data, buckets=Buckets.build(stored_sizes(files), first.shape[1] * first.shape[2], bucket))
        return data.in_memory() if len(data) * first.size <= memory * 2**30 else data

    def from_array(self, pixels: Tensor, cond: Mapping[str, Tensor], kinds: Mapping[str, Condition]) -> InMemory:
        """Images uint8 ``[N, H, W]`` or ``[N, H, W, C]`` by these settings."""
        from PIL import Image as pil  # lazy: speed

        cond, kinds, captions = self.build_conditions(len(pixels), cond, kinds)
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        n, *stored, c = pixels.shape
        wanted = height_width(self.size) if self.size else tuple(stored)
        if wanted != tuple(stored) or (self.channels or c) != c:
            images = (pil.fromarray(p.squeeze(-1) if c == 1 else p) for p in pixels.numpy())
            if n > PROGRESS_FROM:
                images = with_progress(images, n, "resizing")
            x = torch.from_numpy(np.stack([to_pixels(image, self.size, self.channels) for image in images]))
        else:
            x = pixels.movedim(-1, 1).contiguous()
        return InMemory(x, cond, Spec(tuple(x.shape[1:]), kinds), Pixels(), self.flip, captions)
