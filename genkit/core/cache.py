"""What genkit's cache holds, and how to make room in it.

Every file of the cache is whole or absent, and is made again, or downloaded, when it is needed; but statistics that
were saved by name may have no other copy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from genkit.core.tensors import cache_folder

NETWORKS = "networks"  # files in the folder itself
KINDS: Mapping[str, str] = {
    "frames": "images of recordings, decoded",
    "text": "states of captions",
    "reference": "features of reference samples",
    "statistics": "reference statistics saved by name",
    "tar-index": "indexes of tar files",
    "partial": "evaluations that were interrupted",
    "hub": "downloads from the Hugging Face Hub",
    NETWORKS: "weights of feature networks",
}
"""folders of the cache, and what is in them"""
KEPT = ("statistics",)  # by "all": nothing can make them again
IN_USE = 600.0  # seconds after a change for which a file is taken to be one that a process still writes


@dataclass(frozen=True)
class CachedFiles:
    """The files of one kind."""

    kind: str
    files: int
    size: int
    """bytes"""
    used: float
    """when one of them was last read or written, in seconds since 1970; as exact as the file system keeps it"""


@dataclass(frozen=True)
class Cleared:
    """What was removed, and what is younger than asked for or may be in use."""

    files: int
    size: int
    """bytes"""
    kept: int
    """files that stay"""


def list_cache() -> list[CachedFiles]:
    """What there is of each kind, the largest first; nothing if there is no cache."""
    found = []
    for kind in cached_kinds():
        stats = [path.stat() for path in cached_files(kind)]
        if stats:
            used = max(max(s.st_atime, s.st_mtime) for s in stats)
            found.append(CachedFiles(kind, len(stats), sum(s.st_size for s in stats), used))
    return sorted(found, key=lambda files: -files.size)


def clear_cache(kinds: Sequence[str], unused: float = 0.0) -> Cleared:
    """Remove the files of ``kinds`` that were not read or written for ``unused`` seconds.

    The kind ``all`` stands for all that can be made again or downloaded.

    Files that were changed in the last ten minutes stay: a process may still write them. ``ValueError`` for a kind that
    does not exist.
    """
    existing = cached_kinds()
    for kind in kinds:
        if kind not in ("all", *KINDS, *existing):
            raise ValueError(f"clear: given {kind}; allowed: all, {', '.join(dict.fromkeys((*KINDS, *existing)))}")
    chosen = dict.fromkeys(kinds)
    if "all" in chosen:
        chosen |= dict.fromkeys(kind for kind in existing if kind not in KEPT)
    files, size, kept, now = 0, 0, 0, time.time()
    for path in [path for kind in chosen for path in cached_files(kind)]:
        stat = path.stat()
        if now - stat.st_mtime < IN_USE or now - max(stat.st_atime, stat.st_mtime) < unused:
            kept += 1
        else:
            path.unlink(missing_ok=True)
            files, size = files + 1, size + stat.st_size
    return Cleared(files, size, kept)


def cached_kinds() -> list[str]:
    """The kinds that the cache has, known or not."""
    folder = cache_folder()
    if not folder.is_dir():
        return []
    return [*sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), NETWORKS]


def cached_files(kind: str) -> Iterator[Path]:
    """The files of a kind, without links, but with temporary ones that a killed process has left."""
    folder = cache_folder()
    paths = folder.iterdir() if kind == NETWORKS else (folder / kind).rglob("*")
    for path in paths if folder.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            yield path
