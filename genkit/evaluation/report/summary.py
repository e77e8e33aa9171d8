"""The head of a page: the most important facts of a run, its notes and tags; and at the end its environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from genkit.core.durations import format_duration
from genkit.evaluation.cards import flatten, to_number, to_text
from genkit.evaluation.report.html import (
    format_interval,
    format_number,
    render,
    render_listing,
    render_note,
    render_tiles,
)
from genkit.evaluation.report.records import LogSummary
from genkit.evaluation.run_records import Headline, RunRecord


def summary_tiles(run: RunRecord, log: LogSummary) -> Markup:
    """The most important facts of a run."""
    items: dict[str, Any] = {"objective": run.objective, "backbone": run.backbone, "data": run.data, "state": run.state}
    if run.parameters:
        items["parameters"] = format_count(sum(run.parameters.values()))
    if log.num_lines:
        asked = to_text(run.steps if run.steps is not None else run.config.get("steps", "?"))
        items["iterations" if run.finetuning else "steps"] = f"{log.last['step']} of {asked}"
        if samples := to_number(log.last.get("samples")):
            items["samples seen"] = format_count(samples) + describe_epochs(run, samples)
        items["time"] = format_duration(log.seconds)
        if speed := log.curves.get("samples_per_s"):
            median = sorted(point.mean for point in speed)[len(speed) // 2]
            items["samples per second"] = format_number(median)
        for key in [key for key in log.curves if key.endswith("/loss") and not key.startswith("val/")]:
            items[f"last {key}"] = format_number(to_number(log.last.get(key, log.curves[key][-1].mean)))
        if held_out := log.curves.get("val/loss"):
            least = min(held_out, key=lambda point: point.mean)
            items["lowest val/loss"] = f"{format_number(least.mean)} at step {least.step}"
        if log.last.get("skipped"):
            items["steps skipped"] = to_text(log.last["skipped"])
    if run.best_checkpoint:
        items["best checkpoint"] = str(run.best_checkpoint)
    for headline in run.headlines[:1]:
        items[f"best {headline.title}"] = describe_headline(headline)
    environment = {k: run.environment.get(k) for k in ("gpu", "device", "date", "git")}
    if device := environment["gpu"] or environment["device"]:
        items["device"] = to_text(device)
    if environment["date"]:
        items["began"] = to_text(environment["date"])[:16].replace("T", " ")
    if environment["git"]:
        items["code"] = to_text(environment["git"])[:10]
    return render_tiles(items)


def describe_headline(headline: Headline) -> str:
    """``3.21 [3.1, 3.3], n 1000, tied``."""
    tied = ", tied" if headline.best and headline.best.ties else ""
    interval = format_interval(headline.estimate)
    n = to_text(headline.card.settings.get("n", "?"))
    return f"{format_number(headline.estimate.value)}{' ' * bool(interval)}{interval}, n {n}{tied}"


def describe_epochs(run: RunRecord, samples: float) -> str:
    """`` (12.5 epochs)``; nothing if the size of the training data is not known."""
    data = run.checkpoint_state.get("data")
    n = to_number(data.get("n")) if isinstance(data, Mapping) else None
    return f" ({samples / n:.3g} epochs)" if n else ""


def format_count(number: float) -> str:
    """A count in thousands or millions: ``46.98 k``, ``2.86 M``."""
    if number < 10_000:
        return f"{number:.0f}"
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.4g} k"


def annotation_parts(run: RunRecord) -> list[Markup]:
    """Tags and notes, if there are any."""
    notes = [{"time": note.time[:16].replace("T", " "), "text": note.text} for note in run.annotations.notes]
    if not notes and not run.annotations.tags:
        return []
    return [render("annotations", tags=run.annotations.tags, notes=notes)]


def environment_parts(run: RunRecord) -> list[Markup]:
    """The command and the versions of a run, from its ``env.json``."""
    path = run.path / "env.json"
    try:
        environment = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return [render_note("env.json is missing, or cannot be read.")]
    if not isinstance(environment, dict):
        return [render_note("env.json has no settings.")]
    argv = environment.pop("argv", None)
    items = {key: value for key, value in flatten(environment).items() if value is not None}
    if isinstance(argv, list):
        items["command"] = " ".join(map(str, argv))
    return [render_listing(items)]
