"""Images of recorded episodes: stored once each, in memory or mapped from a file, and augmented as they are read."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genkit.core import Batch, Draw, expand
from genkit.core.files import atomic_write, sweep
from genkit.core.tensors import cache_folder
from genkit.data.in_memory import InMemory

logger = logging.getLogger("genkit")
CACHE_VERSION = 2  # of the content of a cached file, for the same source
IDLE = 3600.0  # seconds after which a file whose process does not run is no longer written to
CHANNELS = (1, 3)  # numbers of channels that images may have
GREY = (0.299, 0.587, 0.114)  # weights of the colours in grey (ITU-R BT.601)


# ------------------------------------------------------------------------------------------------ the images
class FrameStore:
    """The images of all steps of some episodes, one after the other; the channels of the cameras follow each other.

    ``episodes`` holds an array uint8 ``[T, C, H, W]`` for each camera of each episode. They may be views of a mapped
    file, from which only the images of a batch are read. ``ValueError`` if the cameras have different sizes.
    """

    def __init__(self, episodes: Sequence[Sequence[np.ndarray]]):
        self.episodes = episodes
        self.starts = np.array([0, *accumulate(len(cameras[0]) for cameras in episodes)])
        self.cameras = tuple(array.shape[1] for array in episodes[0])
        size = episodes[0][0].shape[2:]
        if odd := {array.shape[2:] for cameras in episodes for array in cameras} - {size}:
            given = " and ".join("x".join(map(str, s)) for s in (size, min(odd)))
            raise ValueError(f"frames: given images of {given}; all cameras and episodes need one size")
        self.shape = (sum(self.cameras), *size)
        """(C, H, W)"""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        """For another process: of images in mapped files only their places, of others the numbers."""
        episodes = [[MappedPlace.of(array) or array for array in cameras] for cameras in self.episodes]
        return {**self.__dict__, "episodes": episodes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = [[a.open() if isinstance(a, MappedPlace) else a for a in cameras] for cameras in state["episodes"]]
        self.__dict__.update(state, episodes=opened)

    def gather(self, rows: Tensor) -> Tensor:
        """The images uint8 ``[*rows, C, H, W]`` of these steps."""
        out = np.empty((rows.numel(), *self.shape), np.uint8)
        flat = rows.flatten().numpy()
        for image, row, k in zip(out, flat, np.searchsorted(self.starts, flat, "right") - 1, strict=True):
            first = 0
            for array in self.episodes[k]:
                image[first : first + array.shape[1]] = array[row - self.starts[k]]
                first += array.shape[1]
        return torch.from_numpy(out).unflatten(0, rows.shape)


class MappedPlace(NamedTuple):
    """Where in a file an array uint8 is that is a view of the mapped file."""

    file: str
    offset: int
    """of its first number, which may come after others if the view runs backwards"""
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> MappedPlace | None:
        """The place of an array; None if it is in memory."""
        root: Any = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        if not isinstance(root, np.memmap) or root.filename is None:
            return None
        address, begin = (a.__array_interface__["data"][0] for a in (array, root))
        return cls(str(root.filename), root.offset + address - begin, array.shape, array.strides)

    def open(self) -> np.ndarray:
        """The array again, mapped."""
        if not all(self.shape):
            return np.empty(self.shape, np.uint8)
        spans = [(n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)]
        before = -sum(span for span in spans if span < 0)
        size = 1 + sum(abs(span) for span in spans)
        mapped = np.memmap(self.file, np.uint8, "r", self.offset - before, (size,))
        return np.ndarray(self.shape, np.uint8, mapped, before, self.strides)


@dataclass(eq=False)
class WithFrames(InMemory):
    """Samples that are conditioned on images. Each image is stored once, although it is in several windows.

    ``crop`` (h, w) cuts a part at a random place out of the images, and ``jitter`` changes brightness, contrast and
    saturation by a factor in [1 - jitter, 1 + jitter]: the same for all images of a sample, for they belong together.
    """

    frames: FrameStore | None = None
    frame_rows: Tensor | None = None
    crop: tuple[int, int] | None = None
    jitter: float = 0.0

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        batch = super().batch(indices, draw)
        assert self.frames is not None
        assert self.frame_rows is not None
        frames = self.frames.gather(self.frame_rows[indices])
        if self.crop is not None:
            frames = random_crop(frames, self.crop, draw)
        if self.jitter:
            frames = color_jitter(frames, self.frames.cameras, self.jitter, draw)
        return replace(batch, cond={**batch.cond, "frames": frames})


# ------------------------------------------------------------------------------------------------- augmentation
def random_crop(frames: Tensor, size: tuple[int, int], draw: Draw) -> Tensor:
    """A part of ``size`` (h, w) of images ``[B, To, C, H, W]``, at a place that ``draw`` chooses for each sample."""
    room = torch.tensor([n - k + 1 for n, k in zip(frames.shape[-2:], size, strict=True)])
    places = (draw.uniform(2) * room).long().minimum(room - 1).tolist()
    return torch.stack([f[..., t : t + size[0], u : u + size[1]] for f, (t, u) in zip(frames, places, strict=True)])


def color_jitter(frames: Tensor, cameras: Sequence[int], amount: float, draw: Draw) -> Tensor:
    """Images uint8 ``[B, To, C, H, W]`` with brightness, contrast and, of cameras with three channels, saturation times
    factors in [1 - amount, 1 + amount], which ``draw`` chooses for each sample."""
    brightness, contrast, saturation = (1 + amount * (2 * draw.uniform(3) - 1)).unbind(1)
    x = frames.float() * expand(brightness, frames)
    mean = x.mean((1, 2, 3, 4), keepdim=True)
    x = mean + (x - mean) * expand(contrast, frames)
    parts = []
    for part in x.split(list(cameras), 2):
        if part.shape[2] == 3:
            grey = (part * torch.tensor(GREY)[:, None, None]).sum(2, keepdim=True)
            part = grey + (part - grey) * expand(saturation, frames)
        parts.append(part)
    return torch.cat(parts, 2).round().clamp(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------- conversion
def channels_first(values: np.ndarray, name: str, location: str) -> np.ndarray:
    """Images ``[N, H, W, C]`` or ``[N, C, H, W]`` as the latter. ``ValueError`` as for :func:`image_shape`."""
    image_shape(values.shape, values.dtype, name, location)
    return values.transpose(0, 3, 1, 2) if values.shape[3] in CHANNELS else values


def image_shape(shape: tuple[int, ...], dtype: np.dtype, name: str, location: str) -> tuple[int, int, int, int]:
    """The shape of images ``[N, H, W, C]`` or ``[N, C, H, W]`` as the latter. ``ValueError`` unless they are uint8 with
    1 or 3 channels."""
    if dtype == np.uint8 and len(shape) == 4:
        n, a, b, c = shape
        if c in CHANNELS:
            return n, c, a, b
        if a in CHANNELS:
            return n, a, b, c
    raise ValueError(f"{location}: {name} is {shape} of {dtype}; images are uint8 [N, H, W, 3], or with one channel")


def resize(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """An image uint8 ``[H, W, C]`` as ``[C, h, w]``, by Pillow's bicubic filter as environments' pictures are."""
    if size is not None and image.shape[:2] != size:
        from PIL import Image  # lazy: speed

        squeezed = image[:, :, 0] if image.shape[2] == 1 else image
        image = np.asarray(Image.fromarray(squeezed).resize((size[1], size[0]))).reshape(*size, image.shape[2])
    return image.transpose(2, 0, 1)


def resize_all(images: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Images uint8 ``[N, C, H, W]`` as ``[N, C, h, w]``; themselves if they have this size."""
    if size is None or images.shape[2:] == tuple(size):
        return images
    return np.stack([resize(image.transpose(1, 2, 0), size) for image in images])


