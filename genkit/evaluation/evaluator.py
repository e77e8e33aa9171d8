"""The evaluator: a feature extractor, a reference and metrics, set up once and applied to any set of samples."""

from __future__ import annotations

import math
import time
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from genkit import config
from genkit.backbones.compressed import compressed_formats
from genkit.config.blocks import suggest
from genkit.core import Data, Label, Spec
from genkit.core.progress import Progress, silent
from genkit.core.tensors import cache_folder, sha256
from genkit.evaluation import cards
from genkit.evaluation.classes import TOLERANCE, describe_classes, need_proportions, shares_distance
from genkit.evaluation.measurement import Measurement, Space, measure_reference, measure_spaces, require_logits
from genkit.evaluation.metrics import FEATURES as EXTRACTORS
from genkit.evaluation.metrics import METRICS, Estimate, Metric, MetricSettings, Moments, SampleStatistics
from genkit.evaluation.metrics.features import Extractor, Features
from genkit.evaluation.metrics.spatial import share_networks
from genkit.evaluation.named_statistics import require_same_features
from genkit.evaluation.shift import SHIFT_SAMPLES, measure_shift
from genkit.evaluation.sources import (
    DatasetSamples,
    ModelSamples,
    Reconstructions,
    SampleSource,
    class_condition,
    open_run_data,
    reference_settings,
    source_settings,
    split_into_blocks,
)
from genkit.evaluation.trained_features import trained_features
from genkit.training.ranks import SINGLE, Ranks

OWN_METRICS = {"clip": "cmmd", "inception-spatial": "fid"}  # of features that are known for one metric: CMMD, sFID
SMALL = range(8, 33)  # sides of images for which a classifier trained on them tells more than Inception
Reference = SampleSource | Path
"""Stored samples, samples of another run, or an npz of statistics (mu, sigma)."""


# ------------------------------------------------------------------------------------------------ choosing features
CountNames = tuple[str | None, str | None]
COUNT_NAMES: CountNames = ("n", "reference_n")  # of genkit eval: the settings that give the numbers of samples


@dataclass(frozen=True)
class Auto(Features, ABC):
    """What suits the samples: a classifier for small grey labelled images, inception for others, raw for vectors."""

    def load(self, device: torch.device | str, data: Data | None = None) -> Extractor:
        """The extractor that suits ``data``."""
        if data is None:
            raise ValueError("features: auto needs data to choose by; name inception, classifier or raw")
        return EXTRACTORS[default_features(data.spec)]().load(device, data)


FEATURES: dict[str, type[Features]] = {"auto": Auto, **EXTRACTORS}


def is_image(spec: Spec) -> bool:
    """Whether samples have the shape of images, ``[C, H, W]``."""
    return len(spec.shape) == 3


def default_features(spec: Spec) -> str:
    """The name of the features that suit samples of this shape and conditions."""
    if not is_image(spec):
        return "raw"
    channels, height, width = spec.shape
    small = channels == 1 and height in SMALL and width in SMALL and class_condition(spec) is not None
    return "classifier" if small else "inception"


def default_metrics(spec: Spec, features: str, labelled: bool) -> str:
    """The names of the metrics that suit samples of this shape, separated by commas."""
    if not is_image(spec):
        return "w2,sliced_w2,mmd"
    if features in OWN_METRICS:
        return OWN_METRICS[features]
    return "fid,kid,prdc,accuracy" if features == "classifier" and labelled else "fid,kid,prdc"


def choose_features(features: Features, resize: str | None, weights: str | None, spec: Spec) -> Features:
    """The features that suit the samples if ``features`` is auto, with the settings ``resize`` and ``weights``.

    ``ValueError`` if one of these is given and has no effect.
    """
    overrides = {name: value for name, value in {"resize": resize, "weights": weights}.items() if value is not None}
    if type(features) is Auto:
        features = EXTRACTORS["inception" if overrides and is_image(spec) else default_features(spec)]()
    known = {f.name for f in fields(features)}  # type: ignore[arg-type]  # every one is a dataclass
    for name, value in overrides.items():
        if name not in known:
            kind = type(features).__name__.lower()
            raise ValueError(
                f"{name}: given {value}, which has no effect on {kind} features; take --features inception"
            )
    return config.from_dict(type(features), config.dump(features) | overrides)


def find_metrics(names: str) -> dict[str, Metric]:
    """The metrics of ``"fid,kid"``, by name. ``ValueError`` if one is unknown, or none is named."""
    metrics = {}
    for name in filter(None, (word.strip() for word in names.split(","))):
        if name not in METRICS:
            raise ValueError(f"metrics: given {name!r}; allowed: {', '.join(METRICS)}{suggest(name, METRICS)}")
        metrics[name] = METRICS[name]
    if not metrics:
        raise ValueError(f"metrics: given none; allowed: {', '.join(METRICS)}")
    return metrics


