"""One process at a time writes into a run directory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout


class RunLock:
    """The right to write into a run directory. It ends with the ``with`` block, :meth:`release` or the
    process.

    Raises ``ValueError`` that names the process that has it.
    """

    def __init__(self, run: Path):
        self.file, self.owner = run / ".lock", run / ".lock-owner"
        self.lock = FileLock(self.file)
        try:
            self.lock.acquire(timeout=0)
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
