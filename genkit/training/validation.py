"""The loss of held-out samples while training: the same samples, noise and times at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from genkit.core import Batch, Codec, Data, Direction, Draw, Objective
from genkit.training.precision import use_precision
from genkit.training.resume import data_fingerprint
from genkit.training.settings import TrainSettings
from genkit.training.state import State

DRAWS = -1  # second number of the key of the random draws, which is the step in training
MAX_BLOCK = 256  # samples in a forward pass
LEVELS_SEED = 0  # of the noise at fixed levels, whatever the seed of the run


def validation_metrics(settings: TrainSettings) -> dict[str, Direction]:
    """What ``val_every`` logs, ``{"val/loss": "lower", "val/raw/loss": "lower"}``, and which values are better.

    Raises ``ValueError`` if the objective has no loss that means anything on held-out samples.
    """
    metrics = dict(settings.objective.validation_metrics)
    if settings.val_every and not metrics:
        raise ValueError(
            f"val_every: given {settings.val_every}, but {type(settings.objective).__name__} has no loss that means "
            "anything on held-out samples: its networks are each other's measure; try --eval-every 500"
        )
    metrics |= {name: "lower" for name in level_names(settings.val_levels)}
    prefixes = ("val", "val/raw") if settings.ema or settings.power_ema else ("val",)
    return {f"{prefix}/{name}": direction for prefix in prefixes for name, direction in metrics.items()}


def level_names(levels: Sequence[float]) -> list[str]:
    """What the errors at these noise levels are called: their mean, and each."""
    return ["velocity", *(f"velocity_{level:g}" for level in levels)] if levels else []


@dataclass(frozen=True)
class Validation:
    """Held-out samples of a run, and how their loss is measured. All ranks share the samples."""

    objective: Objective
    data: Data
    codec: Codec
    """the codec of the training data"""
    n: int
    """number of samples, evenly spaced in the data"""
    block: int
    """samples in a forward pass"""
    seed: int
    precision: str
    accelerator: Accelerator
    levels: tuple[float, ...] = ()
    """noise levels at which the error of the velocity is measured, of the same samples and noise in all runs"""

    @classmethod
    def create(cls, settings: TrainSettings, training: Data, codec: Codec, accelerator: Accelerator) -> Validation:
        """The validation on the test split of ``settings.data``; ``training`` is the split that is trained on.

        Raises ``ValueError`` if there is no test split, or it is the training split, or has another layout.
        """
        validation_metrics(settings)
        if settings.val_levels and type(settings.objective).level_errors is Objective.level_errors:
            settings.objective.level_errors({}, Batch(torch.empty(0)), settings.val_levels)
        source = settings.data.unaugmented()
        with accelerator.main_process_first():
            try:
                data = source.load("test")
            except ValueError as e:
                raise ValueError(f"val_every: needs held-out samples: {e}") from e
        if data_fingerprint(data) == data_fingerprint(training):
            kind = type(settings.data).__name__
            raise ValueError(f"val_every: {kind} has no held-out samples: its test split is the training split; "
                             "leave --val-every out")  # fmt: skip
        if data.spec.shape != training.spec.shape or data.spec.cond.keys() != training.spec.cond.keys():
            raise ValueError(
                f"val_every: held-out samples are {data.spec.shape} with conditions {', '.join(data.spec.cond)}; needs "
                f"those of the training split, {training.spec.shape} with {', '.join(training.spec.cond)}"
            )
        block = min(settings.micro_batch or settings.batch, MAX_BLOCK)
        return cls(settings.objective, data, codec, min(settings.val_n, len(data)), block, settings.seed,
                   settings.precision, accelerator, settings.val_levels)  # fmt: skip

    def __call__(self, state: State) -> dict[str, float]:
        """Means over the samples by name: ``val/loss`` of the slowest average, ``val/raw/loss`` of the raw weights."""
        values = self.measure(state.slowest_average, "val")
        if state.emas:
            values |= self.measure(state.nets, "val/raw")
        for net in state.nets.values():
            net.train()
        return values

    @torch.no_grad()
    def measure(self, nets: Mapping[str, nn.Module], prefix: str) -> dict[str, float]:
        """``{"PREFIX/loss": mean}`` of these networks, the same number on every rank, however many there are."""
        for net in nets.values():
            net.eval()
        names = [*self.objective.validation_metrics, *level_names(self.levels)]
        device, world = self.accelerator.device, self.accelerator.num_processes
        rows = torch.zeros(len(names), self.n, device=device, dtype=torch.float64)
        for first in range(self.accelerator.process_index * self.block, self.n, world * self.block):
            stop = min(first + self.block, self.n)
            with use_precision(self.precision, device):
                losses = self.losses(nets, first, stop)
            rows[:, first:stop] = torch.stack([losses[name].double() for name in names])
        if world > 1:  # every row is 0 on all ranks but one
            rows = self.accelerator.reduce(rows, "sum")
        assert isinstance(rows, Tensor)
        return {f"{prefix}/{name}": value for name, value in zip(names, rows.mean(1).tolist(), strict=True)}

    def losses(self, nets: Mapping[str, nn.Module], first: int, stop: int) -> dict[str, Tensor]:
        """The numbers of samples ``first..stop``, ``[B]`` each."""
        losses = self.objective.validate(nets, self.rows(first, stop, self.seed))
        if self.levels:
            errors = self.objective.level_errors(nets, self.rows(first, stop, LEVELS_SEED), self.levels)
            losses |= zip(level_names(self.levels), [errors.mean(0), *errors], strict=True)
        return losses

    def rows(self, first: int, stop: int, seed: int) -> Batch:
        """Samples ``first..stop`` of the ``n``, encoded, with random numbers that depend on seed and row only."""
        spaced = torch.linspace(0, len(self.data) - 1, self.n, dtype=torch.float64).round().long()
        device = self.accelerator.device
        batch = self.data.batch(spaced[first:stop], Draw((seed, DRAWS, 1), first, stop))
        draw = Draw((seed, DRAWS), first, stop, device)
        batch = batch.to(device)
        return self.codec.encode(replace(batch, draw=draw))