def require_size(size: Sequence[int], first: Sequence[int], given: tuple[int, int] | None, which: str) -> None:
    """``ValueError`` if an image's ``size`` is not that of the ``first`` one, and none was ``given`` for all."""
    if given is None and tuple(size) != tuple(first):
        raise ValueError(f"{which} has images of {first[0]}x{first[1]} and of {size[0]}x{size[1]}; give "
                         "--data.image-size H W, to which all are resized")  # fmt: skip


def cached_pieces(
    files: Sequence[Path],
    name: str,
    shape: tuple[int, int, int, int],
    pieces: Callable[[], Iterable[np.ndarray]],
    size: tuple[int, int] | None,
    **key: Any,
) -> np.ndarray:
    """The images of a camera, uint8 ``[N, C, h, w]`` of ``size``, mapped from a file: read in pieces, once.

    ``shape`` is (N, C, H, W) as they are recorded in ``files``. ``pieces()`` yields some of them at a time, in order,
    ``[n, H, W, C]`` or ``[n, C, H, W]``; more than N are left out. ``key`` says, besides the files, which they are.
    ``ValueError`` if there are fewer, or images of other channels among them.
    """
    num, channels = shape[:2]
    h, w = size or shape[2:]

    def write(frames: np.ndarray) -> None:
        row = 0
        for piece in pieces():
            images = channels_first(piece, name, str(files[0]))[: num - row]
            if images.shape[1] != channels:
                raise ValueError(f"{files[0]}: {name} has images of {channels} and of {images.shape[1]} channels")
            require_size(images.shape[2:], (h, w), size, f"{files[0]}: {name}")
            frames[row : row + len(images)] = resize_all(images, (h, w))
            row += len(images)
        if row < num:
            raise ValueError(f"{files[0]}: {name} has {row} images of {num}; it is cut off")

    key = {"files": stamps(files), "camera": name, "resized": size is not None, **key}
    return cached_frames(key, (num, channels, h, w), write, name)


