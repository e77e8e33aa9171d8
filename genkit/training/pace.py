"""How long work of many steps takes: lines of progress at intervals of time, and an estimate of all of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from genkit.core.durations import estimate_duration, format_step
from genkit.core.memory import format_bytes, peak_memory

INTERVALS = ((60.0, 10.0), (600.0, 30.0), (float("inf"), 60.0))  # (up to this many seconds, seconds between lines)
FIRST_STEPS, FIRST_SECONDS = 3, 3.0  # after which the estimate is made; the very first step is slow and does not count
WORTH_SAYING = 20.0  # seconds of all the work below which there is no estimate


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
        self.first: tuple[int, float] | None = None  # the end of the first step: its number, and when
        self.estimated = False

    def __call__(self, step: int, text: str, samples: int | None = None) -> None:
        """Report that ``step`` is done. ``samples`` are those of a step, for a rate; ``text`` is the loss, say."""
        now = time.perf_counter()
        if self.first is None:
            self.first = step, now
            return
        done, seconds = step - self.first[0], now - self.first[1]
        if not done:
            return
        per_step = seconds / done
        if not self.estimated and done >= FIRST_STEPS and seconds >= FIRST_SECONDS:
            self.estimated = True
            if (all_seconds := per_step * (self.total - self.start)) >= WORTH_SAYING:
                count = f"{self.total - self.start:,} {self.unit}s"
                self.say(f"time     {estimate_duration(all_seconds)} for {count} ({format_step(per_step)} each)")
        if now - self.last >= self.interval(now - self.began) and step < self.total:
            self.last = now
            rate = f"{samples / per_step:.0f} samples/s" if samples else f"{format_step(per_step)} each"
            left = f"{estimate_duration(per_step * (self.total - step))} left"
            words = (f"{self.unit} {step}/{self.total}", text, rate, format_bytes(peak_memory(self.device)), left)
            self.line("  ".join(word for word in words if word))

    @staticmethod
    def interval(elapsed: float) -> float:
        """Seconds between two lines after this many seconds of work."""
        return next(seconds for end, seconds in INTERVALS if elapsed < end)
