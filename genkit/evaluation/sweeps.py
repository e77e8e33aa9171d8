"""Sweeps: which averages, guidance, samplers and numbers of steps draw a run's samples well and fast.

All combinations are screened with few samples; those on the Pareto front, and the next best, are confirmed with many.
Each measurement is a card in the run's ``eval`` folder, and a card that exists is not made again: that is how a sweep
resumes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge

from genkit import config
from genkit.config import table
from genkit.config.blocks import suggest
from genkit.config.numbers import CheckpointStep, Count, Natural, Positive, Seed
from genkit.config.paths import PathText
from genkit.core import Objective, pictures
from genkit.core.device import DeviceName, pick_device
from genkit.core.durations import estimate_duration
from genkit.core.files import refuse_foreign
from genkit.core.progress import Progress, reporting, silent
from genkit.diffusion.samplers import find_sampler
from genkit.evaluation.best import pareto_front
from genkit.evaluation.cards import Card, file_name, hash_json
from genkit.evaluation.evaluations import default_reference_n, open_reference
from genkit.evaluation.evaluator import Evaluator, is_image
from genkit.evaluation.metrics import METRICS, find_metric, metric_direction
from genkit.evaluation.sources import ModelSamples, hash_weights
from genkit.training.distributed import join_ranks
from genkit.training.ranks import Ranks, use_threads
from genkit.training.run import Run, average_name, load_run
from genkit.training.sampling import GridName, SamplerName, Sampling

COUNTS = ((500, 5000), (500, 2000), (200, 1000), (100, 500), (50, 200))  # samples of screening and of confirming
PILOT_SECONDS = 2.0  # of drawing, by which the time of a sweep is estimated
SWEPT = ("sampler", "steps", "guidance", "guidance_interval", "ema")


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Which combinations are measured, with how many samples, and by which metric."""

    metric: str | None = None
    """The number to optimise, such as fid, kid, recall or w2; None: fid for images, w2 for vectors."""
    ema: tuple[str, ...] = ()
    """Averaged weights by decay, power-WIDTH (of any width, for a run with --power-ema), and "none"; empty: the slowest
    average."""
    guidance: tuple[float, ...] = (1.0,)
    """Guidance scales; 1: none."""
    interval: tuple[str, ...] = ("all",)
    """Noise levels at which guidance acts: all, or LOW-HIGH in sigma / (alpha + sigma), such as 0.2-0.8."""
    sampler: tuple[SamplerName, ...] = ()
    """Samplers; empty: the objective's default."""
    steps: tuple[Count, ...] = ()
    """Steps of the samplers; empty: 5, 10 and 20, or 1, 2 and 4 for one that jumps by a flow map."""
    grid: GridName = "uniform"
    """Time grid of the steps."""
    n: Annotated[int, Ge(2)] | None = None
    """Samples that each combination is screened with. None: 500, or fewer if --max-minutes asks for it."""
    confirm_n: Annotated[int, Ge(2)] | None = None
    """Samples that the best combinations are measured with again. None: 5000, or fewer if --max-minutes asks for it."""
    max_minutes: Positive = 20.0
    """About the longest time of drawing without --n and --confirm-n: a few samples are timed before."""
    num_confirm_extra: Natural = 2
    """Combinations that are confirmed besides the Pareto front: the next best."""
    reference: PathText = "train"
    """train or test of the run's own data, any data source, another run, or an .npz of mu and sigma."""
    features: Any = table("genkit.evaluation:FEATURES", "auto", kind="genkit.evaluation.metrics.features:Features")
    """Feature space of distances."""
    resize: Literal["clean", "legacy_tensorflow", "legacy_pytorch"] | None = None
    """Short for --features.resize."""
    weights: PathText | None = None
    """Short for --features.weights."""
    metric_settings: Any = table("genkit.evaluation:METRIC_SETTINGS", "default")
    """Settings of the metrics."""
    data: Any = table("genkit.evaluation:DATA_OPTIONS", "default")
    """Where a data set that --reference names is stored."""
    seed: Seed = 0
    """Sample i has seed + i."""
    step: CheckpointStep | None = None
    """Which checkpoint, by its step or "best" (of train --keep-best); None: the newest."""
    batch: Count = 64
    """Samples at a time."""
    device: DeviceName = "auto"
    """Device. auto: the machine's accelerator, or the CPU if it has none."""


