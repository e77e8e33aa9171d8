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


TRUSTED: set[str] = set()  # directories of runs that were opened with ``trust=True``


class UntrustedCodeError(ConfigError):
    """A configuration that somebody else may have written names code, which would run."""


def is_trusted(run: object = None) -> bool:
    """Whether the user trusts the runs that this process opens, or the directory ``run``."""
    return os.environ.get("GENKIT_TRUST", "0") not in ("", "0") or str(run) in TRUSTED


def require_trust(cls: type, tree: Mapping[str, Any], location: object, trust: bool = False) -> None:
    """``UntrustedCodeError`` if a stored mapping for ``cls`` names a class whose module would be imported.

    Modules of genkit and those that were imported before, by the user's own program or command line, are allowed.
    """
    if trust:
        return
    for path, name in stored_class_names(cls, tree):
        require_trusted_code(name, f"{location}: {path}")


def require_trusted_code(name: str, path: str, run: object = None) -> None:
    """``UntrustedCodeError`` if ``name``, MODULE:NAME at ``path`` in a stored configuration, would import a module.

    ``run`` is the directory that it is stored in, if that may have been opened as a trusted one.
    """
    module, colon, _ = name.partition(":")
    if colon and is_foreign(module) and module not in sys.modules and not is_trusted(run):
        raise UntrustedCodeError(
            path, f"names {name}, whose code would run; if you trust who made this run: --trust, or GENKIT_TRUST=1"
        )


def is_foreign(module: str) -> bool:
    """Whether a module is not genkit's."""
    return module.partition(".")[0] != "genkit"


def names_foreign_code(cls: type, tree: Mapping[str, Any], environment: str = "") -> bool:
    """Whether a mapping for ``cls``, or the name of an environment, names code that is not genkit's."""
    names = [*(name for _, name in stored_class_names(cls, tree)), environment]
    return any(is_foreign(name.partition(":")[0]) for name in names if ":" in name)


def stored_class_names(cls: type, tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """:func:`class_names` in the blocks of a stored mapping for ``cls``."""
    tables = {f.name for f in dataclasses.fields(cls) if "table" in f.metadata}
    return class_names({k: v for k, v in tree.items() if k in tables})


def class_names(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """``(path, package.module:Class)`` for all texts of this form, at any depth."""
    for key, value in tree.items():
        inner = join_path(path, str(key))
        if isinstance(value, Mapping):
            yield from class_names(value, inner)
        elif isinstance(value, str) and CLASS_NAME.fullmatch(value):
            yield inner, value
