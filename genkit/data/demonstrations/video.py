"""Frames of videos, decoded by PyAV (``pip install 'genkit-torch[video]'``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from genkit.core.files import format_error

INSTALL = "pip install 'genkit-torch[video]'"


class Clip(NamedTuple):
    """The part of a video that belongs to an episode."""

    path: Path
    start: float
    """time of its first frame in the file, in seconds"""
    length: int
    """number of frames"""
    row: int
    """row of its first frame among the frames of all episodes"""


def import_av() -> Any:
    """PyAV. ``ValueError`` if it is not installed."""
    try:
        import av  # lazy: optional
    except ImportError:
        raise ValueError(f"video: decoding needs PyAV; install it: {INSTALL}") from None
    return av


def video_frames(path: Path) -> Iterator[tuple[float, np.ndarray]]:
    """Time in seconds and RGB image uint8 ``[H, W, 3]`` of all frames of a video, in order.

    ``ValueError`` if PyAV is missing, or the file cannot be decoded or has a damaged frame.
    """
    av = import_av()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if frame.is_corrupt:  # the decoder would fill it, and those that follow, from their neighbours
                    raise OSError(f"the frame at {frame.time} s is damaged")
                yield float(frame.time), frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, OSError, IndexError, TypeError) as e:
        raise ValueError(f"{path}: cannot be decoded (truncated?): {format_error(e)[:120]}") from e


def clip_frames(path: Path, clips: list[Clip], fps: float) -> Iterator[tuple[int, np.ndarray]]:
    """The row and the image of every frame of a file that belongs to one of its ``clips``, in order of time.

    Each step has the frame whose time is nearest, at most half a step away. ``ValueError`` if a step has none.
    """
    found = [np.zeros(clip.length, bool) for clip in clips]
    for (k, step), _, image in nearest_frames(path, clips, fps):
        if 0 <= step < clips[k].length:
            found[k][step] = True
            yield clips[k].row + step, image
    for clip, seen in zip(clips, found, strict=True):
        if not seen.all():
            raise ValueError(
                f"{path}: has {int(seen.sum())} of {clip.length} frames from {clip.start:g} s on, at {fps:g} frames a "
                f"second; the first that is missing is number {int(seen.argmin())}"
            )


def nearest_frames(path: Path, clips: list[Clip], fps: float) -> Iterator[tuple[tuple[int, int], float, np.ndarray]]:
    """``((clip, step), distance in steps, image)`` of the frame nearest to each step, in order of time.

    A step may be before or after its clip. A video of twice the rate has two frames for each step.
    """
    order = np.argsort([clip.start for clip in clips], kind="stable")
    starts = np.array([clip.start for clip in clips])[order]
    best: tuple[tuple[int, int], float, np.ndarray] | None = None
    for time, image in video_frames(path):
        i = max(0, int(np.searchsorted(starts, time + 0.5 / fps, "right")) - 1)
        step = (time - starts[i]) * fps
        frame = (int(order[i]), round(step)), abs(step - round(step)), image
        if best is not None and best[0] != frame[0]:
            yield best
        elif best is not None and best[1] <= frame[1]:
            continue
        best = frame
    if best is not None:
        yield best


def first_shape(path: Path) -> tuple[int, int]:
    """Height and width of a video."""
    _, image = next(video_frames(path), (0.0, None))
    if image is None:
        raise ValueError(f"{path}: has no frames")
    return image.shape[0], image.shape[1]
