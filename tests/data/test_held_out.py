"""A share of a person's own data is held out by default, and which samples it holds depends on their names only."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genkit.cli import main as cli
from genkit.core import Draw
from genkit.data import DATA
from genkit.data.held_out import is_held_out
from genkit.data.text import to_texts
from genkit.training.directory import find_run
from genkit.training.resume import find_resumable
from genkit.training.settings import stored_settings

N = 60
TINY = ["--backbone.width=8", "--batch=8", "--steps=2", "--no-tensorboard", "--workers=0", "--device=cpu"]


def make_folder(root: Path, n: int = N) -> Path:
    """``n`` images of two classes, each filled with its own value."""
    for i in range(n):
        path = root / ("even" if i % 2 == 0 else "odd") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(path)
        path.with_suffix(".txt").write_text(f"number {i}")
    return root


def make_zip(root: Path) -> Path:
    folder = make_folder(root / "pictures")
    with zipfile.ZipFile(root / "pictures.zip", "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder))
    return root / "pictures.zip"


def make_npz(root: Path) -> Path:
    x = np.arange(N, dtype=np.uint8)[:, None, None] * np.ones((8, 8), np.uint8)
    np.savez(root / "arrays.npz", x=x, y=np.arange(N) % 2)
    return root / "arrays.npz"


def make_numbers(root: Path) -> Path:
    np.savez(root / "numbers.npz", x=np.arange(N, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32))
    return root / "numbers.npz"


MAKERS = {"folder": lambda root: make_folder(root / "pictures"), "zip": make_zip, "npz": make_npz}


def values(data) -> list[int]:
    """What each sample is filled with."""
    return data.batch(torch.arange(len(data)), Draw((0,), 0, len(data))).x.flatten(1)[:, 0].int().tolist()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("labels", [None, False])
@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_the_splits_are_disjoint_and_complete_and_keep_the_classes(tmp_path, kind, labels, memory):
    settings = {"memory": memory} if kind != "npz" else {}
    source = DATA[kind](root=str(MAKERS[kind](tmp_path)), held_out=0.25, labels=labels, **settings)
    train, test = source.load("train"), source.load("test")
    assert sorted(values(train) + values(test)) == list(range(N))
    assert 5 <= len(test) <= 25
    assert train.num_held_out == len(test)
    assert train.spec == test.spec
    if labels is None:
        for data in (train, test):
            assert data.cond["label"].tolist() == [v % 2 for v in values(data)]
    # whether a model is conditioned on the classes changes nothing
    assert values(test) == values(source.with_fields(labels=True).load("test"))


def test_captions_stay_with_their_images(tmp_path):
    source = DATA["folder"](root=str(make_folder(tmp_path)), held_out=0.25, captions=("files",))
    for split in ("train", "test"):
        data = source.load(split)
        text = data.batch(torch.arange(len(data)), Draw((0,), 0, len(data))).cond["text"]
        assert to_texts(text) == [f"number {v}" for v in values(data)]


def test_numbers_are_scaled_by_the_training_rows_only(tmp_path):
    root = str(make_numbers(tmp_path))
    source = DATA["npz"](root=root, held_out=0.25)
    train, test = source.load("train"), source.load("test")
    assert train.codec == test.codec
    every = DATA["npz"](root=root).load("train")
    assert every.codec != train.codec
    mean = train.codec.encode(train.batch(torch.arange(len(train)), Draw((0,), 0, len(train)))).x.mean()
    assert abs(float(mean)) < 1e-5


def test_a_sample_stays_where_it_is_when_others_are_added():
    names = [f"cat/{i}.png" for i in range(2000)]
    few, many = is_held_out(names[:500], 0.1), is_held_out(names, 0.1)
    assert torch.equal(few, many[:500])
    assert 150 < int(many.sum()) < 250
    assert bool((is_held_out(names, 0.05) <= many).all())  # a smaller share holds out some of these
    assert not is_held_out(names, 0.0).any()


def test_no_class_loses_its_last_sample_and_some_sample_is_held_out():
    for seed in range(300):
        names = [f"rare{seed}/0.png", *[f"common/{seed}-{i}.png" for i in range(30)]]
        held = is_held_out(names, 0.1)
        assert not held[0]
        assert held.any()
    assert is_held_out([f"{i}/only.png" for i in range(200)], 0.1).any()  # each sample has a folder of its own
    assert not is_held_out(["a", "b", "c"], 0.01).any()


SLOWER = [pytest.param(kind, marks=pytest.mark.slow) for kind in MAKERS if kind != "zip"]


@pytest.mark.parametrize("kind", ["zip", *SLOWER])
def test_training_holds_out_a_tenth_and_says_so(tmp_path, kind, capsys):
    root, out = str(MAKERS[kind](tmp_path)), tmp_path / "runs"
    assert cli.main(["train", f"--data={root}", *TINY, f"--out={out}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    settings = stored_settings(find_run(out / "latest"))
    test = settings.data.load("test")
    assert settings.data.held_out == 0.1
    assert any(line.startswith(f"held out {len(test)} of {N} samples") for line in lines[:3])
    assert cli.main(["train", f"--data={root}", "--data.held-out=0", *TINY, f"--out={out}"]) == 0
    assert "held out" not in capsys.readouterr().out
    assert len(stored_settings(find_run(out / "latest")).data.load("train")) == N
    assert find_resumable(settings) == find_run(next(out.glob("0000*")))


def test_a_test_split_leaves_nothing_to_hold_out(tmp_path):
    for split in ("train", "test"):
        make_folder(tmp_path / split, 12)
    source = DATA["folder"](root=str(tmp_path)).with_decisions()
    assert source.held_out == 0
    assert len(source.load("train")) == 12


def test_a_run_without_the_setting_has_all_samples(tmp_path, capsys):
    """The configuration of a run that is older than the setting means what it meant."""
    root, out = make_folder(tmp_path / "pictures"), tmp_path / "runs"
    argv = ["train", f"--data={root}", "--data.held-out=0", "--keep-checkpoints=9", *TINY, f"--out={out}"]
    assert cli.main(argv) == 0
    run = find_run(out / "latest")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    del tree["data"]["held_out"]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    for file in run.glob("checkpoints/*/state.json"):  # an older checkpoint has no settings
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "settings"}))
    assert len(stored_settings(run).data.load("train")) == N
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(run), "--steps=3"]) == 0
    assert "held out" not in capsys.readouterr().out
    assert len(stored_settings(run).data.load("train")) == N
    assert cli.main(["eval", str(run), "--reference=test", "--n=4"]) == 2
    error = capsys.readouterr().err
    assert f"{root}/test" in error
    assert "--data.held-out 0.1" in error
