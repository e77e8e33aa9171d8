"""What the commands of the command line accept, without doing their work."""

import itertools
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from genkit import config
from genkit.cli.commands.bench import BENCHES
from genkit.cli.main import COMMANDS
from genkit.config.blocks import get_fields, load_object, parse_block
from genkit.config.command import FlagParser


class Accepted(Exception):
    """Raised in place of the work that a command would do."""


def accept(name: str, argv: list[str]) -> None:
    """Parse ``argv`` as the command ``name`` would. ConfigError if it is refused."""
    if name == "bench":
        assert argv[0] in BENCHES
        return
    if name in ("train", "tune"):  # their main looks for the runs of --init and --resume first
        config.parse(load_object(COMMANDS[name].settings), argv)
        return
    module = import_module(COMMANDS[name].module)

    def parse(*args, **kwargs):
        config.parse(*args, **kwargs)
        raise Accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parse", parse)
        with pytest.raises(Accepted):
            module.main(argv)


def settings_class(name: str) -> type:
    """The dataclass that the command ``name`` parses its arguments into."""
    module = import_module(COMMANDS[name].module)
    classes = []

    def parse(cls, *args, **kwargs):
        classes.append(cls)
        raise Accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parse", parse)
        with pytest.raises(Accepted):
            module.main([])
    return classes[0]


def flag_parsers(name: str) -> Iterator[FlagParser]:
    """The flags of the command ``name``: by default, and with each entry of each of its tables."""
    cls = settings_class(name)
    choices = [{}]
    for field, f in get_fields(cls).items():
        if "table" in f.metadata:
            choices += [{field: {"name": entry}} for entry in load_object(f.metadata["table"])]
    yield from (FlagParser(parse_block(cls, choice), help=False) for choice in choices)


def read_head(file: Path) -> list[str]:
    """The lines of the comment at the beginning of a YAML file, without ``# `` and indentation."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    return [line.removeprefix("#").strip() for line in lines]


def read_head_commands(file: Path) -> list[str]:
    """The ``genkit`` commands in the head of a YAML file. Each begins a line; a backslash continues it."""
    text = "\n".join(read_head(file)).replace("\\\n", "")
    return re.findall(r"^(?:command: +)?(genkit .*)$", text, re.MULTILINE)
