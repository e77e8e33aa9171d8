"""Pictures of samples: grids of images, plots of signals and points."""

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.core import grids, pictures
from genkit.core.grids import (
    GAP,
    MIN_SIDE,
    count_cycle,
    draw_groups,
    fit_text,
    full_grid_size,
    group_columns,
    text_font,
)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_images_become_a_grid(channels, mode):
    x = torch.zeros(5, channels, 32, 16, dtype=torch.uint8)
    x[3] = 200
    image = pictures.make_grid(x, columns=3)
    assert image.mode == mode
    a = np.asarray(image).reshape(image.height, image.width, -1)
    high, wide = MIN_SIDE + GAP, MIN_SIDE // 2 + GAP
    assert a.shape[:2] == (2 * high + GAP, 3 * wide + GAP)
    assert (a[GAP + high : 2 * high, GAP:wide] == 200).all()  # sample 3 is first in the second row
    assert (a[GAP:high, GAP:wide] == 0).all()


@pytest.mark.parametrize("side", [1, 8, 28, 32, 64, 95, 96, 300])
def test_small_images_are_enlarged_smoothly_by_an_integer_and_large_ones_are_not(side):
    image = torch.arange(side * side).reshape(1, 1, side, side).remainder(256).byte()
    grid = pictures.make_grid(image)
    factor = (grid.width - 2 * GAP) // side
    assert grid.width == factor * side + 2 * GAP
    assert factor == 1 if side >= MIN_SIDE else factor * side >= MIN_SIDE > (factor - 1) * side
    if side == 8:  # between two pixels lie their means, not an edge
        row = np.asarray(grid)[GAP + factor // 2, GAP : GAP + 8 * factor].astype(int)
        assert np.abs(np.diff(row)).max() < 8


@pytest.mark.parametrize("num", range(1, 17))
@pytest.mark.parametrize("each", [1, 3, 4, 8, 27, 64])
def test_a_grid_of_any_number_of_classes_is_about_square(num, each):
    columns = group_columns(num, each)
    rows = -(-each // columns)
    best = min(abs(np.log(num * c / -(-each // c))) for c in range(1, each + 1))
    assert abs(np.log(num * columns / rows)) <= best + np.log(2)


@pytest.mark.parametrize("num", [1, 2, 3, 5, 7, 10, 16, 17, 1000])
@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.0])
def test_the_usual_number_of_samples_fills_its_last_row(num, aspect):
    n = full_grid_size(num, 64, aspect)
    groups = num if num <= 16 else 1
    columns = group_columns(groups, n // groups, aspect) * groups
    assert n % columns == 0
    assert 40 <= n <= 100
    ratio = columns / (n // columns * aspect)
    assert 1 / 3 < ratio < 3 or 10 < num <= 16  # each of many classes has a column
    assert full_grid_size(10, 80) == 80


def test_each_class_has_columns_of_its_own_under_its_name():
    """Classes in turn, each of one grey value: below a heading there is that value only."""
    num, each = 3, 27
    label = torch.arange(num * each) % num
    x = (80 * label[:, None, None, None] + 10).byte().expand(-1, 1, 8, 8)
    grid = draw_groups(x, {"label": label}, ("circle", "square", "triangle"))
    a = np.asarray(grid.convert("L")).astype(int)
    top = grid.height - 9 * (MIN_SIDE + GAP) - GAP
    assert 0.8 < grid.width / grid.height < 1.25
    assert top > 0
    assert (a[:top] < 100).any()  # the headings
    third = (grid.width - GAP) // 3
    for k in range(3):
        tiles = a[top + GAP :, GAP + k * third : (k + 1) * third]
        assert set(np.unique(tiles)) <= {80 * k + 10, 128}


def test_names_of_classes_may_be_long_and_of_any_script():
    for names in (("круг", "квадрат"), ("a" * 300, "b")):
        label = torch.arange(8) % 2
        assert draw_groups(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), {"label": label}, names).width > 100
    assert text_font().getlength(fit_text("a" * 300, 90)) <= 90
    assert fit_text("circle", 90) == "circle"


def test_rows_have_captions():
    plain = pictures.make_grid(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), 3)
    captioned = pictures.make_grid(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), 3, captions=("heun", "ddim"))
    assert captioned.height == plain.height
    left = captioned.width - plain.width
    a = np.asarray(captioned)[:, :left]
    for half in (a[: len(a) // 2], a[len(a) // 2 :]):
        assert half.min() < 100 < half.max()


def test_reconstructions_lie_below_their_originals():
    x = torch.full((7, 1, 8, 8), 40, dtype=torch.uint8)
    image = pictures.draw_pairs(x, x + 100)
    plain = np.asarray(image)[:, -(MIN_SIDE // 2) :]
    rows = [int(np.median(plain[GAP + i * (MIN_SIDE + GAP) + 40])) for i in range(image.height // (MIN_SIDE + GAP))]
    assert rows[:2] == [40, 140]
    points = pictures.draw_pairs(torch.randn(7, 2), torch.randn(7, 2))
    assert points.size[0] > 100


def test_frames_are_numbered_and_slow_enough_to_see(tmp_path):
    frames = pictures.draw_frames([torch.zeros(4, 1, 8, 8, dtype=torch.uint8)] * 3, {})
    assert frames[0].tobytes() != frames[1].tobytes()
    gif = Image.open(pictures.save_gif(frames, tmp_path / "a.gif", 150))
    assert (gif.n_frames, gif.info["duration"]) == (3, 150)


def test_cycles_of_classes_and_prompts():
    assert count_cycle({"label": torch.tensor([0, 1, 2, 0])}) == 3
    assert count_cycle({"label": torch.tensor([0, 0, 1, 1])}) is None
    assert count_cycle({"label": torch.arange(40) % 20}) is None
    assert count_cycle({}) is None
    assert count_cycle({"label": torch.tensor([3, 1, 3, 1, 3])}) == 2  # classes that were asked for, in turn


def test_columns_are_headed_by_their_own_classes(monkeypatch):
    headings = []
    monkeypatch.setattr(grids, "make_grid", lambda *args, **options: headings.append(options["headings"]))
    x = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    grids.draw_groups(x, {"label": torch.tensor([3, 1] * 3)}, ("a", "b", "c", "d"))
    grids.draw_groups(x, {"label": torch.tensor([0, 2] * 3)})
    assert headings == [["d", "b"], ["0", "2"]]


def test_signals_and_numbers_are_plotted():
    assert pictures.draw_samples(torch.randn(3, 2, 12), {}).size[0] > 100
    assert pictures.draw_samples(torch.randn(30, 1), {}).size[0] > 100
    label = torch.arange(30) % 2
    plain = pictures.draw_samples(torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), {"label": label})
    named = pictures.draw_samples(
        torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), {"label": label}, ("up", "down")
    )
    assert plain.tobytes() != named.tobytes()  # a legend


def test_more_than_four_channels_are_refused():
    with pytest.raises(ValueError, match="1 to 4 channels"):
        pictures.make_grid(torch.zeros(1, 5, 4, 4, dtype=torch.uint8))
