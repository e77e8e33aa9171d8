"""The log of a run on its page: losses, metrics and, of fine-tuning, reward, divergence and diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from genkit.evaluation.best import find_best
from genkit.evaluation.cards import Card, to_number, to_text
from genkit.evaluation.metrics import Direction, Estimate, metric_direction
from genkit.evaluation.report.html import render, render_note, render_table, render_value
from genkit.evaluation.report.plots import plot_curves, plot_trajectory
from genkit.evaluation.report.records import LogSummary, Point
from genkit.evaluation.run_records import RunRecord, read_json
from genkit.training.measurements import MEASUREMENTS

Curves = Mapping[str, list[Point]]
CURVE_TITLES = {"grad_norm": "gradient norm", "lr": "learning rate", "samples_per_s": "samples per second"}
CLOCKS = ("step", "samples", "seconds", "cpu_seconds", "skipped")  # keys of the log that are no curves
ENDS = ("before/", "after/")  # results at the two ends of fine-tuning: a table, no curves
BOUNDS = ("_low", "_high")
MEASURED = tuple(f"{prefix}/" for prefix in MEASUREMENTS)  # keys whose bounds are a range
FINETUNING = {  # title -> keys of the log of fine-tuning
    "reward": ("reward", "return", "success", "checkpoint/return", "checkpoint/success", "checkpoint/reward"),
    "KL divergence in nats": ("kl_reference",),
    "diversity": ("mode_entropy_bits", "reward_std", "checkpoint/mode_entropy_bits"),
}
RESULT_DIRECTIONS: Mapping[str, Direction] = {
    "success": "higher", "return": "higher", "reward": "higher", "coverage": "higher", "best_reward": "higher"
}  # fmt: skip


def training_parts(log: LogSummary, cards: Sequence[Card] = (), left_out: Sequence[str] = ()) -> list[Markup]:
    """Curves of everything in the log but ``left_out``: losses in one plot, gradient norms in one, others by name."""
    if not log.num_lines:
        return [render_note("The log has no lines yet.")]
    curves = {key: curve for key, curve in join_bounds(log.curves).items() if key not in left_out}
    plots = plot_groups(curves, metric_titles(cards), x_label="iteration" if left_out else "step")
    parts = [render("plots", plots=plots)] if plots else []
    notes = [f"{log.num_lines} lines"]
    if log.lines_per_point > 1:
        notes[0] += f", {log.lines_per_point} per point; shaded: their range"
    notes += [f"{key}: {count} not finite" for key, count in log.nonfinite.items()]
    if log.damaged:
        notes.append("one line cannot be read; the log ends before it")
    return [*parts, render_note("Log: " + "; ".join(notes) + ".")]


def plot_groups(curves: Curves, titles: Mapping[str, str], x_label: str = "step") -> list[Markup]:
    """One plot for all curves whose keys end in the same word."""
    groups: dict[str, dict[str, list[Point]]] = {"loss": {}, "grad_norm": {}, "lr": {}, "samples_per_s": {}}
    for name, curve in curves.items():
        key = name.rpartition(": ")[2]  # without the run's name, on a page of several
        if (key not in CLOCKS and not key.startswith(ENDS)) or (key == "skipped" and curve[-1].mean > 0):
            groups.setdefault(key.rpartition("/")[2], {})[name] = curve
    return [
        plot_curves(CURVE_TITLES.get(name, titles.get(name, name)), group, name in ("loss", "grad_norm"), x_label)
        for name, group in groups.items()
        if group
    ]


def join_bounds(curves: Curves) -> dict[str, list[Point]]:
    """The curves, with ``eval/fid_low`` and ``eval/fid_high`` as the range of ``eval/fid`` instead of two more."""
    bounds = {key + end for key in curves for end in BOUNDS if key.startswith(MEASURED)}
    joined = {}
    for key, curve in curves.items():
        if key in bounds:
            continue
        low, high = ({p.step: p for p in curves.get(key + end, [])} for end in BOUNDS)
        if low or high:
            curve = [Point(p.step, p.mean, low.get(p.step, p).mean, high.get(p.step, p).mean) for p in curve]
        joined[key] = curve
    return joined


def metric_titles(cards: Sequence[Card]) -> dict[str, str]:
    """What plots call the metrics of the log, by the features of the cards; those with several are left out."""
    titles: dict[str, set[str]] = {}
    for card in cards:
        for metric in card.metrics:
            titles.setdefault(metric, set()).add(card.title(metric))
    return {metric: next(iter(names)) for metric, names in titles.items() if len(names) == 1}


# ---------------------------------------------------------------------------------------------------- fine-tuning
def finetuning_keys() -> list[str]:
    """The keys of the log that :func:`finetuning_parts` shows."""
    return [key for keys in FINETUNING.values() for key in keys]


def finetuning_parts(run: RunRecord, log: LogSummary) -> list[Markup]:
    """Reward, divergence and diversity against the iteration, reward against divergence, and the results before and
    after; nothing for a run that was not fine-tuned."""
    if not run.finetuning:
        return []
    ends = {name: read_json(run.path / f"{name}.json") for name in ("before", "after")}
    plots = []
    for title, keys in FINETUNING.items():
        chosen = {key: log.curves[key] for key in keys if key in log.curves}
        if chosen:
            plots.append(plot_curves(title, chosen, x_label="iteration"))
    plots += reward_by_divergence(log)
    parts = [render("plots", plots=plots)] if plots else []
    return [*parts, *results_table(ends)]


def reward_by_divergence(log: LogSummary) -> list[Markup]:
    """The reward of each iteration against the divergence from the pretrained model (Gao et al. 2023, figure 1)."""
    kl = {p.step: p.mean for p in log.curves.get("kl_reference", [])}
    name = next((key for key in ("success", "return", "reward") if key in log.curves), None)
    points = [(kl[p.step], p.mean, p.step) for p in log.curves[name] if p.step in kl] if name else []
    if len(points) < 2:
        return []
    return [plot_trajectory("KL divergence from the pretrained model in nats", str(name), points)]


def results_table(results: Mapping[str, Mapping[str, Any]]) -> list[Markup]:
    """Evaluations by name, one row each, with the better value of each number marked."""
    results = {name: result for name, result in results.items() if result}
    estimates = {name: {k: e for k, v in result.items() if (e := to_estimate(v))} for name, result in results.items()}
    keys = list(dict.fromkeys(key for found in estimates.values() for key in found))
    if not keys:
        return []
    directions: dict[str, Any] = {key: RESULT_DIRECTIONS.get(key) or metric_direction(key) for key in keys}
    best = {key: find_best(directions[key], [found.get(key) for found in estimates.values()]) for key in keys}
    rows = []
    for i, (name, found) in enumerate(estimates.items()):
        marks = [mark.mark(i) if (mark := best[key]) and key in found else "" for key in keys]
        values = [render_value(found.get(key), mark) for key, mark in zip(keys, marks, strict=True)]
        count = next((to_text(results[name][k]) for k in ("episodes", "samples") if k in results[name]), "–")
        rows.append([name, count, *values])
    caption = "Evaluations without exploration noise, from seeds that were not trained on, with 95 % intervals."
    return [render_table(caption, ["weights", "n", *keys], rows, number_columns=["n", *keys])]


def to_estimate(value: Any) -> Estimate | None:
    """A number with its interval as JSON has it; None for anything else."""
    if not isinstance(value, Mapping):
        return None
    number = to_number(value.get("value"))
    return None if number is None else Estimate(number, to_number(value.get("low")), to_number(value.get("high")))
