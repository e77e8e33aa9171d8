"""Files of `genkit sample` and other commands: one folder holds one set of samples, and nothing foreign is replaced."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from genkit.cli import sample_output
from genkit.cli.commands.sample import Sample
from genkit.cli.main import main
from genkit.core.files import refuse_foreign
from genkit.diffusion.guidance import RULES
from genkit.training.run import load_run


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("output")
    argv = ["train", "--data=digits", "--backbone=mlp", "--backbone.width=8", "--steps=1", "--sample-every=0"]
    assert main([*argv, "--workers=0", "--no-tensorboard", f"--out={out}"]) == 0
    return next(out.glob("0000-*"))


def sample(run, out, *argv):
    return main(["sample", str(run), "--steps=1", f"--out={out}", *argv])


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_folder_holds_one_set_of_samples(digits, tmp_path, capsys):
    out = tmp_path / "few"
    assert sample(digits, out, "--format=png", "--n=5") == 0
    first = content(out)
    for argv in (["--n=2"], ["--n=5", "--seed=1"], ["--n=5", "--label=2"], ["--n=5", "--clip"]):
        assert sample(digits, out, "--format=png", *argv) == 2
        assert "holds other samples already" in capsys.readouterr().err
        assert content(out) == first
    assert sample(digits, out, "--format=png", "--n=5") == 0  # the same again
    assert content(out) == first
    (out / "holiday.png").write_bytes(b"mine")
    assert sample(digits, out, "--format=png", "--n=5") == 2
    assert "holds other files (holiday.png)" in capsys.readouterr().err


def test_a_folder_that_is_not_of_samples_is_refused(digits, tmp_path, capsys):
    for name in ("000000.png", "labels.txt", "anything"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(b"mine")
        assert sample(digits, folder, "--format=png", "--n=2") == 2
        assert content(folder) == {name: b"mine"}
    (tmp_path / "file").write_bytes(b"mine")
    assert sample(digits, tmp_path / "file", "--format=png") == 2
    assert "is a file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert sample(digits, tmp_path / "empty", "--format=png", "--n=2") == 0
    assert len(content(tmp_path / "empty")) == 4


def test_a_folder_appears_whole_or_not_at_all(digits, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_output, "sync", fail)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        assert sample(digits, tmp_path / name, "--format=png", "--n=2") == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize(("format", "suffix"), [("grid", ".png"), ("npz", ".npz")])
@pytest.mark.parametrize("foreign", ["{}", "{}.json", ".gif"])
def test_no_foreign_file_is_replaced(format, suffix, foreign, digits, tmp_path, capsys):
    out = tmp_path / f"a{suffix}"
    mine = out.with_suffix(".gif") if foreign == ".gif" else tmp_path / foreign.format(out.name)
    mine.write_text('{"precious": 1}')
    argv = [f"--format={format}", "--n=2", "--trajectory"]
    assert sample(digits, out, *argv) == 2
    assert f"{mine} exists, and genkit sample did not write it" in capsys.readouterr().err
    assert [p.read_text() for p in tmp_path.iterdir()] == ['{"precious": 1}']
    mine.unlink()
    beside = out.with_suffix(".json")  # settings have a name of their own
    beside.write_text('{"precious": 1}')
    assert sample(digits, out, *argv) == sample(digits, out, *argv, "--seed=3") == 0
    assert json.loads(out.with_name(out.name + ".json").read_text())["seed"] == 3
    assert beside.read_text() == '{"precious": 1}'


def test_the_suffix_of_another_format_is_refused(digits, tmp_path, capsys):
    for format, name in (("npz", "a.png"), ("grid", "a.npz"), ("grid", "a.txt")):
        assert sample(digits, tmp_path / name, f"--format={format}", "--n=2") == 2
        assert "out: given" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


OTHER_VALUES = {
    "ema": ("none", "0.5"), "sampler": ("ddim",), "steps": (7,), "guidance": (2.0, 2.0000001),
    "guidance_rule": (RULES["apg"](), RULES["rescale"]()), "guidance_interval": ((0.1, 0.5),),
    "guidance_passes": ("apart",), "autoguide": ("ema:0.5",), "classifier": ("c",), "classifier_scale": (2.0,),
    "precision": ("bf16",), "grid": ("karras",), "clip": (True,), "seed": (9,), "n": (3,), "label": ("1", "a b", "a-b"),
    "prompt": (("x",), ("y",)),
    "lora": ("x/l", "y/l"), "lora_scale": (0.5,),
}  # fmt: skip
NOT_IN_THE_NAME = {"compile", "run", "step", "device", "batch", "format", "out", "trajectory"}


def test_a_default_name_holds_every_setting_that_matters(digits):
    run, base = load_run(digits), Sample(run=str(digits), n=4)
    assert {f.name for f in fields(Sample)} <= OTHER_VALUES.keys() | NOT_IN_THE_NAME  # a new setting belongs here
    changed = [replace(base, **{k: v}) for k, values in OTHER_VALUES.items() if hasattr(base, k) for v in values]
    names = [sample_output.default_name(command, run) for command in [base, *changed]]
    assert len(set(names)) == len(names)
    assert names[0] == "sample-step1-heun20-seed0-n4"
    assert all(len(name) < 200 and "/" not in name for name in names)


def test_reports_cards_and_arrays_do_not_replace_foreign_files(digits, tmp_path, capsys):
    for name, argv in (
        ("a.html", ["report", str(digits), "--out"]),
        ("a.json", ["eval", str(digits), "--n=16", "--metrics=fid", "--features=raw", "--steps=1", "--out"]),
        ("a.npz", ["reflow", str(digits), "--n=2", "--out"]),
    ):
        (tmp_path / name).write_bytes(b"mine")
        assert main([*argv, str(tmp_path / name)]) == 2
        assert "genkit did not write it" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == b"mine"
    page = tmp_path / "b.html"
    assert main(["report", str(digits), "--out", str(page)]) == main(["report", str(digits), "--out", str(page)]) == 0
    refuse_foreign(tmp_path / "new")
