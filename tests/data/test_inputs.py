"""What is left out of data is said; classes are counted as a person counts them; numbers keep their digits."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from genkit.core import Draw, Label
from genkit.data import DATA, image_files
from genkit.data.classes import MAX_CLASSES, describe_classes, list_classes, sort_naturally
from genkit.data.codecs import MinMax, Standardize
from genkit.data.demonstrations.windows import Episode, check_episodes
from genkit.data.image_files import IMAGE_SUFFIXES
from tests.support.data import everything, make_zip, picture, refuses, save

ENCODERS = {  # suffix -> format of Pillow, for the suffixes that are not formats of their own
    ".jpe": "JPEG", ".jfif": "JPEG", ".apng": "PNG", ".dib": "DIB", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM",
}  # fmt: skip


def write(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def encoded(suffix):
    stream = io.BytesIO()
    name = ENCODERS.get(suffix) or Image.registered_extensions()[suffix]
    Image.fromarray(picture(0)).save(stream, name)
    return stream.getvalue()


def said(caplog):
    return " ".join(record.getMessage() for record in caplog.records)


# --------------------------------------------------------------------------------------------------- left out
@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_that_pillow_reads_is_an_image(suffix, tmp_path):
    if (suffix == ".avif" and not features.check("avif")) or (suffix == ".jp2" and not features.check("jpg_2000")):
        pytest.skip("this Pillow lacks the decoder")
    for name in ("a", "b"):
        write(tmp_path / name / f"0{suffix.upper()}", encoded(suffix))
    data = DATA["folder"](root=str(tmp_path)).load()
    assert len(data) == 2
    assert data.spec.cond["label"].names == ("a", "b")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_is_left_out_is_counted_and_named(kind, tmp_path, caplog):
    names = ["a/1.heic", "a/2.heic", "b/notes.md", "b/README", "Thumbs.db", "labels.txt", ".DS_Store"]
    root = tmp_path / "in"
    for name in ("a/0.png", "b/0.png"):
        save(root / name, picture(0))
    for name in names:
        write(root / name)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
            for path in sorted(root.rglob("*")):
                archive.write(path, path.relative_to(root))
        root = tmp_path / "in.zip"
    assert len(DATA[kind](root=str(root)).load()) == 2
    assert f"{root}: 4 files are no images and were left out: 2 x .heic, " in said(caplog)
    assert len(caplog.records) == 1
    DATA[kind](root=str(root)).load()  # it is said once
    assert len(caplog.records) == 1


@pytest.mark.parametrize("memory", [0, 1])
@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp", ".png"])
def test_pages_that_are_left_out_are_said(suffix, memory, tmp_path, caplog):
    pages = [Image.fromarray(picture(i)) for i in range(3)]
    pages[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / f"b{suffix}")
    data = DATA["folder"](root=str(tmp_path), memory=memory).load()
    assert len(everything(data).x) == 2
    assert f"a{suffix}" in said(caplog)
    assert f"b{suffix}" not in said(caplog)
    assert "several pages" in said(caplog)


def test_empty_class_folders_are_no_classes(tmp_path, caplog):
    for name in ("1", "2", "10"):
        save(tmp_path / name / "0.png", picture(0))
    (tmp_path / "empty").mkdir()
    data = DATA["folder"](root=str(tmp_path)).load()
    assert data.spec.cond["label"] == Label(3, ("1", "2", "10"))
    assert "1 folders hold no images and are no classes: empty" in said(caplog)


def test_classes_without_samples_are_said(tmp_path, caplog):
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)), y=np.array([0, 3, 3]))
    assert DATA["npz"](root=str(tmp_path / "a.npz")).load().spec.cond["label"].num == 4
    assert "2 of the 4 classes have no samples: 1, 2" in said(caplog)
    np.savez(tmp_path / "b.npz", x=np.zeros((3, 2)), y=np.array([0, 1, 10**9]))
    with refuses("class 1000000000", f"0..{MAX_CLASSES - 1}"):
        DATA["npz"](root=str(tmp_path / "b.npz")).load()


def test_a_tiff_of_32_bits_is_refused(tmp_path):
    ramp = np.arange(256, dtype=np.int32).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    with refuses(tmp_path / "a.tif", "32-bit"):
        DATA["folder"](root=str(tmp_path)).load()
    (tmp_path / "a.tif").unlink()
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "b.tif")
    assert DATA["folder"](root=str(tmp_path)).load().x.flatten().tolist() == list(range(256))


# ---------------------------------------------------------------------------------------------------- classes
def test_a_zip_has_the_classes_of_the_folder(tmp_path):
    names = ["data/1/a.png", "data/10/b.png", "data/2/deep/c.png"]
    for i, name in enumerate(names):
        save(tmp_path / name, picture(i))
    root = make_zip(tmp_path / "a.zip", {name: picture(i) for i, name in enumerate(names)})
    folder, archive = DATA["folder"](root=str(tmp_path / "data")).load(), DATA["zip"](root=root).load()
    assert folder.spec == archive.spec
    assert archive.spec.cond["label"].names == ("1", "2", "10")
    assert torch.equal(folder.x, archive.x)
    assert folder.cond["label"].tolist() == archive.cond["label"].tolist() == [0, 2, 1]
    assert not DATA["zip"](root=root, labels=False).load().spec.cond
    flat = make_zip(tmp_path / "flat.zip", {"data/a.png": picture(0), "data/b/c.png": picture(1)})
    assert not DATA["zip"](root=flat).load().spec.cond


def test_the_test_split_of_a_zip_has_the_classes_of_train(tmp_path):
    make_zip(tmp_path / "train.zip", {"a/0.png": picture(0), "b/0.png": picture(1), "c/0.png": picture(1)})
    make_zip(tmp_path / "test.zip", {"b/0.png": picture(0), "c/0.png": picture(1)})
    test = DATA["zip"](root=str(tmp_path)).load("test")
    assert test.cond["label"].tolist() == [1, 2]
    make_zip(tmp_path / "test.zip", {"b/0.png": picture(0), "d/0.png": picture(1)})
    with refuses(tmp_path / "test.zip" / "d" / "0.png", "not one of the classes"):
        DATA["zip"](root=str(tmp_path)).load("test")


def test_a_zip_of_several_splits_is_refused(tmp_path):
    """Its test images would be trained on, as classes "test: ..."."""
    images = {
        f"{split}/{label}/{i}.png": picture(i) for split in ("train", "test") for label in (1, 10) for i in (0, 1)
    }
    root = make_zip(tmp_path / "both.zip", images)
    with refuses("both.zip", "splits test, train", "train.zip and test.zip"):
        DATA["zip"](root=root).load()


@given(st.lists(st.integers(-50, 1000), unique=True), st.sampled_from(["", "class", "a b "]))
def test_numbers_in_names_are_sorted_by_value(numbers, prefix):
    numbers = numbers if not prefix else [abs(n) for n in numbers]
    names = {f"{prefix}{n}" for n in numbers}
    assert sort_naturally(names) == [f"{prefix}{n}" for n in sorted(set(numbers))]


@given(st.sets(st.text(st.characters(codec="utf-8"), max_size=8)))
def test_any_names_have_one_order(names):
    assert sort_naturally(names) == sort_naturally(sorted(names, reverse=True))
    assert set(sort_naturally(names)) == names


def test_classes_are_listed_with_their_numbers_and_counts(tmp_path):
    for name in ("cat/0", "cat/1", "dog/0"):
        save(tmp_path / f"{name}.png", picture(0))
    assert describe_classes(DATA["folder"](root=str(tmp_path)).load()) == "0 cat: 2, 1 dog: 1"
    assert describe_classes(DATA["moons"]().load()) is None or "0" in describe_classes(DATA["moons"]().load())
    assert list_classes(Label(3)) == "0, 1, 2"
    assert list_classes(Label(100)).endswith("19, and 80 more")


def test_a_class_is_known_by_its_name():
    kind = Label(3, ("1", "2", "10"))
    assert [kind.number(x) for x in ("1", "2", "10", "0", 0, 2)] == [0, 1, 2, 0, 0, 2]
    assert Label(3).number("2") == Label(3).number(np.int64(2)) == 2
    pets = Label(2, ("cat", "dog"))
    assert pets.number("dog") == 1
    for wrong, words in (("dgo", ("dgo", "0..1", "cat, dog", "did you mean dog?")), (2, ("2", "0..1")), (-1, ("-1",))):
        with refuses("label", *words):
            pets.number(wrong)


# ---------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("codec", ["standardize", "min-max"])
@pytest.mark.parametrize("offset", [0.0, 1e8, -3e12])
def test_numbers_are_cast_after_centring(codec, offset, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4))
    x[:, 2] += offset
    np.savez(tmp_path / "a.npz", x=x)
    data = DATA["npz"](root=str(tmp_path / "a.npz"), codec=codec).load()
    model = data.codec.encode(data.batch(torch.arange(30), Draw((0,), 0, 30))).x
    assert model.dtype == torch.float32
    assert len(model[:, 2].unique()) == 30
    back = data.codec.decode(model).double().numpy()
    resolution = np.finfo(np.float64).eps * abs(offset) + 1e-6
    assert np.abs(back - x).max() < 4 * resolution
    assert data.x.dtype == (torch.float64 if offset else torch.float32)


def test_numbers_that_float32_holds_stay_float32():
    x = torch.randn(50, 3) * 100 + 1000
    for codec in (Standardize.fit(x), MinMax.fit(x)):
        assert not codec.needs_float64
        assert codec.decode(torch.zeros(2, 3)).dtype == torch.float32


def test_demonstrations_whose_digits_would_be_lost_are_refused():
    rng = np.random.default_rng(0)
    obs, actions = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
    check_episodes([Episode(obs, actions)], "a")
    check_episodes([Episode(obs * 0 + 1e9, actions)], "a")  # constant
    images = (np.zeros((20, 3, 4, 4), np.uint8), np.zeros((19, 3, 4, 4), np.uint8))
    with refuses("a: episode 0 has 19 images and 20 actions"):
        check_episodes([Episode(obs, actions, frames=images)], "a")
    obs[:, 1] += 1.7e9
    with refuses("a: column 1 of the observations", "subtract"):
        check_episodes([Episode(obs, actions)], "a")


def test_a_member_that_inflates_without_end_is_refused(tmp_path, monkeypatch):
    root = make_zip(tmp_path / "a.zip", {"a.png": picture(0)})
    monkeypatch.setattr("genkit.data.image_files.MAX_MEMBER", 40)
    with refuses(tmp_path / "a.zip" / "a.png", "inflates to"):
        DATA["zip"](root=root).load()


@pytest.mark.parametrize("archived", [False, True])
def test_a_large_image_is_one_line_and_a_bomb_is_refused(tmp_path, caplog, monkeypatch, recwarn, archived):
    """Pillow's limit, here 100 pixels: a line above it, a refusal above its double, and no warning of Python's."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (9, 12, 16):
        folder = tmp_path / str(side)
        write(folder / "a.png", png(side))
        if archived:
            folder = folder.with_suffix(".zip")
            with zipfile.ZipFile(folder, "w") as archive:
                archive.writestr("a.png", png(side))
        load = DATA["zip" if archived else "folder"](root=str(folder)).load
        if side == 16:
            refuses(load, "a.png: cannot be decoded", "bomb")
            continue
        assert load().spec.shape[1:] == (side, side)
        line = f"note     {folder}/a.png: has 12x12 pixels; it is decoded all the same"
        assert [r.getMessage() for r in caplog.records] == ([] if side == 9 else [line])
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


def png(side):
    stream = io.BytesIO()
    Image.new("L", (side, side), 7).save(stream, "PNG")
    return stream.getvalue()


def test_a_long_walk_through_a_tree_says_where_it_is(tmp_path, caplog, monkeypatch):
    for i in range(3):
        write(tmp_path / f"deep/{i}/{i}.png")
    with caplog.at_level("INFO", "genkit"):
        quick = image_files.list_files(tmp_path)
        assert not caplog.messages, "a short walk needs no words"
        monkeypatch.setattr(image_files, "SECONDS_UNTIL_SAID", -1.0)
        assert image_files.list_files(tmp_path) == quick
    assert len(quick) == 3
    assert f"{tmp_path}: still listing files, 3 so far; now in {tmp_path}/deep/" in caplog.messages[-1]
