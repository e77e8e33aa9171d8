"""Configuration: a frozen dataclass, a YAML file and a command line are the same thing, checked in the same place."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from genkit.config.blocks import ConfigError, dump, from_dict, load, load_yaml, narrow, override, to_yaml
from genkit.config.command import parse

__all__ = [
    "ConfigError",
    "dump",
    "from_dict",
    "load_yaml",
    "narrow",
    "override",
    "parse",
    "table",
    "to_yaml",
]


def table(registry: str, name: str, **metadata: str) -> Any:
    """A field that holds an object of a dataclass in ``registry`` ("module:NAME"), by default ``name``'s."""
    return field(default_factory=lambda: load(registry)[name](), metadata={"table": registry, **metadata})
