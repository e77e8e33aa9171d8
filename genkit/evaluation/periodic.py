"""Evaluation while training: the slowest average every few steps, its samples drawn by all ranks together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from accelerate import Accelerator
from torch import nn

from genkit.config.blocks import suggest
from genkit.core import Data, Direction
from genkit.core.tensors import to_tensors
from genkit.evaluation.cards import Card
from genkit.evaluation.evaluations import default_reference_n
from genkit.evaluation.evaluator import FEATURES, Evaluator, find_metrics
from genkit.evaluation.sources import ModelSamples, open_run_data
from genkit.training.measurements import Measured
from genkit.training.ranks import Ranks
from genkit.training.run import Run
from genkit.training.sampling import Sampling
from genkit.training.settings import TrainSettings
from genkit.training.state import State

MAX_BATCH = 64


@dataclass
class PeriodicEvaluation:
    """What a training run is evaluated with. Set up before the first step (:meth:`create`), to find mistakes early."""

    evaluator: Evaluator
    cfg: TrainSettings
    data: Data

    @classmethod
    def create(cls, cfg: TrainSettings, state: State, data: Data, accelerator: Accelerator) -> PeriodicEvaluation:
        """The evaluation that ``cfg.eval_*`` describe. ``ValueError`` for settings that do not suit the data."""
        if cfg.eval_features not in FEATURES:
            hint = suggest(cfg.eval_features, FEATURES)
            raise ValueError(f"eval_features: given {cfg.eval_features!r}; allowed: {', '.join(FEATURES)}{hint}")
        nets, file = slowest_average(state)
        samples = samples_while_training(cfg, nets, data, Path(), state.step, file, "unused")
        with accelerator.main_process_first():
            reference = open_run_data(samples.run)
        evaluator = Evaluator.create(
            samples,
            reference,
            None if cfg.eval_metrics is None else find_metrics(cfg.eval_metrics),
            FEATURES[cfg.eval_features](),
            weights=cfg.eval_weights,
            n=cfg.eval_n,
            reference_n=default_reference_n(data.spec, cfg.eval_n),
            names=("eval_n", None),
            batch=min(cfg.batch, MAX_BATCH),
            device=accelerator.device,
            ranks=Ranks.of(accelerator),
        )
        return cls(evaluator, cfg, data)

    @property
    def directions(self) -> dict[str, Direction]:
        """The numbers that a card will have, and which values are better."""
        return {value: metric.direction for metric in self.evaluator.metrics.values() for value in metric.values}

    def describe(self) -> str | None:
        return None

    def __call__(self, state: State, run: Path, stop: Callable[[], bool] = lambda: False) -> Measured | None:
        """The metrics of this state, with their intervals. It is never interrupted."""
        card = self.evaluate(state, run)
        if card is None:
            return None
        parts = {"": "value", "_low": "low", "_high": "high"}
        values = {f"{k}{end}": getattr(e, part) for k, e in card.metrics.items() for end, part in parts.items()}
        return Measured(values, {card.title(k): e.value for k, e in card.metrics.items()})

    def evaluate(self, state: State, run: Path) -> Card | None:
        """The card of this state, saved in the ``eval`` folder of ``run``; None on all ranks but the main one.

        All ranks draw samples; only the main one computes metrics. ``ValueError`` on all ranks if a sample is not
        finite.
        """
        nets, file = slowest_average(state)
        for net in nets.values():
            net.eval()
        try:
            digest = hashlib.sha256(safetensors.torch.save(to_tensors(nets))).hexdigest()
            samples = samples_while_training(self.cfg, nets, self.data, run, state.step, file, digest)
            measurement = self.evaluator.measure(samples, self.cfg.eval_n)
        finally:
            for net in state.nets.values():
                net.train()
        if not self.evaluator.ranks.is_main:
            return None
        card = self.evaluator.make_card(samples, self.cfg.eval_n, measurement)
        card.save()
        return card


def slowest_average(state: State) -> tuple[dict[str, nn.Module], str]:
    """The networks that are evaluated, and the name of the file that they are saved in."""
    slowest = state.slowest
    return state.slowest_average, "nets.safetensors" if slowest is None else f"ema-{slowest}.safetensors"


def samples_while_training(
    cfg: TrainSettings, nets: dict[str, nn.Module], data: Data, run: Path, step: int, file: str, sha256: str
) -> ModelSamples:
    """Samples of ``nets``, as if they were loaded from the checkpoint of ``step``."""
    device = next(p for net in nets.values() for p in net.parameters()).device
    weights = f"checkpoints/step-{step:07d}/{file}"
    current = Run(run, cfg, nets, data.spec, data.codec, step, weights, device)
    return ModelSamples(current, Sampling(steps=cfg.eval_steps), sha256)
