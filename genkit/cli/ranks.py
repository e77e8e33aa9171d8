"""Ranks on the command line: how a process ends, and a mistake that all ranks make, which is said once.

The first rank leaves its message where the others can read it.
"""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

KEY = "genkit/error"  # of the first rank's message, in the launcher's store
PATIENCE = timedelta(seconds=10)  # in which the first rank makes the same mistake, if it does: it starts as late


def find_rank() -> tuple[int, int]:
    """Return this process's rank and the number of ranks: 0 of 1 without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Return whether torchrun or `accelerate launch` started this process."""
    return "WORLD_SIZE" in os.environ or {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()


def leave_message(message: str) -> None:
    """Let the other ranks know what the first one has said; nothing on another rank or without a launcher's store."""
    rank, num = find_rank()
    if rank == 0 and num > 1 and (store := open_store()):
        store.set(KEY, message)


def has_said(message: str) -> bool:
    """Return whether the first rank has said the same. False on the first rank itself, and where there is no store."""
    rank, num = find_rank()
    if rank == 0 or num == 1 or (store := open_store()) is None:
        return False
    try:
        store.wait([KEY], PATIENCE)
        return store.get(KEY).decode() == message
    except RuntimeError:  # it has said nothing: this rank alone is wrong
        return False


def open_store() -> TCPStore | None:
    """Return a client of the store that torchrun keeps for its processes; None if another launcher started them."""
    from torch.distributed import (  # lazy: only if something is wrong
        TCPStore,  # pyright: ignore[reportPrivateImportUsage]
    )

    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    try:
        return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=PATIENCE)
    except RuntimeError:
        return None


def end_process(code: int) -> NoReturn:
    """End the process with the exit code ``code``.

    A rank runs its exit handlers, but not the interpreter's finalization: threads of torch's process group that still
    wait for the interpreter then abort the process now and then ("terminate called without an active exception").
    """
    if find_rank()[1] > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
