"""Pictures of samples and losses: images become a grid, points a scatter plot, signals a sheet of curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from genkit.core.files import MARK, atomic_write

MIN_SIDE = 64  # smaller images are enlarged to about this many pixels, by an integer factor


def make_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Arrange uint8 images ``[N, C, H, W]`` in a grid, row by row; C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA.

    Small images are enlarged by an integer factor, and thin grey lines separate them. ``columns`` None makes the grid
    about square. Raises ``ValueError`` for more than 4 channels.
    """
    n, c, h, w = images.shape
    columns = columns or max(1, round((n * h / w) ** 0.5))
    scale, gap = max(1, MIN_SIDE // max(h, w)), max(1, MIN_SIDE // 32)
    rows, high, wide = -(-n // columns), h * scale + gap, w * scale + gap
    sheet = np.full((rows * high + gap, columns * wide + gap, c), 128, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        r, k = divmod(i, columns)
        tile = image.repeat(scale, 0).repeat(scale, 1)
        sheet[gap + r * high : (r + 1) * high, gap + k * wide : (k + 1) * wide] = tile
    return to_pil(sheet)


def to_pil(array: np.ndarray) -> Image.Image:
    """Convert uint8 ``[H, W, C]`` to a PIL image. Raises ``ValueError`` unless C is 1 to 4."""
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(array.shape[2])
    if mode is None:
        raise ValueError(f"a picture has 1 to 4 channels; given {array.shape[2]}; try --format npz")
    return Image.fromarray(array[..., 0] if mode == "L" else array)


def draw_figure(draw: Callable[[Any], None], size: tuple[float, float] = (5, 5)) -> Image.Image:
    """Render what ``draw(axes)`` plots; ``size`` in inches of 100 pixels."""
    return draw_figures(lambda axes: draw(axes[0, 0]), (1, 1), size)


def draw_figures(
    draw: Callable[[Any], None], shape: tuple[int, int], size: tuple[float, float], **options: Any
) -> Image.Image:
    """Render what ``draw(axes [rows, columns])`` plots; ``options`` go to matplotlib's ``subplots``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # lazy: slow to import
    from matplotlib.figure import Figure

    fig = Figure(figsize=size, dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(fig)
    draw(fig.subplots(*shape, squeeze=False, **options))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def plot_points(points: Tensor, cond: Mapping[str, Tensor]) -> Image.Image:
    """Plot the first two coordinates of points ``[N, D]``, coloured by class; a histogram if D = 1."""

    def draw(axes: Any) -> None:
        x = points.numpy()
        if x.shape[1] == 1:
            axes.hist(x[:, 0], bins=max(10, int(len(x) ** 0.5)))
            return
        colour = {"c": cond["label"].numpy(), "cmap": "tab10"} if "label" in cond else {}
        axes.scatter(x[:, 0], x[:, 1], s=6, **colour)
        axes.set_aspect("equal")
        axes.set_title(f"{len(x)} samples")

    return draw_figure(draw)


def plot_signals(signals: Tensor, cond: Mapping[str, Tensor]) -> Image.Image:
    """Plot up to 16 signals ``[N, C, T]`` above each other, with one colour per channel."""

    def draw(axes: Any) -> None:
        for i, signal in enumerate(signals[:16].numpy()):
            for c, line in enumerate(signal):
                axes.plot(line + 2.5 * i, color=f"C{c}", lw=1)
        axes.set_yticks([])

    return draw_figure(draw, (6, 8))


def detect_cycle(cond: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes or prompts if 2 to 16 of them repeat in a cycle, one grid column each; else None."""
    label, words = cond.get("label"), cond.get("text")
    if label is not None and len(label) > 1:
        num = int(label.max()) + 1
        return num if 2 <= num <= 16 and bool((label == torch.arange(len(label)) % num).all()) else None
    if words is None or len(words) < 2:
        return None
    num = len(words.unique(dim=0))
    return num if 2 <= num <= 16 and bool((words == words[torch.arange(len(words)) % num]).all()) else None


PLOTS: Mapping[int, Callable[..., Image.Image]] = {  # axes of one sample -> its picture
    1: plot_points,
    2: plot_signals,
    3: lambda x, cond: make_grid(x, detect_cycle(cond)),
}


def draw_samples(x: Tensor, cond: Mapping[str, Tensor]) -> Image.Image:
    """Draw decoded samples ``[N, *S]``: points, signals or images."""
    return PLOTS[x.ndim - 1](x, cond)


def save_image(image: Image.Image, path: Path, **options: Any) -> Path:
    """Write an image atomically; ``options`` go to PIL. Raises ``ValueError`` for a suffix of no image format."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: given {path.suffix or 'no suffix'}; allowed: the suffix of an image; try .png")
    with atomic_write(path) as part:
        image.save(part, format=kind, **mark_options(kind), **options)
    return path


def mark_options(kind: str) -> dict[str, Any]:
    """Options of PIL with which an image says that genkit wrote it; empty for formats that have no place for that."""
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("Software", MARK)
        return {"pnginfo": info}
    return {"comment": MARK.encode()} if kind in ("GIF", "JPEG") else {}


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int = 60) -> Path:
    """Write an endless GIF that pauses on its last frame."""
    durations = [milliseconds] * (len(frames) - 1) + [1500]
    return save_image(frames[0], path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)


def plot_loss(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write a plot of each phase's loss over the steps, on a log scale if all losses are positive."""

    def draw(axes: Any) -> None:
        keys = sorted({k for r in records for k in r if k.endswith("/loss")})
        for key in keys:
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=key, lw=1)
        if all(r[k] > 0 for r in records for k in keys if r.get(k) is not None):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend()

    return save_image(draw_figure(draw, (7, 4)), path)
