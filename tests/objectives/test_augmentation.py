"""EDM's augmentation: transforms against closed forms and torchvision, and labels that are 0 when samples are drawn."""

import math

import pytest
import torch

from genkit.backbones import UNet
from genkit.core import Batch, Draw, Image, Label, Scalar, Spec
from genkit.objectives import OBJECTIVES
from genkit.objectives.matching.augmentation import (
    INPUTS,
    NAMES,
    SCALE,
    SHIFT,
    augment_batch,
    augment_inputs,
    draw_numbers,
    matrix_of,
    transform,
)
from genkit.training.run import load_run
from genkit.training.train import train

EDM = OBJECTIVES["edm"]


def numbers(**given):
    """The nine numbers of one picture, by name; ``angle`` is a rotation."""
    angle = given.pop("angle", 0.0)
    values = {"cos": math.cos(angle) - 1, "sin": math.sin(angle), **given}
    return torch.tensor([[values.get(name, 0.0) for name in NAMES]])


def moved(x, **given):
    return transform(x, matrix_of(numbers(**given)))


@pytest.fixture
def x():
    return torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, lambda x: x),
        ({"flip_x": 1.0}, lambda x: x.flip(-1)),
        ({"flip_y": 1.0}, lambda x: x.flip(-2)),
        ({"flip_x": 1.0, "flip_y": 1.0}, lambda x: torch.rot90(x, 2, (-2, -1))),
        ({"angle": math.pi / 2}, lambda x: torch.rot90(x, -1, (-2, -1))),  # clockwise, as y points down
        ({"angle": -math.pi / 2}, lambda x: torch.rot90(x, 1, (-2, -1))),
        ({"angle": math.pi}, lambda x: torch.rot90(x, 2, (-2, -1))),
        ({"flip_x": 1.0, "angle": math.pi / 2}, lambda x: torch.rot90(x.flip(-1), -1, (-2, -1))),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_transforms_without_interpolation_are_exact(x, given, expected):
    torch.testing.assert_close(moved(x, **given), expected(x), rtol=0, atol=2e-5)


