"""What a sampler costs besides its network: our samplers against diffusers' schedulers, per step, in one process.

    genkit bench overhead [--out FILE.json]

A network that does next to nothing, samples of 2x8x8, batch 4, 20 steps of epsilon-prediction on the DDPM path (the
flow rows: velocity on the linear one). Both sides run in turn; the CPU time of the network and of ``set_timesteps`` is
taken off, and the median over the rounds is reported, in microseconds of one core. What is left is the kernels that
combine tensors, and Python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from genkit import __version__
from genkit.core import Parametrization, ProbabilityPath, Sampler
from genkit.diffusion.parametrization import Epsilon, NetDenoiser, Velocity
from genkit.diffusion.paths import VP, Linear
from genkit.diffusion.samplers import Grid, ddim, dpmpp_2m, dpmpp_3m, heun, trailing, uniform, unipc

STEPS = 20
SIGMA = partial(heun, clock="sigma")  # the clock of Karras et al. 2022, which is also that of HeunDiscreteScheduler
PAIRS: dict[
    str, tuple[Sampler, ProbabilityPath, Parametrization, Grid, str, dict[str, Any]]
] = {  # name -> ours, theirs
    "ddim": (ddim, VP(), Epsilon(), trailing(STEPS), "DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": (dpmpp_2m, VP(), Epsilon(), trailing(STEPS), "DPMSolverMultistepScheduler", {}),
    "dpmpp_3m": (
        dpmpp_3m,
        VP(),
        Epsilon(),
        trailing(STEPS),
        "DPMSolverMultistepScheduler",
        {"solver_order": 3},
    ),
    "unipc": (unipc, VP(), Epsilon(), trailing(STEPS), "UniPCMultistepScheduler", {}),
    "heun": (SIGMA, VP(), Epsilon(), trailing(STEPS), "HeunDiscreteScheduler", {}),
    "heun, flow": (heun, Linear(), Velocity(), uniform(STEPS), "FlowMatchHeunDiscreteScheduler", {}),
    "euler, flow": (ddim, Linear(), Velocity(), uniform(STEPS), "FlowMatchEulerDiscreteScheduler", {}),
}


class Halve(nn.Module):
    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x * 0.5


def seconds(run: Callable[[], object]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


@torch.no_grad()
def measure(name: str, rounds: int = 25) -> tuple[float, float]:
    """Microseconds a step that (ours, diffusers') adds to the network's own time."""
    import diffusers

    sampler, path, prediction, grid, scheduler, options = PAIRS[name]
    net, x = Halve(), torch.randn(4, 2, 8, 8)
    denoise, times = NetDenoiser(net, path, prediction), grid(path)
    theirs = getattr(diffusers, scheduler)(**options)
    theirs.set_timesteps(STEPS)
    evaluations = len(theirs.timesteps)
    scale = getattr(theirs, "scale_model_input", lambda y, t: y)  # the flow schedulers need none

    def loop() -> Tensor:
        theirs.set_timesteps(STEPS)
        y = x
        for t in theirs.timesteps:
            y = theirs.step(net(scale(y, t), t), t, y).prev_sample
        return y

    rows = [
        (
            seconds(lambda: sampler(denoise, x, times)),
            seconds(loop) - seconds(lambda: theirs.set_timesteps(STEPS)),
            seconds(lambda: [net(x) for _ in range(evaluations)]),
        )
        for _ in range(rounds)
    ]
    ours, other, alone = (statistics.median(column) / STEPS * 1e6 for column in zip(*rows, strict=True))
    return ours - alone, other - alone


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="genkit bench overhead", description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON, with the settings")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {name: measure(name, args.rounds) for name in PAIRS}
    table = Table("sampler", "genkit, us a step", "diffusers", "ratio")
    for name, (ours, theirs) in found.items():
        table.add_row(name, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}")
    Console().print(table)
    if args.out:
        import diffusers

        record = {n: {"genkit_us": o, "diffusers_us": t, "ratio": t / o} for n, (o, t) in found.items()}
        settings = {"rounds": args.rounds, "steps": STEPS, "genkit": __version__, "torch": torch.__version__,
                    "diffusers": diffusers.__version__}  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"overhead": record, "settings": settings}, indent=1) + "\n")
    return 0
