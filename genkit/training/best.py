"""The best checkpoint by a metric that is measured while training, and when to stop without a better one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genkit.config.blocks import suggest
from genkit.core import Direction
from genkit.core.files import write_text

BEST_FILE = "best.json"


@dataclass
class BestCheckpoint:
    """The best evaluated checkpoint so far: a function of the run's log, so a resumed run needs no other record."""

    metric: str
    """name of the metric in the log, such as val/loss or eval/fid"""
    direction: Direction
    """which values are better"""
    step: int | None = None
    """its step; None: none was evaluated"""
    value: float | None = None
    """its metric"""
    worse: int = 0
    """evaluations since"""

    def update(self, step: int, value: float | None) -> bool:
        """Compare the evaluation at ``step``; None, or a number that is not finite, is never better.

        Returns whether it is the best one.
        """
        if value is None or not math.isfinite(value) or not self.is_better(value):
            self.worse += 1
            return False
        self.step, self.value, self.worse = step, value, 0
        return True

    def is_better(self, value: float) -> bool:
        """Whether ``value`` is better than the best one so far."""
        if self.value is None:
            return True
        return value < self.value if self.direction == "lower" else value > self.value

    def is_stale(self, patience: int | None) -> bool:
        """Whether ``patience`` evaluations in a row (None: any number) have not been better."""
        return patience is not None and self.worse >= patience

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Compare all evaluations in the records of a log."""
        for record in records:
            if self.metric in record:
                self.update(record["step"], record[self.metric])

    def write(self, run: Path) -> None:
        """Record it in the run directory."""
        write_text(run / BEST_FILE, json.dumps(asdict(self)) + "\n")

    def __str__(self) -> str:
        return "none yet" if self.value is None else f"step {self.step}, {self.metric} {self.value:.5g}"


def read_best(run: Path) -> BestCheckpoint | None:
    """The best checkpoint that the run has recorded; None if it has not, or the record is damaged."""
    try:
        return BestCheckpoint(**json.loads((run / BEST_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def choose_metric(name: str, known: Mapping[str, Direction], intervals: Mapping[str, int]) -> BestCheckpoint:
    """A record of the best checkpoint by the metric ``name``: ``val/loss``, or ``fid`` for ``eval/fid`` and ``success``
    for ``rollout/success``.

    ``known`` are the metrics of this run, ``intervals`` the steps between the evaluations that give them by prefix:
    ``{"val": 0, "eval": 500}``. Raises ``ValueError`` for a metric that is unknown, or never measured.
    """
    short = [prefix for prefix in intervals if prefix != "val"]  # whose metrics need no prefix
    key = next((k for prefix in short if (k := f"{prefix}/{name}") in known), name)
    prefixes = [key.partition("/")[0]] if "/" in key else short
    never = [prefix for prefix in prefixes if not intervals.get(prefix, 1)]
    if never == prefixes:
        options = " or ".join(f"--{prefix}-every" for prefix in never)
        raise ValueError(f"keep_best: given {name}, which is never measured; give {options}, say 500")
    if key not in known:
        hint = suggest(name, [*known, *(k.partition("/")[2] for k in known)])
        raise ValueError(f"keep_best: given {name!r}; measured: {', '.join(known) or 'nothing'}{hint}")
    return BestCheckpoint(key, known[key])
