"""Data: sources, codecs, and the order in which training sees them."""

from __future__ import annotations

import torch

from genkit.codecs import Pixels
from genkit.core import Batch


def test_every_pixel_value_comes_back():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = Pixels().encode(Batch(values)).x
    assert x.min() == -1
    assert x.max() == 1
    assert torch.equal(Pixels().decode(x), values)
    assert torch.equal(Pixels().decode(torch.tensor([-3.0, 9.0])), torch.tensor([0, 255], dtype=torch.uint8))
