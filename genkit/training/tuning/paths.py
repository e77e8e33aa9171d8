"""Paths of a study, which mean the same for all of its trials: from any directory, and when ``latest`` has moved on."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from genkit import config
from genkit.config import load_object
from genkit.config.blocks import as_block, find_settings, get_fields, get_hints
from genkit.config.command import put_setting
from genkit.config.help_text import find_marks
from genkit.config.paths import PathText
from genkit.core.links import LINK_NAME
from genkit.data import DataSource
from genkit.training.first_stage import canonical_first_stage
from genkit.training.init_sources import canonical_init
from genkit.training.settings import TrainSettings
from genkit.training.tuning.space import format_choice, parse_dimensions

Settings = TypeVar("Settings", bound=TrainSettings)
RUNS: Mapping[str, Callable[[str], str]] = {"codec": canonical_first_stage, "init": canonical_init}
NO_SOURCES = {"out", "resume"}  # paths from which no trial reads


def with_lasting_paths(settings: Settings) -> Settings:
    """``settings`` with every path from which a trial may read, such as ``init`` and ``data.root``, as an absolute one
    without ``latest``. What is not there stays as it is."""
    changes: dict[str, Any] = {}
    for name, hint in find_settings(as_block(settings)):
        owner, field = find_owner(settings, name)
        value = getattr(owner, field)
        if isinstance(value, str) and is_path(owner, name, hint) and (new := lasting_text(owner, name, value)) != value:
            put_setting(changes, name, new)
    return config.override(settings, **changes)


def with_lasting_choices(texts: Sequence[str], settings: TrainSettings, fixed: Iterable[str] = ()) -> tuple[str, ...]:
    """The ``texts`` of a space, with the paths among its choices as :func:`with_lasting_paths` has them.

    ``ValueError`` for a text that describes no option of ``settings``, or one of ``fixed``.
    """
    new = []
    for text, dimension in zip(texts, parse_dimensions(texts, settings, fixed), strict=True):
        values = [lasting_choice(settings, dimension.name, value) for value in dimension.examples]
        new.append(text if values == dimension.examples else format_choice(dimension.name, values))
    return tuple(new)


def lasting_choice(settings: TrainSettings, name: str, value: Any) -> Any:
    """``value`` of the setting ``name``; a path, or one that stands for a block, as a lasting one."""
    owner, field = find_owner(settings, name)
    if not isinstance(value, str):
        return value
    if "table" in (meta := get_fields(type(owner))[field].metadata):
        names = {known.replace("_", "-") for known in load_object(meta["table"])}
        is_fallback = "fallback" in meta and value.replace("_", "-") not in names
        return lasting_path(value) if is_fallback and os.path.exists(os.path.expanduser(value)) else value
    return lasting_text(owner, name, value) if is_path(owner, name, get_hints(type(owner))[field]) else value


def find_owner(settings: Any, name: str) -> tuple[Any, str]:
    """The block that has the setting of this dotted name, and the name of its field."""
    *blocks, field = name.split(".")
    return functools.reduce(getattr, blocks, settings), field


def is_path(owner: Any, name: str, hint: Any) -> bool:
    """Whether a trial may read from the path that the setting ``name`` of ``owner``, of type ``hint``, is."""
    if name in NO_SOURCES or hint is None:
        return False
    is_root = isinstance(owner, DataSource) and name.rpartition(".")[2] == "root"  # an external source may say str
    return is_root or any(mark in find_marks(hint) for mark in find_marks(PathText))


def lasting_text(owner: Any, name: str, text: str) -> str:
    """The path ``text`` of the setting ``name`` of ``owner``, which does not depend on the working directory."""
    if name in RUNS:
        with contextlib.suppress(ValueError):
            return RUNS[name](text)
        return text
    if isinstance(owner, DataSource) and name.rpartition(".")[2] == "root":
        text = getattr(owner.with_fields(root=text).with_absolute_root(), "root", text)
    return lasting_path(text)


def lasting_path(text: str) -> str:
    """``text`` as an absolute path without ``latest`` if it exists, also behind a KIND: that tells what it is."""
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return os.path.realpath(path) if LINK_NAME in Path(path).parts else os.path.abspath(path)
    kind, colon, rest = text.partition(":")
    return f"{kind}:{lasting_path(rest)}" if colon and rest and os.path.exists(os.path.expanduser(rest)) else text
