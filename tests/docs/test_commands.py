"""Every `genkit` command that a page, a configuration's head or a results file shows is one that genkit accepts."""

import ast
import contextlib
import io
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import genkit
from genkit.cli.main import COMMANDS, main
from tests.support.commands import accept, read_head_commands
from tools import tables

ROOT = Path(__file__).parents[2]


def from_pages():
    """``(place, command)`` of code blocks and of code in sentences that is a whole command."""
    for page in tables.pages():
        if "contributing" in page.parts:  # of recipes, whose parts are registered by their own tests
            continue
        text = page.read_text().replace("\\\n", " ")
        blocks = re.findall(r"```(?:bash|text)?\n(.*?)```", text, re.DOTALL)
        lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
        inline = re.findall(r"`((?:genkit|python -m genkit) [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        yield from ((page.relative_to(ROOT), command) for line in [*lines, *inline] for command in line.split("&&"))


def from_configs():
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        yield from ((file.relative_to(ROOT), command) for command in read_head_commands(file))


def from_results():
    for file in sorted((ROOT / "docs/results").glob("*.json")):
        stored = json.loads(file.read_text())
        for key in {"train", "command", "check"} & stored.keys():
            value = stored[key] if isinstance(stored[key], str) else " ".join(map(str, stored[key]))
            yield from ((file.relative_to(ROOT), re.sub(r"\(.*|\[|\]", "", command)) for command in value.split(";"))


def all_commands():
    """Each distinct command once, with a seed for S and a number for N; what has another gap (`...`, NAME) is none."""
    places = {}
    for place, command in [*from_pages(), *from_configs(), *from_results()]:
        command = re.sub(r"\b[SN]\b", "1", command.strip().removeprefix("python -m "))
        if re.match(r"genkit \w+ ", command) and not re.search(r"\.\.\.|…|\bNAME\b|COMMAND|--help", command):
            places.setdefault(command, place)
    return [pytest.param(command, id=f"{place}: {command}"[:90]) for command, place in sorted(places.items())]


@pytest.mark.parametrize("command", all_commands())
def test_commands_are_accepted(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    # a person's own folder, which the next test makes
    _, name, *argv = shlex.split(command.replace("--data=pictures", "--data=folder --data.root pictures"))
    assert name in COMMANDS
    with contextlib.redirect_stdout(io.StringIO()):
        accept(name, argv)


def test_scripts_exist():
    text = "".join(page.read_text() for page in [*tables.pages(), *(ROOT / "docs/results").glob("*.json")])
    scripts = set(re.findall(r"python ((?:examples|samplers|tools|benchmarks)/\w+\.py)", text))
    assert scripts
    assert not [script for script in scripts if not (ROOT / script).is_file()]


def test_options_in_sentences_exist():
    """The last part of each `--block.option` is a field or an argument somewhere."""
    sources = [
        file
        for folder in ("genkit", "benchmarks", "examples", "samplers", "tools")
        for file in (ROOT / folder).rglob("*.py")
    ]
    code = "".join(file.read_text() for file in sources)
    known = set(re.findall(r"^ +(\w+)(?:: |=|, )", code, re.MULTILINE)) | set(re.findall(r'"--([\w-]+)"', code))
    known |= {"help", "version", "config", "resume", "num_processes", "nproc-per-node"}
    unknown = set()
    for page in tables.pages():
        for option in re.findall(r"`--([a-z][\w.-]*)", page.read_text()):
            name = option.rpartition(".")[2]
            if not {name, name.replace("-", "_")} & known:
                unknown.add(f"{page.name}: --{option}")
    assert not unknown


def test_names_in_python_blocks_exist():
    """What a block imports can be imported, and `genkit.NAME` is public."""
    for page in tables.pages():
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = import_module(str(node.module))
                    assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], page
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "genkit":
                    assert node.attr in genkit.__all__, f"{page}: genkit.{node.attr}"


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_the_commands_for_ones_own_pictures_run(page, tmp_path, monkeypatch, capsys):
    """As they are printed, one after the other, but for options that make them short."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i % 3, 24, 3), np.uint8)).save(path)
    section = (ROOT / page).read_text().partition("## Your own pictures")[2].partition("\n## ")[0]
    short = {
        "train": ["--data.size=8", "--steps=2", "--batch=8", "--backbone.width=8", "--no-tensorboard", "--device=cpu"],
        "sample": ["--steps=2", "--device=cpu"],
        "eval": ["--features=raw", "--metrics=fid", "--n=8", "--steps=2", "--device=cpu"],
        "report": [],
    }
    commands = re.findall(r"^(genkit [^#\n]*)", section, re.MULTILINE)
    assert [shlex.split(command)[1] for command in commands] == list(short)
    for command in commands:
        _, name, *argv = shlex.split(command)
        assert main([name, *argv, *short[name]]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "held out" in said
    assert "0 cat: " in said
    assert (tmp_path / "runs" / "latest" / "report.html").is_file()
