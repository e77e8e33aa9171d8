"""One evaluation: samples of a run, a folder, an npz or a data set, measured against a reference.

card = evaluate("runs/latest", metrics="fid,kid", n=1000)
card.metrics["fid"].value
card.save()
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge

from genkit import config
from genkit.config import ConfigError, narrow, table
from genkit.config.blocks import suggest
from genkit.config.names import NameIn
from genkit.config.paths import PathText
from genkit.core import Spec
from genkit.core.device import pick_device
from genkit.core.files import refuse_foreign
from genkit.core.links import follow_links
from genkit.core.messages import warn_once
from genkit.core.progress import Progress, reporting
from genkit.evaluation.cards import Card
from genkit.evaluation.evaluator import FEATURES, Evaluator, Reference, find_metrics, is_image, measure_together
from genkit.evaluation.metrics.features import Extractor, Features
from genkit.evaluation.named_statistics import find_statistics, save_statistics, statistics_path
from genkit.evaluation.sources import (
    REFERENCE_SEED,
    SPLITS,
    DataOptions,
    DatasetSamples,
    ModelSamples,
    Reconstructions,
    SampleSource,
    hash_weights,
    is_statistics_file,
    open_data,
    open_run_data,
)
from genkit.training.distributed import join_ranks
from genkit.training.ranks import Ranks, use_threads
from genkit.training.run import Run, load_run
from genkit.training.sampling import LoadOptions, Sampling

DEFAULT_IMAGES, DEFAULT_VECTORS = 10_000, 2_000  # samples of a run if no number is given
MIN_REFERENCE_VECTORS = 2_000
LARGE_PIXELS, CPU_IMAGES = 32**2, 500  # beyond this size a CPU draws so many samples by default


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Sampling, LoadOptions):
    """How samples are drawn, and what they are measured with and against."""

    # -- what is measured
    reconstruct: Literal["train", "test"] | None = None
    """Measure the run's reconstructions of this split (of a VAE, a first stage, a codec) instead of its samples."""
    metrics: Annotated[str, NameIn("genkit.evaluation:METRICS", ",")] | None = None
    """Metrics, separated by commas; None: those that suit the data."""
    n: Annotated[int, Ge(2)] | None = None
    """Number of samples; None: all stored ones; of a run 10000 images (500 on a CPU if they are larger than 32x32) or
    2000 vectors."""
    reference: PathText | None = None
    """train or test of the run's own data, any data source, another run, an .npz of mu and sigma, or such statistics by
    name: stats:NAME, clean-fid:cifar10-train-32; None: train."""
    reference_n: Annotated[int, Ge(2)] | None = None
    """Number of reference samples; None: all images; as many vectors as are measured, but at least 2000; of another
    run as many as are measured."""
    features: Any = table("genkit.evaluation:FEATURES", "auto", kind="genkit.evaluation.metrics.features:Features")
    """Feature space of distances. auto: classifier for small grey images, inception for others, raw for vectors."""
    further_features: tuple[str, ...] = ()
    """Further feature spaces, measured in the same pass over the samples, each with the metrics that suit it and a card
    of its own: NAME, or NAME=WEIGHTS with the folder or file of its weights, say dinov2 clip=DIR inception-spatial."""
    resize: Literal["clean", "legacy_tensorflow", "legacy_pytorch"] | None = None
    """Short for --features.resize: how images are resized for Inception."""
    weights: PathText | None = None
    """Short for --features.weights: the file of Inception's weights."""
    metric_settings: Any = table("genkit.evaluation:METRIC_SETTINGS", "default")
    """Settings of the metrics."""
    data: Any = table("genkit.evaluation:DATA_OPTIONS", "default")
    """Where named data sets are stored, and how images are read."""
    save_stats: PathText | None = None
    """Write mu and sigma of the samples' features to this .npz, or keep them as stats:NAME, to be a reference later."""


def evaluate(
    source: str | Path | Run | SampleSource,
    settings: EvaluationSettings | None = None,
    *,
    progress: Progress | None = None,
    **changes: Any,
) -> Card:
    """Measure samples against a reference and return the card; nothing is printed, and the card is not saved.

    See :func:`evaluate_all`, of which it returns the first card.
    """
    return evaluate_all(source, settings, progress=progress, **changes)[0]


