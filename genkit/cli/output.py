"""What commands print: text in which names from files and other people's runs cannot control the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from genkit.cli.escape import printable


class SafeConsole(Console):
    """A console whose text and cells of tables have their control characters escaped; lines are not wrapped."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, soft_wrap=True, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects as text, and tables."""
        text = [obj if hasattr(obj, "__rich_console__") else str(obj) for obj in objects]
        super().print(*text, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """All text passes here, also the cells of a table."""
        return super().render_str(printable(text, lines=True), **options)


console = SafeConsole()
