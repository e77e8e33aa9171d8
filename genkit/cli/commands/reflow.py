"""`genkit reflow RUN`: the pairs (source, sample) that a model makes, to train a straighter one on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from tyro.conf import Positional

from genkit.config import parse
from genkit.core import Draw, Objective
from genkit.data.codecs import LearnedCodec
from genkit.data.pairs import save_pairs
from genkit.diffusion.paths import Linear
from genkit.diffusion.samplers import Seeds, refuse_noise
from genkit.objectives import Flow
from genkit.objectives.matching.matching import Matching
from genkit.training.run import Run, load_run
from genkit.training.sampling import Sampling

console = Console(highlight=False, soft_wrap=True)
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Reflow:
    """Draw pairs (source, sample) from a run, for training with --objective.coupling=given."""

    run: Positional[str]
    """The run's folder, such as runs/latest."""
    n: Count = 50_000
    """How many pairs; too few, and the new model learns them by heart."""
    sampler: str | None = None
    """An ODE sampler; None: the objective's usual one (heun)."""
    steps: Count = 50
    """Steps of the sampler: its error is learned too."""
    guidance: float = 1.0
    """Strength of classifier-free guidance, which the new model then has built in; 1: none."""
    seed: Annotated[int, Ge(0)] = 1_000_000
    """Pair i has seed + i; far from those of usual samples."""
    batch: Count = 256
    """Pairs at a time."""
    out: str | None = None
    """The .npz file; None: pairs-step<N>.npz in the run's folder."""
    ema: str | None = None
    """Which averaged weights, by decay; None: the slowest; "none": the weights themselves."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""


def main(argv: list[str]) -> int:
    asked = parse(Reflow, argv, prog="genkit reflow", description="Make the pairs of a reflow.")
    run = load_run(asked.run, ema=asked.ema, device=asked.device)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("pairs", total=asked.n)
        x, x1, cond = draw_pairs(run, asked, lambda done: bar.update(task, completed=done))
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{run.weights}: gives samples that are not finite; the run has diverged")
    out = Path(asked.out) if asked.out else run.directory / f"pairs-step{run.step}.npz"
    made = {**asdict(asked), "run": str(run.directory), "weights": run.weights}
    save_pairs(out, x, x1, cond, run.spec, run.codec, made)
    console.print(f"{asked.n} pairs  {out}", markup=False)
    same = f"genkit train --config {run.directory / 'config.yaml'} --data=pairs --data.root {out}"
    goes_on = f" --init {run.directory}" if isinstance(run.objective, Flow) else ""
    straight = "--objective.coupling=given" if goes_on else "--objective=flow --objective.coupling=given"
    console.print(f"straighten  {same} {straight}{goes_on}", markup=False)
    console.print(f"one step    {same} --objective=distillation{goes_on if plain(run.objective) else ''}", markup=False)
    return 0


def plain(objective: Objective) -> bool:
    """Whether its network says what that of a distilled flow says: the velocity on straight lines."""
    return isinstance(objective, Flow) and (objective.path, objective.prediction) == (Linear(), "velocity")


def draw_pairs(run: Run, asked: Reflow, progress=lambda done: None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """``x``, ``x1`` and their conditions, which are those of the training data in turn."""
    objective = run.objective
    if not isinstance(objective, Matching):
        raise ValueError(f"run: given one of {type(objective).__name__}, which has no ODE to make straight")
    if isinstance(run.codec, LearnedCodec):
        raise ValueError("run: given a model of latents, whose pairs cannot be stored yet; take a model of the samples")
    generate = run.generator(Sampling(sampler=asked.sampler, steps=asked.steps, guidance=asked.guidance))
    no_noise = refuse_noise("a pair needs the sample that its noise alone determines")
    data, found = run.config.data.load("train") if run.spec.cond else None, []
    for first in range(0, asked.n, asked.batch):
        rows = range(first, min(first + asked.batch, asked.n))
        cond = {}
        if data:
            drawn = data.codec.encode(
                data.batch(torch.tensor(rows) % len(data), Draw((asked.seed,), rows[0], rows[-1] + 1))
            )
            cond = {k: v.to(run.device) for k, v in drawn.cond.items()}
        noise = Seeds([asked.seed + i for i in rows], run.device)
        z = noise(run.spec.shape)
        with torch.no_grad():
            x = generate(z, cond, no_noise).float()
        found.append((x.cpu(), objective.source(z, cond).cpu(), {k: v.cpu() for k, v in cond.items()}))
        progress(rows[-1] + 1)
    x, x1, conds = zip(*found, strict=True)
    return torch.cat(x), torch.cat(x1), {k: torch.cat([c[k] for c in conds]) for k in conds[0]}
