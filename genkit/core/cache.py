"""What genkit's cache holds, and how to make room in it.

Every file of the cache is whole or absent, and is made again, or downloaded, when it is needed; but statistics that
were saved by name may have no other copy.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from genkit.core.files import remove_directory
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
WHOLE: Mapping[str, int] = {"hub": 2}  # kinds whose files go together: those of a folder so many levels below (a run)
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
        stats = [stat for _, stat in cached_files(kind)]
        if stats:
            used = max(max(s.st_atime, s.st_mtime) for s in stats)
            found.append(CachedFiles(kind, len(stats), sum(s.st_size for s in stats), used))
    return sorted(found, key=lambda files: -files.size)


def clear_cache(kinds: Sequence[str], unused: float = 0.0) -> Cleared:
    """Remove the files of ``kinds`` that were not read or written for ``unused`` seconds.

    The kind ``all`` stands for all that can be made again or downloaded.

    Files that were changed in the last ten minutes stay: a process may still write them. A run from the hub goes or
    stays as a whole. ``ValueError`` for a kind that does not exist.
    """
    existing = cached_kinds()
    for kind in kinds:
        if kind not in ("all", *KINDS, *existing):
            raise ValueError(f"clear: given {kind}; allowed: all, {', '.join(dict.fromkeys((*KINDS, *existing)))}")
    chosen = dict.fromkeys(kinds)
    if "all" in chosen:
        chosen |= dict.fromkeys(kind for kind in existing if kind not in KEPT)
    files, size, kept, now = 0, 0, 0, time.time()
    for path, stats in [entry for kind in chosen for entry in cached_entries(kind)]:
        changed = max(stat.st_mtime for stat in stats)
        if now - changed < IN_USE or now - max(changed, *(stat.st_atime for stat in stats)) < unused:
            kept += len(stats)
            continue
        with contextlib.suppress(FileNotFoundError):
            remove_directory(path) if path.is_dir() else path.unlink()
        files, size = files + len(stats), size + sum(stat.st_size for stat in stats)
    return Cleared(files, size, kept)


def cached_kinds() -> list[str]:
    """The kinds that the cache has, known or not."""
    folder = cache_folder()
    if not folder.is_dir():
        return []
    return [*sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), NETWORKS]


def cached_entries(kind: str) -> list[tuple[Path, list[os.stat_result]]]:
    """Files, and folders of those that go together, with the sizes and times of what is in them."""
    top, levels = cache_folder() / kind, WHOLE.get(kind)
    entries: dict[Path, list[os.stat_result]] = {}
    for path, stat in cached_files(kind):
        entry = top.joinpath(*path.relative_to(top).parts[:levels]) if levels else path
        entries.setdefault(entry, []).append(stat)
    return list(entries.items())


def cached_files(kind: str) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of a kind, without links, but with temporary ones that a killed process has left.

    Another process may add and remove files meanwhile: what is gone is left out.
    """
    top = cache_folder() if kind == NETWORKS else cache_folder() / kind
    for folder, folders, names in os.walk(top):
        if kind == NETWORKS:
            folders.clear()
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):
                stat = path.lstat()
                if S_ISREG(stat.st_mode):
                    yield path, stat