def cached_frames(
    key: Mapping[str, Any], shape: tuple[int, ...], write: Callable[[np.ndarray], None], name: str
) -> np.ndarray:
    """Images uint8 ``shape``, (N, C, H, W), mapped from a file of the cache folder that exists whole or not at all.

    ``key``, ready for JSON, identifies their source and size. Without a file ``write(frames)`` fills one; ``name`` is
    what it decodes, for a message. ``ValueError`` if there is no room.
    """
    text = json.dumps([CACHE_VERSION, shape, key], sort_keys=True)
    path = cache_folder() / "frames" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
    if not path.is_file():
        logger.info(f"frames   {name}: {shape[0]} images of {shape[2]}x{shape[3]}, decoded once into {path}")
        try:
            sweep(path.parent, idle=IDLE)  # of decodings that were killed
            with atomic_write(path) as part:
                require_room(part, math.prod(shape))
                frames = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
                write(frames)
                frames.flush()
                del frames
        except OSError as e:
            raise ValueError(f"{path}: cannot be written ({e.strerror}); set GENKIT_CACHE to a disk with room") from e
    try:
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as e:
        raise ValueError(f"{path}: cannot be read ({e}); remove it, and it is made again") from e
    if frames.shape != shape or frames.dtype != np.uint8:
        raise ValueError(f"{path}: holds {frames.shape}, not {shape}; remove it, and it is made again")
    return frames


def require_room(file: Path, size: int) -> None:
    """Raise ``OSError`` unless ``size`` bytes fit on the disk of a file to come: a process that writes to a mapped file
    of which a part has no room is killed."""
    if (free := shutil.disk_usage(file.parent).free) < size:
        raise OSError(errno.ENOSPC, f"needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def stamps(paths: Sequence[Path]) -> list[list[Any]]:
    """Name, size and time of change of files, by which they are known again."""
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
