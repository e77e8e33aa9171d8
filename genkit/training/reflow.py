"""Reflow: the pairs (source, sample) of a trained flow, to train a straighter one on (Liu et al. 2023)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import config
from genkit.config.numbers import Count, Scale, Seed
from genkit.core import Data, Draw
from genkit.core.files import refuse_foreign
from genkit.core.progress import Progress, reporting
from genkit.data.codecs import LearnedCodec
from genkit.data.pairs import save_pairs
from genkit.diffusion.samplers import Seeds, refuse_noise
from genkit.objectives.matching.matching import Matching
from genkit.training.run import Run, load_run
from genkit.training.sampling import LoadOptions, Sampling


@dataclass(frozen=True, kw_only=True)
class ReflowSettings(LoadOptions):
    """How many pairs are drawn, and how."""

    n: Count = 50_000
    """Number of pairs. With too few, the new model memorises them."""
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
    provenance = {**asdict(settings), "run": str(run.directory), "weights": run.weights}
    save_pairs(path, x, x1, cond, run.spec, run.codec, provenance)
    return ReflowPairs(path, settings.n, run)


def draw_pairs(run: Run, settings: ReflowSettings, progress: Progress) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Samples ``x`` and sources ``x1`` ``[n, *S]`` in the model's units, and the conditions, those of the training
    data in turn."""
    objective = run.objective
    if not isinstance(objective, Matching):
        raise ValueError(f"run: given one of {type(objective).__name__}, which has no ODE to straighten")
    if isinstance(run.codec, LearnedCodec):
        raise ValueError("run: given a model of latents, whose pairs cannot be stored yet; take a model of the samples")
    generate = run.generator(Sampling(sampler=settings.sampler, steps=settings.steps, guidance=settings.guidance))
    no_noise = refuse_noise("a pair needs the sample that its noise alone determines")
    data = run.config.data.load("train") if run.spec.cond else None
    parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    progress("pairs", 0, settings.n)
    for first in range(0, settings.n, settings.batch):
        rows = range(first, min(first + settings.batch, settings.n))
        cond = training_conditions(data, rows, settings.seed, run.device) if data else {}
        noise = Seeds([settings.seed + i for i in rows], run.device)
        z = noise(run.spec.shape)
        with torch.no_grad():
            x = generate(z, cond, no_noise).float()
        parts.append((x.cpu(), objective.source(z, cond).cpu(), {k: v.cpu() for k, v in cond.items()}))
        progress("pairs", rows.stop, settings.n)
    x, x1, conds = zip(*parts, strict=True)
    return torch.cat(x), torch.cat(x1), {k: torch.cat([c[k] for c in conds]) for k in conds[0]}


def training_conditions(data: Data, rows: range, seed: int, device: torch.device) -> dict[str, Tensor]:
    """The conditions of samples ``rows`` of ``data``, in random order and then again, as the model sees them.

    The order matters if there are fewer pairs than samples: data may be sorted by class.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    batch = data.batch(order[torch.tensor(rows) % len(data)], Draw((seed,), rows.start, rows.stop))
    return {k: v.to(device) for k, v in data.codec.encode(batch).cond.items()}
