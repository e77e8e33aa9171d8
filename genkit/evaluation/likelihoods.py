"""The likelihood of held-out samples under a run, in bits per dimension: an upper bound on their code length."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from genkit import config
from genkit.config.numbers import Count, Positive, Seed
from genkit.core import ELBO, Batch, Cond, Draw, HasELBO
from genkit.core.progress import Progress, reporting
from genkit.data.codecs import Identity, LearnedCodec, Pixels
from genkit.diffusion.samplers import (
    Grid,
    Seeds,
    VLBTerms,
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
from genkit.training.precision import Precision, network_precision
from genkit.training.ranks import use_threads
from genkit.training.run import Run, load_run
from genkit.training.sampling import LoadOptions

Estimator = Literal["ode", "vlb", "iwae"]
PILOT_SECONDS = 2.0  # of work that is timed before the number of samples is chosen
SCALES = {Pixels: 127.5, Identity: 1.0}  # from model numbers to the unit in which a density is quoted
LATENT_KEY = 2  # last number of the random key of latent draws
DEFAULT_HEUN_STEPS, DEFAULT_CHAIN_STEPS, DEFAULT_DRAWS = 64, 1000, 64


@dataclass(frozen=True, kw_only=True)
class LikelihoodSettings(LoadOptions):
    """How the likelihood of held-out samples is estimated."""

    n: Count | None = None
    """Number of samples of the split, chosen at random by the seed; None: all, or as many as --max-minutes allows."""
    max_minutes: Positive = 5.0
    """About the longest time without --n: the first few samples are timed, and the rest that does not fit left out."""
    split: Literal["train", "test"] = "test"
    """Which samples."""
    bound: Estimator | None = None
    """ode: change of variables along the probability-flow ODE; vlb: the variational bound of the ancestral chain; iwae:
    importance-weighted draws of a VAE's latent (and its ELBO). None: iwae for a VAE, ode for the others."""
    draws: Count | None = None
    """Draws of the latent for each sample, with --bound iwae; None: 64. More draws give a tighter bound."""
    variance: Literal["small", "large", "learned"] | None = None
    """Variance of the chain's steps, with --bound vlb; None: learned if the model has it, else small."""
    divergence: Literal["hutchinson", "exact"] = "hutchinson"
    """exact costs a backward pass for each dimension; hutchinson one for each probe, and is unbiased."""
    probes: Count = 1
    """Random directions of hutchinson."""
    solver: Literal["heun", "dopri5"] = "heun"
    """Fixed steps, or adaptive ones."""
    steps: Count | None = None
    """Steps of heun (None: 64), or of the chain (None: all timesteps of a DDPM, 1000 for others)."""
    seed: Seed = 0
    """Seed of dequantisation and probes; sample i has seed + i."""
    batch: Count = 128
    """Samples at a time."""
    precision: Precision = "fp32"
    """Arithmetic of the networks' forward passes: fp32, tf32 (on CUDA devices), bf16 or fp16. The ODE, the chain and
    sums compute in fp32."""


@dataclass(frozen=True)
class MeanEstimate:
    """A mean over samples and its standard error (None if unknown)."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class LikelihoodResult:
    """The likelihood of held-out samples."""

    bits_per_dim: MeanEstimate
    details: Mapping[str, Any]
    """further numbers of the estimator: nats per sample, the terms of a bound; ready for JSON"""
    n: int
    """number of samples"""
    description: str
    """one line on the numbers"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """all settings, ready for JSON"""
    available: int | None = None
    """samples of the split"""

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON has it."""
        return {**self.details, "bits_per_dim": asdict(self.bits_per_dim), "settings": dict(self.settings),
                "available": self.available}  # fmt: skip

    def summary(self) -> str:
        """The result in two lines."""
        stderr = math.nan if self.bits_per_dim.stderr is None else self.bits_per_dim.stderr
        number = f"{self.bits_per_dim.value:.4f} ± {stderr:.4f} bits per dimension"
        left_out = f" of {self.available}" if self.available and self.available > self.n else ""
        about = f"{self.settings.get('split')}, {self.n}{left_out} samples{', at random' if left_out else ''}"
        return f"{number} ({about})\n{self.description}, {self.settings.get('weights')}"

    __repr__ = summary


