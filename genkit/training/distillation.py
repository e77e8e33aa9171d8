"""Distil the guidance of a trained model into an adapter that takes its scale as an input: :func:`distill`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genkit import config
from genkit.backbones.lora import GuidanceLoRA
from genkit.config.numbers import Count, Natural, Positive, Seed, Threads, Width
from genkit.config.paths import NameText, PathText
from genkit.core.device import DeviceName
from genkit.core.progress import Progress
from genkit.objectives.matching.guidance_distillation import GuidanceDistillation, GuidanceScale
from genkit.training.directory import find_run
from genkit.training.run import Run
from genkit.training.schedules import warmup_steps
from genkit.training.settings import TrainingPrecision, TrainSettings, stored_settings
from genkit.training.train import TrainedRun, train


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """What an adapter of guidance learns, and how."""

    # -- adapter
    guidance: tuple[GuidanceScale, GuidanceScale] = (1.0, 6.0)
    """Smallest and largest scale of guidance that the adapter learns."""
    rank: Width = 16
    """Rank of the change of each layer."""
    layers: str | None = "."
    """Regular expression that matches anywhere in the names of the adapted layers; None: all linear layers."""
    points: Count = 10
    """Euler steps of each guided trajectory, all of which are trained on."""
    # -- optimization
    steps: Count = 500
    """Optimizer steps."""
    batch: Count = 16
    """Guided trajectories per step."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    seed: Seed = 0
    """Seed of every random number."""
    # -- computation and saving
    precision: TrainingPrecision = "fp32"
    """Forward-pass precision of the guided trajectories and the adapter."""
    device: DeviceName = "auto"
    """Device. auto: the machine's accelerator, or the CPU if it has none."""
    threads: Threads | None = None
    """CPU threads. None: one for small batches, else all."""
    workers: Natural = 0
    """Data-loading processes. 0: load in this process."""
    out: PathText = "runs"
    """Directory in which the run directory is made."""
    name: NameText | None = None
    """Name of the run. None: data-objective-backbone."""
    save_every: Count = 500
    """Steps between checkpoints."""


def distill(
    run: str | Path | Run,
    settings: DistillSettings | None = None,
    *,
    progress: Progress | None = None,
    **changes: Any,
) -> TrainedRun:
    """Distil the guidance of a trained model, and return a run that is guided in one pass (Jensen et al. 2025).

    The model itself stays as it is: the new run holds an adapter and refers to the old one, as a LoRA run does.
    ``run.sample(guidance=w)`` of the new run takes one pass a step for every ``w`` in the trained interval. ``changes``
    are settings by name: ``distill("runs/latest", guidance=(1, 4), steps=200)``. ``ValueError`` for a model that has no
    conditions, was never trained without them, or is not sampled in steps.
    """
    settings = config.override(settings or DistillSettings(), **changes)
    directory = run.directory if isinstance(run, Run) else find_run(run)
    stored = stored_settings(directory)
    objective = stored.objective
    if isinstance(objective, GuidanceDistillation):
        raise ValueError("run: its guidance is distilled already; distil the run that it adapts")
    low, high = settings.guidance
    distilled = GuidanceDistillation(of=objective, low=low, high=high, points=settings.points)
    if not objective.knows_null:
        raise ValueError(
            "run: this model was never trained without its conditions, so it has no guidance to distil; train one with "
            "--objective.cond-dropout 0.1"
        )
    return train(
        TrainSettings(
            objective=distilled,
            backbone=stored.backbone,
            data=stored.data,
            codec=stored.codec,
            codec_posterior=stored.codec_posterior,
            init=str(directory),
            lora=GuidanceLoRA(rank=settings.rank, layers=settings.layers),
            steps=settings.steps,
            batch=settings.batch,
            lr=settings.lr,
            warmup=min(warmup_steps(stored), settings.steps // 10),
            seed=settings.seed,
            precision=settings.precision,
            device=settings.device,
            threads=settings.threads,
            workers=settings.workers,
            out=settings.out,
            name=settings.name,
            save_every=settings.save_every,
            sample_every=0,
        ),
        progress=progress,
    )
