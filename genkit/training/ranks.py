"""Processes and threads: how ranks that share work share values and errors, and how many threads each uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


@dataclass(frozen=True)
class Ranks:
    """Process number ``rank`` of ``world`` processes that share work."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator) -> Ranks:
        """This process among those of ``accelerator``."""
        return cls(accelerator.process_index, accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every rank, in their order, on every rank."""
        return gather_object([value]) if self.world > 1 else [value]

    def once(self, work: Callable[..., Any], *args: Any) -> Any:
        """``work(*args)``, done by the main rank, on every rank. Its ``ValueError`` or ``OSError`` is raised on all, so
        that none waits for one that has stopped."""
        if self.world == 1:
            return work(*args)
        result, error = None, None
        if self.is_main:
            try:
                result = work(*args)
            except OSError as e:
                error = e
            except ValueError as e:  # its subclasses may not be sent
                error = ValueError(str(e))
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result

    def raise_together(self, error: Exception | None) -> None:
        """Raise the first rank's error on every rank, so that none waits for one that has stopped."""
        for message in self.gather(None if error is None else str(error)):
            if message is not None:
                raise error if error is not None and self.world == 1 else ValueError(message)


SINGLE = Ranks()


@contextmanager
def use_threads(num: int | None) -> Iterator[None]:
    """Use ``num`` CPU threads in a block (None: no change). Sums in the last digits depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(num or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