EstimatorFunction = Callable[[Run, LikelihoodSettings, Progress], LikelihoodResult]


def likelihood(
    run: str | Path | Run,
    settings: LikelihoodSettings | None = None,
    *,
    progress: Progress | None = None,
    **changes: Any,
) -> LikelihoodResult:
    """Estimate the likelihood of held-out samples under a run, or its directory; nothing is printed.

    Settings are a dataclass, keywords that change it, or both: ``likelihood("runs/latest", n=100, bound="vlb")``.
    ``progress`` defaults to a bar in a terminal or a notebook. ``ValueError`` for models of latents and models without
    a likelihood, for settings that have no effect, and if the result is not finite.
    """
    settings = settings or LikelihoodSettings()
    if changes:
        settings = config.override(settings, **changes)
    if not isinstance(run, Run):
        run = load_run(run, ema=settings.ema, step=settings.step, device=settings.device)
    if isinstance(run.codec, LearnedCodec):
        raise ValueError("likelihood: a model of latents has a density of latents, and none of samples; "
                         "allowed: a model of the samples themselves")  # fmt: skip
    if type(run.codec) not in SCALES:
        allowed = ", ".join(kind.__name__ for kind in SCALES)
        raise ValueError(f"likelihood: given a run whose codec is {type(run.codec).__name__}; allowed: {allowed}")
    bound = settings.bound or run.objective.likelihood_method
    if bound is None:
        raise ValueError(f"likelihood: {type(run.objective).__name__} has none; needs a flow, a diffusion or a VAE")
    precise = network_precision(run.nets, settings.precision, run.device)
    with reporting(progress) as report, use_threads(run.config.threads), precise:
        available = len(run.config.data.load(settings.split))
        fitted = fit_budget(run, settings, ESTIMATORS[bound], available, report)
        result = ESTIMATORS[bound](run, fitted, report)
    if not math.isfinite(result.bits_per_dim.value):
        raise ValueError(f"{run.weights}: gives likelihoods that are not finite; take more --steps")
    rows = "all" if result.n >= available else "random"
    stored = {"bound": bound, "n": result.n, "rows": rows, "run": run.directory.name, "weights": run.weights}
    return LikelihoodResult(
        result.bits_per_dim,
        result.details,
        result.n,
        result.description,
        {**asdict(settings), **stored},
        available,
    )


def fit_budget(
    run: Run, settings: LikelihoodSettings, estimate: EstimatorFunction, available: int, progress: Progress
) -> LikelihoodSettings:
    """The settings with as many of the ``available`` samples as fit into ``max_minutes``; unchanged if all do.

    Twice as many samples as before are timed until that takes seconds, or is a batch. The seconds for a sample fall
    with the size of the batch, so the estimate errs on the long side. A number that is given is not changed;
    ``ValueError`` for one above ``available``.
    """
    if settings.n is not None:
        if settings.n > available:
            raise ValueError(f"n: given {settings.n}, but the {settings.split} split has {available} samples; take "
                             f"--n {available}, or leave it out")  # fmt: skip
        return settings
    clock: list[float] = []

    def record_time(what: str, done: int, total: int | None) -> None:
        clock.append(time.perf_counter())

    pilot, largest = 1, min(settings.batch, available)
    while True:
        progress("timing", pilot, largest)
        clock.clear()
        estimate(run, replace(settings, n=pilot, batch=pilot), record_time)
        seconds = time.perf_counter() - clock[0]  # without loading the data, after which comes the first report
        if seconds > PILOT_SECONDS or pilot >= largest:
            break
        pilot = min(2 * pilot, largest)
    fitting = int(60 * settings.max_minutes / (seconds / pilot))
    if fitting >= available:
        return settings
    n = max(2, fitting)
    minutes = seconds / pilot * available / 60
    logging.getLogger("genkit").warning(
        f"likelihood: {n} of {available} {settings.split} samples, at random, take about {settings.max_minutes:g} "
        f"minutes; all would take about {minutes:.0f}: --n {available}, or --max-minutes"
    )
    # smaller batches, so that the progress moves every few seconds
    return replace(settings, n=n, batch=min(settings.batch, max(1, pilot)))


