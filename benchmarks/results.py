"""What the small benchmarks share: a results file that can be resumed, and checks of their options."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table

from genkit import __version__
from genkit.core.files import atomic_write, write_text

MAX_SEEDS, MAX_STEPS = 100, 10**7
CONFIDENCE = 0.95  # of an interval
PIPE_WIDTH = 160  # characters


class ResultsFile:
    """Cells of a table, written to ``out`` (JSON) as soon as each is measured; ``out.npz`` has arrays for a picture.

    A cell that is there need not be measured again. ``ValueError`` if ``out`` has the cells of other settings. With
    ``out`` None nothing is written.
    """

    def __init__(self, out: Path | None, settings: Mapping[str, Any], command: Sequence[str]):
        self.out = out
        self.cells: dict[str, dict[str, Any]] = {}
        self.arrays: dict[str, np.ndarray] = {}
        settings = json.loads(json.dumps(settings))
        self.head = {"command": ["genkit", "bench", *command], "settings": settings}
        self.head |= {"genkit": __version__, "torch": torch.__version__}
        if out and out.is_file():
            self._read(out, settings)

    def _read(self, out: Path, settings: Mapping[str, Any]) -> None:
        try:
            stored = json.loads(out.read_text())
            self.cells, stored_settings = dict(stored["cells"]), dict(stored["settings"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"out: given {out}, which is no results file of this benchmark; give another file") from e
        for key, value in settings.items():
            if stored_settings.get(key) != value:
                raise ValueError(
                    f"out: given {out}, which was measured with {key} {stored_settings.get(key)}, not {value}; "
                    "give another file or those settings"
                )
        if self._arrays_path.is_file():
            with np.load(self._arrays_path, allow_pickle=False) as arrays:
                self.arrays = {key: arrays[key] for key in arrays.files}

    @property
    def _arrays_path(self) -> Path:
        assert self.out is not None
        return self.out.with_suffix(".npz")

    def __contains__(self, cell: str) -> bool:
        return cell in self.cells

    def add(self, cell: str, values: Mapping[str, Any], array: np.ndarray | None = None) -> None:
        """Store a cell, and an array for the picture."""
        self.cells[cell] = dict(values)
        if array is not None:
            self.arrays[cell] = array
        if self.out:
            packed = io.BytesIO()
            np.savez_compressed(packed, **self.arrays)  # type: ignore[arg-type]  # names are keywords
            with atomic_write(self._arrays_path) as part:
                part.write_bytes(packed.getvalue())
            write_text(self.out, json.dumps(self.head | {"cells": self.cells}, indent=1) + "\n")


def format_mean_sd(values: Sequence[float]) -> str:
    """``mean±sd``, with the standard deviation of a sample (n - 1); the mean alone of one value. From 10 on with one
    decimal, else with three."""
    v = np.asarray(values, dtype=float)
    digits = 1 if abs(v.mean()) >= 10 else 3
    return f"{v.mean():.{digits}f}" + (f"±{v.std(ddof=1):.{digits}f}" if len(v) > 1 else "")


def make_console() -> Console:
    """The console of a benchmark: in a file or a pipe, lines have room for a table."""
    return Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)


def make_table(*head: str, title: str | None = None) -> Table:
    """A table for the terminal, whose cells are wrapped where it is narrow: a number is never cut short."""
    return Table(*(Column(name, overflow="fold") for name in head), title=title)


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of ``values``, and half the width of Student's interval for it (NaN for one value)."""
    from scipy.stats import t  # lazy: a third of a second

    v = np.asarray(values, dtype=float)
    if len(v) == 1:
        return float(v[0]), float("nan")
    half = t.ppf((1 + CONFIDENCE) / 2, len(v) - 1) * v.std(ddof=1) / len(v) ** 0.5
    return float(v.mean()), float(half)


def check_ranges(args: argparse.Namespace, **largest: int) -> None:
    """``ValueError`` unless each option is from 1 to its largest value."""
    for name, most in largest.items():
        if not 1 <= getattr(args, name) <= most:
            raise ValueError(f"{name.replace('_', '-')}: given {getattr(args, name)}; allowed 1 to {most}")
