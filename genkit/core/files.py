"""Files that appear whole or not at all, and what is said of those that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A place beside ``path`` to write to. It takes that name when the block ends well, and is gone when it does not.

    The folders above are made. Each process has a place of its own; of two that write one file, the last stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}-{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` whole or not at all; its path."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def one_line(error: Exception) -> str:
    """What an error says, or of which kind it is where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
