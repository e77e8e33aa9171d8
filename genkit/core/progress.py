"""Progress of long work, as a callback, so that the library prints nothing.

Library functions take ``progress: Progress | None``. None shows a bar in a terminal or a notebook and nothing
elsewhere; :func:`silent` shows nothing; any other callable is called with each update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Protocol


class Progress(Protocol):
    """``progress(what, done, total)``: ``done`` of ``total`` (None: unknown) steps of ``what`` are finished."""

    def __call__(self, what: str, done: int, total: int | None) -> None: ...


def silent(what: str, done: int, total: int | None) -> None:
    """Report nothing."""


@contextlib.contextmanager
def reporting(progress: Progress | None, enabled: bool = True) -> Iterator[Progress]:
    """``progress`` itself, or a bar on standard error if it is None; nothing if not ``enabled`` (on other ranks)."""
    if not enabled:
        yield silent
    elif progress is not None:
        yield progress
    else:
        with terminal_progress() as bar:
            yield bar


@contextlib.contextmanager
def terminal_progress() -> Iterator[Progress]:
    """A progress bar on standard error, in a terminal or a notebook with ipywidgets; silent elsewhere."""
    from rich.console import Console  # lazy: needed in a terminal only
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    in_notebook = console.is_jupyter and find_spec("ipywidgets") is not None  # rich warns if it is missing
    if not (in_notebook or (console.is_terminal and not console.is_jupyter)):
        yield silent
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, total: int | None) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield show
