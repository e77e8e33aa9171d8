"""Cards: a number with everything that it hangs on, as JSON.

``{"metrics": {"fid": {"value": 3.1, "low": 3.0, "high": 3.2}}, "settings": {"n": 10000, ...}}``

What decides a card's numbers is in ``settings``; what was merely observed on the way (seconds, evaluations) too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from genkit import __version__
from genkit.core.files import write_text
from genkit.evaluation.metrics import Estimate
from genkit.evaluation.shards import key_of

Card = dict[str, Any]
WEIGHTS = ("run", "step", "ema", "weights", "weights_sha256", "samples")  # what two cards may be compared over
OBSERVED = ("nfe", "passes", "seconds", "metric_seconds", "versions", "device", "ranks", "notes")
NAMES = ("reference.data", "reference.stats")  # where the same pixels lie, which their sha256 already tells apart
PACKAGES = ("torch", "numpy", "scipy", "torchvision", "pillow")


def versions() -> dict[str, str]:
    return {"genkit": __version__, **{p: version(p) for p in PACKAGES}}


def numbers(found: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """Estimates as a card holds them. ``ValueError`` for a value that is not finite: it is no measurement."""
    for name, estimate in found.items():
        if not math.isfinite(estimate.value):
            raise ValueError(f"{name}: is {estimate.value}; no card was written (too few samples, or all alike?)")
    finite = lambda v: v if v is not None and math.isfinite(v) else None  # noqa: E731
    return {k: {"value": e.value, "low": finite(e.low), "high": finite(e.high)} for k, e in found.items()}


def name_of(settings: Mapping[str, Any]) -> str:
    """``0002000-heun18-g1.5-n10000-1a2b3c4d.json``; the end tells apart what the rest does not name."""
    words = [f"{settings['step']:07d}"] if "step" in settings else []
    if settings.get("sampler"):
        words += [f"{settings['sampler']}{settings['steps']}", f"g{settings['guidance']:g}"]
    words += [f"n{settings['n']}", key_of({k: v for k, v in settings.items() if k not in OBSERVED})[:8]]
    return "-".join(words) + ".json"


def write(card: Card, path: Path) -> Path:
    return write_text(path, json.dumps(card, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> Card:
    """``ValueError`` where it is not a card."""
    try:
        card = json.loads(path.read_text())
        if all("value" in v for v in card["metrics"].values()) and isinstance(card["settings"], dict):
            return card
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: is no card of genkit eval: {e}") from None
    raise ValueError(f"{path}: is no card of genkit eval; needs metrics and settings")


def newest(path: str) -> Path:
    """A card, or the newest of a run's."""
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if not file.is_dir():
        raise ValueError(f"{file}: there is no such card or run; make one with: genkit eval RUN")
    found = sorted((file / "eval").glob("*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    if not found:
        raise ValueError(f"{file}: has no cards yet; make one with: genkit eval {path}")
    return found[-1]


@dataclass(frozen=True)
class Line:
    """One metric of two cards."""

    metric: str
    a: Estimate
    b: Estimate

    @property
    def overlap(self) -> bool | None:
        """Whether the intervals share a point; None where one is not known."""
        if self.a.low is None or self.a.high is None or self.b.low is None or self.b.high is None:
            return None
        return self.a.low <= self.b.high and self.b.low <= self.a.high


def differences(a: Card, b: Card) -> list[str]:
    """In what two cards differ besides the weights: ``["n: 1000 and 2000", ...]``."""
    s, t = (flat({k: v for k, v in card["settings"].items() if k not in (*WEIGHTS, *OBSERVED)}) for card in (a, b))
    keys = [k for k in dict.fromkeys([*s, *t]) if k not in NAMES]
    return [f"{k}: {told(s, k)} and {told(t, k)}" for k in keys if s.get(k) != t.get(k)]


def remarks(a: Card, b: Card) -> list[str]:
    """What two cards were made by, where that differs: it may move the last digits."""
    s, t = (flat({k: card["settings"].get(k) for k in ("versions", "device")}) for card in (a, b))
    return [f"{k}: {told(s, k)} and {told(t, k)}" for k in dict.fromkeys([*s, *t]) if s.get(k) != t.get(k)]


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, v in tree.items():
        out |= flat(v, f"{path}{k}.") if isinstance(v, Mapping) else {path + k: v}
    return out


def told(tree: Mapping[str, Any], key: str) -> str:
    if key not in tree:
        return "nothing"
    text = json.dumps(tree[key])
    return text[:12] + "…" if "sha256" in key else text


def compare(a: Card, b: Card) -> list[Line]:
    """The metrics that both have. ``ValueError`` where the cards differ in more than the weights."""
    if odd := differences(a, b):
        raise ValueError(f"compare: the cards differ in more than the weights: {'; '.join(odd)}; measure both alike")
    shared = [k for k in a["metrics"] if k in b["metrics"]]
    if not shared:
        raise ValueError(f"compare: no metric is in both: {', '.join(a['metrics'])} against {', '.join(b['metrics'])}")
    return [Line(k, *(estimate(card["metrics"][k]) for card in (a, b))) for k in shared]


def estimate(stored: Mapping[str, Any]) -> Estimate:
    return Estimate(stored["value"], stored.get("low"), stored.get("high"))


def text(e: Estimate) -> str:
    interval = "" if e.low is None or e.high is None else f" [{e.low:.4g}, {e.high:.4g}]"
    return f"{e.value:.5g}{interval}"
