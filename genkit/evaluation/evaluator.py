"""The ruler: a feature extractor, a reference and metrics, set up once and then held against any set of samples."""

from __future__ import annotations

import time
from abc import ABC
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from genkit import config
from genkit.config.blocks import suggest
from genkit.core import Data, Spec
from genkit.core.tensors import sha256
from genkit.evaluation import cards
from genkit.evaluation.metrics import METRICS, Estimate, Measured, Metric, Moments, Settings, bias_warning
from genkit.evaluation.metrics.features import FEATURES as ALL
from genkit.evaluation.metrics.features import Extractor, Features, cache
from genkit.evaluation.shards import Found, Progress, Ranks, measure, quiet, reference, require_logits
from genkit.evaluation.sources import Drawn, Given, Rebuilt, Samples, class_of, data_of, how_of, split_rows

SMALL = range(8, 33)  # pixels a side of the pictures for which a classifier of their own says more than Inception
KEEPS = {"moments": (), "features": ("features",), "samples": ("features",), "logits": ("logits",),
         "labels": ("logits", "labels")}  # fmt: skip


@dataclass(frozen=True)
class Auto(Features, ABC):
    """What suits the samples: a classifier for small grey labelled pictures, inception for others, raw for vectors."""

    def load(self, device: torch.device | str, data: Data | None = None) -> Extractor:
        if data is None:
            raise ValueError("features: auto needs data to suit; name others")
        return ALL[suits(data.spec)]().load(device, data)


FEATURES: dict[str, type[Features]] = {"auto": Auto, **ALL}


def is_picture(spec: Spec) -> bool:
    return len(spec.shape) == 3


def suits(spec: Spec) -> str:
    """The name of the features that suit samples of this kind."""
    if not is_picture(spec):
        return "raw"
    channels, height, width = spec.shape
    small = channels == 1 and height in SMALL and width in SMALL and class_of(spec) is not None
    return "classifier" if small and "classifier" in ALL else "inception"


def usual(spec: Spec, features: str, labelled: bool) -> str:
    """The metrics that suit samples of this kind."""
    if not is_picture(spec):
        return "w2,sliced_w2,mmd"
    return "fid,kid,prdc,accuracy" if features == "classifier" and labelled else "fid,kid,prdc"


def choose(features: Features, mode: str | None, weights: str | None, spec: Spec) -> Features:
    """The features that were asked for, with the short flags put in. ``ValueError`` where these have no effect."""
    given = {k: v for k, v in {"mode": mode, "weights": weights}.items() if v is not None}
    if type(features) is Auto:
        features = ALL["inception" if given and is_picture(spec) else suits(spec)]()
    known = {f.name for f in fields(features)}  # type: ignore[arg-type]  # every one is a dataclass
    for name, value in given.items():
        if name not in known:
            kind = type(features).__name__.lower()
            raise ValueError(
                f"{name}: given {value}, which has no effect on {kind} features; take --features inception"
            )
    changed = config.dump(features) | given
    return config.from_dict(type(features), changed)


def named(names: str) -> dict[str, Metric]:
    """``"fid,kid"`` as metrics. ``ValueError`` for one that is unknown."""
    found = {}
    for name in filter(None, (w.strip() for w in names.split(","))):
        if name not in METRICS:
            raise ValueError(f"metrics: given {name!r}; allowed: {', '.join(METRICS)}{suggest(name, METRICS)}")
        found[name] = METRICS[name]
    if not found:
        raise ValueError(f"metrics: given none; allowed: {', '.join(METRICS)}")
    return found


@dataclass
class Ruler:
    """What samples are measured by. :func:`ruler` sets one up."""

    metrics: Mapping[str, Metric]
    extractor: Extractor
    settings: Settings
    against: Measured | None
    about: Mapping[str, Any]
    """the reference, for the card"""
    device: torch.device
    batch: int = 64
    ranks: Ranks = field(default_factory=Ranks)
    also: frozenset[str] = frozenset()
    """what is kept though no metric needs it: features give the FID its interval"""

    @property
    def keep(self) -> frozenset[str]:
        return self.also | frozenset(k for m in self.metrics.values() for k in KEEPS[m.needs])

    def look(self, samples: Samples, n: int, progress: Progress = quiet) -> Found:
        """Measure ``n`` samples, on all ranks together. A kill costs half a minute of work."""
        if n < 2:
            raise ValueError(f"n: given {n}; a distance between distributions needs 2 samples or more")
        how: dict[str, Any] = {"keep": self.keep, "batch": self.batch, "ranks": self.ranks, "progress": progress}
        return measure(samples, self.extractor, n, partial=cache() / "partial", **how)

    def compute(self, found: Found) -> dict[str, Estimate]:
        """All metrics."""
        mine = placed(found.measured, self.device)
        against = placed(self.against, self.device) if self.against else None
        out: dict[str, Estimate] = {}
        for metric in self.metrics.values():
            out |= metric.compute(mine, against if metric.reference else None, self.settings)
        return out

    def plan(self, samples: Samples, n: int) -> dict[str, Any]:
        """The settings of a card that are known before the work."""
        return {
            **how_of(samples),
            "n": n,
            "batch": self.batch,
            "effective_batch": len(split_rows(n, self.batch)[0]),
            "metrics": list(self.metrics),
            "metric_settings": asdict(self.settings),
            "features": dict(self.extractor.settings),
            "reference": dict(self.about),
        }

    def card(self, samples: Samples, n: int, found: Found) -> cards.Card:
        """The card of what was found."""
        began = time.perf_counter()
        estimates = cards.numbers(self.compute(found))
        note = bias_warning(n) if "fid" in self.metrics else None
        observed = {
            **({"nfe": found.nfe, "passes": found.passes} if isinstance(samples, Drawn) else {}),
            "seconds": round(found.seconds, 2),
            "metric_seconds": round(time.perf_counter() - began, 2),
            "device": device_name(self.device),
            "ranks": self.ranks.world,
            "versions": cards.versions(),
            "notes": [note] if note else [],
        }
        return {"metrics": estimates, "settings": {**self.plan(samples, n), **observed}}


