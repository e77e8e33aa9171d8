"""What a study searches: intervals and choices of options, by their dotted names."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass
from typing import Any, TypeVar

import yaml

from genkit.config.blocks import (
    ConfigError,
    as_block,
    check_value,
    dump,
    find_settings,
    find_types,
    from_dict,
    get_fields,
    suggest,
    to_plain,
)
from genkit.config.command import put_setting, to_path
from genkit.training.settings import TrainSettings

Settings = TypeVar("Settings")
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
INTERVAL = re.compile(rf"(log:)?({NUMBER})\.\.({NUMBER})")
FORMS = "NAME=LOW..HIGH, NAME=log:LOW..HIGH or NAME=A,B,C"
MAX_CHOICES = 100
FOLLOWING: Mapping[str, Field] = {
    name: f for name, f in get_fields(TrainSettings).items()
    if {"optimizer", "objective"} & {followed.partition(".")[0] for followed in f.metadata.get("follows", "").split()}
}  # fmt: skip  # settings that have a default of their own for some optimizers and objectives


@dataclass(frozen=True)
class Interval:
    """An option between two numbers, both included."""

    name: str
    """dotted"""
    low: float
    high: float
    log: bool = False
    """whether equal ratios are equally likely, not equal differences"""
    integer: bool = False

    @property
    def examples(self) -> list[Any]:
        """Values that a trial may have: both ends."""
        return [self.low, self.high]

    def suggest(self, trial: Any) -> Any:
        """The value of an Optuna trial."""
        if self.integer:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def read(self, recorded: Any) -> Any:
        """The value that Optuna has ``recorded``."""
        return recorded

    def find_text(self, value: Any) -> Any:
        """``value`` as Optuna knows it; None if it is not within the interval."""
        inside = isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high
        return value if inside else None


@dataclass(frozen=True)
class Choice:
    """An option that is one of several values, in no order."""

    name: str
    """dotted"""
    values: Mapping[str, Any]
    """by their text, which is what Optuna keeps"""

    @property
    def examples(self) -> list[Any]:
        """Values that a trial may have: all."""
        return list(self.values.values())

    def suggest(self, trial: Any) -> Any:
        """The value of an Optuna trial."""
        return self.read(trial.suggest_categorical(self.name, list(self.values)))

    def read(self, recorded: str) -> Any:
        """The value of a text that Optuna has ``recorded``."""
        return self.values[recorded]

    def find_text(self, value: Any) -> str | None:
        """``value`` as Optuna knows it; None if it is none of them."""
        if isinstance(value, Mapping):  # a block, which its name chooses
            value = value["name"]
        return next((text for text, known in self.values.items() if known == value), None)


Dimension = Interval | Choice


def parse_space(
    texts: Sequence[str], settings: Any, fixed: Iterable[str] = (), kept: Collection[str] = ()
) -> list[Dimension]:
    """The space that ``NAME=LOW..HIGH``, ``NAME=log:LOW..HIGH`` and ``NAME=A,B,C`` describe, for these ``settings``.

    ``ValueError`` for a name that is none of the settings' or one of ``fixed``, and for values that they refuse, alone
    or with a choice of another name. ``kept`` are settings that follow no choice.
    """
    space = parse_dimensions(texts, settings, fixed)
    require_valid_values(space, settings, kept)
    return space


def parse_dimensions(texts: Sequence[str], settings: Any, fixed: Iterable[str] = ()) -> list[Dimension]:
    """The options that ``texts`` describe, each by itself. ``ValueError`` for one that ``settings`` do not have."""
    if not texts:
        raise ValueError(f"space: given nothing; needs options to search, as {FORMS}, say lr=log:1e-4..1e-2")
    known = {path: hint for path, hint in find_settings(as_block(settings)) if path.partition(".")[0] not in fixed}
    space = [parse_dimension(text, known) for text in texts]
    names = [dimension.name for dimension in space]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"space: {repeated} is given twice; give each option once")
    return space


def parse_dimension(text: str, known: Mapping[str, Any]) -> Dimension:
    """One option of the space; ``known`` are the types of all, None for a block. ``ValueError`` if it is none."""
    name, equals, values = text.partition("=")
    name = to_path(name if name.startswith("--") else f"--{name}") or ""
    if not equals or not values.strip():
        raise ValueError(f"space: given {text!r}; needs {FORMS}")
    if name not in known:
        raise ValueError(f"space: given {name}, which is no option to search; {list_names(name, known)}")
    if match := INTERVAL.fullmatch(values.strip()):
        return parse_interval(name, known[name], match)
    types = find_types(known[name]) if known[name] is not None else set()
    if types & {int, float} and (".." in values or values.startswith("log:")):  # else a path may be above this folder
        raise ValueError(f"space: given {text!r}, whose ends are no numbers; needs {FORMS}")
    return parse_choice(name, known[name], values)


def parse_interval(name: str, hint: Any, match: re.Match) -> Interval:
    """An interval of an option of type ``hint`` (None: a block). ``ValueError`` if the option is no number."""
    text, log = match[0], bool(match[1])
    low, high = float(match[2]), float(match[3])
    types = find_types(hint) if hint is not None else set()
    if not types & {int, float} or tuple in types:
        raise ValueError(f"space: given {name}={text}, but {name} is no number; give choices: {name}=A,B,C")
    integer = float not in types
    if integer and not (low.is_integer() and high.is_integer()):
        raise ValueError(f"space: given {name}={text}, but {name} is an integer; needs integers at both ends")
    if not low < high or not math.isfinite(high - low):
        raise ValueError(f"space: given {name}={text}; the first end needs to be below the second")
    if log and low <= 0:
        raise ValueError(f"space: given {name}={text}; a logarithmic interval needs ends above 0")
    return Interval(name, int(low) if integer else low, int(high) if integer else high, log, integer)


def parse_choice(name: str, hint: Any, text: str) -> Choice:
    """Choices, separated by commas; each is written as in YAML. ``ValueError`` if there are fewer than two, or one is
    not of the option's type ``hint`` (None: a block)."""
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        values = []
    if not isinstance(values, list) or not 2 <= len(values) <= MAX_CHOICES:
        raise ValueError(f"space: given {name}={text}; needs two choices or more, as in {name}=A,B,C")
    try:
        values = values if hint is None else [to_plain(check_value(hint, value, name)) for value in values]
    except ConfigError as e:
        raise ValueError(f"space: {e}") from None
    choices = {str(value) if isinstance(value, str) else yaml_text(value): value for value in values}
    if len(choices) < len(values):
        raise ValueError(f"space: given {name}={text}, where a choice is given twice")
    return Choice(name, choices)


