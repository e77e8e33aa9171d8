"""No name, of a class, a file, a run or in a caption, controls the terminal that it is printed on."""

from __future__ import annotations

import os
import shutil
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from genkit.cli.escape import printable
from genkit.cli.main import main
from genkit.cli.output import SafeConsole
from genkit.config import load_yaml

EVIL = "\x1b[31m\x9b2J\u202e\ta"  # colour, clear the screen (C1), write from the right


def controls(text):
    """Characters of ``text`` that a terminal may obey."""
    kinds = {c: unicodedata.category(c) for c in text}
    return {c for c, kind in kinds.items() if c != "\n" and (kind in ("Cc", "Cs", "Zl", "Zp") or c in "\u202e\u2066")}


@given(st.text())
def test_any_text_is_printable_and_plain_text_stays(text):
    assert not controls(printable(text))
    assert "\n" not in printable(text)
    if not controls(text) and text.isprintable():
        assert printable(text) == text
    assert printable(text, lines=True).count("\n") == text.count("\n")
    printable(text).encode()  # also of a name that is no UTF-8


def test_tables_and_objects_are_escaped_too(capsys):
    from pathlib import Path

    from rich.table import Table

    console = SafeConsole()
    table = Table(EVIL)
    table.add_row(EVIL, EVIL)
    console.print(table)
    console.print(Path(EVIL), EVIL, 3, markup=False)
    out = capsys.readouterr().out
    assert not controls(out)
    assert out.count("\\x1b") == 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on images whose folder, classes and captions have control characters in their names, moved into one."""
    top = tmp_path_factory.mktemp("evil") / f"data{EVIL}"
    for k in range(2):
        for i in range(8):
            file = top / f"{EVIL}{k}" / f"{i}{EVIL}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 100 * k + i).save(file)
    (top / "note\x1b.txt").write_text("no image")
    (top / "empty\x1b").mkdir()
    argv = ["--backbone=mlp", "--backbone.width=8", "--batch=8", "--workers=0", "--no-tensorboard", "--sample-every=0"]
    out = tmp_path_factory.mktemp("out")
    assert main(["train", f"--data={top}", *argv, "--steps=2", f"--out={out}"]) == 0
    moved = out / f"0007-{EVIL}"
    shutil.move(next(out.glob("0000-*")), moved)
    return moved


COMMANDS = {
    "train": ["train", "--resume", "{run}", "--steps=3"],
    "data": ["train", "--data={top}", "--data.captions=files", "--out={out}"],
    "info": ["info", "{run}"],
    "sample": ["sample", "{run}", "--n=2", "--steps=1", "--label", EVIL + "1", "--out={out}/" + EVIL + ".png"],
    "label": ["sample", "{run}", "--n=2", "--steps=1", "--label", EVIL],
    "eval": [
        "eval",
        "{run}",
        "--n=16",
        "--steps=1",
        "--features=raw",
        "--metrics=fid",
        "--out={out}/" + EVIL + ".json",
    ],
    "folder": ["eval", "{top}", "{top}", "--features=raw", "--metrics=fid"],
    "compare": ["eval", "--compare", "{run}", "{run}"],
    "sweep": ["sweep", "{run}", "--steps", "1", "--n=16", "--confirm-n=16", "--features=raw", "--metric=fid"],
    "likelihood": ["likelihood", "{out}/" + EVIL],
    "reflow": ["reflow", "{run}", "--n=2", "--steps=1"],
    "report": ["report", "{run}"],
    "export": ["export", "{run}", "{out}/" + EVIL, "--to=run"],
    "absent": ["info", "{out}/" + EVIL],
}


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS)
def test_no_command_prints_a_control_character(run, tmp_path, capfd, argv):
    top = load_yaml(run / "config.yaml")["data"]["root"]
    code = main([a.format(run=run, top=top, out=tmp_path) for a in argv])
    out, err = capfd.readouterr()
    assert code in (0, 2)
    assert not controls(out + err), (out, err)
    assert "\\x1b" in out + err, (code, out, err)
    assert "Traceback" not in err


def test_a_name_that_is_no_utf8_is_printed(tmp_path, capfd):
    assert main(["info", os.fsdecode(bytes(tmp_path) + b"/\xff")]) == 2
    assert "\\udcff" in capfd.readouterr().err
