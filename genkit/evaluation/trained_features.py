"""Which features a model was trained on, so that distances in them say little about it."""

from __future__ import annotations

from pathlib import Path

from genkit.config import load_yaml

FRECHET = "frechet"
"""The reward of ``genkit finetune`` that is a distance in features, ``frechet:NAME``."""


def trained_features(run: Path) -> list[str]:
    """The names of the features on which a run, or one that it started from (``init``), was trained by a distance."""
    names: set[str] = set()
    seen: set[Path] = set()
    place: Path | None = run
    while place is not None and place not in seen:
        seen.add(place)
        tuning = load_yaml(place / "finetune.yaml") if (place / "finetune.yaml").is_file() else {}
        kind, _, name = str(tuning.get("reward") or "").partition(":")
        names |= {name} if kind == FRECHET and name else set()
        init = load_yaml(place / "config.yaml").get("init") if (place / "config.yaml").is_file() else None
        place = Path(str(init)) if init and (Path(str(init)) / "config.yaml").is_file() else None
    return sorted(names)
