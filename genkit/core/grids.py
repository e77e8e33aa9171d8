"""Grids of images: their layout, enlargement of small images, headings of columns and captions of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_SIDE = 96  # smaller images are enlarged to at least this many pixels, by an integer factor
GAP = 3  # pixels between images, grey
GREY = 128
TEXT_SIZE = 15
MAX_GROUPS = 16  # classes or prompts that get columns of their own


# ------------------------------------------------------------------------------------------------------- layout
def group_columns(num: int, each: int, aspect: float = 1.0) -> int:
    """How many columns each of ``num`` groups of ``each`` images gets, so that the grid is about square.

    ``aspect`` is the height of an image divided by its width. Full last rows are preferred.
    """

    def cost(columns: int) -> float:
        rows = -(-each // columns)
        empty = rows * columns - each
        return abs(math.log(num * columns / (rows * aspect))) + 2 * empty / each

    return min(range(1, each + 1), key=cost)


def full_grid_size(num: int, about: int, aspect: float = 1.0) -> int:
    """The number of samples near ``about`` whose grid is about square with a full last row.

    ``num`` groups (classes or prompts) come in turn; 1 if there are none, or too many for columns of their own.
    """
    num = num if num <= MAX_GROUPS else 1

    def cost(shape: tuple[int, int]) -> float:
        columns, rows = num * shape[0], shape[1]
        return abs(math.log(columns / (rows * aspect))) + abs(math.log(columns * rows / about))

    columns, rows = min(((c, r) for c in range(1, about + 1) for r in range(1, about + 1)), key=cost)
    return num * columns * rows


def count_cycle(cond: Mapping[str, Tensor]) -> int | None:
    """The number of classes or prompts if 2 to 16 of them repeat in a cycle, else None."""
    label, words = cond.get("label"), cond.get("text")
    if label is not None and len(label) > 1:
        num = len(label.unique())
        in_turn = 2 <= num <= MAX_GROUPS and bool((label == label[torch.arange(len(label)) % num]).all())
        return num if in_turn else None
    if words is None or len(words) < 2:
        return None
    num = len(words.unique(dim=0))
    in_turn = 2 <= num <= MAX_GROUPS and bool((words == words[torch.arange(len(words)) % num]).all())
    return num if in_turn else None


# ------------------------------------------------------------------------------------------------------- drawing
def to_pil(array: np.ndarray) -> Image.Image:
    """Convert uint8 ``[H, W, C]`` to a PIL image. Raises ``ValueError`` unless C is 1 to 4."""
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(array.shape[2])
    if mode is None:
        raise ValueError(f"a picture has 1 to 4 channels; given {array.shape[2]}; try --format npz")
    return Image.fromarray(array[..., 0] if mode == "L" else array)


def make_grid(
    images: Tensor,
    columns: int | None = None,
    *,
    headings: Sequence[str] = (),
    captions: Sequence[str] = (),
    min_side: int = MIN_SIDE,
) -> Image.Image:
    """Arrange uint8 images ``[N, C, H, W]`` in a grid, row by row; C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA.

    Images smaller than ``min_side`` are enlarged by an integer factor (bicubic), and thin grey lines separate them.
    ``columns`` None makes the grid about square. ``headings`` are texts above equally many columns each, ``captions``
    texts to the left of the rows. Raises ``ValueError`` for more than 4 channels.
    """
    n, c, h, w = images.shape
    columns = columns or max(1, round((n * h / w) ** 0.5))
    scale = max(1, -(-min_side // max(h, w)))
    rows, high, wide = -(-n // columns), h * scale + GAP, w * scale + GAP
    sheet = to_pil(np.full((rows * high + GAP, columns * wide + GAP, c), GREY, np.uint8))
    for i, array in enumerate(images.permute(0, 2, 3, 1).numpy()):
        r, k = divmod(i, columns)
        tile = to_pil(array)
        tile = tile if scale == 1 else tile.resize((w * scale, h * scale), Image.Resampling.BICUBIC)
        sheet.paste(tile, (GAP + k * wide, GAP + r * high))
    return add_texts(sheet, headings, captions, wide * columns // max(1, len(headings)), high)


def draw_groups(x: Tensor, cond: Mapping[str, Tensor], names: Sequence[str] = (), **options: Any) -> Image.Image:
    """A grid of images ``[N, C, H, W]``; those of classes or prompts in turn have columns of their own.

    ``names``, of all classes or of the prompts, are their headings; without them classes have their numbers.
    ``options`` go to :func:`make_grid`.
    """
    num, (n, _, h, w) = count_cycle(cond), x.shape
    if num is None:
        return make_grid(x, **options)
    each = -(-n // num)
    columns = group_columns(num, each, h / w)
    rows = -(-each // columns)
    places = [(k % num) * columns + (k // num) % columns + (k // num // columns) * num * columns for k in range(n)]
    sheet = torch.full((rows * num * columns, *x.shape[1:]), GREY, dtype=x.dtype)
    sheet[torch.tensor(places)] = x
    if (label := cond.get("label")) is not None:
        headings = [names[int(i)] if i < len(names) else str(i) for i in label[:num].tolist()]
    else:
        headings = list(names[:num]) if len(names) >= num else []
    return make_grid(sheet, num * columns, headings=headings, **options)


# --------------------------------------------------------------------------------------------------------- texts
@cache
def text_font() -> Any:
    """DejaVu Sans, which matplotlib brings; Pillow's own font has Latin letters only."""
    import matplotlib  # lazy: slow to import

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), TEXT_SIZE) if file.is_file() else ImageFont.load_default(TEXT_SIZE)


def fit_text(text: str, width: int) -> str:
    """``text`` in one line, cut off to at most ``width`` pixels."""
    text, font = " ".join(text.split()), text_font()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…" if text else ""


def add_texts(
    sheet: Image.Image, headings: Sequence[str], captions: Sequence[str], heading_width: int, row_height: int
) -> Image.Image:
    """``sheet`` with headings above columns of ``heading_width`` pixels, and captions left of the rows."""
    if not headings and not captions:
        return sheet
    font, line = text_font(), TEXT_SIZE + 8
    left = max((int(font.getlength(text)) + 16 for text in captions), default=0)
    top = line if headings else 0
    colour = sheet.convert("RGBA" if "A" in sheet.getbands() else "RGB" if sheet.mode == "RGB" else "L")
    out = Image.new(colour.mode, (sheet.width + left, sheet.height + top), "white")
    out.paste(colour, (left, top))
    draw = ImageDraw.Draw(out)
    for i, text in enumerate(headings):
        middle = left + GAP // 2 + heading_width * i + heading_width // 2
        draw.text((middle, top // 2), fit_text(text, heading_width - 4), "black", font, anchor="mm")
    for i, text in enumerate(captions):
        draw.text((left - 8, top + GAP + row_height * i + row_height // 2), text, "black", font, anchor="rm")
    return out


def add_footer(image: Image.Image, text: str) -> Image.Image:
    """``image`` with a line of text below it."""
    out = Image.new(image.mode, (image.width, image.height + TEXT_SIZE + 8), "white")
    out.paste(image, (0, 0))
    draw = ImageDraw.Draw(out)
    draw.text((image.width // 2, image.height + TEXT_SIZE // 2 + 4), text, "black", text_font(), anchor="mm")
    return out
