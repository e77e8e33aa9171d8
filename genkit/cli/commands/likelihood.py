"""`genkit likelihood RUN`: how probable held-out samples are under a model, in bits per dimension."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
from annotated_types import Ge
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from tyro.conf import Positional

from genkit.config import parse
from genkit.core import ELBO, Batch, Cond, Draw, HasELBO
from genkit.data.codecs import Identity, LearnedCodec, Pixels
from genkit.diffusion.samplers import (
    Bound,
    Grid,
    Seeds,
    bits_per_dim,
    dequantise,
    log_prob,
    trailing,
    uniform,
    variational_bound,
)
from genkit.diffusion.samplers.likelihood import BitsPerDim
from genkit.objectives import DDPM
from genkit.objectives.matching.matching import Matching
from genkit.training.run import Run, load_run

console = Console(highlight=False, soft_wrap=True, stderr=True)
Count = Annotated[int, Ge(1)]
SCALES = {Pixels: 127.5, Identity: 1.0}  # model numbers to the unit in which a density is quoted


@dataclass(frozen=True)
class Likelihood:
    """Bits per dimension of held-out samples: an upper bound on their code length."""

    run: Positional[str]
    """A run's folder, such as runs/latest."""
    n: Count | None = None
    """How many samples of the split; None: all."""
    split: Literal["train", "test"] = "test"
    """Which samples."""
    bound: Literal["ode", "vlb", "iwae"] | None = None
    """ode: change of variables along the probability-flow ODE; vlb: the variational bound of the ancestral chain; iwae:
    importance-weighted draws of a VAE's latent (and its ELBO). None: iwae of a VAE, ode of the others."""
    draws: Count | None = None
    """Of the latent for each sample, with --bound iwae; None: 64. More draws, a tighter bound."""
    variance: Literal["small", "large", "learned"] | None = None
    """Of the chain's steps, with --bound vlb; None: learned where the model has it, else small."""
    divergence: Literal["hutchinson", "exact"] = "hutchinson"
    """exact costs a backward pass for each dimension; hutchinson one for each probe, and is unbiased."""
    probes: Count = 1
    """Random directions of hutchinson."""
    solver: Literal["heun", "dopri5"] = "heun"
    """Fixed steps, or adaptive ones."""
    steps: Count | None = None
    """Steps of heun (None: 64), or of the chain (None: all timesteps of a DDPM, 1000 of others)."""
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
    run = load_run(asked.run, ema=asked.ema, step=asked.step, device=asked.device)
    if isinstance(run.codec, LearnedCodec):
        raise ValueError("likelihood: a model of latents has a density of latents, and none of samples; "
                         "allowed: a model of the samples themselves")  # fmt: skip
    if type(run.codec) not in SCALES:
        allowed = ", ".join(kind.__name__ for kind in SCALES)
        raise ValueError(f"likelihood: given a run whose codec is {type(run.codec).__name__}; allowed: {allowed}")
    if run.config.threads:
        torch.set_num_threads(run.config.threads)
    means = asked.bound or run.objective.likelihood_method
    if means is None:
        raise ValueError(f"likelihood: {type(run.objective).__name__} has none; needs a flow, a diffusion or a VAE")
    result, n, by = MEANS[means](run, asked)
    if not math.isfinite(result["bits_per_dim"]["value"]):
        raise ValueError(f"{run.weights}: gives likelihoods that are not finite; take more --steps")
    result["settings"] = {**vars(asked), "bound": means, "n": n, "run": run.directory.name, "weights": run.weights}
    if asked.json:
        print(json.dumps(result))
        return 0
    found = result["bits_per_dim"]
    stderr = math.nan if found["stderr"] is None else found["stderr"]
    print(f"{found['value']:.4f} ± {stderr:.4f} bits per dimension ({asked.split}, {n} samples)")
    print(f"{by}, {run.weights}")
    return 0


Found = tuple[dict[str, Any], int, str]  # numbers, how many samples, and a sentence on them


def flowing(run: Run) -> Matching:
    """The objective of a model with a path to normal noise. ``ValueError`` for the others."""
    objective = run.objective
    if not (isinstance(objective, Matching) and objective.source.is_normal and objective.sampler):
        raise ValueError("likelihood: needs a model whose path ends in standard normal noise; this run's does not")
    return objective


def refuse(asked: Likelihood, names: tuple[str, ...], what: str) -> None:
    """``ValueError`` for a setting that would have no effect."""
    usual = Likelihood(asked.run)
    for name in names:
        if getattr(asked, name) != getattr(usual, name):
            raise ValueError(f"{name}: given {getattr(asked, name)}, which is for {what}")


def by_ode(run: Run, asked: Likelihood) -> Found:
    """The change of variables of dequantised pixels."""
    flowing(run)
    refuse(asked, ("variance",), "the chain; allowed with --bound vlb")
    refuse(asked, ("draws",), "a VAE; allowed with --bound iwae")
    nats = log_probs(run, asked)
    bits = bits_per_dim(nats, math.prod(run.spec.shape), SCALES[type(run.codec)])
    by = f"{float(nats.mean()):.3f} nats a sample; {asked.divergence} divergence"
    return {"bits_per_dim": number(bits), "log_prob_nats": mean(nats)}, len(nats), by


