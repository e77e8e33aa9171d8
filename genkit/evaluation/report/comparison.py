"""Several runs on one page, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from genkit.core.durations import format_duration
from genkit.evaluation.cards import Card, to_text
from genkit.evaluation.differences import diff_runs
from genkit.evaluation.report.curves import FINETUNING, finetuning_keys, join_bounds, metric_titles, plot_groups
from genkit.evaluation.report.html import (
    format_number,
    render,
    render_heading,
    render_listing,
    render_note,
    render_table,
)
from genkit.evaluation.report.plots import plot_curves
from genkit.evaluation.report.quality import quality_parts
from genkit.evaluation.report.records import LogSummary, Point
from genkit.evaluation.report.rollouts import read_rollouts, rollout_table
from genkit.evaluation.report.samples import newest_grid_parts
from genkit.evaluation.report.summary import describe_headline, format_count
from genkit.evaluation.run_records import RunRecord

DIFFERENCES = {
    "short_settings": "Configuration",
    "data": "Training data",
    "parameters": "Parameters",
    "environment": "Code",
}
MANY_RUNS = 8  # more have no column each
MANY_ROWS = 20  # of a table; longer ones are folded
LONG_VALUE = 60

Section = tuple[str, Sequence[Markup]]


def comparison_sections(
    runs: Sequence[RunRecord], logs: Sequence[LogSummary], extra: Sequence[Card], errors: Sequence[str]
) -> list[Section]:
    """The sections of a page about several runs; ``extra`` cards are measured by none of them."""
    names = unique_names(runs)
    cards = [*(card for run in runs for card in run.cards), *extra]
    unread = [f"{name}: {line}" for name, run in zip(names, runs, strict=True) for line in run.card_files[1]]
    curves = {
        f"{name}: {key}": curve
        for name, log in zip(names, logs, strict=True)
        for key, curve in join_bounds(log.curves).items()
    }
    return [
        ("", [overview_table(names, runs, logs)]),
        ("What differs", difference_parts(names, runs)),
        ("Quality", quality_parts(cards, [*errors, *unread])),
        ("Rollouts", rollout_rows(names, runs)),
        ("Fine-tuning", overlaid_finetuning(curves)),
        ("Newest samples", newest_grid_parts([run.path for run in runs])),
        ("Training", overlaid_training(curves, cards)),
        ("Configurations", [
            render("fold", name=name, inner=render_listing(run.settings)) for name, run in zip(names, runs, strict=True)
        ]),
    ]  # fmt: skip


def unique_names(runs: Sequence[RunRecord]) -> list[str]:
    """The names of the runs, with their parent directories where two are equal."""
    names = [run.name for run in runs]
    return [f"{run.path.parent.name}/{run.name}" if names.count(run.name) > 1 else run.name for run in runs]


def overview_table(names: Sequence[str], runs: Sequence[RunRecord], logs: Sequence[LogSummary]) -> Markup:
    """One row a run."""
    rows = []
    for name, run, log in zip(names, runs, logs, strict=True):
        loss = ", ".join(f"{k} {format_number(v)}" for k, v in run.losses.items())
        best = [f"{h.title} {describe_headline(h)}" for h in run.headlines[:1]]
        held_out = log.curves.get("val/loss")
        rows.append([
            name, run.state, run.objective, run.backbone, run.data, f"{run.step or 0}\xa0of\xa0{to_text(run.steps)}",
            format_duration(log.seconds), format_count(sum(run.parameters.values())) if run.parameters else "–",
            loss or "–", format_number(min(p.mean for p in held_out)) if held_out else "–", *(best or ["–"]),
            " ".join(run.annotations.tags) or "–", run.annotations.notes[-1].text if run.annotations.notes else "–",
        ])  # fmt: skip
    heads = ["run", "state", "objective", "backbone", "data", "steps", "time", "parameters", "last loss",
             "lowest val/loss", "best metric", "tags", "last note"]  # fmt: skip
    shown = [i for i, head in enumerate(heads) if i == 0 or any(row[i] != "–" for row in rows)]
    return render_table(
        f"{len(runs)} runs", [heads[i] for i in shown], [[row[i] for i in shown] for row in rows], ["parameters"]
    )


def difference_parts(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Markup]:
    """Tables of the settings, data, parameters and code in which the runs differ."""
    if any(run.problem for run in runs):
        damaged = "; ".join(f"{name}: {run.problem}" for name, run in zip(names, runs, strict=True) if run.problem)
        return [render_note(f"Not compared: {damaged}")]
    if len(runs) > MANY_RUNS:
        return [render_note(f"{len(runs)} runs have no column each; compare fewer: genkit diff RUN RUN")]
    result = diff_runs(*runs)
    parts: list[Markup] = []
    for part, title in DIFFERENCES.items():
        entries: Mapping[str, tuple[Any, ...]] = getattr(result, part)
        if entries:
            rows = [[name, *(show_value(value) for value in values)] for name, values in entries.items()]
            table = render_table(title, ["setting", *names], rows)
            folded = render("fold", name=f"{title}: {len(rows)} differences", inner=table)
            parts.append(folded if len(rows) > MANY_ROWS else table)
    same = [title.lower() for part, title in DIFFERENCES.items() if not getattr(result, part)]
    if same:
        parts.append(render_note(f"The same in all: {', '.join(same)}."))
    return parts + [render_note(line) for line in result.incomparable]


def show_value(value: Any) -> str:
    """A setting in a cell."""
    if value is None:
        return "–"
    text = f"{value:.6g}" if isinstance(value, float) else to_text(value)
    return text if len(text) <= LONG_VALUE else text[: LONG_VALUE - 1] + "…"


def rollout_rows(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Markup]:
    """One table of the rollouts of all runs."""
    rollouts = [
        (name, path, summary)
        for name, run in zip(names, runs, strict=True)
        for path, summary in read_rollouts(run.path / "rollouts")
    ]
    return [rollout_table(rollouts, many=True)] if rollouts else []


def overlaid_finetuning(curves: Mapping[str, list[Point]]) -> list[Markup]:
    """Reward, divergence and diversity of all fine-tuned runs."""
    parts = []
    for title, keys in FINETUNING.items():
        for key in keys:
            chosen = {name: curve for name, curve in curves.items() if name.endswith(f": {key}")}
            if chosen:
                parts.append(plot_curves(f"{title}: {key}", chosen, x_label="iteration"))
    return [render("plots", plots=parts)] if parts else []


def overlaid_training(curves: Mapping[str, list[Point]], cards: Sequence[Card]) -> list[Markup]:
    """The curves of all runs, one plot for each kind of number."""
    tuning = tuple(f": {key}" for key in finetuning_keys())
    chosen = {name: curve for name, curve in curves.items() if not name.endswith(tuning)}
    plots = plot_groups(chosen, metric_titles(cards))
    return [render("plots", plots=plots)] if plots else [render_note("The logs have no lines yet.")]


def card_sections(cards: Sequence[Card], errors: Sequence[str]) -> list[Section]:
    """The sections of a page about cards alone."""
    return [("Quality", [render_heading(f"{len(cards)} cards"), *quality_parts(cards, errors)])]
