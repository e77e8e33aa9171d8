"""Reflow: the pairs (source, sample) of a trained flow, to train a straighter one on (Liu et al. 2023)."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import config
from genkit.config.numbers import Count, Positive, Scale, Seed
from genkit.core import Data, Draw
from genkit.core.durations import estimate_duration
from genkit.core.files import refuse_foreign
from genkit.core.progress import Progress, reporting
from genkit.data.codecs import LearnedCodec
from genkit.data.pairs import save_pairs
from genkit.diffusion.samplers import Seeds, refuse_noise
from genkit.objectives.matching.matching import Matching
from genkit.training.precision import Precision
from genkit.training.run import Run, load_run
from genkit.training.sampling import LoadOptions, Sampling

DEFAULT_PAIRS, FIRST_BATCH = 50_000, 8
PILOT_SECONDS = 2.0  # of drawing, after which the number of pairs is chosen


@dataclass(frozen=True, kw_only=True)
class ReflowSettings(LoadOptions):
    """How many pairs are drawn, and how."""

    n: Count | None = None
    """Number of pairs. With too few, the new model memorises them. None: 50,000, or as many as --max-minutes allows."""
    max_minutes: Positive = 10.0
    """About the longest time without --n: the first pairs are timed, and those that do not fit are left out."""
    sampler: str | None = None
    """An ODE sampler; None: the objective's default (heun)."""
    steps: Count = 50
    """Number of sampler steps; the new model learns their error too."""
    guidance: Scale = 1.0
    """Scale of classifier-free guidance, which becomes part of the new model; 1: no guidance."""
    seed: Seed = 1_000_000
    """Pair i has seed + i; far from the seeds of usual samples."""
    batch: Count = 256
    """Pairs per batch."""
    precision: Precision = "fp32"
    """Arithmetic of the networks' forward passes: fp32, tf32 (on CUDA devices), bf16 or fp16."""


@dataclass(frozen=True)
class ReflowPairs:
    """Pairs that were drawn and written."""

    path: Path
    """the .npz, for ``--data=pairs --data.root``"""
    num_pairs: int
    run: Run
    """the model that drew them"""


def reflow(
    run: str | Path | Run,
    settings: ReflowSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> ReflowPairs:
    """Draw pairs (source, sample) from a model and write them, for training with ``--objective.coupling=given``.

    ``out`` is the .npz; None: pairs-step<N>.npz in the run's folder. ``changes`` are settings by name:
    ``reflow(run, n=1000)``; those of loading have no effect on an opened ``run``. ``ValueError`` if the model has no
    probability-flow ODE or models latents, the sampler adds noise, or samples are not finite.
    """
    settings = config.override(settings or ReflowSettings(), **changes)
    if not isinstance(run, Run):
        run = load_run(run, ema=settings.ema, step=settings.step, device=settings.device)
    path = Path(out) if out else run.directory / f"pairs-step{run.step}.npz"
    refuse_foreign(path)
    with reporting(progress) as report:
        x, x1, cond = draw_pairs(run, settings, report)
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{run.weights}: gives samples that are not finite; the run has diverged")
    provenance = {**asdict(settings), "n": len(x), "run": str(run.directory), "weights": run.weights}
    save_pairs(path, x, x1, cond, run.spec, run.codec, provenance)
    return ReflowPairs(path, len(x), run)


class PairBudget:
    """How many pairs are drawn, and in which batches: what ``n`` asks for, or what fits into ``max_minutes``.

    Without ``n`` the first batches double, from ``FIRST_BATCH`` pairs on, until they have taken ``PILOT_SECONDS``. The
    pairs themselves do not depend on their number, nor on the batches.
    """

    def __init__(self, settings: ReflowSettings):
        self.settings = settings
        self.n = settings.n or DEFAULT_PAIRS
        self.size = settings.batch if settings.n else min(FIRST_BATCH, settings.batch)
        self.first, self.began, self.fixed = 0, time.perf_counter(), settings.n is not None

    def next_rows(self) -> range | None:
        """The numbers of the next pairs; None if there are enough."""
        if self.first >= self.n:
            return None
        rows = range(self.first, min(self.first + self.size, self.n))
        self.first = rows.stop
        return rows

    def count(self, done: int) -> None:
        """Note that ``done`` pairs are drawn; after the pilot the number of pairs is fixed, and said if it is less."""
        if self.fixed:
            return
        self.size = min(2 * self.size, self.settings.batch)
        seconds = time.perf_counter() - self.began
        if seconds < PILOT_SECONDS:
            return
        self.fixed, minutes = True, self.settings.max_minutes
        fitting = max(done, int(60 * minutes * done / seconds))
        if fitting < self.n:
            whole = estimate_duration(seconds / done * self.n)
            logging.getLogger("genkit").warning(
                f"reflow: {fitting} of {self.n} pairs take about {minutes:g} minutes; all would take {whole}: "
                f"--n {self.n}, or --max-minutes"
            )
            self.n = fitting


def draw_pairs(run: Run, settings: ReflowSettings, progress: Progress) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Samples ``x`` and sources ``x1`` ``[n, *S]`` in the model's units, and the conditions, those of the training
    data in turn."""
    objective = run.objective
    if not isinstance(objective, Matching):
        raise ValueError(f"run: given one of {type(objective).__name__}, which has no ODE to straighten")
    if isinstance(run.codec, LearnedCodec):
        raise ValueError("run: given a model of latents, whose pairs cannot be stored yet; take a model of the samples")
    sampling = Sampling(
        sampler=settings.sampler, steps=settings.steps, guidance=settings.guidance, precision=settings.precision
    )
    generate = run.generator(sampling)
    no_noise = refuse_noise("a pair needs the sample that its noise alone determines")
    data = run.config.data.load("train") if run.spec.cond else None
    parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    budget = PairBudget(settings)
    progress("pairs", 0, budget.n)
    while (rows := budget.next_rows()) is not None:
        cond = training_conditions(data, rows, settings.seed, run.device) if data else {}
        noise = Seeds([settings.seed + i for i in rows], run.device)
        z = noise(run.spec.shape)
        with torch.no_grad():
            x = generate(z, cond, no_noise).float()
        parts.append((x.cpu(), objective.source(z, cond).cpu(), {k: v.cpu() for k, v in cond.items()}))
        budget.count(rows.stop)
        progress("pairs", rows.stop, budget.n)
    x, x1, conds = zip(*parts, strict=True)
    return torch.cat(x), torch.cat(x1), {k: torch.cat([c[k] for c in conds]) for k in conds[0]}


def training_conditions(data: Data, rows: range, seed: int, device: torch.device) -> dict[str, Tensor]:
    """The conditions of samples ``rows`` of ``data``, in random order and then again, as the model sees them.

    The order matters if there are fewer pairs than samples: data may be sorted by class.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    batch = data.batch(order[torch.tensor(rows) % len(data)], Draw((seed,), rows.start, rows.stop))
    return {k: v.to(device) for k, v in data.codec.encode(batch).cond.items()}