@dataclass(frozen=True)
class SweepPoint:
    """One combination, measured."""

    samples: ModelSamples
    card: Card
    metric: str

    @property
    def passes(self) -> float:
        """Rows that go through the network for each sample: the NFE, with guidance's second row counted."""
        return self.card.settings["passes"]

    @property
    def value(self) -> float:
        """The value of the metric."""
        return self.card.metrics[self.metric].value

    @property
    def cost(self) -> float:
        """The value if lower is better, else minus the value."""
        return -self.value if metric_direction(self.metric) == "higher" else self.value

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a sweep varies."""
        return {name: self.card.settings[name] for name in SWEPT}


@dataclass(frozen=True)
class SweepResult:
    """The measured combinations of a sweep."""

    metric: str
    points: Sequence[SweepPoint]
    """measured with the largest number of samples"""
    screened: Sequence[SweepPoint]
    """all combinations, measured with few samples"""
    failures: Sequence[str]
    """one line for each combination that could not be measured"""
    run: Run

    @property
    def front(self) -> list[SweepPoint]:
        """The points that no other equals or beats in both passes and value, by passes."""
        return front_of(self.points)

    @property
    def title(self) -> str:
        """What tables and plots call the metric, by the features that it is measured in."""
        return self.points[0].card.title(self.metric)

    @property
    def n(self) -> int:
        """The number of samples of ``points``."""
        return self.points[0].card.settings["n"]

    @property
    def plot_path(self) -> Path:
        """Where :meth:`save_plot` writes by default: in the run's ``eval`` folder, named by what was measured."""
        names = sorted(file_name(point.card.settings) for point in [*self.screened, *self.points])
        key = hash_json([names, self.metric])[:8]
        return self.run.directory / "eval" / f"sweep-{self.run.step:07d}-{self.metric}-{key}.png"

    def to_dict(self) -> dict[str, Any]:
        """The points as JSON has them."""
        front = self.front
        rows = [
            {"pareto": p in front, "passes": p.passes, "nfe": p.card.nfe, self.metric: p.value, **p.settings}
            for p in self.points
        ]
        return {"metric": self.metric, "n": self.n, "points": rows}

    def save_plot(self, path: str | Path | None = None) -> Path:
        """Draw the metric against the passes, and return the picture's path."""
        path = self.plot_path if path is None else Path(path)
        refuse_foreign(path)
        return pictures.save_image(pictures.draw_figure(self._draw, (7, 4.5)), path)

    def _draw(self, axes: Any) -> None:
        """Screened points in grey, confirmed ones with their intervals, the Pareto front as a line."""
        x, y = [p.passes for p in self.screened], [p.value for p in self.screened]
        axes.scatter(x, y, s=12, c="0.75", label="screened")
        for point in self.points:
            estimate = point.card.metrics[self.metric]
            if estimate.low is not None and estimate.high is not None:
                axes.plot([point.passes, point.passes], [estimate.low, estimate.high], c="C0", lw=1)
        axes.scatter([p.passes for p in self.points], [p.value for p in self.points], s=20, c="C0", label="confirmed")
        front = self.front
        axes.step([p.passes for p in front], [p.value for p in front], where="post", c="C1", label="Pareto front")
        for point in front:
            settings = point.card.settings
            guidance = f", {settings['guidance']:g}" if settings["guidance"] != 1 else ""
            text = f"{settings['sampler']} {settings['steps']}{guidance}"
            place = (point.passes, point.value)
            axes.annotate(text, place, xytext=(3, 5), textcoords="offset points", fontsize=7)
        axes.set_xlabel("network passes per sample")
        axes.set_ylabel(self.title)
        axes.set_xscale("log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()


def sweep(
    run: str | Path, settings: SweepSettings | None = None, *, progress: Progress | None = None, **changes: Any
) -> SweepResult:
    """Measure all combinations of the settings' averages, guidance, samplers and steps; nothing is printed.

    ``run`` is a run's directory. Settings are a dataclass, keywords that change it, or both. The cards are saved in the
    run's ``eval`` folder; a sweep that is called again continues from them. Under a launcher all ranks call this
    together. ``ValueError`` for settings that the run does not support, before anything is drawn, and if no combination
    gives finite samples.
    """
    settings = settings or SweepSettings()
    if changes:
        settings = config.override(settings, **changes)
    accelerator = join_ranks(pick_device(settings.device))
    ranks = Ranks.of(accelerator)
    combinations = list_combinations(run, settings, accelerator.device)
    first = combinations[0]
    metric = settings.metric or ("fid" if is_image(first.spec) else "w2")
    metric_name = find_metric(metric)
    if metric_name is None:
        known = [value for known_metric in METRICS.values() for value in known_metric.values]
        raise ValueError(f"metric: given {metric!r}; allowed: {', '.join(known)}{suggest(metric, known)}")
    with accelerator.main_process_first():
        reference = open_reference(settings.reference, first, settings.data, first.sampling, accelerator.device)
    with reporting(progress, ranks.is_main) as report, use_threads(first.run.config.threads):
        n, confirm_n = ranks.once(choose_counts, settings, combinations, report)
        evaluator = Evaluator.create(
            first,
            reference,
            {metric_name: METRICS[metric_name]},
            settings.features,
            resize=settings.resize,
            weights=settings.weights,
            settings=settings.metric_settings,
            n=min(n, confirm_n),
            reference_n=default_reference_n(first.spec, confirm_n, reference),
            names=("n" if n <= confirm_n else "confirm_n", None),
            batch=settings.batch,
            device=accelerator.device,
            ranks=ranks,
            progress=report,
        )
        evaluator.keep = frozenset({"features"})
        failures: list[str] = []
        screened = measure_points(combinations, evaluator, n, metric, report, "screening", failures)
        if not screened:
            raise ValueError(
                f"sweep: none of {len(combinations)} combinations gave finite samples; the run has diverged"
            )
        points = screened
        if confirm_n > n:
            chosen = [point.samples for point in choose_points(screened, settings.num_confirm_extra)]
            again = [samples for samples in combinations if samples in chosen]
            points = measure_points(again, evaluator, confirm_n, metric, report, "confirming", failures)
    return SweepResult(metric, points, screened, failures, first.run)


def choose_counts(
    settings: SweepSettings, combinations: Sequence[ModelSamples], progress: Progress = silent
) -> tuple[int, int]:
    """The numbers of samples of screening and of confirming: those of ``settings``, or without any the largest of
    ``COUNTS`` whose drawing takes at most ``max_minutes`` if every combination is confirmed.

    Few sizes are allowed, so that a sweep that is called again finds its cards. What is left out is said.
    """
    if settings.n is not None or settings.confirm_n is not None:
        return settings.n or COUNTS[0][0], settings.confirm_n or COUNTS[0][1]
    progress("timing", 0, None)
    seconds = time_sample(combinations)
    minutes = [(n + confirm_n) * seconds / 60 for n, confirm_n in COUNTS]
    i = next((i for i, m in enumerate(minutes) if m <= settings.max_minutes), len(COUNTS) - 1)
    (n, confirm_n), (all_n, all_confirm_n) = COUNTS[i], COUNTS[0]
    if i:
        logging.getLogger("genkit").warning(
            f"sweep: {len(combinations)} combinations, screened with {n} samples and confirmed with {confirm_n}, take "
            f"{estimate_duration(60 * minutes[i])} at most; {all_n} and {all_confirm_n} would take "
            f"{estimate_duration(60 * minutes[0])}: --n {all_n} --confirm-n {all_confirm_n}, or --max-minutes"
        )
    return n, confirm_n


def time_sample(combinations: Sequence[ModelSamples]) -> float:
    """About the seconds of one sample of every combination: one is timed, and others cost as their steps do.

    Twice as many samples as before are drawn until that takes ``PILOT_SECONDS``, or is a batch. 0 if no combination
    gives samples.
    """

    def cost(samples: ModelSamples) -> float:
        return (samples.sampling.steps or 1) * (1 if samples.sampling.guidance == 1 else 2)

    for timed in combinations:
        num, seconds = 1, 0.0
        with contextlib.suppress(ValueError):  # it is left out of the sweep, too
            while True:
                began = time.perf_counter()
                timed.rows(0, num, num)
                seconds = time.perf_counter() - began
                if seconds > PILOT_SECONDS or num >= timed.sampling.batch:
                    return seconds / num * sum(map(cost, combinations)) / cost(timed)
                num = min(2 * num, timed.sampling.batch)
    return 0.0


def list_combinations(run: str | Path, settings: SweepSettings, device: torch.device) -> list[ModelSamples]:
    """The samples of every combination once. ``ValueError`` for what the run does not support."""
    loaded: dict[str | None, Run] = {}
    combinations: dict[tuple[str | None, Sampling], ModelSamples] = {}
    intervals = [parse_interval(text) for text in settings.interval]
    for ema in settings.ema or (None,):
        loaded[ema] = load_run(run, ema=ema, step=settings.step, device=device.type)
    objective = next(iter(loaded.values())).objective
    solvers = [(s, steps) for s in settings.sampler or (None,) for steps in settings.steps or swept_steps(objective, s)]
    product = itertools.product(loaded, settings.guidance, intervals, solvers)
    for ema, guidance, interval, (sampler, steps) in product:
        sampling = Sampling(
            guidance=guidance,
            guidance_interval=interval if guidance != 1 else None,  # an interval has no effect at guidance 1
            sampler=sampler,
            steps=steps,
            grid=settings.grid,
            seed=settings.seed,
            batch=settings.batch,
        )
        if (ema, sampling) not in combinations:
            combinations[ema, sampling] = ModelSamples(loaded[ema], sampling, hash_weights(loaded[ema]))
    return list(combinations.values())


def swept_steps(objective: Objective, sampler: str | None) -> tuple[int | None, ...]:
    """The numbers of steps to try if none are asked for; none is one for a model that draws in one pass."""
    name = sampler or objective.sampler
    return (None,) if name is None else find_sampler(name).swept_steps


def parse_interval(text: str) -> tuple[float, float] | None:
    """``0.2-0.8`` as numbers; None for ``all``. ``ValueError`` for anything else."""
    if text == "all":
        return None
    try:
        low, high = map(float, text.split("-"))
    except ValueError:
        raise ValueError(f"interval: given {text!r}; allowed: all, or LOW-HIGH such as 0.2-0.8") from None
    return low, high


def measure_points(
    combinations: Sequence[ModelSamples],
    evaluator: Evaluator,
    n: int,
    metric: str,
    progress: Progress,
    task: str,
    failures: list[str],
) -> list[SweepPoint]:
    """Measure each combination with ``n`` samples, or read its card if there is one.

    A combination that cannot be measured (too few steps for its sampler, say) is left out and added to ``failures``.
    """
    ranks, points = evaluator.ranks, []
    for i, samples in enumerate(combinations):

        def report(what: str, done: int, total: int | None, start: int = i * n) -> None:
            progress(task, start + done, len(combinations) * n)

        path = evaluator.card_path(samples, n)
        assert path is not None
        card = ranks.once(load_if_present, path)
        if card is None:
            try:
                measurement = evaluator.measure(samples, n, report)
                card = ranks.once(evaluator.make_card, samples, n, measurement)
            except ValueError as e:
                failures.append(f"{describe_combination(samples)}: {e}")
                continue
            if ranks.is_main:
                card.save()
        report(task, n, n)
        points.append(SweepPoint(samples, card, metric))
    return points


def load_if_present(path: Path) -> Card | None:
    """The card at ``path``, if there is one."""
    return Card.load(path) if path.is_file() else None


def describe_combination(samples: ModelSamples) -> str:
    """A combination in a few words."""
    sampling = samples.sampling
    guidance = f"guidance {sampling.guidance:g}"
    if sampling.guidance_interval is not None:
        guidance += " in {:g}-{:g}".format(*sampling.guidance_interval)
    sampler = sampling.sampler or "default sampler"
    return f"{sampler} {sampling.steps} steps, {guidance}, ema {average_name(samples.run.weights)}"


def front_of(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """The points that no other equals or beats in both passes and value, by passes."""
    return pareto_front(points, lambda p: p.passes, lambda p: p.cost)


def choose_points(points: Sequence[SweepPoint], num_extra: int) -> list[SweepPoint]:
    """The Pareto front and the ``num_extra`` best of the other points."""
    front = front_of(points)
    others = sorted((p for p in points if p not in front), key=lambda p: p.cost)
    return front + others[:num_extra]
