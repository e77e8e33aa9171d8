"""Ranks that stop together."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from torch import Tensor

PATIENCE = 1.0  # seconds after which a signal is heard, unless a step takes longer
MOST_STEPS = 10  # between two comparisons, which wait for the device


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
