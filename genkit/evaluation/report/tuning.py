"""The page of a study of genkit tune: history, importance of the options, slices, curves, all trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genkit import __version__
from genkit.evaluation.report.html import (
    ARROWS,
    format_number,
    render,
    render_listing,
    render_note,
    render_page,
    render_table,
    render_tiles,
)
from genkit.evaluation.report.plots import COLOURS, INK, render_plot, use_log_scale, use_plain_ticks
from genkit.training.tuning.study import RESULTS, StudyResults, TrialRecord, read_results
from genkit.training.tuning.tune import BEST_SETTINGS, STUDY_FILE, fresh_seed

MARKS = {"complete": "o", "pruned": "x", "failed": "P", "running": "^"}
MAX_CURVES = 60


def is_study(folder: Path) -> bool:
    """Whether a directory is that of a study with results."""
    return (folder / STUDY_FILE).is_file() and (folder / RESULTS).is_file()


def render_study(folder: Path) -> str:
    """The page of a study. ``ValueError`` if its results are damaged."""
    results = read_results(folder)
    best = results.best
    tiles: dict[str, Any] = {"trials": len(results.trials)}
    tiles |= {state: n for state in ("complete", "pruned", "failed", "running") if (n := results.count(state))}
    if best:
        tiles[f"best {results.metric} {ARROWS[results.direction]}"] = format_number(best.value)
    lead = f"Search for settings by genkit tune: {results.metric}, {results.direction} is better; genkit {__version__}"
    return render_page(folder.name, lead, [
        ("", [render_tiles(tiles)]),
        ("Best trial", best_parts(folder, best)),
        ("History", [render("plots", plots=[plot_history(results)])] if scored(results) else []),
        ("Importance", importance_parts(results)),
        ("Options", [render("plots", plots=plot_slices(results))] if scored(results) else []),
        ("Curves", [render("plots", plots=[plot_trials(results)])] if any(t.curve for t in results.trials) else []),
        ("Trials", [trial_table(results)]),
        ("Configuration", [render("code", name=STUDY_FILE, text=(folder / STUDY_FILE).read_text("utf-8"))]),
    ])  # fmt: skip


def scored(results: StudyResults) -> list[TrialRecord]:
    """The trials with a finite metric that are over."""
    return [t for t in results.trials if t.state in ("complete", "pruned") and is_number(t.value)]


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def best_parts(folder: Path, best: TrialRecord | None) -> list[Markup]:
    """The best trial and how to train with its settings."""
    if best is None:
        return [render_note("No trial is complete yet.")]
    options = {name: show_option(best.values, name) for name in best.values}
    items = {"trial": best.number, "run": best.run or "–", **options}
    seed = fresh_seed(folder)
    note = (
        "The best of many trials is chosen by the number that it is listed with, which flatters it: train with its "
        f"settings and another seed (genkit train --config {BEST_SETTINGS} --seed {seed}) and measure that."
    )
    return [render_listing(items), render_note(note)]


def plot_history(results: StudyResults) -> Markup:
    """The metric of each trial, and the best one so far."""
    trials = scored(results)
    sign = 1 if results.direction == "lower" else -1
    complete = [t for t in trials if t.state == "complete"]
    best: list[float] = []
    for t in complete:
        value = float(t.value or 0.0)
        best.append(value if not best else min(best[-1], value, key=lambda v: sign * v))

    def draw(axes: Any) -> None:
        for i, state in enumerate(("complete", "pruned")):
            chosen = [t for t in trials if t.state == state]
            if chosen:
                axes.plot([t.number for t in chosen], [t.value for t in chosen], ls="", marker=MARKS[state], ms=4.5,
                          color=COLOURS[i], label=state)  # fmt: skip
        if best:
            axes.step([t.number for t in complete], best, where="post", color=INK, lw=1, label="best so far")
        scale_values(axes.yaxis, [float(t.value or 0.0) for t in trials])
        axes.set_xlabel("trial")
        axes.set_ylabel(results.metric)
        axes.legend(frameon=False, fontsize=8)

    ends = f"; the best so far goes from {format_number(best[0])} to {format_number(best[-1])}" if best else ""
    return render_plot(draw, f"{results.metric} {ARROWS[results.direction]}, the last value of pruned trials",
                       f"{results.metric} of {len(trials)} trials{ends}")  # fmt: skip


def scale_values(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis for positive values over more than half a decade, else plain labels."""
    if min(values) > 0 and max(values) > 3 * min(values):
        use_log_scale(axis, values)
    else:
        use_plain_ticks(axis)


