"""Codecs: numbers come back, are stored as JSON, and refuse what does not fit."""

from __future__ import annotations

import json

import pytest
import torch

from genkit.core import Batch
from genkit.data.codecs import CODECS, Actions, Identity, MinMax, Pixels, Plans, Standardize, from_dict, to_dict
from tests.support.data import refuses


def test_every_pixel_value_comes_back():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = Pixels().encode(Batch(values)).x
    assert x.dtype == torch.float32
    assert x.min() == -1
    assert x.max() == 1
    assert torch.equal(Pixels().decode(x), values)
    assert torch.equal(Pixels().decode(torch.tensor([-3.0, 9.0])), torch.tensor([0, 255], dtype=torch.uint8))
    assert Pixels().decode(torch.tensor([0.999], dtype=torch.bfloat16)) == 255  # rounds in float32, not in bfloat16


@pytest.mark.parametrize("shape", [(50, 3), (50, 3, 7)])
def test_affine_codecs_bring_numbers_to_order_one_and_back(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1e-3, 50.0, 0]).reshape(1, 3, *(1,) * (len(shape) - 2)) + 0.1
    x = x.float()
    low_high, mean_std = MinMax.fit(x), Standardize.fit(x)
    y, z = low_high.encode(Batch(x)).x, mean_std.encode(Batch(x)).x
    moving = y.movedim(1, 0)[:2].flatten(1)
    assert torch.allclose(moving.amin(1), torch.tensor(-1.0))
    assert torch.allclose(moving.amax(1), torch.tensor(1.0))
    z_dims = z.movedim(1, 0).flatten(1)
    assert torch.allclose(z_dims.mean(1), torch.zeros(3), atol=1e-4)
    assert torch.allclose(z_dims.std(1, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-4)
    assert torch.allclose(low_high.decode(y), x, atol=1e-4, rtol=1e-5)
    assert torch.allclose(mean_std.decode(z), x, atol=1e-4, rtol=1e-5)
    wild = mean_std.decode(torch.full_like(z, 7.0))
    assert torch.equal(wild[:, 2], x[:, 2])  # a constant stays, whatever the model predicts
    assert torch.equal(low_high.decode(torch.full_like(z, 7.0))[:, 2], x[:, 2])
    tenths = torch.full((7, 1), 0.1, dtype=torch.float64)
    assert tenths.std(0, correction=0) > 0  # rounding; dividing by it would explode
    assert Standardize.fit(tenths) == Standardize((0.1,), (0.0,))
    with refuses("3 dimensions", "(2, 4)"):
        mean_std.encode(Batch(torch.zeros(2, 4)))


def test_codecs_are_stored_as_json():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    codecs = [Pixels(), Identity(), MinMax.fit(x), Standardize.fit(x), Actions((1.0, 2.0), (3.0, 4.0), (0.0, 1.0)),
              Plans((1.0, 2.0), (3.0, 4.0), (1.0,))]  # fmt: skip
    assert {to_dict(c)["name"] for c in codecs} == set(CODECS)
    for codec in codecs:
        assert from_dict(json.loads(json.dumps(to_dict(codec)))) == codec
    with refuses("'pixel'", "pixels, identity"):
        from_dict({"name": "pixel"})
    with refuses("min-max", "low"):
        from_dict({"name": "min-max", "low": [0]})