def by_bound(run: Run, asked: Likelihood) -> Found:
    """The variational bound; the noise of its terms is drawn once for each sample."""
    objective = flowing(run)
    refuse(asked, ("divergence", "probes", "solver"), "the ODE; allowed with --bound ode")
    refuse(asked, ("draws",), "a VAE; allowed with --bound iwae")
    if not objective.is_diffusion:
        raise ValueError("bound: given vlb, but this run's source or coupling makes it no diffusion; allowed: ode")
    times, kept = chain(objective, asked.steps)(run.denoiser.path), []
    pixels = isinstance(run.codec, Pixels)
    for x, cond, noise in batches(run, asked, dequantised=False):
        with torch.no_grad():
            bound = variational_bound(
                run.denoiser, x, cond, times=times, variance=asked.variance, pixels=pixels, noise=noise
            )
        kept.append([part.double().cpu() for part in bound])
    bound = Bound(*(torch.cat(parts) for parts in zip(*kept, strict=True)))
    dims = math.prod(run.spec.shape)
    in_bits = lambda nats: number(bits_per_dim(-nats, dims, scale=1.0))  # noqa: E731
    ends = zip(times.tolist(), times[1:].tolist(), bound.steps.T, strict=False)  # all but the last step, to the data
    each = [{"t": t, "s": s, **in_bits(nats)} for t, s, nats in ends]
    terms = {"prior": in_bits(bound.prior), "steps": each, "data": in_bits(bound.data)}
    numbers = {"bits_per_dim": in_bits(bound.total), "log_prob_nats": mean(-bound.total), "terms": terms}
    by = f"{-float(bound.total.mean()):.3f} nats a sample; bound of {len(times) - 1} steps"
    return numbers, len(bound.total), by


def by_draws(run: Run, asked: Likelihood) -> Found:
    """The ELBO and the importance-weighted bound, of which the bits per dimension are.

    Black and white pixels and grey levels count by their mass, other numbers by their density, pixels dequantised. The
    draws of a sample depend on its row alone.
    """
    if run.objective.likelihood_method != "iwae":
        raise ValueError(f"bound: given iwae, but {type(run.objective).__name__} has no latent; allowed: ode, vlb")
    refuse(asked, ("variance", "steps"), "a path to noise, and a VAE has none")
    refuse(asked, ("divergence", "probes", "solver"), "the ODE, and a VAE has none")
    objective, samples = cast(HasELBO, run.objective), asked.draws or 64
    found, done = [], 0
    for x, cond, _ in batches(run, asked, dequantised=not objective.is_discrete):
        rows, done = (done, done + len(x)), done + len(x)
        draw = Draw((asked.seed, LATENT), *rows, run.device)
        found.append([v.cpu() for v in objective.bounds(run.nets, Batch(x, cond, draw=draw), samples)])
    bounds = ELBO(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    scale = 1.0 if objective.is_discrete else SCALES[type(run.codec)]
    numbers = {
        "neg_elbo_nats": mean(-bounds.elbo),
        "iwae_nats": mean(bounds.iwae),
        "bits_per_dim": number(bits_per_dim(bounds.iwae, math.prod(run.spec.shape), scale)),
        "draws": samples,
    }
    elbo, iwae = (float(v.mean()) for v in bounds)
    return numbers, len(bounds.elbo), f"{-elbo:.3f} nats is minus the ELBO, log p >= {iwae:.3f} by {samples} draws"


LATENT = 2  # the last number of the key of a latent's draws
MEANS = {"ode": by_ode, "vlb": by_bound, "iwae": by_draws}


def chain(objective: Matching, steps: int | None) -> Grid:
    """The steps of a DDPM's own times, or of chart time."""
    if isinstance(objective, DDPM):
        return trailing(steps or objective.timesteps, objective.timesteps)
    return uniform(steps or 1000)


def number(found: BitsPerDim) -> dict[str, float | None]:
    return {"value": found.value, "stderr": None if math.isnan(found.stderr) else found.stderr}


def mean(nats: Tensor) -> dict[str, float | None]:
    stderr = float(nats.double().std() / math.sqrt(len(nats))) if len(nats) > 1 else None
    return {"value": float(nats.double().mean()), "stderr": stderr}


def log_probs(run: Run, asked: Likelihood) -> Tensor:
    """``log p`` in nats of the model's own numbers, ``[N]``, each sample with its own conditions."""
    times = uniform(asked.steps or 64)(run.denoiser.path)
    how: dict[str, Any] = {"divergence": asked.divergence, "probes": asked.probes, "solver": asked.solver}
    return torch.cat([
        log_prob(run.denoiser, x, cond, times=times, noise=noise, **how).cpu()
        for x, cond, noise in batches(run, asked, dequantised=True)
    ])  # fmt: skip


def batches(run: Run, asked: Likelihood, dequantised: bool) -> Iterator[tuple[Tensor, Cond, Seeds]]:
    """Samples in the model's own numbers, their conditions and their own noise."""
    data = run.config.data.load(asked.split)
    n = min(asked.n or len(data), len(data))
    with Progress(console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("likelihood", total=n)
        for first in range(0, n, asked.batch):
            rows = range(first, min(first + asked.batch, n))
            noise = Seeds([asked.seed + i for i in rows], run.device)
            batch = data.batch(torch.arange(rows.start, rows.stop), Draw((asked.seed,), rows.start, rows.stop))
            batch = batch.to(run.device)
            pixels = batch.x.dtype == torch.uint8 and dequantised
            yield dequantise(batch.x, noise) if pixels else run.codec.encode(batch).x, batch.cond, noise
            bar.update(task, completed=rows.stop)