def placed(m: Measured, device: torch.device) -> Measured:
    move = lambda v: v if v is None else v.to(device)  # noqa: E731
    return replace(m, moments=m.moments.to(device), features=move(m.features), logits=move(m.logits),
                   labels=move(m.labels))  # fmt: skip


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def ruler(
    samples: Samples,
    reference_: Given | Path | None,
    metrics: Mapping[str, Metric] | None = None,
    features: Features | None = None,
    *,
    mode: str | None = None,
    weights: str | None = None,
    settings: Settings = Settings(),  # noqa: B008  (frozen)
    reference_n: int | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    progress: Progress = quiet,
) -> Ruler:
    """The ruler for samples of this kind against a reference: data, or a file of statistics (mu, sigma).

    What is not named is chosen by the kind of the samples. ``ValueError``, before any sample is drawn, where a metric
    has no meaning for them.
    """
    stored = reference_ if isinstance(reference_, Given) else None
    spec = stored.spec if stored is not None and samples.label is None else samples.spec
    wanted = choose(features or Auto(), mode, weights, spec)
    kind = next((k for k, v in ALL.items() if v is type(wanted)), type(wanted).__name__)
    if metrics is None:
        metrics = named(usual(samples.spec, kind, samples.label is not None))
    check(metrics, samples, reference_)
    if stored is not None and stored.spec.shape != samples.spec.shape and (kind != "inception"):
        raise ValueError(f"reference: {stored.name} holds samples {list(stored.spec.shape)}, {samples.name} "
                         f"{list(samples.spec.shape)}; {kind} features need the same shape")  # fmt: skip
    learns = None if kind == "inception" else training(samples, stored)
    if ranks.world > 1:  # one that trains itself shall do so once, and the others find it in the cache
        ranks.once(lambda: bool(wanted.load(device, learns)))
    extractor = wanted.load(device, learns)
    if stored is not None and any("logits" in KEEPS[m.needs] for m in metrics.values()):
        require_logits(extractor(stored.rows(0, 1, 1).x), extractor)
    for source in (s for s in (samples, stored) if isinstance(s, Given) and s.hashed is None):
        source.hashed = ranks.once(source.hash)  # which also reads every file, before the work
    made = Ruler(metrics, extractor, settings, None, {}, torch.device(device), batch, ranks)
    if isinstance(reference_, Path):
        made.against, made.about = statistics(reference_, extractor, metrics)
    elif stored is not None:
        n = min(reference_n or len(stored.data), len(stored.data))
        keep = frozenset({"features"} if any(m.reference and m.needs != "moments" for m in metrics.values()) else ())
        if any(m.reference for m in metrics.values()):
            how: dict[str, Any] = {"keep": keep, "batch": batch, "ranks": ranks, "progress": progress}
            made.against, made.about = reference(stored, extractor, n, **how), {**stored.identity(), "n": n}
    return made


def training(samples: Samples, reference_: Given | None) -> Data | None:
    """The training split for features that learn: the reference's where it has classes, else the samples' own."""
    if reference_ is not None and class_of(reference_.spec) is not None:
        return reference_.training()
    if isinstance(samples, Drawn):
        return data_of(samples.run).data
    if isinstance(samples, Rebuilt):
        return samples.given.training()
    return samples.training() if isinstance(samples, Given) else None


def check(metrics: Mapping[str, Metric], samples: Samples, against: Given | Path | None) -> None:
    """``ValueError`` for the first metric that has no meaning for these samples."""
    for name, metric in metrics.items():
        if metric.needs == "labels" and samples.label is None:
            raise ValueError(f"{name}: needs samples that were asked for by class; {samples.name} has no classes")
        if metric.needs == "samples" and is_picture(samples.spec):
            raise ValueError(f"{name}: is for vectors; {samples.name} gives pictures {list(samples.spec.shape)}; "
                             "take fid, kid or prdc")  # fmt: skip
        if metric.reference and against is None:
            raise ValueError(f"{name}: needs a reference; name one with --reference, such as cifar10:train")
        if metric.reference and metric.needs != "moments" and isinstance(against, Path):
            raise ValueError(f"{name}: needs the reference's samples; {against} holds only mu and sigma; take fid")


def statistics(path: Path, extractor: Extractor, metrics: Mapping[str, Metric]) -> tuple[Measured, dict[str, Any]]:
    """A file of mu and sigma as a reference."""
    moments = Moments.load(path)
    if extractor.dim and moments.dim != extractor.dim:
        name = extractor.settings.get("name", "these")
        have = f"{name} features have {extractor.dim}"
        raise ValueError(f"reference: {path} holds statistics of {moments.dim} numbers; {have}")
    return Measured(moments), {"stats": str(path), "sha256": sha256(path), "n": moments.n}
