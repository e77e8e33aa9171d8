"""The files in configs/: they load, every key is known, and every command in their heads is one that genkit accepts."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from genkit import config
from genkit.rl.finetune.settings import FinetuneSettings
from genkit.training.settings import TrainSettings
from tests.support.commands import accept, read_head, read_head_commands

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
each_file = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT / "configs")) for path in FILES])


def load(path: Path):
    """The settings in a file, as its command reads them. ConfigError for an unknown key or an invalid value."""
    if path.parent.name == "finetune":
        return config.parse(FinetuneSettings, ["runs/latest", "--config", str(path)])
    return config.parse(TrainSettings, ["--config", str(path)])


@each_file
def test_the_file_loads_and_makes_the_round_trip(path):
    settings = load(path)
    assert config.from_dict(type(settings), config.dump(settings)) == settings


@each_file
def test_an_unknown_key_in_the_file_would_be_refused(path, tmp_path):
    copy = tmp_path / path.parent.name / path.name
    copy.parent.mkdir()
    copy.write_text(path.read_text() + "stepz: 3\n")
    with pytest.raises(config.ConfigError, match="stepz: unknown setting"):
        load(copy)


@each_file
def test_the_head_states_command_hardware_minutes_and_result(path):
    head = read_head(path)
    keys = re.findall(r"^(\w+):", "\n".join(head), re.MULTILINE)
    assert keys == ["command", "hardware", "minutes", "expect"]
    assert max(map(len, path.read_text().splitlines()[: len(head)])) <= 120


@each_file
def test_every_command_in_the_head_is_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = read_head_commands(path)
    name = "finetune" if path.parent.name == "finetune" else "train"
    own = [shlex.split(c) for c in commands if f"--config {path.relative_to(ROOT)}" in c]
    assert [argv[1] for argv in own] == [name], "the head shows the command that uses the file"
    for command in commands:
        _, name, *argv = shlex.split(command)
        with contextlib.redirect_stdout(io.StringIO()):
            accept(name, argv)


def test_no_command_hides_in_a_sentence():
    """A command has lines of its own, so that the tests find it; a backslash continues it."""
    for path in FILES:
        hidden = [line for line in read_head(path) if re.search(r"\S.*\bgenkit [a-z]+ (-|runs|RUN)", line)]
        assert not [line for line in hidden if not re.match(r"(command: +)?(genkit|python)", line)], path


def test_heads_are_read_with_keys_and_continuations(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "# Title: genkit in a sentence.\n"
        "# command:  genkit demo four-ways\n"
        "#           genkit train --steps 3 \\\n"
        "#               --batch 4\n"
        "# expect:   1.0:\n"
        "#           genkit rollout runs/latest\n"
        "steps: 3\n# genkit not in the head\n"
    )
    assert read_head_commands(file) == [
        "genkit demo four-ways",
        "genkit train --steps 3 --batch 4",
        "genkit rollout runs/latest",
    ]
