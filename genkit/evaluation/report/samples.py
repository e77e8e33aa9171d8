"""The samples of a run on its page: grids drawn while training, and pictures of `genkit sample`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genkit.evaluation.cards import to_text
from genkit.evaluation.report.html import embed_pictures, render_gallery, render_note

TRAINING_GRIDS = 12  # grids of samples on a page, spread evenly over the training
OTHER_PICTURES = 8


def spread_evenly(items: Sequence[Any], num: int) -> list[Any]:
    """At most ``num`` of the items, evenly spaced, including the first and the last."""
    if len(items) <= num:
        return list(items)
    return [items[round(i * (len(items) - 1) / (num - 1))] for i in range(num)]


def list_grids(run: Path) -> list[Path]:
    """The grids of samples that were drawn while training, oldest first."""
    return sorted((run / "samples").glob("step-*.png"), key=lambda path: (len(path.name), path.name))


def training_sample_parts(run: Path) -> list[Markup]:
    """The grids of samples that were drawn while training."""
    paths = list_grids(run)
    chosen = spread_evenly(paths, TRAINING_GRIDS)
    images, errors = embed_pictures((path, step_caption(path)) for path in chosen)
    parts = [render_gallery(images, "Grid of samples", "Checkpoint")] if images else []
    if len(chosen) < len(paths):
        parts.append(render_note(f"{len(chosen)} of {len(paths)} grids, spread evenly over the training."))
    return parts + damage_note(errors)


def newest_grid_parts(runs: Sequence[Path]) -> list[Markup]:
    """The newest grid of each run, side by side."""
    newest = [(grids[-1], f"{run.name}, {step_caption(grids[-1])}") for run in runs if (grids := list_grids(run))]
    images, errors = embed_pictures(newest)
    return ([render_gallery(images, "Grid of samples")] if images else []) + damage_note(errors)


def step_caption(path: Path) -> str:
    """``step 500`` for ``step-0000500.png``."""
    digits = path.stem.removeprefix("step-")
    return f"step {int(digits)}" if digits.isdecimal() else path.stem


def other_sample_parts(run: Path) -> list[Markup]:
    """The pictures of ``genkit sample`` in the run's directory, newest last, with their settings."""
    paths = [path for path in (run / "samples").glob("*.png") if not path.name.startswith("step-")]
    chosen = sorted(paths, key=lambda path: (path.stat().st_mtime, path.name))[-OTHER_PICTURES:]
    captions = [" · ".join([path.stem, *sampling_facts(path.with_name(path.name + ".json"))]) for path in chosen]
    images, errors = embed_pictures(zip(chosen, captions, strict=True))
    parts = [render_gallery(images, "Samples")] if images else []
    if len(chosen) < len(paths):
        parts.append(render_note(f"The newest {len(chosen)} of {len(paths)}."))
    return parts + damage_note(errors)


def damage_note(errors: Sequence[str]) -> list[Markup]:
    """A note about pictures that cannot be read, if there are any."""
    return [render_note("Left out: " + "; ".join(errors) + ".")] if errors else []


def sampling_facts(path: Path) -> list[str]:
    """Sampler, evaluations, guidance and seed from the JSON file beside a picture; nothing if it cannot be read."""
    try:
        settings = json.loads(path.read_bytes())
        return [f"{k} {to_text(settings[k])}" for k in ("sampler", "nfe", "guidance", "seed") if k in settings]
    except (OSError, ValueError, TypeError, RecursionError):
        return []
