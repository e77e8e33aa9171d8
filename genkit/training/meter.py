"""What the training loop counts between two lines of the log: means, skipped steps, time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Means since the last line of the log, kept on the device, and the time that training took."""

    def __init__(self, device: torch.device, step: int, stored: Mapping[str, Any] | None = None):
        """``stored`` is what :meth:`dump` returned at the checkpoint that training resumes from."""
        stored = stored or {}
        self.device = device
        self.step = stored.get("step", step)
        self.last: float | None = stored.get("last")
        self.sums = {k: torch.tensor(v, device=device) for k, v in stored.get("sums", {}).items()}
        self.counts: dict[str, float] = dict(stored.get("counts", {}))
        now = time.perf_counter()
        self.started = now - stored.get("seconds", 0.0)
        self.mark = now - stored.get("since_mark", 0.0)
        self.pause_began: float | None = None

    def dump(self, accelerator: Accelerator) -> dict[str, Any]:
        """Return the unfinished line as JSON values: exact on one rank, the mean over several."""
        keys = sorted(self.sums)
        sums: list[float] = []
        if keys:
            means = torch.stack([self.sums[k].to(self.device) for k in keys])
            sums = accelerator.reduce(means, "mean").tolist()  # type: ignore[union-attr]
        now = time.perf_counter()
        return {
            "step": self.step,
            "last": self.last,
            "sums": dict(zip(keys, sums, strict=True)),
            "counts": dict(self.counts),
            "seconds": now - self.started,
            "since_mark": (self.pause_began or now) - self.mark,
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block from ``samples_per_s``, which counts training alone."""
        self.pause_began = time.perf_counter()
        yield
        self.mark += time.perf_counter() - self.pause_began
        self.pause_began = None

    def add(self, key: str, value: Tensor, count: float) -> None:
        """Add a scalar ``value``, the sum of ``count`` terms of the mean called ``key``."""
        value = value.detach().float()
        self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.counts[key] = self.counts.get(key, 0.0) + count

    def peek(self, phase: str) -> float | None:
        """Return the mean loss of a phase so far, or that of the last line. Synchronises the device."""
        key = f"{phase}/loss"
        return float(self.sums[key]) / self.counts[key] if key in self.sums else self.last

    def read(self, accelerator: Accelerator, step: int, skipped: int, batch: int, lr: float) -> dict[str, Any]:
        """Return the line of the log at ``step``, with means over the ranks, and start the next one."""
        keys = sorted(self.sums)
        means = torch.stack([self.sums[k].to(self.device) / self.counts[k] for k in keys])
        means = accelerator.reduce(means, "mean").tolist()  # type: ignore[union-attr]
        now = time.perf_counter()
        record: dict[str, Any] = {
            "step": step,
            "samples": step * batch,
            "seconds": round(now - self.started, 3),
            "lr": lr,
            "samples_per_s": round((step - self.step) * batch / (now - self.mark), 1),
            "skipped": skipped,
            **{k: v if math.isfinite(v) else None for k, v in zip(keys, means, strict=True)},
        }
        self.last = next((v for k, v in record.items() if k.endswith("/loss")), None)
        self.step = step
        self.sums, self.counts = {}, {}
        self.mark = time.perf_counter()
        return record


class SkippedSteps:
    """A count of the steps that were skipped because a gradient was not finite, kept on the device."""

    def __init__(self, device: torch.device):
        self.streak = torch.zeros((), device=device)
        """skipped steps in a row, up to the last step, without those after which fp16 takes a smaller loss scale"""
        self.count = torch.zeros((), device=device)
        """skipped steps since the last :meth:`take`"""

    def add(self, bad: Tensor, hopeless: Tensor | float = 1.0) -> None:
        """Count a step: ``bad`` is 1.0 if it was skipped, else 0.0; not in the streak unless it was ``hopeless``."""
        self.streak = (self.streak + hopeless) * bad
        self.count = self.count + bad

    def take(self) -> int:
        """Return the number of skipped steps since the last call."""
        count = int(self.count)
        self.count = torch.zeros_like(self.count)
        return count
