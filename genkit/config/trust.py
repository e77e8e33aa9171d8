"""Trust: a configuration that somebody else wrote, that of a run, imports no code that is not genkit's.

Set ``GENKIT_TRUST=1``, give ``--trust`` on the command line or ``load(..., trust=True)`` in Python to allow it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from genkit.config.blocks import ConfigError, join_path

CLASS_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_trusted() -> bool:
    """Whether the user trusts the runs that this process opens."""
    return os.environ.get("GENKIT_TRUST", "0") not in ("", "0")


def require_trust(cls: type, tree: Mapping[str, Any], location: object, trust: bool = False) -> None:
    """``ConfigError`` if a stored mapping for ``cls`` names a class whose module would be imported.

    Modules of genkit and those that were imported before, by the user's own program or command line, are allowed.
    """
    if trust or is_trusted():
        return
    tables = {f.name for f in dataclasses.fields(cls) if "table" in f.metadata}
    for path, name in class_names({k: v for k, v in tree.items() if k in tables}):
        module = name.partition(":")[0]
        if module.partition(".")[0] != "genkit" and module not in sys.modules:
            raise ConfigError(
                f"{location}: {path}",
                f"names {name}, whose code would run; if you trust who made this run: --trust, or GENKIT_TRUST=1",
            )


def class_names(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """``(path, package.module:Class)`` for all texts of this form, at any depth."""
    for key, value in tree.items():
        inner = join_path(path, str(key))
        if isinstance(value, Mapping):
            yield from class_names(value, inner)
        elif isinstance(value, str) and CLASS_NAME.fullmatch(value):
            yield inner, value
