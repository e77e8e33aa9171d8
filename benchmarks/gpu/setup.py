"""What the parts of ``genkit bench gpu`` share: the device, sizes, networks, data, clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genkit.backbones import DiT
from genkit.core import Backbone, Cond, Label, Objective, Spec
from genkit.data import InMemory, Stream
from genkit.data.codecs import Identity
from genkit.diffusion.samplers import Seeds
from genkit.objectives import Flow
from genkit.training.distributed import join_ranks
from genkit.training.loop import State, fit, initial_state
from genkit.training.settings import TrainSettings

Row = Mapping[str, Any]  # column -> number, text, or NEEDS_CUDA
NEEDS_CUDA = "needs CUDA"
CLASSES = 1000
NEVER = 10**9


@dataclass(frozen=True)
class Setup:
    """Where and how large."""

    device: torch.device
    tiny: bool
    folder: Path
    """for runs, removed at the end"""

    @property
    def is_cuda(self) -> bool:
        """Whether kernels, launches and memory of a GPU can be seen."""
        return self.device.type == "cuda"

    @property
    def base(self) -> DiT:
        """DiT-B/2 (Peebles & Xie 2023, table 1)."""
        return DiT(width=32, depth=1) if self.tiny else DiT(width=768, depth=12)

    @property
    def large(self) -> DiT:
        """DiT-XL/2, with heads of 64 in place of 72."""
        return DiT(width=32, depth=2) if self.tiny else DiT(width=1152, depth=28)

    def latents(self) -> InMemory:
        """Random numbers in the shape of latents, with classes."""
        n, side = (16, 8) if self.tiny else (1024, 32)
        x = torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(0))
        return InMemory(
            x, {"label": torch.arange(n) % CLASSES}, Spec((4, side, side), {"label": Label(CLASSES)}), Identity()
        )

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], object], repeats: int = 5, warmup: int = 2) -> float:
        """The mean time of a call, without the first ones."""
        repeats, warmup = (1, 1) if self.tiny else (repeats, warmup)
        for _ in range(warmup):
            function()
        self.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        self.synchronize()
        return (time.perf_counter() - began) / repeats


def train_steps(
    setup: Setup,
    objective: Objective,
    backbone: Backbone,
    data: InMemory,
    at_step: Callable[[int], None] = lambda step: None,
    **settings: Any,
) -> State:
    """Train as ``genkit train`` does, without a run directory; ``at_step`` is called after each step."""
    defaults = {"warmup": 0, "log_every": NEVER, "save_every": NEVER, "sample_every": 0, "precision": "fp32"}
    changed = replace(TrainSettings(), objective=objective, backbone=backbone, **{**defaults, **settings})
    torch.manual_seed(0)
    nets = {k: v.to(setup.device) for k, v in objective.networks(backbone, data.spec).items()}
    state = initial_state(objective, nets, changed)
    stream = Stream(data, changed.batch, 0, setup.device, workers=0)
    accelerator = join_ranks(setup.device)
    fit(objective, state, stream, data.codec, changed, accelerator, progress=lambda step, loss: at_step(step))
    return state


def shaken_network(setup: Setup, backbone: DiT) -> dict[str, nn.Module]:
    """A denoiser on the device whose output is not zero, as that of an untrained one is."""
    torch.manual_seed(0)
    nets = Flow().networks(backbone, setup.latents().spec)
    for net in nets.values():
        for p in net.parameters():
            with torch.no_grad():
                p.add_(torch.randn_like(p), alpha=0.02)
        net.to(setup.device).eval().requires_grad_(False)
    return nets


def conditions(setup: Setup, n: int) -> tuple[torch.Tensor, Cond]:
    """Noise and classes of ``n`` samples."""
    data = setup.latents()
    noise = Seeds(range(n), setup.device)(data.spec.shape)
    return noise, {"label": (torch.arange(n) % CLASSES).to(setup.device)}


def rounded(row: Mapping[str, Any], digits: int = 4) -> Row:
    """The row with numbers of so many significant digits."""
    return {k: float(f"{v:.{digits}g}") if isinstance(v, float) else v for k, v in row.items()}
