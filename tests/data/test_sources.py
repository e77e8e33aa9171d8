"""The registry of sources, paths in place of names, and samples in memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from genkit.backbones import BACKBONES
from genkit.core import Draw, Label, Spec
from genkit.data import DATA, DataSource, InMemory, find_source
from genkit.data.codecs import Identity
from tests.support import sources as contract
from tests.support.data import TOYS, make_zip, noise_of, picture, refuses, save


def test_every_entry_of_the_registry_is_a_source_with_a_description_and_help():
    suffixes = [kind.suffix for kind in DATA.values() if kind.suffix is not None]
    assert len(set(suffixes)) == len(suffixes)
    for name, kind in DATA.items():
        assert issubclass(kind, DataSource), name
        assert kind.__doc__, name
        assert kind.default_backbone in BACKBONES, name


@pytest.mark.parametrize("name", [*TOYS, "digits", "four-ways"])
def test_sources_without_files_keep_the_contract(name):
    contract.check_all(DATA[name]())


def test_a_batch_holds_the_requested_rows():
    data = DATA["digits"]().load()
    batch = data.batch(torch.tensor([3, 0, 3]), noise_of(3))
    assert torch.equal(batch.x, data.x[[3, 0, 3]])
    assert torch.equal(data.codec.decode(data.codec.encode(batch).x), batch.x)


def test_names_and_paths(tmp_path):
    assert find_source("digits") == ("digits", {})
    save(tmp_path / "pictures" / "a.png", picture(0))
    make_zip(tmp_path / "a.zip", {"a.png": picture(0)})
    np.savez(tmp_path / "train.npz", x=np.zeros((2, 2)))
    assert find_source(str(tmp_path / "pictures")) == ("folder", {"root": str(tmp_path / "pictures")})
    assert find_source(str(tmp_path / "a.zip")) == ("zip", {"root": str(tmp_path / "a.zip")})
    assert find_source(str(tmp_path / "train.npz")) == ("npz", {"root": str(tmp_path / "train.npz")})
    assert find_source(str(tmp_path)) == ("npz", {"root": str(tmp_path)})
    for path in ("pictures", "a.zip"):
        name, fields = find_source(str(tmp_path / path))
        assert len(DATA[name](**fields).load()) == 1
    with refuses("'digit'", "digits", "folder"):
        find_source("digit")
    with refuses(tmp_path / "b.zip"):
        find_source(str(tmp_path / "b.zip"))


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
    monkeypatch.setattr("genkit.data.images.PROGRESS_FROM", 3)
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
