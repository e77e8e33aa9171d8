"""Cards: the result of an evaluation as JSON, with everything it depends on.

``{"metrics": {"fid": {"value": 3.1, "low": 3.0, "high": 3.2}}, "settings": {"n": 10000, ...}}``

``settings`` has what determines the numbers, and what was observed on the way (seconds, network evaluations, versions).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from genkit import __version__
from genkit.core.files import refuse_foreign, write_text
from genkit.core.links import follow_links
from genkit.evaluation.metrics import Estimate, metric_title

# settings that compared cards may differ in
WEIGHTS = ("run", "step", "ema", "weights", "weights_sha256", "adapter", "samples", "trained_on", "frozen_weights")
OBSERVED = (  # of the machine or of the work, not settings
    "nfe",
    "passes",
    "seconds",
    "draw_cpu_seconds",
    "metric_seconds",
    "versions",
    "device",
    "ranks",
    "notes",
    "precision_shift",
)
LOCATIONS = ("reference.data", "reference.stats", "reference.run")  # names; the hash of a reference counts
PACKAGES = ("torch", "numpy", "scipy", "torchvision", "pillow")


@dataclass(frozen=True)
class Card:
    """The metrics of a set of samples with their intervals, and every setting that they depend on."""

    metrics: Mapping[str, Estimate]
    settings: Mapping[str, Any]
    """ready for JSON"""
    path: Path | None = field(default=None, compare=False)
    """The card's file; of a card that has not been saved, where :meth:`save` puts it by default (None: nowhere)."""

    @classmethod
    def load(cls, path: str | Path) -> Card:
        """Read a card. ``ValueError`` if the file is not one."""
        path = Path(path)
        try:
            card = parse_card(path.read_bytes(), path)
        except (OSError, ValueError) as e:
            raise ValueError(f"{path}: is not a card of genkit eval: {e}") from None
        if not card.settings:
            raise ValueError(f"{path}: is not a card of genkit eval: has no settings")
        return card

    def save(self, path: str | Path | None = None) -> Path:
        """Write the card atomically, to ``path`` or to its default place, and return where.

        ``ValueError`` if there is neither, or a number is not finite.
        """
        target = self.path if path is None else Path(path).expanduser()
        if target is None:
            raise ValueError("path: given none, and a card of stored samples has no default place; name a file")
        refuse_foreign(target)
        return write_text(target, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """The card as JSON has it."""
        metrics = {name: estimate._asdict() for name, estimate in self.metrics.items()}
        return {"metrics": metrics, "settings": dict(self.settings)}

    @property
    def name(self) -> str:
        """The name of the card's file, without its suffix."""
        return "" if self.path is None else self.path.stem

    @property
    def flat_settings(self) -> dict[str, Any]:
        """The settings by dotted name: ``{"reference.n": 1000, ...}``."""
        return flatten(self.settings)

    @property
    def step(self) -> float | None:
        """The checkpoint, if the samples are a run's."""
        return to_number(self.settings.get("step"))

    @property
    def nfe(self) -> float | None:
        """Network evaluations per sample, if the samples are a run's."""
        return to_number(self.settings.get("nfe"))

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers has to know."""
        notes = self.settings.get("notes")
        return [to_text(note) for note in notes] if isinstance(notes, list) else []

    @property
    def is_trained_on(self) -> bool:
        """Whether the model was trained on the features that it was measured in, so that its values rank nothing."""
        features, trained = self.settings.get("features"), self.settings.get("trained_on")
        name = features.get("name") if isinstance(features, Mapping) else None
        return isinstance(trained, list) and name in trained

    def title(self, metric: str) -> str:
        """What tables call one of the metrics: ``fid`` in Inception's features, ``fd (raw)`` in raw ones."""
        features = self.settings.get("features")
        name = features.get("name") if isinstance(features, Mapping) else None
        return metric_title(metric, None if name is None else to_text(name))

    def summary(self) -> str:
        """The metrics, how the samples were made, and the notes, in a few lines."""
        width = max((len(self.title(name)) for name in self.metrics), default=0)
        lines = [f"{self.title(name):<{width}}  {estimate}" for name, estimate in self.metrics.items()]
        return "\n".join([*lines, describe_settings(self.settings), *(f"note: {note}" for note in self.notes)])

    __repr__ = summary


def rankable(card: Card | None, metric: str) -> Estimate | None:
    """A card's value, if it can be the best one: None for features that the model was trained on."""
    return None if card is None or card.is_trained_on else card.metrics.get(metric)


# ------------------------------------------------------------------------------------------------ making and reading
def versions() -> dict[str, str]:
    """The versions of the packages that numbers may depend on."""
    return {"genkit": __version__, **{package: version(package) for package in PACKAGES}}


def require_finite(estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """The estimates, without bounds that are not finite. ``ValueError`` if a value is not: it is no measurement."""
    for name, estimate in estimates.items():
        if not math.isfinite(estimate.value):
            raise ValueError(f"{name}: is {estimate.value}; no card was written (too few samples, or all alike?)")
    return {name: Estimate(e.value, to_number(e.low), to_number(e.high)) for name, e in estimates.items()}


def parse_card(text: str | bytes, path: Path | None = None) -> Card:
    """A card from its JSON; missing settings are empty. ``ValueError`` says what is wrong with it."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    metrics = tree.get("metrics") if isinstance(tree, dict) else None
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError("has no metrics")
    estimates = {}
    for name, entry in metrics.items():
        numbers = [to_number(entry.get(key)) if isinstance(entry, dict) else None for key in Estimate._fields]
        if numbers[0] is None:
            raise ValueError(f"has no number for {name}")
        estimates[name] = Estimate(numbers[0], *numbers[1:])
    settings = tree.get("settings")
    return Card(estimates, settings if isinstance(settings, dict) else {}, path)


def file_name(settings: Mapping[str, Any]) -> str:
    """``0002000-heun18-g1.5-n10000-1a2b3c4d.json``: the hash at the end covers all settings that are not observed."""
    words = [f"{settings['step']:07d}"] if "step" in settings else []
    if settings.get("sampler"):
        words += [f"{settings['sampler']}{settings['steps']}", f"g{settings['guidance']:g}"]
    words += [f"n{settings['n']}", hash_json({k: v for k, v in settings.items() if k not in OBSERVED})[:8]]
    return "-".join(words) + ".json"


def find_card(path: str | Path) -> Path:
    """``path`` if it is a file, or the newest card of the run ``path``. ``ValueError`` if there is none."""
    place = follow_links(Path(path).expanduser())
    if place.is_file():
        return place
    if not place.is_dir():
        raise ValueError(f"{place}: there is no such card or run; make one with: genkit eval RUN")
    cards = sorted((place / "eval").glob("*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    if not cards:
        raise ValueError(f"{place}: has no cards yet; make one with: genkit eval {path}")
    return cards[-1]


# --------------------------------------------------------------------------------------------------------- comparing
@dataclass(frozen=True)
class MetricComparison:
    """One metric of two cards."""

    metric: str
    a: Estimate
    b: Estimate

    @property
    def overlap(self) -> bool | None:
        """Whether the intervals have a point in common; None if an interval is not known."""
        return self.a.overlaps(self.b)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON has it."""
        return {"metric": self.metric, "a": self.a._asdict(), "b": self.b._asdict(), "overlap": self.overlap}


def compare(a: Card, b: Card) -> list[MetricComparison]:
    """The metrics that both cards have. ``ValueError`` if the cards differ in more than the weights."""
    if differences := setting_differences(a, b):
        raise ValueError(f"compare: the cards differ in more than the weights: {'; '.join(differences)}; measure both "
                         "in the same way")  # fmt: skip
    for card in (a, b):
        if card.is_trained_on:
            raise ValueError(
                f"compare: {to_text(card.settings.get('run'))} was trained on these features "
                f"({to_text(card.settings['features']['name'])}); ranking by them means nothing; measure both in "
                "others, say --features raw"
            )
    shared = [name for name in a.metrics if name in b.metrics]
    if not shared:
        raise ValueError(f"compare: the cards have no metric in common: {', '.join(a.metrics)} and "
                         f"{', '.join(b.metrics)}")  # fmt: skip
    return [MetricComparison(name, a.metrics[name], b.metrics[name]) for name in shared]


def setting_differences(a: Card, b: Card) -> list[str]:
    """The settings besides the weights in which two cards differ: ``["n: 1000 and 2000", ...]``, one entry a block."""
    entries: dict[str, list[str]] = {}
    for entry in list_differences(comparable_settings(a), comparable_settings(b)):
        entries.setdefault(re.split(r"[.:]", entry, maxsplit=1)[0], []).append(entry)
    more = {block: f" (and {len(found) - 1} more)" if len(found) > 1 else "" for block, found in entries.items()}
    return [found[0] + more[block] for block, found in entries.items()]


def comparable_settings(card: Card) -> dict[str, Any]:
    """The settings, by dotted name, that must be equal in two cards that are compared."""
    ignored = (*WEIGHTS, *OBSERVED)
    settings = flatten({k: v for k, v in card.settings.items() if k not in ignored})
    return {k: v for k, v in settings.items() if k not in LOCATIONS}


def version_differences(a: Card, b: Card) -> list[str]:
    """The versions and devices in which two cards differ, which may change the last digits."""
    return list_differences(*(flatten({k: card.settings.get(k) for k in ("versions", "device")}) for card in (a, b)))


def list_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """``["key: value in a and value in b", ...]`` for the keys with different values."""
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    return [f"{key}: {show_setting(a, key)} and {show_setting(b, key)}" for key in keys]


# --------------------------------------------------------------------------------------------------------- formatting
def show_setting(settings: Mapping[str, Any], key: str) -> str:
    """A setting in a message; hashes are cut."""
    if key not in settings:
        return "nothing"
    text = json.dumps(settings[key])
    return text[:12] + "…" if "sha256" in key else text


def describe_settings(settings: Mapping[str, Any]) -> str:
    """One line: sampler, number of samples, reference, features, seconds. Settings that are missing are left out."""
    words = []
    if settings.get("sampler"):
        words.append(f"{settings['sampler']} {settings.get('steps')} steps")
        labels = {"nfe": "NFE", "guidance": "guidance", "ema": "ema"}
        words[0] += "".join(f", {label} {to_short(settings[k])}" for k, label in labels.items() if k in settings)
    if "reconstructed" in settings:
        words.append(f"reconstructions of {describe_data(settings['reconstructed'])}")
    reference = settings.get("reference")
    against = f" against {reference.get('n')} of {describe_data(reference)}" if reference else ""
    words.append(f"{settings.get('n')} samples{against}")
    features = settings.get("features", {})
    words.append("features " + " ".join(str(features[key]) for key in ("name", "resize") if key in features))
    if isinstance(shift := settings.get("precision_shift"), Mapping):
        words.append(f"{settings.get('precision')} (mean difference to fp32 {to_short(shift.get('mean'))})")
    if "seconds" in settings:
        words.append(f"{settings['seconds']} s")
    return "; ".join(words)


def describe_data(data: Mapping[str, Any]) -> str:
    """``NAME:SPLIT`` of a data set, the file of its statistics, or the run that the samples are of."""
    if "run" in data:
        return f"samples of {data['run']} at step {data.get('step')}"
    return data.get("stats") or f"{data.get('data')}:{data.get('split')}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``. Empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def to_text(value: object) -> str:
    """A string itself; anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def to_short(value: object) -> str:
    """A number without trailing zeros; anything else as text."""
    number = to_number(value)
    return to_text(value) if number is None else f"{number:g}"


def to_number(value: object) -> float | None:
    """``value`` if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return cast(float, value) if is_number else None


def hash_json(tree: Any) -> str:
    """The sha256 of ``tree`` as JSON."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()