def evaluate_all(
    source: str | Path | Run | SampleSource,
    settings: EvaluationSettings | None = None,
    *,
    progress: Progress | None = None,
    **changes: Any,
) -> list[Card]:
    """Measure samples against a reference in one feature space, and in each of ``further_features``: a card for each.

    ``source`` is a run or its directory, the path or name of stored samples (``cifar10:test``), or a
    :class:`~genkit.evaluation.sources.SampleSource`. Settings are a dataclass, keywords that change it, or both:
    ``evaluate("runs/latest", metrics="fid", n=100)``. ``progress`` defaults to bars in a terminal or a notebook. Under
    a launcher all ranks call this together, and each gets the card. ``ValueError`` for wrong settings, and if a sample
    or a metric is not finite.
    """
    settings = settings or EvaluationSettings()
    if changes:
        settings = config.override(settings, **changes)
    accelerator = join_ranks(pick_device(settings.device))
    ranks = Ranks.of(accelerator)
    stored = statistics_path(settings.save_stats) if settings.save_stats else None
    if stored and stored.suffix != ".npz":
        raise ValueError(f"save_stats: given {settings.save_stats}; needs a name that ends in .npz, or stats:NAME")
    if stored:
        refuse_foreign(stored)
    metrics = None if settings.metrics is None else find_metrics(settings.metrics)
    with accelerator.main_process_first():
        samples = open_samples(source, settings, accelerator.device)
        reference = open_reference(
            settings.reference, samples, settings.data, narrow(settings, Sampling), accelerator.device,
            settings.resize or getattr(settings.features, "resize", "clean"),
        )  # fmt: skip
    if metrics is None and reference is None and settings.save_stats:
        metrics = {}
    n = settings.n or samples.limit or default_n(samples.spec, accelerator.device)
    if samples.limit is not None and n > samples.limit:
        raise ValueError(f"n: given {n}, but {samples.name} has {samples.limit} samples; take --n {samples.limit}")
    further = [parse_features(text) for text in settings.further_features]
    if further and isinstance(reference, Path):
        raise ValueError(f"further_features: {reference} has statistics of one kind of features only; take samples")
    with reporting(progress, ranks.is_main) as report, use_threads(run_threads(samples)):
        create = functools.partial(
            Evaluator.create,
            samples,
            reference,
            settings=settings.metric_settings,
            n=n,
            reference_n=settings.reference_n or default_reference_n(samples.spec, n, reference),
            batch=settings.batch,
            device=accelerator.device,
            ranks=ranks,
            progress=report,
        )
        chosen = settings.features
        evaluators = [create(metrics, chosen, resize=settings.resize, weights=settings.weights)]
        evaluators += [create(None, features) for features in further]
        require_different([evaluator.extractor for evaluator in evaluators])
        if n < 2:
            raise ValueError(f"n: given {n}; a distance between distributions needs 2 samples or more")
        measurements = measure_together(evaluators, samples, n, report)
        pairs = zip(evaluators, measurements, strict=True)
        made = [ranks.once(evaluator.make_card, samples, n, measurement) for evaluator, measurement in pairs]
    if stored and ranks.is_main:
        save_statistics(measurements[0].statistics.moments, evaluators[0].extractor.settings, stored)
    return made


def require_different(extractors: Sequence[Extractor]) -> None:
    """``ValueError`` if two extractors are the same one: their cards would be one file."""
    for i, extractor in enumerate(extractors):
        if any(extractor.settings == other.settings for other in extractors[:i]):
            raise ValueError(f"further_features: {extractor.settings['name']} is measured already; give each once")


def parse_features(text: str) -> Features:
    """The features that ``NAME`` or ``NAME=WEIGHTS`` describes. ``ValueError`` for an unknown name, or weights that the
    features do not have."""
    name, equals, weights = text.partition("=")
    if name not in FEATURES:
        raise ValueError(f"further_features: given {text}; allowed: {', '.join(FEATURES)}{suggest(name, FEATURES)}")
    kind = FEATURES[name]
    try:
        return config.from_dict(kind, {"weights": weights} if equals else {})
    except ConfigError as e:
        raise ValueError(f"further_features: given {text}: {e}") from None


def default_n(spec: Spec, device: torch.device) -> int:
    """The number of samples that are drawn from a run if none is given: fewer large images on a CPU, which is said."""
    if not is_image(spec):
        return DEFAULT_VECTORS
    if device.type != "cpu" or math.prod(spec.shape[1:]) <= LARGE_PIXELS:
        return DEFAULT_IMAGES
    warn_once(f"n: {CPU_IMAGES} samples, for {DEFAULT_IMAGES} take hours on a CPU; distances of few samples are biased "
              f"and compare with equal numbers only: --n {DEFAULT_IMAGES}")  # fmt: skip
    return CPU_IMAGES


def default_reference_n(spec: Spec, n: int, reference: Reference | None = None) -> int | None:
    """The number of reference samples for ``n`` samples if none is given; None: all."""
    if isinstance(reference, ModelSamples):
        return n
    return None if is_image(spec) else max(n, MIN_REFERENCE_VECTORS)


def run_threads(samples: SampleSource) -> int | None:
    """The CPU threads that the samples' run was trained with; None for stored samples."""
    return samples.run.config.threads if isinstance(samples, ModelSamples | Reconstructions) else None


