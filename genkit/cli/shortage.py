"""What the machine lacks when a library gives up: memory, disk space, open files. One line each, with advice."""

from __future__ import annotations

import errno
import re
from collections.abc import Collection

_DISK = "the disk is full, or a quota is reached"
_ADVICE = "free some space or write elsewhere; what was saved before is intact"
MEMORY = "out of memory"
FEWER, LESS = (
    ("micro_batch", "batch", "samples", "n"),
    {"precision": "--precision bf16", "backbone": "--backbone.checkpoint"},
)
OS_ERRORS = {
    errno.ENOSPC: f"{_DISK}; {_ADVICE}",
    errno.EDQUOT: f"{_DISK}; {_ADVICE}",
    errno.EFBIG: f"a file is larger than the file system or a limit (ulimit -f) allows; {_ADVICE}",
    errno.ENOMEM: MEMORY,
    errno.EMFILE: "too many open files; raise the limit (ulimit -n), or lower --workers",
    errno.ENFILE: "too many open files on this machine; lower --workers",
    errno.EIO: "the disk reports an input/output error; check the disk",
}
BUS_ERROR = re.compile(r"bus error|shared memory \(shm\)", re.IGNORECASE)


def explain_shortage(e: BaseException, options: Collection[str] = FEWER) -> str | None:
    """Return one line about what the machine lacks, with advice, or None for every other error.

    Of the ``options`` of a command the advice names those that save memory.

    Libraries raise the system's refusals in classes of their own (``SafetensorError`` for a full disk, ``RuntimeError``
    for memory on a CPU), so the text decides where there is no error number. The causes of an error count too.
    """
    cause: BaseException | None = e
    while cause is not None:
        if (text := _explain(cause)) is not None:
            return f"{text}; {advise_on_memory(options)}" if text == MEMORY else text
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def advise_on_memory(options: Collection[str]) -> str:
    """What to try without enough memory, by the options that there are."""
    fewer = [f"--{name.replace('_', '-')}" for name in FEWER if name in options]
    less = [flag for name, flag in LESS.items() if name in options]
    advice = [*([f"lower {', '.join(fewer)}"] if fewer else []), *([f"give {', '.join(less)}"] if less else [])]
    return ", ".join([*advice, "or take a smaller network or smaller samples" if advice else "close other programs"])


def _explain(e: BaseException) -> str | None:
    from genkit.core.memory import is_out_of_memory  # lazy: it imports torch, which `genkit --help` does without

    text = str(e)
    if isinstance(e, OSError):
        where = f"{e.filename}: " if e.filename else ""
        return f"{where}{OS_ERRORS[e.errno]}" if e.errno in OS_ERRORS else None
    number = re.search(r"os error (\d+)", text)  # Rust's: safetensors, tokenizers
    if number and int(number[1]) in OS_ERRORS:
        return OS_ERRORS[int(number[1])]
    if is_out_of_memory(e):
        return MEMORY
    if isinstance(e, RuntimeError) and BUS_ERROR.search(text):
        return "a data-loading process ran out of shared memory (/dev/shm); give --workers 0, or more shared memory"
    return None
