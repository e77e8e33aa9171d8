"""Toy shapes: centred, of unit variance, exact without noise."""

from __future__ import annotations

from math import pi, sqrt

import pytest
import torch

from genkit.core import Label
from genkit.data import DATA
from genkit.data.codecs import Identity
from tests.support.data import TOYS, refuses


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_centred_and_of_unit_variance(name):
    config = DATA[name](n=20_000)
    data = config.load()
    assert len(data) == 20_000
    assert data.x.dtype == torch.float32
    assert data.spec.shape == (2,)
    assert data.codec == Identity()
    assert data.x.mean(0).abs().max() < 0.03
    assert abs(data.x.var(0).mean() - 1 - config.noise**2) < 0.03
    assert torch.equal(data.x, config.load("train").x)
    assert not torch.equal(data.x, config.load("test").x)
    assert not torch.equal(data.x, DATA[name](n=20_000, seed=1).load().x)
    classes = {"moons": 2, "rotated-moons": 2, "8gaussians": 8, "spirals": 2}.get(name)
    assert data.spec.cond == ({"label": Label(classes)} if classes else {})
    if classes:
        share = torch.bincount(data.cond["label"], minlength=classes) / len(data)
        assert (share - 1 / classes).abs().max() < 0.02
    with refuses("'validation'", "train, test"):
        config.load("validation")


def test_eight_gaussians_are_labelled_by_the_nearest_centre():
    data = DATA["8gaussians"](n=5_000, noise=0.1).load()
    angle = torch.arange(8) * pi / 4
    centres = sqrt(2) * torch.stack([angle.cos(), angle.sin()], dim=1)
    assert torch.equal(torch.cdist(data.x, centres).argmin(1), data.cond["label"])
    assert abs((data.x - centres[data.cond["label"]]).std() - 0.1) < 0.005


def test_toy_shapes_without_noise_are_exact():
    raw = lambda name, **k: (d := DATA[name](n=2_000, noise=0.0, **k).load(), d.x * DATA[name].scale)  # noqa: E731
    data, x = raw("moons")
    x = x + torch.tensor(DATA["moons"].mean)
    upper = data.cond["label"] == 0
    assert torch.allclose(x[upper].norm(dim=1), torch.tensor(1.0), atol=1e-4)
    assert x[upper, 1].min() > -1e-4
    assert torch.allclose((x[~upper] - torch.tensor([1, 0.5])).norm(dim=1), torch.tensor(1.0), atol=1e-4)
    assert x[~upper, 1].max() < 0.5 + 1e-4

    quarter, _ = raw("rotated-moons", angle=90.0)
    assert torch.allclose(quarter.x, torch.stack([-data.x[:, 1], data.x[:, 0]], dim=1), atol=1e-5)
    assert torch.equal(quarter.cond["label"], data.cond["label"])

    _, x = raw("checkerboard")
    square = x.floor().long()
    assert (square.sum(1) % 2 == 0).all()
    assert len(torch.unique(square, dim=0)) == 8
    assert square.min() == -2
    assert square.max() == 1

    _, x = raw("swissroll")
    x = x + torch.tensor(DATA["swissroll"].mean)
    angle = x.norm(dim=1)
    assert torch.allclose(x, angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1), atol=2e-3)
    assert angle.min() > 1.5 * pi - 0.01
    assert angle.max() < 4.5 * pi + 0.01

    data, x = raw("spirals")
    r = x.norm(dim=1)
    angle = 3 * pi * r + pi * data.cond["label"]
    assert torch.allclose(x, r[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1), atol=1e-4)
