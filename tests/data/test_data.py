"""Data: codecs, sources, their refusals, and the order in which training sees the samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from itertools import pairwise
from math import pi, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from genkit.core import Batch, Draw, Label, Spec
from genkit.data import DATA, InMemory, OnDisk, Stream, source
from genkit.data.codecs import CODECS, Actions, Identity, MinMax, Pixels, Plans, Standardize, from_dict, to_dict
from genkit.data.images import pixels_of

TOYS = ["moons", "rotated-moons", "8gaussians", "checkerboard", "swissroll", "spirals"]


class refuses:  # reads as pytest.raises does
    """A ``ValueError`` in one line that says all of ``words``."""

    def __init__(self, *words: object):
        self.words = [str(w) for w in words]

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> bool:
        assert error is not None, "nothing was refused"
        if not isinstance(error, ValueError):
            return False
        assert "\n" not in str(error)
        for word in self.words:
            assert word in str(error), f"{word!r} is not in: {error}"
        return True


def noise_of(n: int) -> Draw:
    return Draw((0,), 0, n)


def everything(data) -> Batch:
    return data.batch(torch.arange(len(data)), noise_of(len(data)))


def picture(seed: int, h: int = 4, w: int = 4, c: int = 3) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, c), dtype=np.uint8)
    return pixels[..., 0] if c == 1 else pixels


def save(path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1).copy())


# --------------------------------------------------------------------------------------------------- codecs
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
    assert torch.equal(wild[:, 2], x[:, 2])  # a constant stays what it is, whatever a model says
    assert torch.equal(low_high.decode(torch.full_like(z, 7.0))[:, 2], x[:, 2])
    tenths = torch.full((7, 1), 0.1, dtype=torch.float64)
    assert tenths.std(0, correction=0) > 0  # rounding; to divide by it would blow up
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


# ----------------------------------------------------------------------------------------------------- toys
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


# --------------------------------------------------------------------------------------------------- digits
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


def test_digits_take_the_options_of_pictures():
    data = DATA["digits"](size=(16, 12), channels=3, flip=True).load()
    assert data.spec.shape == (3, 16, 12)
    assert torch.equal(data.x[:, 0], data.x[:, 2])
    assert data.flip


# ------------------------------------------------------------------------------------------------- decoding
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
        assert pixels_of(stored).tolist() == expected
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
    assert np.array_equal(pixels_of(Image.fromarray(wide), 4), wide[:, 2:6].transpose(2, 0, 1))
    assert np.array_equal(pixels_of(Image.fromarray(wide), (4, 9)), wide.transpose(2, 0, 1))
    tall = picture(0, 12, 4)
    assert np.array_equal(pixels_of(Image.fromarray(tall), 4), tall[4:8].transpose(2, 0, 1))
    fine = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255
    small = pixels_of(Image.fromarray(fine), 16)
    assert small.shape == (1, 16, 16)
    assert abs(small.astype(int) - 127).max() <= 12  # nearest or bilinear without antialiasing gives 0 and 255
    halves = np.repeat(np.array([[0, 100, 100, 100, 100, 0]], np.uint8), 4, axis=0)
    assert (pixels_of(Image.fromarray(halves), 2) == 100).all()  # the 4x4 in the middle
    assert pixels_of(Image.fromarray(wide), (8, 16)).shape == (3, 8, 16)


def test_the_camera_s_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    flat = picture(1, 2, 3)
    Image.fromarray(flat).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(DATA["folder"](root=str(tmp_path)).load().x[0], chw(np.rot90(flat, -1)))


# -------------------------------------------------------------------------------------------------- folders
def test_sub_folders_are_classes(tmp_path):
    for i, name in enumerate(["dog/b.png", "cat/z.png", "cat/deep/a.png", "dog/.hidden.png", ".git/c.png"]):
        save(tmp_path / name, picture(i))
    (tmp_path / "bird").mkdir()  # empty: a class that has no samples
    save(tmp_path.with_name(tmp_path.name + "-elsewhere") / "c.png", picture(9))
    (tmp_path / "elk").symlink_to(tmp_path.with_name(tmp_path.name + "-elsewhere"))
    (tmp_path / "dog" / "notes.txt").write_text("not a picture")
    data = DATA["folder"](root=str(tmp_path)).load()
    assert data.spec == Spec((3, 4, 4), {"label": Label(4, ("bird", "cat", "dog", "elk"))})
    assert data.cond["label"].tolist() == [1, 1, 2, 3]
    assert torch.equal(data.x, torch.stack([chw(picture(i)) for i in (2, 1, 0, 9)]))  # sorted by path
    assert data.codec == Pixels()
    assert DATA["folder"](root=str(tmp_path), labels=False).load().spec == Spec((3, 4, 4))


def test_a_flat_folder_is_searched_to_the_bottom_and_has_no_classes(tmp_path):
    for i, name in enumerate(["b.png", "a/c.png", "a/deep/d.PNG", "e/f.png"]):
        save(tmp_path / name, picture(i, c=1))
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    data = DATA["folder"](root=str(tmp_path)).load()
    assert data.spec == Spec((1, 4, 4))
    assert torch.equal(data.x, torch.stack([chw(picture(i, c=1)) for i in (1, 2, 0, 3)]))


def test_one_sub_folder_is_no_class(tmp_path):
    save(tmp_path / "all" / "a.png", picture(0))
    assert DATA["folder"](root=str(tmp_path)).load().spec == Spec((3, 4, 4))


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_folder_s_test_split_has_the_classes_of_train(held_out, tmp_path):
    for i, name in enumerate(["train/a/0.png", "train/b/1.png", f"{held_out}/b/2.png"]):
        save(tmp_path / name, picture(i))
    for root in (tmp_path, tmp_path / "train"):
        train, test = (DATA["folder"](root=str(root)).load(s) for s in ("train", "test"))
        assert train.cond["label"].tolist() == [0, 1]
        assert test.cond["label"].tolist() == [1]
        assert train.spec == test.spec
        assert torch.equal(test.x[0], chw(picture(2)))
    save(tmp_path / held_out / "c" / "3.png", picture(3))
    with refuses(tmp_path / held_out / "c" / "3.png", "classes of"):
        DATA["folder"](root=str(tmp_path)).load("test")


def test_pictures_that_do_not_fit_are_read_when_they_are_asked_for(tmp_path):
    for i in range(6):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", picture(i))
    config = {"root": str(tmp_path), "flip": True, "size": 3}
    held, disk = DATA["folder"](**config).load(), DATA["folder"](**config, memory=0).load()
    assert isinstance(held, InMemory)
    assert isinstance(disk, OnDisk)
    assert held.spec == disk.spec
    assert len(held) == len(disk) == 6
    indices = torch.tensor([5, 0, 3, 3])
    one, other = held.batch(indices, noise_of(4)), disk.batch(indices, noise_of(4))
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.cond["label"], other.cond["label"])
    assert isinstance(DATA["folder"](**config, memory=6 * 27 / 2**30).load(), InMemory)
    assert isinstance(DATA["folder"](**config, memory=6 * 26 / 2**30).load(), OnDisk)


@pytest.mark.parametrize("memory", [0, 1])
def test_a_folder_s_faults_are_named(memory, tmp_path):
    def load(**options):
        data = DATA["folder"](root=str(tmp_path), memory=memory, **options).load()
        return data, everything(data)

    with refuses(tmp_path / "nowhere", "--data.root"):
        DATA["folder"](root=str(tmp_path / "nowhere")).load()
    with refuses(tmp_path, "no pictures"):
        load()
    save(tmp_path / "a.png", picture(0, 4, 6))
    with refuses(tmp_path / "a.png", "is not a folder"):
        DATA["folder"](root=str(tmp_path / "a.png")).load()
    with refuses(tmp_path, "no test split", "train"):
        DATA["folder"](root=str(tmp_path)).load("test")
    save(tmp_path / "b.png", picture(1, 8, 4))
    with refuses(tmp_path / "b.png", "8x4", tmp_path / "a.png", "4x6", "--data.size=4"):
        load()
    assert load(size=4)[0].spec.shape == (3, 4, 4)
    save(tmp_path / "b.png", picture(1, 4, 6, 1))
    with refuses(tmp_path / "b.png", "grey", tmp_path / "a.png", "colour", "--data.channels"):
        load()
    assert load(channels=1)[0].spec.shape == (1, 4, 6)
    save(tmp_path / "b.png", picture(1, 40, 60))
    whole = (tmp_path / "b.png").read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:20], b"", b"\x89PNG no", whole[:400] + b"?" * 50 + whole[450:]):
        (tmp_path / "b.png").write_bytes(broken)
        with refuses(tmp_path / "b.png"):
            load(size=4)


# ----------------------------------------------------------------------------------------------------- zips
def make_zip(path, pictures: dict[str, np.ndarray], labels: object = ...) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, pixels in pictures.items():
            with archive.open(name, "w") as f:
                Image.fromarray(pixels).save(f, "png")
        if labels is not ...:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return str(path)


def test_a_zip_with_and_without_classes(tmp_path):
    pictures = {f"0000{i % 2}/img{i}.png": picture(i) for i in range(3)}
    labels = [["00000/img2.png", 5], ["00001\\img1.png", 0], ["00000/img0.png", 2]]
    labelled = make_zip(tmp_path / "labelled.zip", pictures, labels)
    data = DATA["zip"](root=labelled).load()
    assert data.spec == Spec((3, 4, 4), {"label": Label(6)})
    assert data.cond["label"].tolist() == [2, 5, 0]
    assert torch.equal(data.x, torch.stack([chw(picture(i)) for i in (0, 2, 1)]))
    assert DATA["zip"](root=labelled, labels=False).load().spec == Spec((3, 4, 4))
    for root in (make_zip(tmp_path / "null.zip", pictures, None), make_zip(tmp_path / "none.zip", pictures)):
        assert DATA["zip"](root=root).load().spec == Spec((3, 4, 4))
    disk = DATA["zip"](root=labelled, memory=0).load()
    assert torch.equal(everything(disk).x, data.x)


def test_a_zip_s_test_split_lies_beside_it(tmp_path):
    make_zip(tmp_path / "train.zip", {"a.png": picture(0), "b.png": picture(1)}, [["a.png", 0], ["b.png", 4]])
    make_zip(tmp_path / "test.zip", {"c.png": picture(2)}, [["c.png", 1]])
    for root in (tmp_path, tmp_path / "train.zip"):
        assert DATA["zip"](root=str(root)).load().spec == DATA["zip"](root=str(root)).load("test").spec
    make_zip(tmp_path / "test.zip", {"c.png": picture(2)}, [["c.png", 5]])
    with refuses(tmp_path / "test.zip", "class 5", "0..4"):
        DATA["zip"](root=str(tmp_path)).load("test")
    with refuses("test split", tmp_path / "test.zip"):
        DATA["zip"](root=str(tmp_path / "test.zip")).load("test")


def test_a_zip_s_faults_are_named(tmp_path):
    path = tmp_path / "a.zip"

    def load(root=path):
        return DATA["zip"](root=str(root)).load()

    with refuses(tmp_path, "train.zip"):
        load(tmp_path)
    path.write_bytes(b"not a zip")
    with refuses(path, "zip"):
        load()
    make_zip(path, {}, [])
    with refuses(path, "no pictures"):
        load()
    both = {"a.png": picture(0), "b.png": picture(1)}
    faults = [
        ([["a.png", 0]], "b.png"),
        ([["a.png", 0], ["b.png", 1], ["c.png", 1]], "c.png"),
        ([["a.png", 0], ["b.png", 1], ["b.png", 2]], "twice"),
        ([["a.png", 0], ["b.png", -1]], "-1"),
        ([["a.png", 0], ["b.png", 1.5]], "1.5"),
        ([["a.png", 0], ["b.png", [0.1, 0.2]]], "integer"),
        ([["a.png"], ["b.png"]], "class"),
        ([[1, 0], [2, 1]], "class"),
        (3, "class"),
    ]
    for labels, word in faults:
        make_zip(path, both, labels)
        with refuses(path / "dataset.json", word):
            load()
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("c.png", b"\x89PNG no")
    with refuses(path / "dataset.json"):
        load()
    make_zip(path, both)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("c.png", b"\x89PNG no")
    with refuses(path / "c.png"):
        load()
    make_zip(path, both)
    blob = path.read_bytes()
    at = blob.index(b"IDAT") + 6
    path.write_bytes(blob[:at] + bytes([blob[at] ^ 255]) + blob[at + 1 :])  # its checksum is now wrong
    with refuses(path / "a.png"):
        load()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"")
        archive.writestr("dataset.json", "{")
    with refuses(path / "dataset.json"):
        load()


def test_nothing_leaves_an_archive(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    make_zip(inside / "a.zip", {"../evil.png": picture(0), "/abs.png": picture(1)})
    assert len(DATA["zip"](root=str(inside / "a.zip")).load()) == 1  # a hidden name is none of the pictures
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.zip", "in"]


# --------------------------------------------------------------------------------------------------- arrays
@pytest.mark.parametrize(("x", "y"), [("arr_0", "arr_1"), ("x", "y")])
def test_npz_pictures(x, y, tmp_path):
    pixels = np.stack([picture(i, 4, 6) for i in range(5)])
    np.savez(tmp_path / "a.npz", **{x: pixels, y: np.arange(5)})
    data = DATA["npz"](root=str(tmp_path / "a.npz")).load()
    assert data.spec == Spec((3, 4, 6), {"label": Label(5)})
    assert torch.equal(data.x, torch.from_numpy(pixels).movedim(-1, 1))
    assert data.cond["label"].tolist() == list(range(5))
    assert data.codec == Pixels()
    assert DATA["npz"](root=str(tmp_path / "a.npz"), size=2, channels=1).load().spec.shape == (1, 2, 2)
    assert DATA["npz"](root=str(tmp_path / "a.npz"), labels=False).load().spec == Spec((3, 4, 6))
    np.savez(tmp_path / "b.npz", **{x: pixels[..., 0]})
    assert DATA["npz"](root=str(tmp_path / "b.npz")).load().spec == Spec((1, 4, 6))


def test_npz_numbers_are_standardized_by_the_training_split(tmp_path):
    rng = np.random.default_rng(0)
    train, test = rng.normal([3, -40], [0.1, 20], (500, 2)), rng.normal([3, -40], [0.1, 20], (7, 2))
    np.savez(tmp_path / "train.npz", x=train, y=np.arange(500) % 3)
    np.savez(tmp_path / "test.npz", x=test, y=np.zeros(7, np.uint8))
    data, held_out = DATA["npz"](root=str(tmp_path)).load(), DATA["npz"](root=str(tmp_path)).load("test")
    assert data.spec == held_out.spec == Spec((2,), {"label": Label(3)})
    assert data.codec == held_out.codec == Standardize.fit(torch.from_numpy(train).float())
    assert torch.allclose(held_out.x, torch.from_numpy(test).float())
    assert isinstance(DATA["npz"](root=str(tmp_path), codec="min-max").load().codec, MinMax)
    assert DATA["npz"](root=str(tmp_path), codec="identity").load().codec == Identity()
    np.savez(tmp_path / "chunks.npz", x=np.zeros((3, 2, 16), np.float32))
    assert DATA["npz"](root=str(tmp_path / "chunks.npz")).load().spec == Spec((2, 16))


class Evil:
    def __reduce__(self):
        return os.abort, ()


def test_an_npz_s_faults_are_named(tmp_path):
    path = tmp_path / "a.npz"
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    faults = [
        ({"x": np.array([Evil(), 1], object)}, "pickle"),
        ({"x": pixels, "y": np.array([Evil(), 1, 2], object)}, "pickle"),
        ({"images": pixels}, "images"),
        ({}, "nothing"),
        ({"x": np.zeros((3, 4, 4, 4), np.uint8)}, "[3, 4, 4, 4]"),
        ({"x": np.zeros((3, 4, 4, 3), np.float32)}, "float32 [3, 4, 4, 3]"),
        ({"x": np.zeros((3, 4), np.int64)}, "int64"),
        ({"x": np.zeros((0, 4), np.float32)}, "[0, 4]"),
        ({"x": np.zeros(4, np.float32)}, "[4]"),
        ({"x": np.array([[0.0], [np.nan], [np.inf]])}, "2 rows hold NaN or infinity, the first at 1"),
        ({"x": pixels, "y": np.arange(4)}, "[3] integers"),
        ({"x": pixels, "y": np.arange(3.0)}, "float64"),
        ({"x": pixels, "y": np.array([0, -1, 2])}, "integers from 0"),
    ]
    for arrays, word in faults:
        np.savez(path, **arrays)
        with refuses(path, word):
            DATA["npz"](root=str(path)).load()
    np.savez(path, x=np.zeros((3, 2)))
    for options in ({"flip": True}, {"size": 4}, {"channels": 1}):
        with refuses(path, "numbers"):
            DATA["npz"](root=str(path), **options).load()
    np.savez(path, x=pixels)
    with refuses(path, "min-max"):
        DATA["npz"](root=str(path), codec="min-max").load()
    with refuses("no test split"):
        DATA["npz"](root=str(path)).load("test")
    path.write_bytes(path.read_bytes()[:60])
    with refuses(path):
        DATA["npz"](root=str(path)).load()
    path.write_bytes(b"no")
    with refuses(path):
        DATA["npz"](root=str(path)).load()
    with refuses(tmp_path / "b.npz"):
        DATA["npz"](root=str(tmp_path / "b.npz")).load()


# ------------------------------------------------------------------------------------------------- classics
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
    with refuses(folder, "5 pictures and 6 labels"):
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
def test_without_a_network_a_classic_says_where_it_was_looked_for(name, tmp_path, monkeypatch):
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


# -------------------------------------------------------------------------------------------------- holding
def test_the_registry_is_complete_and_every_offline_source_loads():
    offline = [*TOYS, "digits"]
    pictures = {"mnist", "fashion-mnist", "cifar10", "folder", "zip", "npz"}
    assert set(DATA) == {*offline, *pictures, "pairs", "latents", "four-ways", "pusht", "replay", "minari", "lerobot"}
    for name in offline:
        data = DATA[name]().load()
        batch = data.batch(torch.tensor([3, 0, 3]), noise_of(3))
        assert batch.x.shape == (3, *data.spec.shape)
        assert torch.equal(batch.x[0], data.x[3])
        data.spec.check(batch.cond, 3)
        encoded = data.codec.encode(batch)
        assert encoded.x.dtype == torch.float32
        assert torch.equal(data.codec.decode(encoded.x), batch.x)


def test_names_and_paths(tmp_path):
    assert source("digits") == ("digits", {})
    save(tmp_path / "pictures" / "a.png", picture(0))
    make_zip(tmp_path / "a.zip", {"a.png": picture(0)})
    np.savez(tmp_path / "train.npz", x=np.zeros((2, 2)))
    assert source(str(tmp_path / "pictures")) == ("folder", {"root": str(tmp_path / "pictures")})
    assert source(str(tmp_path / "a.zip")) == ("zip", {"root": str(tmp_path / "a.zip")})
    assert source(str(tmp_path / "train.npz")) == ("npz", {"root": str(tmp_path / "train.npz")})
    assert source(str(tmp_path)) == ("npz", {"root": str(tmp_path)})
    for path in ("pictures", "a.zip"):
        name, fields = source(str(tmp_path / path))
        assert len(DATA[name](**fields).load()) == 1
    with refuses("'digit'", "digits", "folder"):
        source("digit")
    with refuses(tmp_path / "b.zip"):
        source(str(tmp_path / "b.zip"))


def test_samples_that_do_not_fit_their_spec_are_refused():
    x = torch.zeros(4, 3)
    with refuses("(3,)", "(2,)"):
        InMemory(x, {}, Spec((2,)), Identity())
    with refuses("0..1"):
        InMemory(x, {"label": torch.tensor([0, 1, 2, 0])}, Spec((3,), {"label": Label(2)}), Identity())
    with refuses("flip"):
        InMemory(x, {}, Spec((3,)), Identity(), flip=True)


def test_importing_the_data_room_imports_no_reader():
    heavy = "{'torchvision', 'sklearn', 'PIL', 'rich', 'scipy'}"
    code = f"import sys, genkit.data; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------------------------------- stream
def numbered(n: int, flip: bool = True) -> InMemory:
    """Sample i is a picture [1, 1, 2] of i and 255 - i: it tells who it is, and whether it was mirrored."""
    i = torch.arange(n, dtype=torch.uint8)
    x = torch.stack([i, 255 - i], dim=1).reshape(n, 1, 1, 2)
    return InMemory(x, {"label": torch.arange(n)}, Spec((1, 1, 2), {"label": Label(n)}), Pixels(), flip)


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> OnDisk:
    root = tmp_path_factory.mktemp("pictures")
    for i in range(11):
        save(root / "ab"[i % 2] / f"{i:02}.png", picture(i))
    return DATA["folder"](root=str(root), memory=0, flip=True).load()


@st.composite
def cuts(draw) -> tuple[int, list[int]]:
    size = draw(st.integers(1, 40))
    return size, [0, *sorted(draw(st.sets(st.integers(1, size - 1))) if size > 1 else []), size]


@given(cuts(), st.integers(1, 50), st.integers(0, 2**63), st.integers(0, 10**6), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_batch_is_the_same_however_it_is_cut(cut, n, seed, step, draw):
    size, edges = cut
    data = numbered(n)
    whole = Stream(data, size, seed)(step, draw, 0, size)
    parts = [Stream(data, size, seed)(step, draw, a, b) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat([p.x for p in parts]), whole.x)  # the samples and their flips
    assert torch.equal(torch.cat([p.cond["label"] for p in parts]), whole.cond["label"])
    assert torch.equal(torch.cat([p.draw.normal(3) for p in parts]), whole.draw.normal(3))  # and the loss's numbers,
    assert torch.equal(torch.cat([p.draw.uniform() for p in parts]), whole.draw.uniform())  # one after the other
    assert (whole.x.flatten(1).amin(1) == whole.cond["label"]).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_epoch_shows_every_sample_once(n, size, seed, draw):
    stream = Stream(numbered(n), size, seed)
    steps = -(-3 * n // size)
    seen = torch.cat([stream(s, draw, 0, size).cond["label"] for s in range(steps)])
    for epoch in range(3):
        assert sorted(seen[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_orders_differ_between_epochs_draws_and_seeds():
    n = 30
    first = Stream(numbered(n), n, 0)
    batches = [first(0, 0, 0, n), first(1, 0, 0, n), first(0, 1, 0, n), Stream(numbered(n), n, 1)(0, 0, 0, n)]
    orders, noises = (
        [b.cond["label"] for b in batches],
        [b.draw.normal(4) for b in batches],
    )  # a draw moves on when asked
    for i in range(len(batches)):
        for j in range(i):
            assert not torch.equal(orders[i], orders[j])
            assert not torch.equal(noises[i], noises[j])


def test_augmentation_leaves_the_noise_alone():
    n = 200
    flipping, plain = Stream(numbered(n), n, 0), Stream(numbered(n, flip=False), n, 0)

    def mirrored(step: int, draw: int) -> torch.Tensor:
        return (flipping(step, draw, 0, n).x != plain(step, draw, 0, n).x).flatten(1).any(1)

    flips = [mirrored(3, 0), mirrored(4, 0), mirrored(3, 1)]
    assert all(70 < f.sum() < 130 for f in flips)
    assert not torch.equal(flips[0], flips[1])
    assert not torch.equal(flips[0], flips[2])
    assert torch.equal(flipping(3, 0, 0, n).draw.normal(4), plain(3, 0, 0, n).draw.normal(4))
    known = flipping(3, 0, 0, n).draw.uniform() < 0.5
    assert 70 < (known == flips[0]).sum() < 130  # or the loss would know who was mirrored


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1), st.sampled_from([(0, 8), (0, 3), (3, 8)]))))
@settings(max_examples=25, deadline=None)
def test_reading_ahead_changes_nothing(disk, requests):
    plain, ahead = Stream(disk, 8, seed=5, workers=0), Stream(disk, 8, seed=5, workers=2)
    for step, draw, (start, stop) in requests:
        one, other = plain(step, draw, start, stop), ahead(step, draw, start, stop)
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.cond["label"], other.cond["label"])
        assert torch.equal(one.draw.normal(2), other.draw.normal(2))


def test_a_resumed_stream_continues_and_foresees(disk):
    ahead = Stream(disk, 8, seed=5, workers=2)
    steady = [ahead(step, 0, 0, 8).x for step in range(6)]
    resumed = Stream(disk, 8, seed=5, workers=2)
    assert torch.equal(torch.stack([resumed(step, 0, 0, 8).x for step in range(3, 6)]), torch.stack(steady[3:]))
    assert sorted(ahead.ahead.tasks[(0, 0, 8)]) == [6, 7]
    every_third = [ahead(step, 1, 0, 8) for step in (0, 3, 6)]
    assert len(every_third) == 3
    assert sorted(ahead.ahead.tasks[(1, 0, 8)]) == [9, 12]
    held = Stream(DATA["digits"]().load(), 8, seed=5, workers=2)
    assert held.ahead is None


def test_a_corrupt_file_is_named_through_the_threads_too(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", picture(i))
    data = DATA["folder"](root=str(tmp_path), memory=0).load()
    (tmp_path / "2.png").write_bytes(b"\x89PNG no")
    stream = Stream(data, 4, seed=0, workers=2)
    with refuses(tmp_path / "2.png"):
        stream(0, 0, 0, 4)


def test_a_stream_of_nothing_is_refused():
    with refuses("0"):
        Stream(numbered(3), 0, seed=0)
    with refuses("0"):
        Stream(numbered(0), 4, seed=0)


def test_long_work_shows_a_bar_and_gives_the_same(tmp_path, monkeypatch, capfd):
    for i in range(5):
        save(tmp_path / f"{i}.png", picture(i))
    quiet = DATA["folder"](root=str(tmp_path)).load()
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("genkit.data.images.LONG", 3)
    monkeypatch.setattr("genkit.data.images.CHUNK", 2)
    load = lambda: (DATA["folder"](root=str(tmp_path)).load(), DATA["digits"](size=4).load("test"))  # noqa: E731
    assert torch.equal(load()[0].x, quiet.x)
    assert capfd.readouterr() == ("", "")  # not a terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert torch.equal(load()[0].x, quiet.x)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "decoding" in shown.err
    assert "resizing" in shown.err


def test_classes_can_be_left_out():
    pixels = DATA["digits"](labels=False).load()
    assert pixels.spec.cond == {}
    assert pixels.batch(torch.arange(3), Draw((0,), 0, 3)).cond == {}
    assert torch.equal(pixels.x, DATA["digits"]().load().x)
