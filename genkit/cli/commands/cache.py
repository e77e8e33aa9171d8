"""`genkit cache`: what genkit keeps on disk to be faster, and its removal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from genkit.cli.formats import format_age, format_bytes
from genkit.cli.output import console
from genkit.config import parse
from genkit.core.cache import KINDS, clear_cache, list_cache
from genkit.core.durations import DurationText, parse_duration
from genkit.core.tensors import cache_folder


@dataclass(frozen=True)
class Cache:
    """List the files that genkit keeps to be faster, in GENKIT_CACHE or ~/.cache/genkit; with --clear, remove some.

    All are made again, or downloaded, when they are needed, but for statistics: what eval --save-stats has written may
    have no other copy.
    """

    clear: tuple[str, ...] = ()
    """Kinds of files to remove, or all: every kind but statistics."""
    unused: DurationText | None = None
    """Remove only files that were not used for this time: 12h, 30d."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Cache, argv, prog="genkit cache", description=Cache.__doc__)
    if command.unused and not command.clear:
        raise ValueError("unused: given without --clear; name what to remove, such as --clear frames --unused 30d")
    if command.clear:
        cleared = clear_cache(command.clear, parse_duration(command.unused) if command.unused else 0.0)
        kept = f"; {cleared.kept} that were used since then, or changed just now, stay" if cleared.kept else ""
        console.print(f"removed {cleared.files} files, {format_bytes(cleared.size)}{kept}")
    found = list_cache()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head, right in (("kind", False), ("files", True), ("size", True), ("last used", True), ("", False)):
        table.add_column(head, justify="right" if right else "left", overflow="fold")
    for row in found:
        what = KINDS.get(row.kind, "")
        table.add_row(row.kind, f"{row.files:,}", format_bytes(row.size), format_age(row.used), what)
    if found:
        console.print(table)
    console.print(f"{format_bytes(sum(row.size for row in found))} in {cache_folder()}")
    return 0
