"""When training stops early: signals, and ranks that stop together."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

STOP_SIGNALS = [s for name in ("SIGINT", "SIGTERM", "SIGUSR1") if (s := getattr(signal, name, None))]
PATIENCE = 1.0  # seconds after which a signal is heard, unless a step takes longer
MOST_STEPS = 10  # between two comparisons, which wait for the device
collected: ContextVar[list[int] | None] = ContextVar("collected", default=None)  # the signals of the outermost context


class StopAgreement:
    """Whether to stop, the same answer on all ranks, which receive a signal at different steps.

    They compare after every step that takes a second or longer, and after each tenth of fast ones: a scheduler that
    asks a job to end kills it soon.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.next: int | None = None
        self.last = (0, 0.0)

    def is_reached(self, step: int, stop: bool) -> bool:
        """Whether a rank wants to ``stop``, if the ranks compare after this step."""
        if self.accelerator.num_processes == 1:
            return stop
        if self.next is not None and step < self.next:
            return False
        now = time.monotonic()
        seconds = PATIENCE if self.next is None else (now - self.last[1]) / max(1, step - self.last[0])
        sums = self.accelerator.reduce(torch.tensor([float(stop), seconds], device=self.accelerator.device), "sum")
        assert isinstance(sums, Tensor)
        stopping, total = sums.tolist()
        mean = total / self.accelerator.num_processes  # the same on all ranks, as is the next step
        self.next, self.last = step + steps_between(mean), (step, now)
        return stopping > 0


def steps_between(seconds: float) -> int:
    """Steps from one comparison to the next, if a step takes so long."""
    return max(1, min(MOST_STEPS, int(PATIENCE / max(seconds, 1e-9))))


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 in a list. The first lets the step end and saves; a second Ctrl-C ends at
    once. Slurm sends SIGUSR1 some time before it ends a job, if asked to (``--signal=USR1@300``).

    A context within another one yields the list of that, so that a signal in one of several trainings ends them all.
    Signals can be caught in the main thread only; elsewhere the list stays empty.
    """
    outer = collected.get()
    if outer is not None:
        yield outer
        return
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {s: signal.signal(s, handle) for s in STOP_SIGNALS}
    except ValueError:  # not the main thread
        previous = {}
    token = collected.set(received)
    try:
        yield received
    finally:
        collected.reset(token)
        for s, handler in previous.items():
            signal.signal(s, handler)
