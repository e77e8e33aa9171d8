"""Commands that run in several processes: started by a launcher, and only the first process prints."""

from __future__ import annotations

import os
from collections.abc import Sequence

from genkit.training.distributed import lost_ranks, start_ranks


def start_missing_ranks(command: str, argv: Sequence[str]) -> None:
    """Replace this process by all ranks if ``accelerate launch`` started only one of several (it does on CPUs)."""
    if (num := lost_ranks()) > 1:
        start_ranks(num, command, list(argv))


def is_main_rank() -> bool:
    """Whether this process prints and writes: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"
