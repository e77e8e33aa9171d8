"""Every setting that is a path expands `~` and refuses empty text, in one place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from genkit.cli.main import COMMANDS, main
from genkit.config import ConfigError, load_yaml, parse
from genkit.config.blocks import check_value, get_fields, get_hints
from genkit.config.paths import expand_path
from genkit.data import DATA
from genkit.training.directory import find_run
from genkit.training.settings import TrainSettings
from tests.support.commands import settings_class
from tests.support.data import picture, save

PATHS = {
    "root", "out", "run", "resume", "init", "codec", "lora", "weights", "eval_weights", "reference", "save_stats",
    "autoguide", "classifier", "encoder", "source",
}  # fmt: skip
CLASSES = [settings_class(name) for name in COMMANDS if name != "bench"] + list(DATA.values())


@pytest.mark.parametrize("cls", CLASSES)
def test_every_path_of_every_command_and_source_is_expanded(cls, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name, field in get_fields(cls).items():
        if name in PATHS and "table" not in field.metadata and "Literal" not in str(get_hints(cls)[name]):
            hint, many = get_hints(cls)[name], "tuple" in str(field.type)
            assert check_value(hint, ["~/x"] if many else "~/x", name) == (("/home/me/x",) if many else "/home/me/x")
            for text in ("", " ", "a\0b"):
                with pytest.raises(ConfigError, match=name):
                    check_value(hint, [text] if many else text, name)


def test_expand_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [expand_path(p) for p in ("~", "~/a b", "a/~", "ema:0.9", "./~x")] == [
        "/home/me", "/home/me/a b", "a/~", "ema:0.9", "./~x"
    ]  # fmt: skip


def test_a_home_is_never_a_folder_of_that_name(tmp_path, monkeypatch, capsys):
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for name in ("a/0", "b/0"):
        save(home / "pics" / f"{name}.png", picture(0))
    tiny = ["--backbone=mlp", "--backbone.width=8", "--steps=1", "--sample-every=0", "--workers=0", "--no-tensorboard"]
    assert main(["train", "--data=~/pics", *tiny, "--out=~/runs", "--name=a"]) == 0
    (home / "c.yaml").write_text("data: ~/pics\nout: ~/runs\n")
    assert main(["train", "--config=~/c.yaml", *tiny, "--name=b"]) == 0
    assert main(["train", "--resume=~/runs/latest", "--steps=2"]) == 0
    assert main(["sample", "~/runs/latest", "--n=2", "--steps=1", "--out=~/a.png"]) == 0
    assert main(["report", "~/runs/latest", "--out=~/a.html"]) == 0
    assert main(["info", "~/runs/latest"]) == 0
    assert not list(work.iterdir())
    assert {p.name for p in (home / "runs").iterdir()} == {"0000-a", "0001-b", "latest"}
    assert {"a.png", "a.html"} <= {p.name for p in home.iterdir()}
    assert find_run("~/runs/latest") == (home / "runs" / "0001-b").resolve()


def test_the_root_of_data_is_stored_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("pics/0.png"), picture(0))
    tiny = ["--backbone=mlp", "--backbone.width=8", "--steps=1", "--sample-every=0", "--workers=0", "--no-tensorboard"]
    argv = ["train", "--data=pics", *tiny, "--out", str(tmp_path / "o")]
    assert main([*argv, "--resume=auto"]) == 0
    run = tmp_path / "o" / "latest"
    assert load_yaml(run / "config.yaml")["data"]["root"] == str(tmp_path / "pics")
    assert main([*argv[:-3], "--steps=2", "--sample-every=0", "--out", str(tmp_path / "o"), "--resume=auto"]) == 0
    assert sorted(os.listdir(tmp_path / "o")) == [run.resolve().name, "latest"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", str(run), "--steps=3"]) == 0


def test_empty_texts_are_refused():
    for flag in ("--out=", "--config=", "--init=", "--codec=", "--resume="):
        with pytest.raises(ValueError, match="empty text"):
            parse(TrainSettings, [flag])


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", "a\nb", "\x1b[31mred", "a\0b", "a\\b", "\x7f"])
def test_a_name_is_one_plain_line(name):
    with pytest.raises(ValueError, match="name: given"):
        parse(TrainSettings, ["--name", name])


def test_a_folder_of_runs_says_which_it_holds(tmp_path):
    for name in ("0000-a", "0001-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "latest").symlink_to("0001-b")
    says = f"^run: given {tmp_path}, which holds runs; give one of them: {tmp_path}/latest$"
    with pytest.raises(ValueError, match=says):
        find_run(tmp_path)
