"""Settings that are paths: ``~`` is the home directory, and empty text (an unset variable of the shell) is refused."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator


def expand_path(path: str) -> str:
    """``path`` with ``~`` expanded. ``ValueError`` if it is empty, or holds a NUL."""
    if not path.strip():
        raise ValueError("an empty text is no path; name a file or folder (is a variable of the shell unset?)")
    if "\0" in path:
        raise ValueError("a path holds no NUL character")
    return os.path.expanduser(path)


PathText = Annotated[str, AfterValidator(expand_path)]
"""The type of every setting that is a path, or a path or a name: runs, files, folders, roots of data sets."""
