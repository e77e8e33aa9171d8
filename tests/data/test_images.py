"""Images: decoding, the standard data sets and their options."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.core import Draw, Label, Spec
from genkit.data import DATA
from genkit.data.images import to_pixels
from tests.support.data import chw, make_zip, picture, refuses


# -------------------------------------------------------------------------------------------------------- digits
def test_digits_are_split_by_class_and_keep_their_labels():
    from sklearn.datasets import load_digits

    train, test = DATA["digits"]().load(), DATA["digits"]().load("test")
    names = tuple("0123456789")
    assert train.spec == test.spec == Spec((1, 8, 8), {"label": Label(10, names)})
    assert train.x.dtype == torch.uint8
    assert train.x.max() == 255
    assert not train.flip
    every = load_digits()
    per_class = np.bincount(every.target)
    assert torch.bincount(test.cond["label"]).tolist() == [round(n / 5) for n in per_class]
    assert len(train) + len(test) == 1797

    def keys(pixels, labels):
        return sorted((bytes(p), int(c)) for p, c in zip(pixels, labels, strict=True))

    both = keys([*train.x.numpy(), *test.x.numpy()], [*train.cond["label"], *test.cond["label"]])
    assert both == keys(np.round(every.images * 255 / 16).astype(np.uint8), every.target)  # hence disjoint
    assert torch.equal(test.x, DATA["digits"]().load("test").x)
    with refuses("split"):
        DATA["digits"]().load("dev")


def test_digits_take_the_options_of_images():
    data = DATA["digits"](size=(16, 12), channels=3, flip=True).load()
    assert data.spec.shape == (3, 16, 12)
    assert torch.equal(data.x[:, 0], data.x[:, 2])
    assert data.flip


# ------------------------------------------------------------------------------------------------------ decoding
@pytest.mark.parametrize(
    ("mode", "pixels", "expected"),
    [
        ("L", np.array([[0, 200]], np.uint8), [[[0, 200]]]),
        ("1", np.array([[0, 255]], np.uint8), [[[0, 255]]]),
        ("RGB", np.array([[[1, 2, 3]]], np.uint8), [[[1]], [[2]], [[3]]]),
        ("RGBA", np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8), [[[10, 255]], [[20, 255]], [[30, 255]]]),
        ("LA", np.array([[[10, 255], [10, 0]]], np.uint8), [[[10, 255]]]),
        ("P", np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), [[[255, 0]], [[0, 0]], [[0, 255]]]),
        ("I;16", np.array([[0, 257, 32896, 65535]], np.uint16), [[[0, 1, 128, 255]]]),
    ],
)
def test_modes_become_eight_bits_grey_or_colour(mode, pixels, expected, tmp_path):
    given = Image.fromarray(pixels)
    given = given.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else given
    given = given.convert("1") if mode == "1" else given
    assert given.mode == mode
    given.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert to_pixels(stored).tolist() == expected
    data = DATA["folder"](root=str(tmp_path)).load()
    assert data.x[0].tolist() == expected
    for channels in (1, 3):
        assert DATA["folder"](root=str(tmp_path), channels=channels).load().spec.shape[0] == channels


def test_floats_are_refused(tmp_path):
    Image.fromarray(np.array([[0.5]], np.float32)).save(tmp_path / "a.tif")
    with refuses(tmp_path / "a.tif", "floats"):
        DATA["folder"](root=str(tmp_path)).load()


def test_a_crop_is_centred_keeps_the_aspect_and_is_antialiased():
    wide = picture(0, 4, 9)
    assert np.array_equal(to_pixels(Image.fromarray(wide), 4), wide[:, 2:6].transpose(2, 0, 1))
    assert np.array_equal(to_pixels(Image.fromarray(wide), (4, 9)), wide.transpose(2, 0, 1))
    tall = picture(0, 12, 4)
    assert np.array_equal(to_pixels(Image.fromarray(tall), 4), tall[4:8].transpose(2, 0, 1))
    fine = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255
    small = to_pixels(Image.fromarray(fine), 16)
    assert small.shape == (1, 16, 16)
    assert abs(small.astype(int) - 127).max() <= 12  # nearest or bilinear without antialiasing gives 0 and 255
    halves = np.repeat(np.array([[0, 100, 100, 100, 100, 0]], np.uint8), 4, axis=0)
    assert (to_pixels(Image.fromarray(halves), 2) == 100).all()  # the 4x4 in the middle
    assert to_pixels(Image.fromarray(wide), (8, 16)).shape == (3, 8, 16)


def test_the_orientation_of_the_camera_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise
    flat = picture(1, 2, 3)
    Image.fromarray(flat).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(DATA["folder"](root=str(tmp_path)).load().x[0], chw(np.rot90(flat, -1)))


# ------------------------------------------------------------------------------------------------------ classics
def write_idx(path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(folder, train: int = 6, test: int = 4) -> np.ndarray:
    pixels = np.stack([picture(i, 28, 28, 1) for i in range(train + test)])
    for prefix, rows in (("train", slice(train)), ("t10k", slice(train, None))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", pixels[rows])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(train + test, dtype=np.uint8)[rows] % 10)
    return pixels


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_in_the_layout_of_torchvision(name, folder, tmp_path):
    raw = tmp_path / folder / "raw"
    pixels = write_mnist(raw)
    train, test = DATA[name](root=str(tmp_path)).load(), DATA[name](root=str(tmp_path)).load("test")
    assert torch.equal(train.x, torch.from_numpy(pixels[:6, None]))
    assert torch.equal(test.x, torch.from_numpy(pixels[6:, None]))
    assert train.cond["label"].tolist() == list(range(6))
    assert test.cond["label"].tolist() == [6, 7, 8, 9]
    assert train.spec.shape == (1, 28, 28)
    assert train.spec.cond["label"].num == 10
    assert train.spec.cond["label"].names[5] == {"mnist": "5", "fashion-mnist": "Sandal"}[name]
    assert not train.flip
    assert DATA[name](root=str(tmp_path), size=32).load().spec.shape == (1, 32, 32)
    with refuses("split"):
        DATA[name](root=str(tmp_path)).load("dev")
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-9])
    with refuses(folder, tmp_path, "cannot be read"):
        DATA[name](root=str(tmp_path)).load()
    write_idx(images, pixels[:5])
    with refuses(folder, "5 images and 6 labels"):
        DATA[name](root=str(tmp_path)).load()


def test_cifar10_as_zips(tmp_path):
    for split, n in (("train", 3), ("test", 2)):
        (tmp_path / "cifar10").mkdir(exist_ok=True)
        pictures = {f"{i}.png": picture(i, 32, 32) for i in range(n)}
        make_zip(tmp_path / "cifar10" / f"{split}.zip", pictures, [[f"{i}.png", i + 5] for i in range(n)])
    train, test = (DATA["cifar10"](root=str(tmp_path)).load(split) for split in ("train", "test"))
    assert train.spec == test.spec
    assert train.spec.shape == (3, 32, 32)
    assert train.spec.cond["label"].num == 10
    assert train.spec.cond["label"].names[5] == "dog"
    assert train.cond["label"].tolist() == [5, 6, 7]
    assert train.flip
    assert not DATA["cifar10"](root=str(tmp_path), flip=False).load().flip


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_without_a_network_a_missing_data_set_names_its_place(name, tmp_path, monkeypatch):
    import urllib.error
    import urllib.request

    def offline(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with refuses(tmp_path, "no network here", "--data.root", "/raw/" if "mnist" in name else "cifar-10-batches-py"):
        DATA[name](root=str(tmp_path)).load()


@pytest.mark.skipif("GENKIT_ASSETS" not in os.environ, reason="GENKIT_ASSETS names no directory with real data")
def test_the_real_mnist():
    train, test = (DATA["mnist"](root=os.environ["GENKIT_ASSETS"]).load(split) for split in ("train", "test"))
    assert torch.bincount(train.cond["label"]).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert len(test) == 10_000
    assert abs(train.x.float().mean() / 255 - 0.1307) < 1e-4


def test_an_alpha_channel_may_be_the_weight_of_each_pixel(tmp_path):
    """Colours are as stored, below alpha 0 too; crop, size and mirror are those of the picture."""
    grey = np.arange(8, dtype=np.uint8)[None].repeat(4, 0) * 30
    alpha = np.zeros((4, 8), dtype=np.uint8)
    alpha[:, 2:4], alpha[:, 4] = 255, 51
    Image.fromarray(np.stack([grey, grey, grey, alpha], 2), "RGBA").save(tmp_path / "a.png")
    Image.fromarray(np.stack([grey, grey, grey], 2), "RGB").save(tmp_path / "b.png")
    for memory in (0.0, 1.0):
        data = DATA["folder"](root=str(tmp_path), alpha="weight", size=(4, 4), memory=memory, flip=True).load()
        assert data.spec.shape == (3, 4, 4)
        batches = [data.batch(torch.tensor([0, 1]), Draw((key,), 0, 2)) for key in range(8)]
        mirrored = {bool(batch.x[0, 0, 0, 0] > batch.x[0, 0, 0, 3]) for batch in batches}
        assert mirrored == {True, False}
        for batch in batches:
            straight = batch if batch.x[0, 0, 0, 0] < batch.x[0, 0, 0, 3] else None
            weight = batch.place_weight[0, 0, 0] if straight else batch.place_weight[0, 0, 0].flip(0)
            torch.testing.assert_close(weight, torch.tensor([1.0, 1.0, 0.2, 0.0]))
            assert sorted(batch.x[0, 0, 0].tolist()) == [60, 90, 120, 150]
            assert bool((batch.place_weight[1] == 1).all())
    white = DATA["folder"](root=str(tmp_path), size=(4, 4)).load().batch(torch.tensor([0]), Draw((0,), 0, 1))
    assert white.place_weight is None
    assert white.x[0, 0, 0].tolist() == [60, 90, 228, 255]
