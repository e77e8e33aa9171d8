"""The CPU time of a training step outside the passes through its networks, for each objective."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from genkit import config
from genkit.backbones import MLP, DiT
from genkit.core import Data
from genkit.core.protocols import Backbone
from genkit.data import DATA, Stream
from genkit.training.loop import fit, initial_state
from genkit.training.settings import TrainSettings

BATCH = 64
PLANE: tuple[str, Backbone] = ("moons", MLP(width=16, depth=2))
PICTURES: tuple[str, Backbone] = ("digits", DiT(width=16, depth=2, head_size=8))
LATENT = {"vae": (4,), "ae": (4,), "vq": (8,), "autoencoder": (2,)}
OBJECTIVES = ("flow", "ddpm", "edm", "gan", "vae", "vq", "autoencoder", "flow-map", "drift")


class Passes:
    """A clock of the time within passes: forward ones of some networks, and backward ones through anything."""

    def __init__(self, nets: Mapping[str, nn.Module]):
        self.seconds, self.depth, self.begun = 0.0, 0, 0.0
        for net in nets.values():
            net.register_forward_pre_hook(lambda *_: self.enter())
            net.register_forward_hook(lambda *_: self.leave(), always_call=True)

    def enter(self) -> None:
        """A pass begins; one within another is a part of it."""
        if self.depth == 0:
            self.begun = time.process_time()
        self.depth += 1

    def leave(self) -> None:
        """A pass ends."""
        self.depth -= 1
        if self.depth == 0:
            self.seconds += time.process_time() - self.begun

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time counts as a pass."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return counted

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block backward passes are counted."""
        places = [(torch.Tensor, "backward"), (torch.autograd, "grad")]
        functions = [getattr(owner, name) for owner, name in places]
        for (owner, name), function in zip(places, functions, strict=True):
            setattr(owner, name, self.counting(function))
        try:
            yield
        finally:
            for (owner, name), function in zip(places, functions, strict=True):
                setattr(owner, name, function)


def lowest_tenth(seconds: list[float]) -> float:
    """A time that other processes of the machine have hardly disturbed: a tenth of all are shorter."""
    return sorted(seconds)[len(seconds) // 10]


def measure_step(name: str, kind: tuple[str, Backbone], steps: int = 200) -> dict[str, float]:
    """Milliseconds of a training step, of its passes, and of the rest: a tenth of the steps stay below each."""
    data: Data = DATA[kind[0]]().load("train")
    shape = LATENT.get(name)
    if shape and len(data.spec.shape) == 3:
        shape = (shape[0], 4, 4)
    objective = {"name": name, **({"latent": list(shape)} if shape else {})}
    settings = config.from_dict(
        TrainSettings, {"objective": objective, "batch": BATCH, "steps": steps, "precision": "fp32"}
    )
    torch.manual_seed(0)
    nets = settings.objective.networks(kind[1], data.spec)
    state, passes = initial_state(settings.objective, nets, settings), Passes(nets)
    marks: list[tuple[float, float]] = []

    def progress(step: int, loss: float | None) -> None:
        marks.append((time.process_time(), passes.seconds))

    with passes.watching():
        fit(settings.objective, state, Stream(data, BATCH, 0), data.codec, settings, Accelerator(cpu=True),
            progress=progress)  # fmt: skip
    lengths = [(1e3 * (b - a), 1e3 * (q - p)) for (a, p), (b, q) in pairwise(marks[steps // 10 :])]
    step, network, rest = (lowest_tenth(v) for v in ([s for s, _ in lengths], [n for _, n in lengths],
                                                     [s - n for s, n in lengths]))  # fmt: skip
    return {"step_ms": step, "passes_ms": network, "overhead_ms": rest}


def measure_steps(rounds: int = 2) -> list[dict[str, Any]]:
    """A row for each objective, on points and on pictures: the best of a few rounds."""
    rows: list[dict[str, Any]] = []
    for where, kind in (("plane", PLANE), ("pictures", PICTURES)):
        for name in OBJECTIVES:
            best = min((measure_step(name, kind) for _ in range(rounds)), key=lambda row: row["overhead_ms"])
            rows.append({"objective": name, "data": where, **best})
    return rows
