"""The link ``latest``, in a directory of runs and in a run, also on file systems that have no symbolic links.

There it is a text file, ``genkit link: TARGET``.
"""

from __future__ import annotations

import os
from pathlib import Path

from genkit.core.files import write_text

LINK_NAME = "latest"
MARK = "genkit link: "


def set_link(link: Path, target: str) -> None:
    """Let ``link`` refer to ``target``, a path below the link's directory; atomically.

    Raises ``ValueError`` if something of the user's has that name.
    """
    require_link(link)
    new = link.with_name(f".{link.name}-{os.getpid()}")
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(target)
    except (OSError, NotImplementedError):  # exFAT, some network drives, Windows without the right
        write_text(link, f"{MARK}{target}\n")
    else:
        os.replace(new, link)


def require_link(link: Path) -> None:
    """``ValueError`` if ``link`` is neither absent nor a link to a directory below its own."""
    if link.is_symlink():
        target = link.resolve()
        replaceable = not target.exists() or (target.is_dir() and target.is_relative_to(link.parent.resolve()))
    else:
        replaceable = not link.exists() or read_link(link) is not None
    if not replaceable:
        raise ValueError(f"{link}: is in the way: genkit needs this name for a link; move it, or give --out")


def read_link(path: Path) -> str | None:
    """The target that a text file names in place of a symbolic link; None for everything else."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 16:
        return None
    content = path.read_bytes()
    return content.decode(errors="replace").removeprefix(MARK).strip() if content.startswith(MARK.encode()) else None


def follow_links(path: str | Path) -> Path:
    """``path`` with each part ``latest`` that is such a text file replaced by its target."""
    path = Path(path)
    if LINK_NAME not in path.parts:
        return path
    followed = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        target = read_link(followed / part) if part == LINK_NAME else None
        followed = followed / (target or part)
    return followed
