"""Pictures of samples, and of a run's loss. Images become a grid, points a scatter plot, signals a sheet of curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genkit.core.files import atomic_write

SIDE = 64  # smaller images are enlarged to about this many pixels, by whole numbers


def mosaic(images: Tensor, columns: int | None = None) -> Image.Image:
    """uint8 ``[N, C, H, W]`` as one picture, row by row; C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA.

    Small images are enlarged by whole numbers; a thin line parts them.
    """
    n, c, h, w = images.shape
    columns = columns or max(1, round((n * h / w) ** 0.5))
    scale, gap = max(1, SIDE // max(h, w)), max(1, SIDE // 32)
    rows, high, wide = -(-n // columns), h * scale + gap, w * scale + gap
    sheet = np.full((rows * high + gap, columns * wide + gap, c), 128, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        r, k = divmod(i, columns)
        tile = image.repeat(scale, 0).repeat(scale, 1)
        sheet[gap + r * high : (r + 1) * high, gap + k * wide : (k + 1) * wide] = tile
    return pil(sheet)


def pil(array: np.ndarray) -> Image.Image:
    """uint8 ``[H, W, C]`` as a PIL image."""
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(array.shape[2])
    if mode is None:
        raise ValueError(f"a picture has 1 to 4 channels; given {array.shape[2]}; take --format npz")
    return Image.fromarray(array[..., 0] if mode == "L" else array)


def figure(draw: Callable[[Any], None], size: tuple[float, float] = (5, 5)) -> Image.Image:
    """What ``draw(axes)`` plots, as a PIL image."""
    return figures(lambda axes: draw(axes[0, 0]), (1, 1), size)


def figures(draw: Callable[[Any], None], shape: tuple[int, int], size: tuple[float, float], **how: Any) -> Image.Image:
    """What ``draw(axes [rows, columns])`` plots, as a PIL image; ``how`` goes to matplotlib's ``subplots``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=size, dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(fig)
    draw(fig.subplots(*shape, squeeze=False, **how))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def scatter(points: Tensor, cond: Mapping[str, Tensor]) -> Image.Image:
    """Points ``[N, D]``: their first two coordinates, coloured by class; a histogram where D = 1."""

    def draw(axes: Any) -> None:
        x = points.numpy()
        if x.shape[1] == 1:
            axes.hist(x[:, 0], bins=max(10, int(len(x) ** 0.5)))
            return
        colour = {"c": cond["label"].numpy(), "cmap": "tab10"} if "label" in cond else {}
        axes.scatter(x[:, 0], x[:, 1], s=6, **colour)
        axes.set_aspect("equal")
        axes.set_title(f"{len(x)} samples")

    return figure(draw)


def curves(signals: Tensor, cond: Mapping[str, Tensor]) -> Image.Image:
    """Signals ``[N, C, T]``, at most 16 of them, a colour a channel."""

    def draw(axes: Any) -> None:
        for i, signal in enumerate(signals[:16].numpy()):
            for c, line in enumerate(signal):
                axes.plot(line + 2.5 * i, color=f"C{c}", lw=1)
        axes.set_yticks([])

    return figure(draw, (6, 8))


def in_turn(cond: Mapping[str, Tensor]) -> int | None:
    """How many classes, or prompts, come in turn, so that each gets a column; None where not, or too many."""
    label, words = cond.get("label"), cond.get("text")
    if label is not None and len(label) > 1:
        num = int(label.max()) + 1
        return num if 2 <= num <= 16 and bool((label == torch.arange(len(label)) % num).all()) else None
    if words is None or len(words) < 2:
        return None
    num = len(words.unique(dim=0))
    return num if 2 <= num <= 16 and bool((words == words[torch.arange(len(words)) % num]).all()) else None


PICTURES: Mapping[int, Callable[..., Image.Image]] = {
    1: scatter,
    2: curves,
    3: lambda x, cond: mosaic(x, in_turn(cond)),
}


def picture(x: Tensor, cond: Mapping[str, Tensor]) -> Image.Image:
    """The picture of decoded samples ``[N, *S]``."""
    return PICTURES[x.ndim - 1](x, cond)


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    """Write a picture so that no half of it can be left behind. ``ValueError`` for an ending that is no picture's."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: {path.suffix or 'no ending'} is not a picture's; take .png")
    with atomic_write(path) as part:
        image.save(part, format=kind, **options)
    return path


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int = 60) -> Path:
    """An endless GIF that rests on its last frame."""
    lasting = [milliseconds] * (len(frames) - 1) + [1500]
    return save(frames[0], path, save_all=True, append_images=list(frames[1:]), duration=lasting, loop=0)


def loss_plot(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """``loss.png``: every phase's loss against the step, on a log scale where all are positive."""

    def draw(axes: Any) -> None:
        keys = sorted({k for r in records for k in r if k.endswith("/loss")})
        for key in keys:
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            axes.plot(*zip(*points, strict=True), label=key, lw=1) if points else None
        if all(r[k] > 0 for r in records for k in keys if r.get(k) is not None):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend()

    return save(figure(draw, (7, 4)), path)