def importance_parts(results: StudyResults) -> list[Markup]:
    """The share of the variance that each option explains, as bars."""
    if not results.importances:
        return [render_note("Not computed: needs three complete trials with different results.")]
    shares = sorted(results.importances.items(), key=lambda item: item[1])

    def draw(axes: Any) -> None:
        axes.barh([name for name, _ in shares], [share for _, share in shares], color=COLOURS[0])
        axes.set_xlabel("share of the variance (fANOVA)")
        axes.set_xlim(0, 1)

    text = ", ".join(f"{name} {share:.2f}" for name, share in shares[::-1])
    plot = render_plot(draw, text, f"Importance of the options: {text}", (4.8, 1.0 + 0.35 * len(shares)))
    note = "Between complete trials. Options that are important together share what they explain (Hutter et al. 2014)."
    return [render("plots", plots=[plot]), render_note(note)]


def plot_slices(results: StudyResults) -> list[Markup]:
    """The metric against each option."""
    trials = scored(results)
    names = list(dict.fromkeys(name for t in trials for name in t.values))
    return [plot_slice(results, name, [t for t in trials if name in t.values]) for name in names]


def plot_slice(results: StudyResults, name: str, trials: Sequence[TrialRecord]) -> Markup:
    """The metric of trials against the option ``name``."""
    numeric = all(is_number(t.values[name]) for t in trials)

    def draw(axes: Any) -> None:
        for i, state in enumerate(("complete", "pruned")):
            chosen = [t for t in trials if t.state == state]
            x = [t.values[name] if numeric else str(t.values[name]) for t in chosen]
            if chosen:
                style = {"ls": "", "ms": 4.5, "marker": MARKS[state], "color": COLOURS[i]}
                axes.plot(x, [t.value for t in chosen], label=state, **style)
        if numeric:
            scale_values(axes.xaxis, [float(t.values[name]) for t in trials])
        scale_values(axes.yaxis, [float(t.value or 0.0) for t in trials])
        axes.set_xlabel(name)
        axes.set_ylabel(results.metric)

    return render_plot(draw, name, f"{results.metric} against {name}, {len(trials)} trials")


def plot_trials(results: StudyResults) -> Markup:
    """The metric of trials while they trained."""
    trials = [t for t in results.trials if t.curve][-MAX_CURVES:]
    best = results.best

    def draw(axes: Any) -> None:
        for t in trials:
            style = {"color": COLOURS[0] if t.state == "complete" else COLOURS[1], "lw": 0.8, "alpha": 0.6}
            if best and t.number == best.number:
                style = {"color": INK, "lw": 1.8}
            steps = [int(step) for step in t.curve]
            axes.plot(steps, list(t.curve.values()), marker="" if len(steps) > 1 else ".", **style)
        scale_values(axes.yaxis, [value for t in trials for value in t.curve.values()])
        use_plain_ticks(axes.xaxis)
        axes.set_xlabel("step")
        axes.set_ylabel(results.metric)

    what = "complete trials, pruned ones in another colour, the best one thick"
    return render_plot(draw, what, f"{results.metric} of {len(trials)} trials against the step: {what}")


def trial_table(results: StudyResults) -> Markup:
    """One row a trial, best first."""
    names = list(dict.fromkeys(name for t in results.trials for name in t.values))
    sign = 1 if results.direction == "lower" else -1
    order = sorted(results.trials, key=lambda t: (t.state != "complete", sign * (t.value or 0.0), t.number))
    rows = [
        [t.number, t.state, format_number(t.value), *(show_option(t.values, name) for name in names),
         list(t.curve)[-1] if t.curve else "–", t.problem or t.run or "–"]
        for t in order
    ]  # fmt: skip
    head = ["trial", "state", results.metric, *names, "last step", "run"]
    return render_table("All trials, complete ones first and the best of them on top", head, rows, [results.metric])


def show_option(values: Mapping[str, Any], name: str) -> str:
    """The value of an option in a cell."""
    value = values.get(name, "–")
    return f"{value:.4g}" if isinstance(value, float) else str(value)
