"""A person's own files: folders and zips of images, arrays in an .npz, and what each refuses."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
import torch

from genkit.core import Label, Spec
from genkit.data import DATA, InMemory, OnDisk
from genkit.data.codecs import Identity, MinMax, Pixels, Standardize
from tests.support.data import chw, everything, make_zip, noise_of, picture, refuses, save


# ------------------------------------------------------------------------------------------------------- folders
def test_subfolders_are_classes(tmp_path):
    for i, name in enumerate(["dog/b.png", "cat/z.png", "cat/deep/a.png", "dog/.hidden.png", ".git/c.png"]):
        save(tmp_path / name, picture(i))
    (tmp_path / "bird").mkdir()  # empty: no class
    save(tmp_path.with_name(tmp_path.name + "-elsewhere") / "c.png", picture(9))
    (tmp_path / "elk").symlink_to(tmp_path.with_name(tmp_path.name + "-elsewhere"))
    (tmp_path / "dog" / "notes.txt").write_text("not a picture")
    data = DATA["folder"](root=str(tmp_path)).load()
    assert data.spec == Spec((3, 4, 4), {"label": Label(3, ("cat", "dog", "elk"))})
    assert data.cond["label"].tolist() == [0, 0, 1, 2]
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


@pytest.mark.parametrize("source", ["folder", "zip"])
def test_images_beside_class_folders_are_counted_and_named(tmp_path, caplog, source):
    names = ["cat/a.png", "dog/b.png", "stray.png", "other.png"]
    for i, name in enumerate(names):
        save(tmp_path / "in" / name, picture(i))
    root = tmp_path / "in"
    if source == "zip":
        root = make_zip(tmp_path / "in.zip", {name: picture(i) for i, name in enumerate(names)})
    assert DATA[source](root=str(root)).load().spec == Spec((3, 4, 4))
    assert "2 folders are no classes, because 2 of 4 images are beside them: other.png, stray.png" in caplog.text
    with refuses("2 of 4 images"):
        DATA[source](root=str(root), labels=True).load()
    caplog.clear()
    assert DATA[source](root=str(root), labels=False).load().spec == Spec((3, 4, 4))
    assert not caplog.text


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_a_folder_beside_train_is_the_test_split_by_any_usual_name(tmp_path, name):
    for i, file in enumerate(["train/cat/0.png", "train/dog/0.png", f"{name}/dog/0.png"]):
        save(tmp_path / file, picture(i))
    source = DATA["folder"](root=str(tmp_path)).with_decisions()
    assert source.load().spec.cond["label"].names == ("cat", "dog")
    assert source.load("test").x.equal(chw(picture(2))[None])


@pytest.mark.parametrize("source", ["folder", "zip"])
@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("Training", "Testing"), ("train", "VALID"), ("ds/train", "ds/val")]
)
def test_splits_are_not_taken_for_classes(tmp_path, source, names):
    """Their test images would be trained on too."""
    pictures = {f"{name}/{c}/0.png": picture(i) for i, name in enumerate(names) for c in ("cat", "dog")}
    for name, pixels in pictures.items():
        save(tmp_path / "in" / name, pixels)
    root = tmp_path / "in" if source == "folder" else make_zip(tmp_path / "in.zip", pictures)
    for labels in (None, False):
        with refuses("holds the splits", "no classes"):
            DATA[source](root=str(root), labels=labels).load()


def test_a_zip_of_one_class_is_a_test_split(tmp_path):
    make_zip(tmp_path / "train.zip", {f"{c}/{i}.png": picture(i) for i in range(2) for c in ("cat", "dog")})
    for names in (["dog/0.png"], ["dog/a/0.png", "dog/a/1.png"], ["some/dog/0.png"]):
        make_zip(tmp_path / "test.zip", {name: picture(i) for i, name in enumerate(names)})
        assert DATA["zip"](root=str(tmp_path)).load("test").cond["label"].tolist() == [1] * len(names)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_one_name_twice_is_refused(tmp_path):
    """Only the last could be read, in place of both."""
    path = make_zip(tmp_path / "in.zip", {"a.png": picture(0), "b.png": picture(1)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a.png", archive.read("b.png"))
    with refuses(path, "a.png: is in the archive more than once"):
        DATA["zip"](root=str(path)).load()


def test_arrays_of_an_npz_that_are_not_read_are_named(tmp_path, caplog):
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(0).random((6, 2)), labels=np.arange(6))
    assert not DATA["npz"](root=str(tmp_path / "in.npz")).load().spec.cond
    assert "only x and y are read; left out: labels" in caplog.text


def test_a_single_subfolder_is_not_a_class(tmp_path):
    save(tmp_path / "all" / "a.png", picture(0))
    assert DATA["folder"](root=str(tmp_path)).load().spec == Spec((3, 4, 4))


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_the_test_split_of_a_folder_has_the_classes_of_train(held_out, tmp_path):
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


def test_images_that_do_not_fit_into_memory_are_read_on_request(tmp_path):
    for i in range(6):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", picture(i))
    config = {"root": str(tmp_path), "flip": True, "size": 3}
    memory, disk = DATA["folder"](**config).load(), DATA["folder"](**config, memory=0).load()
    assert isinstance(memory, InMemory)
    assert isinstance(disk, OnDisk)
    assert memory.spec == disk.spec
    assert len(memory) == len(disk) == 6
    indices = torch.tensor([5, 0, 3, 3])
    one, other = memory.batch(indices, noise_of(4)), disk.batch(indices, noise_of(4))
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.cond["label"], other.cond["label"])
    assert isinstance(DATA["folder"](**config, memory=6 * 27 / 2**30).load(), InMemory)
    assert isinstance(DATA["folder"](**config, memory=6 * 26 / 2**30).load(), OnDisk)


@pytest.mark.parametrize("memory", [0, 1])
def test_faults_of_folders_are_named(memory, tmp_path):
    def load(**options):
        data = DATA["folder"](root=str(tmp_path), memory=memory, **options).load()
        return data, everything(data)

    with refuses(tmp_path / "nowhere", "--data.root"):
        DATA["folder"](root=str(tmp_path / "nowhere")).load()
    with refuses(tmp_path, "no images"):
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
    content = (tmp_path / "b.png").read_bytes()
    for broken in (
        content[: len(content) // 2],
        content[:20],
        b"",
        b"\x89PNG no",
        content[:400] + b"?" * 50 + content[450:],
    ):
        (tmp_path / "b.png").write_bytes(broken)
        with refuses(tmp_path / "b.png"):
            load(size=4)


# ---------------------------------------------------------------------------------------------------------- zips
def test_a_zip_with_and_without_classes(tmp_path):
    pictures = {f"0000{i % 2}/img{i}.png": picture(i) for i in range(3)}
    labels = [["00000/img2.png", 5], ["00001\\img1.png", 0], ["00000/img0.png", 2]]
    labelled = make_zip(tmp_path / "labelled.zip", pictures, labels)
    data = DATA["zip"](root=labelled).load()
    assert data.spec == Spec((3, 4, 4), {"label": Label(6)})
    assert data.cond["label"].tolist() == [2, 5, 0]
    assert torch.equal(data.x, torch.stack([chw(picture(i)) for i in (0, 2, 1)]))
    assert DATA["zip"](root=labelled, labels=False).load().spec == Spec((3, 4, 4))
    null = make_zip(tmp_path / "null.zip", pictures, None)
    assert DATA["zip"](root=null).load().spec == Spec((3, 4, 4))
    disk = DATA["zip"](root=labelled, memory=0).load()
    assert torch.equal(everything(disk).x, data.x)


def test_the_test_split_of_a_zip_lies_beside_it(tmp_path):
    make_zip(tmp_path / "train.zip", {"a.png": picture(0), "b.png": picture(1)}, [["a.png", 0], ["b.png", 4]])
    make_zip(tmp_path / "test.zip", {"c.png": picture(2)}, [["c.png", 1]])
    for root in (tmp_path, tmp_path / "train.zip"):
        assert DATA["zip"](root=str(root)).load().spec == DATA["zip"](root=str(root)).load("test").spec
    make_zip(tmp_path / "test.zip", {"c.png": picture(2)}, [["c.png", 5]])
    with refuses(tmp_path / "test.zip", "class 5", "0..4"):
        DATA["zip"](root=str(tmp_path)).load("test")
    with refuses("test split", tmp_path / "test.zip"):
        DATA["zip"](root=str(tmp_path / "test.zip")).load("test")


def test_faults_of_zips_are_named(tmp_path):
    path = tmp_path / "a.zip"

    def load(root=path):
        return DATA["zip"](root=str(root)).load()

    with refuses(tmp_path, "train.zip"):
        load(tmp_path)
    path.write_bytes(b"not a zip")
    with refuses(path, "zip"):
        load()
    make_zip(path, {}, [])
    with refuses(path, "no images"):
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


def test_nothing_is_extracted_from_an_archive(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    make_zip(inside / "a.zip", {"../evil.png": picture(0), "/abs.png": picture(1)})
    assert len(DATA["zip"](root=str(inside / "a.zip")).load()) == 1  # a hidden file is not an image
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.zip", "in"]


# -------------------------------------------------------------------------------------------------------- arrays
@pytest.mark.parametrize(("x", "y"), [("arr_0", "arr_1"), ("x", "y")])
def test_npz_images(x, y, tmp_path):
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


def test_faults_of_npz_files_are_named(tmp_path):
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