# ------------------------------------------------------------------------------------------------ the evaluator
@dataclass
class Evaluator:
    """What samples are measured with. :meth:`create` sets one up."""

    metrics: Mapping[str, Metric]
    extractor: Extractor
    settings: MetricSettings
    device: torch.device
    batch: int = 64
    ranks: Ranks = SINGLE
    reference: SampleStatistics | None = None
    reference_settings: Mapping[str, Any] = field(default_factory=dict)
    """the reference, for the card"""
    keep: frozenset[str] = frozenset()
    """tensors to keep even if no metric needs them: the features give the FID its interval"""
    class_source: SampleSource | None = None
    """the reference, whose proportions of classes the samples get"""

    @classmethod
    def create(
        cls,
        samples: SampleSource,
        reference: Reference | None,
        metrics: Mapping[str, Metric] | None = None,
        features: Features | None = None,
        *,
        resize: str | None = None,
        weights: str | None = None,
        settings: MetricSettings | None = None,
        n: int | None = None,
        reference_n: int | None = None,
        names: CountNames = COUNT_NAMES,
        batch: int = 64,
        device: torch.device | str = "cpu",
        ranks: Ranks = SINGLE,
        progress: Progress = silent,
    ) -> Evaluator:
        """An evaluator for ``samples`` and others of their kind, against ``reference``.

        Metrics and features that are not given are chosen by the kind of the samples. All ranks call this together.
        ``ValueError``, before any sample is drawn, if a metric has no meaning for these samples, or cannot be computed
        of ``n`` of them (None: any number); ``names`` are the settings of the caller that its advice names.
        """
        source = None if isinstance(reference, Path) else reference
        spec = source.spec if source is not None and samples.label is None else samples.spec
        chosen = choose_features(features or Auto(), resize, weights, spec)
        kind = next((name for name, known in EXTRACTORS.items() if known is type(chosen)), type(chosen).__name__)
        if metrics is None:
            metrics = find_metrics(default_metrics(samples.spec, kind, samples.label is not None))
        check_metrics(metrics, samples, reference)
        if source is not None and source.spec.shape != samples.spec.shape and kind != "inception":
            raise ValueError(f"reference: {source.name} has samples {list(source.spec.shape)}, {samples.name} "
                             f"{list(samples.spec.shape)}; {kind} features need the same shape")  # fmt: skip
        data = None if kind == "inception" else training_data(samples, source)
        progress("feature extractor", 0, None)
        extractor = load_extractor(chosen, device, data, ranks)
        settings = settings or MetricSettings()
        limits = samples.limit, None if source is None else source.limit
        of_reference = None if source is None else smallest(reference_n, source.limit)
        dim = extractor.dim or math.prod(samples.spec.shape)
        check_counts(metrics, dim, settings, n, of_reference, names, limits)
        needs_logits = any("logits" in metric.required_tensors for metric in metrics.values())
        if isinstance(source, DatasetSamples) and needs_logits:
            require_logits(extractor(source.rows(0, 1, 1).x), extractor)
        # hashing reads every file, so that a damaged one is found before the work
        for stored in (samples, source):
            if isinstance(stored, DatasetSamples) and stored.content_hash is None:
                stored.content_hash, stored.class_counts = ranks.once(stored.scan)
        evaluator = cls(metrics, extractor, settings, torch.device(device), batch, ranks)
        evaluator.class_source = source
        evaluator.set_reference(reference, reference_n, progress)
        return evaluator

    def set_reference(self, reference: Reference | None, n: int | None, progress: Progress = silent) -> None:
        """Measure ``n`` samples of the reference (None: all), or read its statistics, if some metric needs it."""
        if isinstance(reference, Path):
            self.reference, self.reference_settings = load_statistics(reference, self.extractor)
        elif reference is not None and any(metric.reference for metric in self.metrics.values()):
            n = smallest(n, reference.limit)
            if n is None:
                raise ValueError(f"reference_n: given none; {reference.name} draws any number of samples, so name one")
            needs_samples = any(metric.needs_reference_samples for metric in self.metrics.values())
            self.reference = measure_reference(
                reference,
                self.extractor,
                n,
                keep=frozenset({"features"} if needs_samples else ()),
                batch=self.batch,
                ranks=self.ranks,
                progress=progress,
            )
            self.reference_settings = {**reference_settings(reference), "n": n}

    def measure(self, samples: SampleSource, n: int, progress: Progress = silent) -> Measurement:
        """Measure ``n`` samples, on all ranks together. A killed process loses about half a minute of work."""
        if n < 2:
            raise ValueError(f"n: given {n}; a distance between distributions needs 2 samples or more")
        return measure_together([self], samples, n, progress)[0]

    @property
    def space(self) -> Space:
        """The features that are measured, with the tensors that are kept of them."""
        keep = self.keep.union(*(metric.required_tensors for metric in self.metrics.values()))
        return Space(self.extractor, keep)

    def match_classes(self, samples: SampleSource) -> str | None:
        """Give samples of a model the classes of the reference, if it has the same ones in unequal proportions.

        Returns a note for the card if the proportions are unequal, whether they could be matched or not.
        """
        source = self.class_source
        uses_reference = any(metric.reference for metric in self.metrics.values())
        if not isinstance(source, DatasetSamples) or source.class_counts is None or not uses_reference:
            return None
        label, counts = samples.label, source.class_counts
        kind = source.spec.cond[source.label] if source.label else None
        if label is None or not isinstance(kind, Label):
            return None  # a model without classes learns the proportions too
        same = samples.spec.cond[label] == kind or getattr(samples.spec.cond[label], "num", None) == kind.num
        if isinstance(samples, ModelSamples):
            if samples.conditions is not None or not need_proportions(counts):
                return None  # conditions of the training data come in its proportions
            if same:
                samples.class_counts = counts
            return describe_classes(counts, kind.names or (), matched=same)
        own = samples.dataset if isinstance(samples, Reconstructions) else samples
        own_counts = own.class_counts if isinstance(own, DatasetSamples) else None
        if own_counts is None or (same and shares_distance(own_counts, counts) <= TOLERANCE):
            return None
        return describe_classes(counts, kind.names or (), matched=False)

    def card_settings(self, samples: SampleSource, n: int) -> dict[str, Any]:
        """The settings of a card that are known before the work."""
        self.match_classes(samples)
        return {
            **source_settings(samples),
            "n": n,
            "batch": self.batch,
            "effective_batch": len(split_into_blocks(n, self.batch)[0]),
            "metrics": list(self.metrics),
            "metric_settings": asdict(self.settings),
            "features": dict(self.extractor.settings),
            "reference": dict(self.reference_settings),
            **trained_on(samples),
            **compressed_base(samples),
        }

    def card_path(self, samples: SampleSource, n: int) -> Path | None:
        """Where the card of a run's samples is stored: in the run's ``eval`` folder. None for other samples."""
        if not isinstance(samples, ModelSamples | Reconstructions):
            return None
        return samples.run.directory / "eval" / cards.file_name(self.card_settings(samples, n))

    def make_card(self, samples: SampleSource, n: int, measurement: Measurement) -> cards.Card:
        """Compute the metrics of a measurement. One that cannot be computed leaves a note and the others.

        ``ValueError`` if none can, or none is finite.
        """
        start = time.perf_counter()
        generated = measurement.statistics.to(self.device)
        reference = self.reference.to(self.device) if self.reference else None
        estimates: dict[str, Estimate] = {}
        notes: list[str | None] = [self.match_classes(samples)]
        if self.extractor.settings.get("name") in trained_on(samples).get("trained_on", []):
            notes.append("trained on these features: the values are better than the model, and rank nothing")
        errors: list[ValueError] = []
        for name, metric in self.metrics.items():
            try:
                values = metric.compute(generated, reference if metric.reference else None, self.settings)
                estimates |= cards.require_finite(values)
            except ValueError as e:  # the samples were costly, and the other metrics are as good as before
                errors.append(e)
                notes.append(f"{name} is missing: {e}")
            else:
                notes.append(metric.warn(n) if metric.warn else None)
        if errors and not estimates:
            raise errors[0]
        observed = {
            "seconds": round(measurement.seconds, 2),
            "draw_cpu_seconds": round(measurement.draw_cpu_seconds, 4),
            "metric_seconds": round(time.perf_counter() - start, 2),
            "device": device_name(self.device),
            "ranks": self.ranks.world,
            "versions": cards.versions(),
            "notes": [note for note in notes if note],
        }
        if isinstance(samples, ModelSamples):
            observed = {"nfe": measurement.nfe, "passes": measurement.passes, **observed}
            if samples.sampling.precision != "fp32":
                observed["precision_shift"] = measure_shift(samples, min(n, SHIFT_SAMPLES))
        settings = {**self.card_settings(samples, n), **observed}
        return cards.Card(estimates, settings, self.card_path(samples, n))


