"""Configuration: a frozen dataclass, a YAML file and a command line describe the same thing, with one set of checks."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from genkit.config.blocks import ConfigError, dump, from_dict, load_object, load_yaml, narrow, override, to_yaml
from genkit.config.command import parse

__all__ = [
    "ConfigError",
    "dump",
    "from_dict",
    "load_object",
    "load_yaml",
    "narrow",
    "override",
    "parse",
    "table",
    "to_yaml",
]


def table(registry: str, name: str, **metadata: str) -> Any:
    """Declare a field that holds an instance of one of the dataclasses in ``registry`` ("module:NAME").

    The default is entry ``name`` with its own defaults. ``metadata``: see ``genkit.config.blocks``.
    """
    return field(default_factory=lambda: load_object(registry)[name](), metadata={"table": registry, **metadata})
