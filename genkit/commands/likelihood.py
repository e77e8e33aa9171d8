"""`genkit likelihood RUN`: how probable held-out samples are under a model, in bits per dimension."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from tyro.conf import Positional

from genkit import runs
from genkit.codecs import Identity, Pixels
from genkit.config import parse
from genkit.core import Draw
from genkit.objectives.matching import Matching
from genkit.sampling import Seeds, bits_per_dim, dequantise, log_prob, uniform

console = Console(highlight=False, soft_wrap=True, stderr=True)
Count = Annotated[int, Ge(1)]
SCALES = {Pixels: 127.5, Identity: 1.0}  # model numbers to the unit in which a density is quoted


@dataclass(frozen=True)
class Likelihood:
    """Bits per dimension of held-out samples, by the change of variables along the probability-flow ODE."""

    run: Positional[str]
    """A run's folder, such as runs/latest."""
    n: Count | None = None
    """How many samples of the split; None: all."""
    split: Literal["train", "test"] = "test"
    """Which samples."""
    divergence: Literal["hutchinson", "exact"] = "hutchinson"
    """exact costs a backward pass for each dimension; hutchinson one for each probe, and is unbiased."""
    probes: Count = 1
    """Random directions of hutchinson."""
    solver: Literal["heun", "dopri5"] = "heun"
    """Fixed steps, or adaptive ones."""
    steps: Count = 64
    """Steps of heun."""
    seed: Annotated[int, Ge(0)] = 0
    """Of dequantisation and probes; sample i has seed + i."""
    batch: Count = 128
    """Samples at a time."""
    ema: str | None = None
    """Which averaged weights, by decay; None: the slowest; "none": the weights themselves."""
    step: Annotated[int, Ge(0)] | None = None
    """Which checkpoint; None: the newest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    json: bool = False
    """Print JSON alone."""


def main(argv: list[str]) -> int:
    asked = parse(Likelihood, argv, prog="genkit likelihood", description=Likelihood.__doc__)
    run = runs.load(asked.run, ema=asked.ema, step=asked.step, device=asked.device)
    if type(run.codec) not in SCALES:
        allowed = ", ".join(kind.__name__ for kind in SCALES)
        raise ValueError(f"likelihood: given a run whose codec is {type(run.codec).__name__}; allowed: {allowed}")
    if not (isinstance(run.objective, Matching) and run.objective.source.normal):
        raise ValueError("likelihood: needs a model whose path ends in standard normal noise; this run's does not")
    if run.config.threads:
        torch.set_num_threads(run.config.threads)
    nats = log_probs(run, asked)
    if not bool(torch.isfinite(nats).all()):
        raise ValueError(f"{run.weights}: gives likelihoods that are not finite; take more --steps")
    found = bits_per_dim(nats, math.prod(run.spec.shape), SCALES[type(run.codec)])
    stderr = float(nats.double().std() / math.sqrt(len(nats))) if len(nats) > 1 else None
    result: dict[str, Any] = {
        "bits_per_dim": {"value": found.value, "stderr": None if math.isnan(found.stderr) else found.stderr},
        "log_prob_nats": {"value": float(nats.double().mean()), "stderr": stderr},
        "settings": {**vars(asked), "n": len(nats), "run": run.directory.name, "weights": run.weights},
    }
    if asked.json:
        print(json.dumps(result))
        return 0
    print(f"{found.value:.4f} ± {found.stderr:.4f} bits per dimension ({asked.split}, {len(nats)} samples)")
    print(f"{result['log_prob_nats']['value']:.3f} nats a sample; {asked.divergence} divergence, {run.weights}")
    return 0


def log_probs(run: runs.Run, asked: Likelihood) -> Tensor:
    """``log p`` in nats of the model's own numbers, ``[N]``, each sample with its own conditions."""
    data = run.config.data.load(asked.split)
    n = min(asked.n or len(data), len(data))
    times, found = uniform(asked.steps)(run.denoiser.path), []
    with Progress(console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("likelihood", total=n)
        for first in range(0, n, asked.batch):
            rows = range(first, min(first + asked.batch, n))
            noise = Seeds([asked.seed + i for i in rows], run.device)
            batch = data.batch(torch.arange(rows.start, rows.stop), Draw((asked.seed,), rows.start, rows.stop))
            batch = batch.to(run.device)
            x = dequantise(batch.x, noise) if batch.x.dtype == torch.uint8 else run.codec.encode(batch).x
            how: dict[str, Any] = {"divergence": asked.divergence, "probes": asked.probes, "solver": asked.solver}
            found.append(log_prob(run.denoiser, x, batch.cond, times=times, noise=noise, **how).cpu())
            bar.update(task, completed=rows.stop)
    return torch.cat(found)