def measure_together(
    evaluators: Sequence[Evaluator], samples: SampleSource, n: int, progress: Progress = silent
) -> list[Measurement]:
    """Measure ``n`` samples in the features of several evaluators, from one pass over the samples, on all ranks
    together. Features that need the same network share it."""
    for evaluator in evaluators:
        evaluator.match_classes(samples)
    share_networks([evaluator.extractor for evaluator in evaluators])
    return measure_spaces(
        samples,
        [evaluator.space for evaluator in evaluators],
        n,
        batch=evaluators[0].batch,
        ranks=evaluators[0].ranks,
        partial=cache_folder() / "partial",
        progress=progress,
    )


def compressed_base(samples: SampleSource) -> dict[str, list[str]]:
    """``{"frozen_weights": formats}`` of networks that draw with compressed weights, as training with them does."""
    formats = compressed_formats(samples.run.nets) if isinstance(samples, ModelSamples) else []
    return {"frozen_weights": formats} if formats else {}


def trained_on(samples: SampleSource) -> dict[str, list[str]]:
    """``{"trained_on": names}`` of the features that a run or one that it started from was trained on; else empty."""
    if not isinstance(samples, ModelSamples | Reconstructions):
        return {}
    names = trained_features(samples.run.directory)
    return {"trained_on": names} if names else {}