# -------------------------------------------------------------------------------------------- opening what is named
def is_run(name: str | Path) -> bool:
    """Whether this is the directory of a run."""
    return (follow_links(Path(name).expanduser()) / "config.yaml").is_file()


def open_samples(
    source: str | Path | Run | SampleSource, settings: EvaluationSettings, device: torch.device
) -> SampleSource:
    """The samples that ``source`` names. ``ValueError`` if a setting has no effect on them."""
    if isinstance(source, Run):
        return open_run_samples(source, settings)
    if not isinstance(source, str | Path):
        return source
    name = str(source)
    if is_run(name):
        run = load_run(Path(name).expanduser(), ema=settings.ema, step=settings.step, device=device.type)
        return open_run_samples(run, settings)
    require_defaults(settings, Sampling, f"stored samples; {name} is not a run")
    require_defaults(settings, LoadOptions, f"stored samples; {name} is not a run")
    if settings.reconstruct:
        raise ValueError(f"reconstruct: needs a run with a code; {name} is not a run")
    try:
        return open_data(name, settings.data)
    except ValueError as e:
        raise ValueError(f"{e}, or a run that genkit train wrote" if "is unknown" in str(e) else str(e)) from e


def open_run_samples(run: Run, settings: EvaluationSettings) -> SampleSource:
    """Samples of a run, or its reconstructions."""
    if not settings.reconstruct:
        return ModelSamples(run, narrow(settings, Sampling), hash_weights(run))
    require_defaults(settings, Sampling, "reconstructions")
    return Reconstructions(run, open_run_data(run, settings.reconstruct, settings.data), hash_weights(run))


def require_defaults(settings: EvaluationSettings, base: type, samples: str) -> None:
    """``ValueError`` for the first setting of ``base`` that was changed, though it has no effect on ``samples``."""
    given, defaults = config.dump(settings), config.dump(EvaluationSettings())
    for f in fields(base):
        if f.name not in ("batch", "device") and given[f.name] != defaults[f.name]:
            raise ValueError(f"{f.name}: has no effect on {samples}")


def open_reference(
    name: str | None,
    samples: SampleSource,
    options: DataOptions,
    sampling: Sampling,
    device: torch.device,
    resize: str = "clean",
) -> Reference | None:
    """The reference that ``name`` names; without a name the training split of a run's own data, else None.

    Samples of another run are drawn with the settings ``sampling``, from other seeds than the samples that are measured
    against them.
    """
    of_run = isinstance(samples, ModelSamples | Reconstructions)
    if of_run and (not name or name in SPLITS):
        if given := next((k for k in ("size", "channels") if getattr(options, k) is not None), None):
            raise ValueError(f"data.{given}: has no effect on the run's own data, which are as it was trained on them; "
                             "leave it out, or name another --reference")  # fmt: skip
        return open_run_data(samples.run, name or "train", options)
    if not name:
        return None
    if name in SPLITS:
        raise ValueError(f"reference: given {name}, a split of a run's data, but {samples.name} is not a run")
    if named := find_statistics(name, resize):
        return named
    path = Path(name).expanduser()
    if is_run(path):
        return open_reference_run(path, sampling, device)
    if is_statistics_file(path):
        return path
    return open_data_like(samples, name, options) if of_run else open_data(name, options)


def open_data_like(samples: SampleSource, name: str, options: DataOptions) -> DatasetSamples:
    """Stored samples by name; images of another shape than ``samples`` are converted to it unless ``options`` say how.

    A message says so.
    """
    if not is_image(samples.spec) or options.size is not None or options.channels is not None:
        return open_data(name, options)
    problem = None
    try:
        stored = open_data(name, options)
        if not is_image(stored.spec) or stored.spec.shape == samples.spec.shape:
            return stored
    except ValueError as e:  # images of several sizes, say
        problem = e
    channels, *size = samples.spec.shape
    try:
        converted = open_data(name, config.override(options, size=size, channels=channels))
    except ValueError as e:
        raise problem or e from None
    if converted.spec.shape != samples.spec.shape:  # a source without these settings
        return converted
    shape = "x".join(map(str, samples.spec.shape))
    warn_once(f"{name}: its images are converted to {shape}, as the run's are (--data.size, --data.channels)")
    return converted


def open_reference_run(path: Path, sampling: Sampling, device: torch.device) -> ModelSamples:
    """Samples of a run as a reference. A model that draws in one pass takes only the seed of ``sampling``."""
    run, seed = load_run(path, device=device.type), sampling.seed + REFERENCE_SEED
    if run.objective.sampler is None:
        return ModelSamples(run, Sampling(seed=seed, batch=sampling.batch), hash_weights(run))
    return ModelSamples(run, replace(sampling, seed=seed), hash_weights(run))
