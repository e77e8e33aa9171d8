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
from genkit.core.grids import GREY, add_footer, draw_groups, make_grid, to_pil

__all__ = [
    "draw_figure", "draw_figures", "draw_frames", "draw_pairs", "draw_samples", "make_grid", "plot_loss", "plot_points",
    "plot_signals", "save_gif", "save_image", "to_pil",
]  # fmt: skip

GIF_SIDE = 64  # of an image in an animation, which holds many pictures
MAX_LEGEND = 10  # classes in a legend: tab10 has ten colours


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


def plot_points(points: Tensor, cond: Mapping[str, Tensor], names: Sequence[str] = ()) -> Image.Image:
    """Plot the first two coordinates of points ``[N, D]``, coloured by class; a histogram if D = 1.

    ``names`` of at most ten classes are shown in a legend.
    """

    def draw(axes: Any) -> None:
        x = points.numpy()
        if x.shape[1] == 1:
            axes.hist(x[:, 0], bins=max(10, int(len(x) ** 0.5)))
            return
        colour = {"c": cond["label"].numpy(), "cmap": "tab10"} if "label" in cond else {}
        dots = axes.scatter(x[:, 0], x[:, 1], s=6, **colour)
        if colour and 2 <= int(cond["label"].max()) + 1 <= len(names) <= MAX_LEGEND:
            axes.legend(dots.legend_elements()[0], [names[int(i)] for i in cond["label"].unique()])
        axes.set_aspect("equal")
        axes.set_title(f"{len(x)} samples")

    return draw_figure(draw)


def plot_signals(signals: Tensor, cond: Mapping[str, Tensor], names: Sequence[str] = ()) -> Image.Image:
    """Plot up to 16 signals ``[N, C, T]`` above each other, with one colour per channel."""

    def draw(axes: Any) -> None:
        for i, signal in enumerate(signals[:16].numpy()):
            for c, line in enumerate(signal):
                axes.plot(line + 2.5 * i, color=f"C{c}", lw=1)
        axes.set_yticks([])

    return draw_figure(draw, (6, 8))


PLOTS: Mapping[int, Callable[..., Image.Image]] = {1: plot_points, 2: plot_signals, 3: draw_groups}
"""axes of one sample -> its picture"""


def draw_samples(x: Tensor, cond: Mapping[str, Tensor], names: Sequence[str] = (), **options: Any) -> Image.Image:
    """Draw decoded samples ``[N, *S]``: points, signals or images. ``names`` are those of the classes or prompts.

    ``options`` of a grid of images go to :func:`genkit.core.grids.make_grid`; other pictures have none.
    """
    return PLOTS[x.ndim - 1](x, cond, names, **(options if x.ndim == 4 else {}))


def draw_pairs(originals: Tensor, copies: Tensor) -> Image.Image:
    """Draw samples ``[N, *S]`` and their reconstructions: images below each other, others in two colours."""
    names = ("original", "reconstruction")
    if originals.ndim < 4:
        kind = torch.arange(2).repeat_interleave(len(originals))
        return draw_samples(torch.cat([originals, copies]), {"label": kind}, names)
    n, _, h, w = originals.shape
    columns = min(n, max(1, round((2 * n * h / w) ** 0.5)))
    columns = -(-n // -(-n // columns))  # rows of equal length
    rows = [x for i in range(0, n, columns) for x in (originals[i : i + columns], copies[i : i + columns])]
    full = torch.full((len(rows), columns, *originals.shape[1:]), GREY, dtype=originals.dtype)
    for row, x in zip(full, rows, strict=True):
        row[: len(x)] = x
    return make_grid(full.flatten(0, 1), columns, captions=names * (len(rows) // 2))


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


def draw_frames(frames: Sequence[Tensor], cond: Mapping[str, Tensor], names: Sequence[str] = ()) -> list[Image.Image]:
    """Pictures of the predictions ``[N, *S]`` after each step, numbered."""
    pictures = (draw_samples(x, cond, names, min_side=GIF_SIDE) for x in frames)
    return [add_footer(picture, f"step {i} of {len(frames)}") for i, picture in enumerate(pictures, 1)]


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int = 60) -> Path:
    """Write an endless GIF that pauses on its last frame."""
    durations = [milliseconds] * (len(frames) - 1) + [1500]
    return save_image(frames[0], path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)


def plot_loss(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write a plot of each phase's loss and of held-out losses (``val/...``, dashed) over the steps, on a log scale if
    all losses are positive."""

    def draw(axes: Any) -> None:
        keys = sorted({k for r in records for k in r if k.endswith("/loss")})
        for key in keys:
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                style = {"ls": "--", "marker": "o", "ms": 3} if key.startswith("val/") else {}
                axes.plot(*zip(*points, strict=True), label=key, lw=1, **style)
        if all(r[k] > 0 for r in records for k in keys if r.get(k) is not None):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend()

    return save_image(draw_figure(draw, (7, 4)), path)
