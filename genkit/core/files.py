"""Atomic writes: a file or directory is complete or absent, even after a kill or a power cut."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

MARK = "written by genkit"  # in pictures and archives
ENDS = 1 << 16  # bytes at each end of a file in which a mark is
LEFTOVER = re.compile(r"\.latest-(\d+)|\..*-(\d+)(?:-[0-9a-f]{8})?\.(?:part|gone)")  # temporary, with a process's id
OWN = re.compile(  # marks of what genkit writes: pictures and archives, JSON, HTML, shards of latents
    MARK.encode() + rb"""|"genkit": "\d|content="genkit |"__metadata__":\{"made":"""
)


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:  # some systems cannot open or sync a directory
        if not path.is_dir():
            raise


def temporary_path(path: Path, ending: str) -> Path:
    """A hidden name beside ``path`` that no other call has, in whichever process: containers that share a disk may have
    processes of the same number."""
    return path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}.{ending}")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; it is renamed to ``path`` if the block succeeds.

    Missing parent directories are created. The content is on the disk before the rename. Each call has its own
    temporary path; if two write the same file, the last one wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary_path(path, "part")
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path`` to fill; it is renamed to ``path`` if the block succeeds.

    An existing directory is replaced. All content is on the disk before the rename.
    """
    part = temporary_path(path, "part")
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.iterdir():
            sync(file)
        sync(part)
        if path.exists():
            remove_directory(path)
        os.replace(part, path)
        sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory; it is renamed first, so that ``path`` is never an incomplete directory."""
    hidden = temporary_path(path, "gone")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path, idle: float = 0.0) -> None:
    """Remove temporary files and directories in ``folder`` whose processes no longer run.

    ``idle`` is the number of seconds since their last change: in a folder that machines share, a process may run on
    another one.
    """
    for path in folder.glob(".*") if folder.is_dir() else ():
        match = LEFTOVER.fullmatch(path.name)
        if match and not is_running(int(match[1] or match[2])) and (not idle or idle_seconds(path) >= idle):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)  # another process may sweep too


def idle_seconds(path: Path) -> float:
    """Seconds since a file was changed; 0 if it has gone."""
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def is_running(pid: int) -> bool:
    """Return whether a process with this id runs on this machine."""
    try:
        return psutil.pid_exists(pid)
    except OverflowError:  # no number of a process
        return True


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` atomically, and return the path."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def file_stamp(path: Path) -> list[int]:
    """Size and time of change, by which a file is known again."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def is_own(path: Path) -> bool:
    """Whether genkit wrote this file: its content says so, near one of its ends."""
    with open(path, "rb") as f:
        head = f.read(ENDS)
        f.seek(max(0, path.stat().st_size - ENDS))
        return bool(OWN.search(head) or OWN.search(f.read()))


def refuse_foreign(*paths: str | Path, option: str = "out") -> None:
    """``ValueError`` if one of ``paths``, which are to be written, is there and is not a file that genkit wrote."""
    for path in (Path(path).expanduser() for path in paths):
        if path.is_dir() or (path.is_file() and not is_own(path)):
            raise ValueError(
                f"{option}: {path} exists, and genkit did not write it; give another --{option}, or move it"
            )


def format_error(error: Exception) -> str:
    """Return an error's message on one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
