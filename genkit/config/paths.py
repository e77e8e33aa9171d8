"""Settings that are paths: ``~`` is the home directory, and empty text (an unset variable of the shell) is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def expand_path(path: str) -> str:
    """``path`` with ``~`` expanded, and links that are text files (:func:`follow_links`) followed.

    Raises ``ValueError`` if it is empty, or holds a NUL.
    """
    if not path.strip():
        raise ValueError("an empty text is no path; name a file or folder (is a variable of the shell unset?)")
    if "\0" in path:
        raise ValueError("a path holds no NUL character")
    from genkit.core.links import follow_links  # lazy: genkit.core imports torch, which no configuration needs

    path = os.path.expanduser(path)
    followed = follow_links(path)
    return path if followed == Path(path) else str(followed)


def check_name(name: str) -> str:
    """``name`` if it can name a directory. ``ValueError`` if it is empty or holds a slash or a control character."""
    if not name.strip() or name in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f-\x9f]", name):
        raise ValueError("a name is not empty and holds no slash and no control character")
    return name


NameText = Annotated[str, AfterValidator(check_name)]
"""The type of a setting that names a run directory."""
PathText = Annotated[str, AfterValidator(expand_path)]
"""The type of every setting that is a path, or a path or a name: runs, files, folders, roots of data sets."""
