"""Several small networks trained at once, for benchmarks that repeat a training with several seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from genkit.core import NO_COND, Batch, Cond, Objective, ProbabilityPath
from genkit.data.codecs import Identity
from genkit.objectives.matching.couplings import Coupling
from genkit.training.loop import fit, initial_state
from genkit.training.settings import TrainSettings


class EnsembleMLP(nn.Module):
    """``members`` independent MLPs with ``depth`` hidden layers and the time as an additional input.

    The rows of a batch come in as many equal groups, one for each member. Adam treats each weight on its own, so
    (without clipping) training them together is training them one after the other, in a fraction of the time.
    Conditions named in ``numbers``, ``[members * B]`` each, are further inputs: a second time. ``out`` features come
    out, ``dim`` if None.
    """

    def __init__(
        self,
        members: int,
        dim: int,
        width: int,
        depth: int,
        activation: Callable[[Tensor], Tensor],
        numbers: Sequence[str] = (),
        out: int | None = None,
    ):
        super().__init__()
        sizes = [dim + 1 + len(numbers), *[width] * depth, out or dim]
        self.members, self.activation, self.numbers = members, activation, numbers
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise(sizes):
            bound = 1 / math.sqrt(i)  # as torch.nn.Linear is initialised
            self.weights.append(nn.Parameter(torch.empty(members, i, o).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(members, 1, o).uniform_(-bound, bound)))

    def forward(self, x: Tensor, label: Tensor, cond: Cond = NO_COND) -> Tensor:
        """``x`` ``[members * B, dim]`` and its time labels ``[members * B]`` to ``[members * B, dim]``."""
        inputs = [x, *(v[:, None].to(x) for v in (label, *(cond[name] for name in self.numbers)))]
        h = torch.cat(inputs, 1).unflatten(0, (self.members, -1))
        *hidden, last = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            h = self.activation(torch.baddbmm(bias, h, weight))
        return torch.baddbmm(last[1], h, last[0]).flatten(0, 1)


@dataclass(frozen=True)
class PerMember:
    """``coupling`` within the rows of each member of an :class:`EnsembleMLP`, so that members share no sources."""

    coupling: Coupling
    members: int
    independent: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = False
    permutes: ClassVar[bool] = True

    def __call__(self, batch: Batch, x1: Tensor, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        """The ends ``[members * B, dim]`` of the paths."""
        parts = zip(batch.x.chunk(self.members), x1.chunk(self.members), t.chunk(self.members), strict=True)
        ends = [self.coupling(Batch(x), source, path, time) for x, source, time in parts]
        return torch.cat([x for x, _ in ends]), torch.cat([source for _, source in ends])


def train(
    objective: Objective,
    nets: Mapping[str, nn.Module],
    draw: Callable[[int], Batch],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int = 0,
    progress: Callable[[int], None] = lambda step: None,
) -> None:
    """Train ``nets`` in place by genkit's own loop on ``draw(rows)``, with a cosine schedule and without clipping."""
    settings = TrainSettings(
        steps=steps, batch=batch, lr=lr, warmup=min(100, steps // 10), clip=0.0, ema=(), precision="fp32", seed=seed,
        log_every=steps, save_every=steps, sample_every=0, betas=objective.default_settings.get("betas", (0.9, 0.99)),
    )  # fmt: skip
    state = initial_state(objective, dict(nets), settings)
    fit(
        objective,
        state,
        lambda step, random, first, stop: replace(draw(stop - first), step=step),
        Identity(),
        settings,
        Accelerator(cpu=True, mixed_precision="no"),
        progress=lambda step, loss: progress(step),
    )
    for net in nets.values():
        net.eval()


def draw_rows(data: Tensor) -> Callable[[int], Batch]:
    """A function that draws rows of ``data`` with replacement, from torch's global generator (seeded each step)."""
    return lambda n: Batch(data[torch.randint(len(data), (n,))])