def load_extractor(features: Features, device: torch.device | str, data: Data | None, ranks: Ranks) -> Extractor:
    """The extractor on every rank. One that trains itself does so on one rank; the others find it in the cache."""
    if ranks.world > 1:
        ranks.once(train_extractor, features, device, data)
    return features.load(device, data)


def train_extractor(features: Features, device: torch.device | str, data: Data | None) -> None:
    """Load an extractor for its effect on the cache."""
    features.load(device, data)


def training_data(samples: SampleSource, reference: SampleSource | None) -> Data | None:
    """The training split for features that learn: the reference's if it has classes, else the samples' own."""
    if reference is not None and class_condition(reference.spec) is not None:
        samples = reference
    if isinstance(samples, ModelSamples):
        return open_run_data(samples.run).data
    if isinstance(samples, Reconstructions):
        return samples.dataset.training_split()
    return samples.training_split() if isinstance(samples, DatasetSamples) else None


def check_metrics(metrics: Mapping[str, Metric], samples: SampleSource, reference: Reference | None) -> None:
    """``ValueError`` for the first metric that has no meaning for these samples."""
    for name, metric in metrics.items():
        if metric.needs == "labels" and samples.label is None:
            raise ValueError(f"{name}: needs class-conditional samples; {samples.name} has no classes")
        if metric.needs == "samples" and is_image(samples.spec):
            raise ValueError(f"{name}: is for vectors; {samples.name} has images {list(samples.spec.shape)}; "
                             "take fid, kid or prdc")  # fmt: skip
        if metric.reference and reference is None:
            raise ValueError(f"{name}: needs a reference; name one with --reference, such as cifar10:train")
        if metric.needs_reference_samples and isinstance(reference, Path):
            raise ValueError(f"{name}: needs the reference's samples; {reference} has only mu and sigma; take fid")


def check_counts(
    metrics: Mapping[str, Metric],
    dim: int,
    settings: MetricSettings,
    n: int | None,
    reference_n: int | None,
    names: CountNames = COUNT_NAMES,
    limits: tuple[int | None, int | None] = (None, None),
) -> None:
    """``ValueError`` that names every metric that cannot be computed of ``n`` samples against ``reference_n``.

    ``dim`` is the number of features. A number that is None is not known. ``names`` are the settings that give the two
    numbers (None: nothing does), and ``limits`` the samples that there are (None: any number).
    """
    of_samples = {name: metric.min_samples(dim, settings) for name, metric in metrics.items()}
    of_reference = {name: metric.min_reference(dim, settings) for name, metric in metrics.items() if metric.reference}
    sides = zip(("samples", "reference"), names, (n, reference_n), (of_samples, of_reference), limits, strict=True)
    for side, option, given, needed, limit in sides:
        missing = {name: number for name, number in needed.items() if given is not None and given < number}
        if not missing:
            continue
        text = ", ".join(f"{name} needs at least {least}" for name, least in missing.items())
        number = max(missing.values())
        if limit is not None and limit < number:
            advice = f"there are no more {side}; leave" if side == "samples" else "take a larger reference, or leave"
        elif option is None:
            advice = "leave"
        else:
            advice = f"take --{option.replace('_', '-')} {number}, or leave"
        raise ValueError(f"{option or side}: given {given}; of {dim} features {text}; {advice} them out")


def smallest(*numbers: int | None) -> int | None:
    """The smallest of the numbers that are known; None if none is."""
    return min((number for number in numbers if number is not None), default=None)


def load_statistics(path: Path, extractor: Extractor) -> tuple[SampleStatistics, dict[str, Any]]:
    """An npz of mu and sigma as a reference, and its settings for the card."""
    moments = Moments.load(path)
    if extractor.dim and moments.dim != extractor.dim:
        name = extractor.settings.get("name", "these")
        raise ValueError(f"reference: {path} has statistics of {moments.dim} features; {name} features have "
                         f"{extractor.dim}")  # fmt: skip
    require_same_features(path, extractor.settings)
    return SampleStatistics(moments), {"stats": str(path), "sha256": sha256(path), "n": moments.n}


def device_name(device: torch.device) -> str:
    """The name of a GPU, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
