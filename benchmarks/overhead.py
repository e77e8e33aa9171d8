"""What a sampler costs besides its network: genkit's samplers and diffusers' schedulers, per step, in one process.

    genkit bench overhead [--out FILE.json]

A network that does next to nothing, samples of 2x8x8, batch 4, 20 steps of epsilon-prediction on the DDPM path (flow
rows: velocity on the linear one). Both sides run in turn; the CPU time of the network and of ``set_timesteps`` is
subtracted, and the median over the rounds is reported, in microseconds of one core. What remains is the kernels that
combine tensors, and Python.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import make_console, make_table
from genkit import __version__
from genkit.cli.scripts import ScriptParser
from genkit.core import Parametrization, ProbabilityPath, Sampler
from genkit.core.files import write_text
from genkit.diffusion.parametrization import Epsilon, NetDenoiser, Velocity
from genkit.diffusion.paths import VP, Linear
from genkit.diffusion.samplers import Grid, ddim, dpmpp_2m, dpmpp_3m, heun, trailing, uniform, unipc

STEPS = 20


@dataclass(frozen=True)
class Pair:
    """A sampler of genkit and a scheduler of diffusers that compute the same."""

    sampler: Sampler
    path: ProbabilityPath
    prediction: Parametrization
    grid: Grid
    scheduler: str
    options: Mapping[str, Any]
    """of the scheduler"""


def ddpm_pair(sampler: Sampler, scheduler: str, **options: Any) -> Pair:
    """A pair on the DDPM path, with epsilon-prediction."""
    return Pair(sampler, VP(), Epsilon(), trailing(STEPS), scheduler, options)


def flow_pair(sampler: Sampler, scheduler: str) -> Pair:
    """A pair on the linear path, with velocity-prediction."""
    return Pair(sampler, Linear(), Velocity(), uniform(STEPS), scheduler, {})


PAIRS: Mapping[str, Pair] = {
    "ddim": ddpm_pair(ddim, "DDIMScheduler", clip_sample=False),
    "dpmpp_2m": ddpm_pair(dpmpp_2m, "DPMSolverMultistepScheduler"),
    "dpmpp_3m": ddpm_pair(dpmpp_3m, "DPMSolverMultistepScheduler", solver_order=3),
    "unipc": ddpm_pair(unipc, "UniPCMultistepScheduler"),
    # the clock of Karras et al. 2022, which HeunDiscreteScheduler uses too
    "heun": ddpm_pair(partial(heun, clock="sigma"), "HeunDiscreteScheduler"),
    "heun, flow": flow_pair(heun, "FlowMatchHeunDiscreteScheduler"),
    "euler, flow": flow_pair(ddim, "FlowMatchEulerDiscreteScheduler"),
}


class Halve(nn.Module):
    """A network that costs one multiplication."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Half of ``x``."""
        return x * 0.5


def cpu_seconds(function: Callable[[], object]) -> float:
    """The CPU time of one call."""
    before = time.process_time()
    function()
    return time.process_time() - before


@torch.no_grad()
def measure(name: str, rounds: int = 25) -> tuple[float, float]:
    """Microseconds per step that (genkit, diffusers) add to the network's own time."""
    import diffusers  # lazy: slow to import

    pair = PAIRS[name]
    net, x = Halve(), torch.randn(4, 2, 8, 8)
    denoise, times = NetDenoiser(net, pair.path, pair.prediction), pair.grid(pair.path)
    scheduler = getattr(diffusers, pair.scheduler)(**pair.options)
    scheduler.set_timesteps(STEPS)
    evaluations = len(scheduler.timesteps)
    scale = getattr(scheduler, "scale_model_input", lambda y, t: y)  # the flow schedulers need none

    def run_genkit() -> Tensor:
        return pair.sampler(denoise, x, times)

    def run_diffusers() -> Tensor:
        scheduler.set_timesteps(STEPS)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(net(scale(y, t), t), t, y).prev_sample
        return y

    def run_network() -> None:
        for _ in range(evaluations):
            net(x)

    rows = []
    for _ in range(rounds):
        ours, theirs = cpu_seconds(run_genkit), cpu_seconds(run_diffusers)
        rows.append((ours, theirs - cpu_seconds(lambda: scheduler.set_timesteps(STEPS)), cpu_seconds(run_network)))
    ours, theirs, network = (statistics.median(column) / STEPS * 1e6 for column in zip(*rows, strict=True))
    return ours - network, theirs - network


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    parser = ScriptParser(__doc__, "genkit bench overhead")
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON, with the settings")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = {name: measure(name, args.rounds) for name in PAIRS}
    table = make_table("sampler", "genkit, us per step", "diffusers", "ratio")
    for name, (ours, theirs) in results.items():
        table.add_row(name, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}")
    make_console().print(table)
    if args.out:
        import diffusers  # lazy: slow to import

        rows = {n: {"genkit_us": o, "diffusers_us": t, "ratio": t / o} for n, (o, t) in results.items()}
        settings = {"rounds": args.rounds, "steps": STEPS, "genkit": __version__, "torch": torch.__version__,
                    "diffusers": diffusers.__version__}  # fmt: skip
        write_text(args.out, json.dumps({"overhead": rows, "settings": settings}, indent=1) + "\n")
    return 0
