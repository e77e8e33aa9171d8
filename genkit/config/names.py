"""Settings whose value is a name in a registry, such as a sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from genkit.config.blocks import load_object, suggest


@dataclass(frozen=True)
class NameIn:
    """Marks a text as a name in a registry: ``Annotated[str, NameIn("genkit.diffusion.samplers:SAMPLERS")]``.

    An unknown name is refused, with the known ones, and the help lists them. The registry, a mapping, is imported when
    it is first needed. With a ``separator``, the text is a list of names.
    """

    registry: str
    separator: str | None = None

    def names(self) -> list[str]:
        """Return the known names."""
        return list(load_object(self.registry))

    def suggest(self, name: str) -> str:
        """Return a hint at the entry that other libraries call ``name``, or whose name is close to it."""
        registry = load_object(self.registry)
        for known, entry in registry.items():
            if name.lower().replace("-", "_") in getattr(entry, "other_names", ()):
                return f"; {name} is {known} here"
        return suggest(name, registry)

    def check(self, text: str) -> str:
        """Return ``text``. Raises ``ValueError`` for an unknown name."""
        known = self.names()
        for name in text.split(self.separator) if self.separator else [text]:
            if name.strip() not in known:
                what = f"{name.strip()!r} is unknown; " if name != text else ""
                raise ValueError(f"{what}allowed: {', '.join(known)}{self.suggest(name.strip())}")
        return text

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))
