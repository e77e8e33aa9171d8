"""One process at a time writes into a run directory."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from genkit.core.files import is_running

PATIENCE = 0.2  # seconds to wait for a lock, which is_locked of another process may have for less than a millisecond


class RunLock:
    """The right to write into a run directory. It ends with the ``with`` block, :meth:`release` or the
    process.

    Raises ``ValueError`` that names the process that has it.
    """

    def __init__(self, run: Path):
        self.file, self.owner = run / ".lock", run / ".lock-owner"
        self.lock = FileLock(self.file)
        try:
            self.lock.acquire(timeout=PATIENCE)
        except Timeout:
            name = self.owner.read_text().strip() if self.owner.is_file() else "another process"
            raise ValueError(f"run: {run} is being trained by {name}; wait for it, or stop it first") from None
        self.owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others write."""
        self.owner.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)
        self.lock.release()


def is_locked(run: Path) -> bool:
    """Whether a process writes into the run directory now. Nothing is changed; False if that cannot be found out."""
    file, owner = run / ".lock", run / ".lock-owner"
    if not file.is_file() or not owner.is_file():  # released, or never taken
        return False
    try:
        match = re.fullmatch(r"process (\d+) on (.+)", owner.read_text().strip())
        if match and match[2] == socket.gethostname() and not is_running(int(match[1])):
            return False  # it was killed
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, ValueError):
        return False