# ------------------------------------------------------------------------------------------------------- estimators
def estimate_by_ode(run: Run, settings: LikelihoodSettings, progress: Progress) -> LikelihoodResult:
    """The change of variables along the probability-flow ODE, of dequantised pixels."""
    require_path_to_noise(run)
    require_defaults(settings, ("variance",), "the chain; allowed with --bound vlb")
    require_defaults(settings, ("draws",), "a VAE; allowed with --bound iwae")
    nats = log_probs(run, settings, progress)
    bits = bits_per_dim(nats, math.prod(run.spec.shape), SCALES[type(run.codec)])
    description = f"{float(nats.mean()):.3f} nats per sample; {settings.divergence} divergence"
    details = {"log_prob_nats": asdict(mean_of(nats))}
    return LikelihoodResult(without_nan(bits), details, len(nats), description)


def log_probs(run: Run, settings: LikelihoodSettings, progress: Progress) -> Tensor:
    """``log p`` in nats in the model's own units, ``[N]``, each sample with its own conditions."""
    times = uniform(settings.steps or DEFAULT_HEUN_STEPS)(run.denoiser.path)
    options: dict[str, Any] = {
        "divergence": settings.divergence,
        "probes": settings.probes,
        "solver": settings.solver,
    }
    parts = []
    for x, cond, noise in read_batches(run, settings, progress, dequantised=True):
        parts.append(log_prob(run.denoiser, x, cond, times=times, noise=noise, **options).cpu())
    return torch.cat(parts)


def estimate_by_vlb(run: Run, settings: LikelihoodSettings, progress: Progress) -> LikelihoodResult:
    """The variational bound of the ancestral chain; the noise of its terms is drawn once for each sample."""
    objective = require_path_to_noise(run)
    require_defaults(settings, ("divergence", "probes", "solver"), "the ODE; allowed with --bound ode")
    require_defaults(settings, ("draws",), "a VAE; allowed with --bound iwae")
    if not objective.is_diffusion:
        raise ValueError("bound: given vlb, but this run's source or coupling makes it no diffusion; allowed: ode")
    times, parts = chain_grid(objective, settings.steps)(objective.path), []
    pixels = isinstance(run.codec, Pixels)
    for x, cond, noise in read_batches(run, settings, progress, dequantised=False):
        with torch.no_grad():
            bound = variational_bound(
                run.denoiser, x, cond, times=times, variance=settings.variance, pixels=pixels, noise=noise
            )
        parts.append([part.double().cpu() for part in bound])
    bound = VLBTerms(*(torch.cat(part) for part in zip(*parts, strict=True)))
    dims = math.prod(run.spec.shape)

    def in_bits(nats: Tensor) -> MeanEstimate:
        return without_nan(bits_per_dim(-nats, dims, scale=1.0))

    steps = []
    for t, s, nats in zip(times.tolist(), times[1:].tolist(), bound.steps.T, strict=False):  # without the last step
        steps.append({"t": t, "s": s, **asdict(in_bits(nats))})
    terms = {"prior": asdict(in_bits(bound.prior)), "steps": steps, "data": asdict(in_bits(bound.data))}
    details = {"log_prob_nats": asdict(mean_of(-bound.total)), "terms": terms}
    description = f"{-float(bound.total.mean()):.3f} nats per sample; bound of {len(times) - 1} steps"
    return LikelihoodResult(in_bits(bound.total), details, len(bound.total), description)


