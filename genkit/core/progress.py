"""How a long call reports its progress: a callback, so that the library prints nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """``progress(what, done, total)``: ``done`` of ``total`` (None: unknown) steps of ``what`` are finished."""

    def __call__(self, what: str, done: int, total: int | None) -> None: ...


def silent(what: str, done: int, total: int | None) -> None:
    """Report nothing."""


@contextmanager
def terminal_progress(enabled: bool = True) -> Iterator[Progress]:
    """Yield a callback that shows one bar a task on standard error, in a terminal or a notebook.

    The bars disappear when the block ends. Nothing is shown elsewhere (a pipe, a log file), or unless ``enabled``.
    """
    from rich.console import Console  # lazy: core is imported by everything
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not enabled or not (console.is_terminal or console.is_jupyter):
        yield silent
        return
    tasks: dict[str, TaskID] = {}
    with Bars(console=console, transient=True) as bars:

        def show(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def choose_progress(progress: Progress | None, enabled: bool = True) -> AbstractContextManager[Progress]:
    """A context of the callback to use: ``progress`` itself, or bars in the terminal if it is None.

    Of several processes only the one that is ``enabled`` reports.
    """
    if progress is None:
        return terminal_progress(enabled)
    return nullcontext(progress if enabled else silent)
