"""A mistake in the options of a script is one line, as it is for commands."""

import re
from pathlib import Path

import pytest
from PIL import Image

from genkit.cli.commands.bench import BENCHES
from genkit.cli.main import main
from genkit.cli.scripts import ScriptParser
from genkit.core.pictures import save_image

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", BENCHES)
@pytest.mark.parametrize("argv", [["--nope"], ["--nope=3", "stray"]])
def test_a_benchmark_refuses_in_one_line(name, argv, capsys):
    try:
        code = main(["bench", name, *argv])
    except SystemExit as e:
        code = e.code
    assert code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "nope" in error


def test_every_mistake_is_one_line(capsys):
    parser = ScriptParser("Do something.\n\nMore.", "name")
    parser.add_argument("run")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--kind", choices=["a", "b"])
    for argv in ([], ["r", "--steps", "x"], ["r", "--kind", "c"], ["r", "--steps"], ["r", "s"]):
        with pytest.raises(SystemExit) as e:
            parser.parse_args(argv)
        assert e.value.code == 2
        assert re.fullmatch(r"name: .+; see --help\n", capsys.readouterr().err)
    assert parser.description == "Do something."


def test_a_picture_of_somebody_else_is_not_replaced(tmp_path, capsys):
    parser = ScriptParser("Draw.", "draw")
    parser.add_argument("--out", type=Path, default=tmp_path / "mine.png")
    assert parser.parse_args([]).out == tmp_path / "mine.png"
    Image.new("L", (2, 2)).save(tmp_path / "mine.png")
    for argv in ([], ["--out", str(tmp_path / "mine.png")]):
        with pytest.raises(SystemExit) as e:
            parser.parse_args(argv)
        assert e.value.code == 2
        assert "mine.png exists, and genkit did not write it" in capsys.readouterr().err
    save_image(Image.new("L", (2, 2)), tmp_path / "ours.png")
    assert parser.parse_args(["--out", str(tmp_path / "ours.png")]).out == tmp_path / "ours.png"


@pytest.mark.parametrize("folder", ["samplers", "examples", "benchmarks"])
def test_scripts_use_this_parser(folder):
    files = [
        path
        for path in (ROOT / folder).rglob("*.py")
        if "ArgumentParser(" in path.read_text() and path.name != "12_policy_client.py"  # runs without genkit
    ]
    assert files == []
