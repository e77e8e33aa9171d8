"""How long work of many steps takes: lines of progress at intervals of time, and an estimate of all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from statistics import median

import torch

from genkit.core.durations import estimate_duration, format_step
from genkit.core.memory import format_bytes, peak_memory

INTERVALS = ((60.0, 10.0), (600.0, 30.0), (float("inf"), 60.0))  # (up to this many seconds, seconds between lines)
FIRST_STEPS, FIRST_SECONDS = 3, 3.0  # after which the estimate is made; the very first step is slow and does not count
WARM_UP = 20  # further steps that may be slow, because they are compiled or tuned, and then do not count either
UNEVEN = 3.0  # a step that takes so many times as long as others is one of these
WORTH_SAYING = 20.0  # seconds of all the work below which there is no estimate


def step_durations(ends: Sequence[tuple[int, float]]) -> list[float]:
    """Seconds of each step, from the numbers of steps and the times at which they ended."""
    return [(after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(ends)]


def count_warm_up(ends: Sequence[tuple[int, float]]) -> int:
    """How many of the first steps took much longer than the median of all."""
    durations = step_durations(ends)
    slow = UNEVEN * median(durations) if durations else 0.0
    return len(list(takewhile(lambda seconds: seconds > slow, durations)))


def is_steady(ends: Sequence[tuple[int, float]]) -> bool:
    """Whether the newest steps took about as long as each other, or the warm-up is over."""
    newest = step_durations(ends)[-FIRST_STEPS:]
    even = len(newest) == FIRST_STEPS and max(newest) <= UNEVEN * min(newest)
    return even or len(ends) > WARM_UP


class Pace:
    """Progress of steps ``start`` to ``total`` in words: an estimate of the time soon after the start, then lines.

    ``say`` receives the estimate, ``line`` the lines of progress.
    """

    def __init__(
        self,
        start: int,
        total: int,
        device: torch.device,
        say: Callable[[str], None],
        line: Callable[[str], None],
        unit: str = "step",
    ):
        self.start, self.total, self.device, self.unit = start, total, device, unit
        self.say, self.line = say, line
        self.began = self.last = time.perf_counter()
        self.ends: list[tuple[int, float]] = []  # of the first step and those of the warm-up: their numbers, and when
        self.estimated = False

    def __call__(self, step: int, text: str, samples: int | None = None) -> None:
        """Report that ``step`` is done. ``samples`` are those of a step, for a rate; ``text`` is the loss, say."""
        now = time.perf_counter()
        if len(self.ends) <= WARM_UP and (not self.ends or step > self.ends[-1][0]):
            self.ends.append((step, now))
        due = now - self.last >= self.interval(now - self.began) and step < self.total
        if self.estimated and not due:  # nearly all steps
            return
        first, began = self.ends[count_warm_up(self.ends)]
        done, seconds = step - first, now - began
        if not done:
            return
        per_step, steady = seconds / done, is_steady(self.ends)
        if not self.estimated and steady and done >= FIRST_STEPS and seconds >= FIRST_SECONDS:
            self.estimated = True
            if (all_seconds := per_step * (self.total - self.start)) >= WORTH_SAYING:
                count = f"{self.total - self.start:,} {self.unit}s"
                self.say(f"time     {estimate_duration(all_seconds)} for {count} ({format_step(per_step)} each)")
        if due:
            self.last = now
            rate = f"{samples / per_step:.0f} samples/s" if samples else f"{format_step(per_step)} each"
            left = f"{estimate_duration(per_step * (self.total - step))} left" if steady else ""
            words = (f"{self.unit} {step}/{self.total}", text, rate, format_bytes(peak_memory(self.device)), left)
            self.line("  ".join(word for word in words if word))

    @staticmethod
    def interval(elapsed: float) -> float:
        """Seconds between two lines after this many seconds of work."""
        return next(seconds for end, seconds in INTERVALS if elapsed < end)
