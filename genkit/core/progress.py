"""Progress of long work, as a callback, so that the library prints nothing.

Library functions take ``progress: Progress | None``. None shows a bar in a terminal or a notebook and logs lines
elsewhere; :func:`silent` shows nothing; any other callable is called with each update.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Protocol

messages = logging.getLogger("genkit.progress")


class Progress(Protocol):
    """``progress(what, done, total)``: ``done`` of ``total`` (None: unknown) steps of ``what`` are finished."""

    def __call__(self, what: str, done: int, total: int | None) -> None: ...


def silent(what: str, done: int, total: int | None) -> None:
    """Report nothing."""


@contextlib.contextmanager
def reporting(progress: Progress | None, enabled: bool = True, stages: bool = True) -> Iterator[Progress]:
    """``progress`` itself, or a bar on standard error if it is None; nothing if not ``enabled`` (on other ranks).

    Where no bar can be shown, :class:`StageMessages` say what is done if ``stages`` is set: work that logs lines of its
    own needs none.
    """
    if not enabled:
        yield silent
    elif progress is not None:
        yield progress
    else:
        with terminal_progress(stages) as bar:
            yield bar


class StageMessages:
    """Progress in lines, for a log file or a pipe: on the logger ``genkit.progress``, at level DEBUG.

    A stage that lasts longer than ``QUIET_SECONDS`` is named, and then once in ``REPEAT_SECONDS`` with the time left.
    What follows a number or a comma in the name of a stage is not part of its name.
    """

    QUIET_SECONDS = 2.0
    REPEAT_SECONDS = 60.0

    def __init__(self) -> None:
        self.stage, self.what, self.done, self.first = "", "", 0, 0
        self.total: int | None = None
        self.began = self.said = time.monotonic()
        self.timer: threading.Timer | None = None

    def __call__(self, what: str, done: int, total: int | None) -> None:
        stage, now = re.split(r"[\d,]", what)[0].strip(), time.monotonic()
        self.what, self.done, self.total = what, done, total
        if stage != self.stage:
            self.close()
            self.stage, self.began, self.said, self.first = stage, now, now, done
            self.timer = threading.Timer(self.QUIET_SECONDS, self.say)
            self.timer.daemon = True
            self.timer.start()
        elif now - self.said >= self.REPEAT_SECONDS and done != total:
            self.say()

    def say(self) -> None:
        """Log one line."""
        self.said = time.monotonic()
        text = self.what
        if self.total is not None:
            text += f": {self.done} of {self.total}"
            if self.first < self.done < self.total:
                left = (self.said - self.began) / (self.done - self.first) * (self.total - self.done)
                text += f", about {math.ceil(left / 60)} min left" if left > 90 else f", about {math.ceil(left)} s left"
        messages.debug(text)

    def close(self) -> None:
        """Say nothing more."""
        if self.timer:
            self.timer.cancel()


@contextlib.contextmanager
def terminal_progress(stages: bool = True) -> Iterator[Progress]:
    """A progress bar on standard error, in a terminal or a notebook with ipywidgets; elsewhere lines, or nothing."""
    from rich.console import Console  # lazy: needed in a terminal only
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    in_notebook = console.is_jupyter and find_spec("ipywidgets") is not None  # rich warns if it is missing
    if not (in_notebook or (console.is_terminal and not console.is_jupyter)):
        lines = StageMessages()
        try:
            yield lines if stages else silent
        finally:
            lines.close()
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, total: int | None) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield show
