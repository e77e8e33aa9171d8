"""What the small measurements share: several networks trained at once, and a record to resume."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from genkit import __version__
from genkit.core import NO_COND, Batch, Cond, Objective, ProbabilityPath
from genkit.core.files import atomic_write, write_text
from genkit.data.codecs import Identity
from genkit.objectives.matching.couplings import Coupling
from genkit.training.loop import fit, initial_state
from genkit.training.settings import TrainSettings


# ------------------------------------------------------------------------------------------ several networks at once
class Stack(nn.Module):
    """``copies`` perceptrons of ``depth`` hidden layers that know nothing of each other, the time joined to the input.

    The rows of a batch come in as many equal groups, one for each. Adam works on each weight alone, so (without
    clipping) to train them together is to train them one after the other, at a fraction of the time.
    """

    def __init__(self, copies: int, dim: int, width: int, depth: int, act: Callable[[Tensor], Tensor]):
        super().__init__()
        sizes = [dim + 1, *[width] * depth, dim]
        self.copies, self.act = copies, act
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise(sizes):
            bound = 1 / math.sqrt(i)  # as torch.nn.Linear starts
            self.weights.append(nn.Parameter(torch.empty(copies, i, o).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(copies, 1, o).uniform_(-bound, bound)))

    def forward(self, x: Tensor, label: Tensor, cond: Cond = NO_COND) -> Tensor:
        h = torch.cat([x, label[:, None].to(x)], 1).unflatten(0, (self.copies, -1))
        *inner, last = zip(self.weights, self.biases, strict=True)
        for w, b in inner:
            h = self.act(torch.baddbmm(b, h, w))
        return torch.baddbmm(last[1], h, last[0]).flatten(0, 1)


@dataclass(frozen=True)
class Each:
    """``coupling`` within each of ``groups`` equal parts of the batch: the networks of a :class:`Stack` share none."""

    coupling: Coupling
    groups: int
    independent: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = False
    permutes: ClassVar[bool] = True

    def __call__(self, batch: Batch, x1: Tensor, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(batch.x.chunk(self.groups), x1.chunk(self.groups), t.chunk(self.groups), strict=True)
        ends = [self.coupling(Batch(x), s, path, u) for x, s, u in parts]
        return torch.cat([x for x, _ in ends]), torch.cat([s for _, s in ends])


def train(
    objective: Objective,
    net: nn.Module,
    sample: Callable[[int], Batch],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int = 0,
    progress: Callable[[int], None] = lambda step: None,
) -> None:
    """Train ``net`` in place by genkit's own loop, on what ``sample(rows)`` draws, with a cosine and no clipping."""
    cfg = TrainSettings(
        steps=steps, batch=batch, lr=lr, warmup=min(100, steps // 10), clip=0.0, ema=(), precision="fp32", seed=seed,
        betas=(0.9, 0.99), log_every=steps, save_every=steps, sample_every=0,
    )  # fmt: skip
    state = initial_state(objective, {"net": net}, cfg)
    fit(
        objective,
        state,
        lambda step, draw, first, stop: sample(stop - first),
        Identity(),
        cfg,
        Accelerator(cpu=True, mixed_precision="no"),
        progress=lambda step, loss: progress(step),
    )
    net.eval()


def rows(data: Tensor) -> Callable[[int], Batch]:
    """Rows of ``data`` at random, with replacement, from torch's global generator (which the loop seeds each step)."""
    return lambda n: Batch(data[torch.randint(len(data), (n,))])


# -------------------------------------------------------------------------------------------------------- the record
def mean_sd(values: Sequence[float]) -> str:
    """``mean±sd``, the standard deviation that of a sample (n - 1)."""
    v = np.asarray(values, dtype=float)
    return f"{v.mean():.3f}±{v.std(ddof=1):.3f}" if len(v) > 1 else f"{v.mean():.3f}"


class Record:
    """Cells of a table, each kept in ``out`` (JSON) as soon as it is measured; ``out.npz`` holds a picture's points.

    A cell that is there is not measured again. ``ValueError`` where ``out`` holds the cells of other settings.
    """

    def __init__(self, out: Path | None, settings: Mapping[str, Any], command: Sequence[str]):
        self.out, self.cells, self.arrays = out, {}, {}
        self.head = {"command": ["genkit", "bench", *command], "settings": json.loads(json.dumps(settings))}
        self.head |= {"genkit": __version__, "torch": torch.__version__}
        if out and out.is_file():
            try:
                found = json.loads(out.read_text())
                self.cells, theirs = dict(found["cells"]), dict(found["settings"])
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"out: given {out}, which is no record of this measurement; give another file") from e
            for key, value in self.head["settings"].items():
                if theirs.get(key) != value:
                    raise ValueError(
                        f"out: given {out}, which was measured with {key} {theirs.get(key)}, not {value}; "
                        "give another file or those settings"
                    )
            if self.points.is_file():
                with np.load(self.points, allow_pickle=False) as stored:
                    self.arrays = {k: stored[k] for k in stored.files}

    @property
    def points(self) -> Path:
        assert self.out is not None
        return self.out.with_suffix(".npz")

    def __contains__(self, cell: str) -> bool:
        return cell in self.cells

    def add(self, cell: str, values: Mapping[str, Any], points: np.ndarray | None = None) -> None:
        """Keep a cell; its picture's points too."""
        self.cells[cell] = dict(values)
        if points is not None:
            self.arrays[cell] = points
        if self.out:
            packed = io.BytesIO()
            np.savez_compressed(packed, **self.arrays)  # type: ignore[arg-type]  # names are keywords
            with atomic_write(self.points) as part:
                part.write_bytes(packed.getvalue())
            write_text(self.out, json.dumps(self.head | {"cells": self.cells}, indent=1) + "\n")
