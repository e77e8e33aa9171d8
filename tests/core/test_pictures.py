"""Pictures of samples: grids of images, plots of signals and points."""

import numpy as np
import pytest
import torch

from genkit.core import pictures


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_images_become_a_grid(channels, mode):
    x = torch.zeros(5, channels, 32, 16, dtype=torch.uint8)
    x[3] = 200
    image = pictures.make_grid(x, columns=3)
    assert image.mode == mode
    a = np.asarray(image).reshape(image.height, image.width, -1)
    assert a.shape[:2] == (2 * (64 + 2) + 2, 3 * (32 + 2) + 2)
    assert (a[2 + 66 : 66 + 66, 2:34] == 200).all()  # sample 3 is first in the second row
    assert (a[2:66, 2:34] == 0).all()


def test_signals_and_numbers_are_plotted():
    assert pictures.draw_samples(torch.randn(3, 2, 12), {}).size[0] > 100
    assert pictures.draw_samples(torch.randn(30, 1), {}).size[0] > 100


def test_more_than_four_channels_are_refused():
    with pytest.raises(ValueError, match="1 to 4 channels"):
        pictures.make_grid(torch.zeros(1, 5, 4, 4, dtype=torch.uint8))
