"""What a run recorded: the curves of its log, thinned while they are read."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

POINTS = 500  # points in a curve: about one for each pixel of its width
READ_BYTES = 1 << 20


class Point(NamedTuple):
    """Consecutive log lines as one point of a curve: the last line's step; mean, minimum and maximum of the values."""

    step: int
    mean: float
    low: float
    high: float


@dataclass
class LogSummary:
    """The curves of a log and what is known about its lines."""

    curves: dict[str, list[Point]] = field(default_factory=dict)
    """by the key in the log's lines"""
    num_lines: int = 0
    """complete lines"""
    lines_per_point: int = 1
    last: Mapping[str, Any] = field(default_factory=dict)
    """the last value of every key: validation and evaluation write lines of their own"""
    seconds: float = 0.0
    """of training, over all sessions"""
    nonfinite: dict[str, int] = field(default_factory=dict)
    """lines whose value was not finite, by key"""
    damaged: bool = False
    """whether a line could not be read; that line and everything after it are left out"""


def parse_lines(lines: Sequence[bytes]) -> tuple[list[Any], bool]:
    """The objects in JSON ``lines`` up to the first line that cannot be read, and whether there was one."""
    try:
        return json.loads(b"[" + b",".join(lines) + b"]"), False
    except (ValueError, RecursionError):
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                return records, True
        return records, False


def read_log(path: Path, points: int = POINTS) -> LogSummary:
    """Summarise a ``log.jsonl`` in at most ``points`` points per curve.

    The file is thinned while it is read, so a million lines need no more memory than a few hundred. A missing file
    gives an empty summary.
    """
    if not path.is_file():
        return LogSummary()
    with open(path, "rb") as f:
        num_lines = sum(block.count(b"\n") for block in iter(lambda: f.read(READ_BYTES), b""))
        f.seek(0)
        log = LogSummary(lines_per_point=max(1, -(-num_lines // points)))
        past_sessions, session = 0.0, 0.0  # seconds; the clock restarts at 0 whenever training is resumed
        while not log.damaged and (chunk := list(itertools.islice(f, log.lines_per_point))):
            records, log.damaged = parse_lines(chunk)
            values: dict[str, list[float]] = {}
            for record in records:
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    continue
                log.num_lines, log.last = log.num_lines + 1, {**log.last, **record}
                clock = record.get("seconds")
                if isinstance(clock, int | float) and math.isfinite(clock):
                    past_sessions, session = past_sessions + (session if clock < session else 0.0), clock
                collect_values(record, values, log.nonfinite)
            for key, v in values.items():
                point = Point(log.last["step"], math.fsum(v) / len(v), min(v), max(v))
                log.curves.setdefault(key, []).append(point)
    log.seconds = past_sessions + session
    return log


def collect_values(record: Mapping[str, Any], values: dict[str, list[float]], nonfinite: dict[str, int]) -> None:
    """Append the finite numbers of a log line to ``values``, and count the others in ``nonfinite``."""
    for key, value in record.items():
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            nonfinite[key] = nonfinite.get(key, 0) + 1
        elif isinstance(value, int | float):
            values.setdefault(key, []).append(value)
