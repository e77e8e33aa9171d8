"""How a long call reports its progress: a callback, so that the library prints nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """``progress(what, done, total)``: ``done`` of ``total`` (None: unknown) steps of ``what`` are finished."""

    def __call__(self, what: str, done: int, total: int | None) -> None: ...


def silent(what: str, done: int, total: int | None) -> None:
    """Report nothing."""