def estimate_by_iwae(run: Run, settings: LikelihoodSettings, progress: Progress) -> LikelihoodResult:
    """The ELBO and the importance-weighted bound, of which the bits per dimension are.

    Black and white pixels and grey levels count by their probability mass, other numbers by their density, with pixels
    dequantised. The draws of a sample depend on its row only.
    """
    if run.objective.likelihood_method != "iwae":
        raise ValueError(f"bound: given iwae, but {type(run.objective).__name__} has no latent; allowed: ode, vlb")
    require_defaults(settings, ("variance", "steps"), "a path to noise, and a VAE has none")
    require_defaults(settings, ("divergence", "probes", "solver"), "the ODE, and a VAE has none")
    objective, draws = cast(HasELBO, run.objective), settings.draws or DEFAULT_DRAWS
    parts, first = [], 0
    for x, cond, _ in read_batches(run, settings, progress, dequantised=not objective.is_discrete):
        draw = Draw((settings.seed, LATENT_KEY), first, first + len(x), run.device)
        first += len(x)
        parts.append([part.cpu() for part in objective.bounds(run.nets, Batch(x, cond, draw=draw), draws)])
    bounds = ELBO(*(torch.cat(part) for part in zip(*parts, strict=True)))
    scale = 1.0 if objective.is_discrete else SCALES[type(run.codec)]
    bits = bits_per_dim(bounds.iwae, math.prod(run.spec.shape), scale)
    details = {
        "neg_elbo_nats": asdict(mean_of(-bounds.elbo)),
        "iwae_nats": asdict(mean_of(bounds.iwae)),
        "draws": draws,
    }
    elbo, iwae = (float(v.mean()) for v in bounds)
    description = f"-ELBO {-elbo:.3f} nats; log p >= {iwae:.3f} nats by {draws} draws"
    return LikelihoodResult(without_nan(bits), details, len(bounds.elbo), description)


ESTIMATORS: Mapping[str, EstimatorFunction] = {
    "ode": estimate_by_ode,
    "vlb": estimate_by_vlb,
    "iwae": estimate_by_iwae,
}


# ---------------------------------------------------------------------------------------------------------- helpers
def require_path_to_noise(run: Run) -> Matching:
    """The objective of a model with a path to normal noise. ``ValueError`` for the others."""
    objective = run.objective
    if not (isinstance(objective, Matching) and objective.source.is_normal and objective.sampler):
        raise ValueError("likelihood: needs a model whose path ends in standard normal noise; this run's does not")
    return objective


def require_defaults(settings: LikelihoodSettings, names: tuple[str, ...], where_used: str) -> None:
    """``ValueError`` for a setting in ``names`` that was changed, though it has an effect only for ``where_used``."""
    defaults = LikelihoodSettings()
    for name in names:
        if getattr(settings, name) != getattr(defaults, name):
            raise ValueError(f"{name}: given {getattr(settings, name)}, which is for {where_used}")


def chain_grid(objective: Matching, steps: int | None) -> Grid:
    """The steps of a DDPM's own timesteps, or uniform steps in chart time."""
    if isinstance(objective, DDPM):
        return trailing(steps or objective.timesteps, objective.timesteps)
    return uniform(steps or DEFAULT_CHAIN_STEPS)


def without_nan(bits: BitsPerDim) -> MeanEstimate:
    """Bits per dimension, with None for an unknown standard error."""
    return MeanEstimate(bits.value, None if math.isnan(bits.stderr) else bits.stderr)


def mean_of(nats: Tensor) -> MeanEstimate:
    """The mean of ``[N]`` numbers and its standard error."""
    stderr = float(nats.double().std() / math.sqrt(len(nats))) if len(nats) > 1 else None
    return MeanEstimate(float(nats.double().mean()), stderr)


def choose_rows(available: int, n: int, seed: int) -> Tensor:
    """``n`` of the indices ``0..available``, at random if not all: a split may be sorted. More contain the fewer."""
    if n >= available:
        return torch.arange(available)
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:n]


def read_batches(
    run: Run, settings: LikelihoodSettings, progress: Progress, dequantised: bool
) -> Iterator[tuple[Tensor, Cond, Seeds]]:
    """Samples in the model's own units, their conditions, and a noise source with each sample's own seed."""
    data = run.config.data.unaugmented().load(settings.split)
    n = settings.n or len(data)
    rows = choose_rows(len(data), n, settings.seed)
    progress("likelihood", 0, n)
    for first in range(0, n, settings.batch):
        last = min(first + settings.batch, n)
        noise = Seeds([settings.seed + i for i in range(first, last)], run.device)
        batch = data.batch(rows[first:last], Draw((settings.seed,), first, last)).to(run.device)
        has_pixels = batch.x.dtype == torch.uint8
        x = dequantise(batch.x, noise) if has_pixels and dequantised else run.codec.encode(batch).x
        yield x, batch.cond, noise
        progress("likelihood", last, n)