def format_choice(name: str, values: Sequence[Any]) -> str:
    """The text that describes a choice of ``values``, as :func:`parse_choice` reads it."""
    return f"{name}={yaml_text(list(values)).removeprefix('[').removesuffix(']')}"


def yaml_text(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()


def list_names(name: str, known: Mapping[str, Any]) -> str:
    """The options beside ``name``, for a message: those of its block."""
    block = name.rpartition(".")[0]
    beside = [path for path in known if path.rpartition(".")[0] == block] or [p for p in known if "." not in p]
    return f"allowed: {', '.join(beside)}{suggest(name, known)}"


def require_valid_values(space: Sequence[Dimension], settings: Any, kept: Collection[str] = ()) -> None:
    """``ValueError`` if the settings refuse an end or a choice, with any choice of blocks."""
    tables = [d for d in space if isinstance(d, Choice) and is_block(d.name, settings)]
    others = [d for d in space if d not in tables]
    for chosen in itertools.product(*(d.examples for d in tables)):
        blocks = {d.name: value for d, value in zip(tables, chosen, strict=True)}
        with_blocks = "".join(f" with {name}={value}" for name, value in blocks.items())
        for values in ({}, *({d.name: value} for d in others for value in d.examples)):
            try:
                with_values(settings, {**blocks, **values}, kept)
            except ConfigError as e:
                raise ValueError(f"space: {e}{with_blocks if values else ''}") from None


def is_block(name: str, settings: Any) -> bool:
    """Whether the setting is a block, which a name chooses."""
    return any(path == name and hint is None for path, hint in find_settings(as_block(settings)))


def with_values(settings: Settings, values: Mapping[str, Any], kept: Collection[str] = ()) -> Settings:
    """``settings`` with others by dotted name. Raises ``ConfigError`` for one that does not fit.

    Settings that have the default of their block, such as Muon's learning rate, follow another choice of that block,
    except for those in ``kept``.
    """
    cls: type[Settings] = type(settings)
    fields, tree = get_fields(cls), dump(settings)
    blocks = {name: tree[name] for name, f in fields.items() if "table" in f.metadata and "follows" not in f.metadata}
    defaults = dump(from_dict(cls, blocks))
    for name, f in fields.items():
        given = name in kept or any(path.partition(".")[0] == name for path in values)
        if "follows" in f.metadata and not given and tree[name] == defaults[name]:
            del tree[name]
    for path in sorted(values, key=lambda path: path.count(".")):  # a block before its settings
        if not is_chosen(tree, path, values[path]):  # else its settings stay as they are
            put_setting(tree, path, to_plain(values[path]))
    return from_dict(cls, tree)


def is_chosen(tree: Mapping[str, Any], path: str, value: Any) -> bool:
    """Whether ``value`` is the name of the block that is at ``path`` already."""
    inner: Any = tree
    for part in path.split("."):
        inner = inner.get(part) if isinstance(inner, Mapping) else None
    return isinstance(inner, Mapping) and inner.get("name") == value


def value_of(settings: Any, name: str) -> Any:
    """The value of the setting of this dotted name, as YAML holds it."""
    value: Any = dump(settings)
    for part in name.split("."):
        value = value[part]
    return value