def test_shifts_are_eighths_of_the_width_and_mirrored_outside(x):
    """One standard deviation is 1/8 of 8 pixels: one pixel to the right, or down."""
    right, down = moved(x, shift_x=1.0), moved(x, shift_y=2.0)
    torch.testing.assert_close(right[..., 1:], x[..., :-1], rtol=0, atol=2e-5)
    torch.testing.assert_close(right[..., 0], x[..., 0], rtol=0, atol=2e-5)
    torch.testing.assert_close(down[..., 2:, :], x[..., :-2, :], rtol=0, atol=2e-5)
    torch.testing.assert_close(down[..., :2, :], x[..., :2, :].flip(-2), rtol=0, atol=2e-5)
    assert SHIFT == 1 / 8


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"angle": 0.4}, {"angle": math.degrees(0.4)}),
        ({"angle": -1.1, "scale": 1.5}, {"angle": math.degrees(-1.1), "scale": SCALE**1.5}),
        (
            {"angle": 2.0, "scale": -0.5, "shift_x": 0.5},
            {"angle": math.degrees(2.0), "scale": SCALE**-0.5, "translate": [1, 0]},
        ),
    ],
    ids=str,
)
def test_affine_maps_agree_with_torchvision(given, options):
    """On the inner part of a picture, where no border matters; the whole number of pixels is 16 / 8 * 0.5 = 1."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    x[..., :4, :] = x[..., -4:, :] = x[..., :4] = x[..., -4:] = 0
    expected = functional.affine(
        x, **{"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], **options},
        interpolation=functional.InterpolationMode.BILINEAR,
    )  # fmt: skip
    found = transform(x, matrix_of(numbers(**given)), mode="bilinear")
    torch.testing.assert_close(found[..., 3:-3, 3:-3], expected[..., 3:-3, 3:-3], rtol=1e-3, atol=1e-4)


def test_stretching_keeps_areas_and_is_along_its_direction():
    direction, amount = 0.7, 1.3
    matrix = matrix_of(numbers(stretch_cos=amount * math.cos(direction), stretch_sin=amount * math.sin(direction)))[0]
    along = torch.tensor([math.cos(direction), math.sin(direction), 0.0])
    across = torch.tensor([-math.sin(direction), math.cos(direction), 0.0])
    torch.testing.assert_close(matrix @ along, SCALE**amount * along)
    torch.testing.assert_close(matrix @ across, SCALE**-amount * across)


def test_frequencies_are_those_of_the_paper():
    batch = Batch(torch.zeros(20_000, 1, 2, 2), draw=Draw((0,), 0, 20_000))
    drawn = draw_numbers(batch, 0.12)
    shares = (drawn != 0).float().mean(0)
    expected = {"flip_x": 0.5, "flip_y": 0.06}
    torch.testing.assert_close(shares, torch.tensor([expected.get(name, 0.12) for name in NAMES]), rtol=0, atol=0.012)
    assert float(drawn[drawn[:, 2] != 0, 2].std()) == pytest.approx(1, abs=0.05)
    assert bool(((drawn[:, 3] + 1) ** 2 + drawn[:, 4] ** 2 - 1).abs().max() < 1e-5)  # a rotation
    # without any, half of the pictures are mirrored, and the others are as they were, to the last bit
    plain = draw_numbers(batch, 0.0)
    assert int((plain[:, 1:] != 0).sum()) == 0


def test_a_batch_keeps_what_is_not_transformed():
    x = torch.randn(64, 1, 8, 8)
    batch = augment_batch(Batch(x, {"label": torch.arange(64)}, draw=Draw((1,), 0, 64)), 0.0)
    flipped = batch.cond["augment_flip_x"] == 1
    assert 0 < int(flipped.sum()) < 64
    assert torch.equal(batch.x[~flipped], x[~flipped])
    torch.testing.assert_close(batch.x[flipped], x[flipped].flip(-1), rtol=0, atol=1e-5)
    assert list(batch.cond) == ["label", *INPUTS]
    assert torch.equal(batch.cond["label"], torch.arange(64))


def test_samples_are_drawn_as_if_nothing_was_transformed(tmp_path):
    """Absent numbers are zeros: the network is the same for both, and other numbers change it."""
    run = train(
        objective={"name": "edm", "augment": 0.5}, data="digits", backbone={"width": 8, "mults": [1]}, steps=6, lr=1e-2,
        batch=16, workers=0, sample_every=0, tensorboard=False, out=str(tmp_path), device="cpu", val_every=6, val_n=16,
    )  # fmt: skip
    run = load_run(run.directory, ema="none")
    spec = Spec((1, 8, 8), {"label": Label(10)})
    assert run.spec.cond.keys() == spec.cond.keys()  # it is no condition of the data
    net, x, label = run.nets["net"], torch.randn(3, 1, 8, 8), torch.zeros(3)
    cond = {"label": torch.arange(3)}
    zeros = {name: torch.zeros(3) for name in INPUTS}
    with torch.no_grad():
        y = net(x, label, cond)
        torch.testing.assert_close(net(x, label, {**cond, **zeros}), y, rtol=0, atol=0)
        for name in INPUTS:
            assert (net(x, label, {**cond, **zeros, name: torch.ones(3)}) - y).abs().amax() > 1e-6, name
    assert run.sample(4, steps=2).x.shape == (4, 1, 8, 8)


def test_validation_is_of_the_pictures_themselves():
    spec = Spec((1, 8, 8))
    objective, plain = EDM(augment=0.5, sigma_data=0.5), EDM(sigma_data=0.5)
    torch.manual_seed(0)
    nets = objective.networks(UNet(width=8, mults=(1,)), spec)
    for p in nets["net"].parameters():
        torch.nn.init.normal_(p, std=0.1)
    batch = Batch(torch.rand(8, 1, 8, 8), draw=Draw((0,), 0, 8))
    again = Batch(batch.x, draw=Draw((0,), 0, 8))
    assert torch.equal(objective.validate(nets, batch)["loss"], plain.validate(nets, again)["loss"])


def test_what_cannot_be_turned_is_refused():
    with pytest.raises(
        ValueError, match=r"augment: turns square pictures \(C, H, H\), and samples are \(2,\); leave it"
    ):
        augment_inputs(Spec((2,)))
    with pytest.raises(ValueError, match=r"samples are \(1, 4, 6\)"):
        EDM(augment=0.1).networks(UNet(width=8), Spec((1, 4, 6)))
    with pytest.raises(ValueError, match=r"condition 'image' is a picture"):
        augment_inputs(Spec((1, 4, 4), {"image": Image(1)}))
    assert set(augment_inputs(Spec((1, 4, 4))).values()) == {Scalar()}
