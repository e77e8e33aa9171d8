"""The registry of sources, paths in place of names, and samples in memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch

from genkit.core import Draw, Label, Spec
from genkit.data import DATA, InMemory, source
from genkit.data.codecs import Identity
from tests.support.data import TOYS, make_zip, noise_of, picture, refuses, save


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
