"""The results of the benchmark as a table in Markdown, a page in HTML, and JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from markupsafe import Markup

from benchmarks.quality.measuring import TIMED_SAMPLES, Result
from benchmarks.quality.settings import Quality, find_row, latent_shape
from genkit import __version__, config
from genkit.core.files import write_text
from genkit.core.markdown import markdown_table
from genkit.evaluation import Card, Estimate
from genkit.evaluation.cards import flatten, to_text
from genkit.evaluation.metrics import metric_title
from genkit.evaluation.report.html import (
    embed_pictures,
    format_interval,
    format_metric,
    format_number,
    render,
    render_gallery,
    render_listing,
    render_note,
    render_page,
    render_table,
    render_value,
)
from genkit.evaluation.report.plots import plot_curves, plot_metrics_by_cost
from genkit.evaluation.report.quality import varying_keys
from genkit.evaluation.report.records import read_log

TITLE = "Objectives on one network, data and budget"
METRICS = ("fid", "accuracy", "precision", "recall", "w2", "sliced_w2", "mmd")  # columns; the cards have more
LEGEND = "↓ lower is better, ↑ higher is better. The first line is held-out data."
COSTS = {"cpu": "training, CPU s", "ms": "ms per sample"}


@dataclass(frozen=True)
class Line:
    """A line of the table: a row at one number of evaluations, over all seeds."""

    name: str
    sampler: str
    nfe: int | None
    """None for held-out data"""
    values: Mapping[str, Estimate]
    """metrics and costs"""
    features: str | None = None
    """the name of the features that distances are measured in"""

    def title(self, key: str) -> str:
        """What tables call a metric, by its features, or a cost."""
        return COSTS.get(key) or metric_title(key, self.features)


def make_lines(results: Sequence[Result], real: Card | None, steps: int) -> list[Line]:
    """Held-out data, then the results with the seeds of each row taken together."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.row, result.nfe), []).append(result)
    cards = [real] if real is not None else [result.measured.card for result in results]
    features = flatten(cards[0].settings).get("features.name") if cards else None
    lines = [Line("real", "held-out data", None, real.metrics, features)] if real is not None else []
    for (name, nfe), group in groups.items():
        cards = [result.measured.card for result in group]
        values = {metric: average_seeds([card.metrics[metric] for card in cards]) for metric in cards[0].metrics}
        values["cpu"] = average_seeds([Estimate(result.cost.scaled_to(steps).cpu) for result in group])
        values["ms"] = average_seeds([Estimate(result.measured.milliseconds) for result in group])
        lines.append(Line(name, group[0].sampler, nfe, values, features))
    return lines


def average_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """A single estimate itself; the mean of several, with the smallest and the largest value as the interval."""
    if len(estimates) == 1:
        return estimates[0]
    values = [estimate.value for estimate in estimates]
    return Estimate(sum(values) / len(values), min(values), max(values))


def column_keys(lines: Sequence[Line]) -> list[str]:
    """The metrics and costs that some line has."""
    return [key for key in (*METRICS, *COSTS) if any(key in line.values for line in lines)]


def column_titles(lines: Sequence[Line], keys: Sequence[str]) -> list[str]:
    """The heads of the columns."""
    return [COSTS.get(key) or format_metric(key, lines[0].title(key)) for key in keys]


# -------------------------------------------------------------------------------------------------------- Markdown
def to_markdown(lines: Sequence[Line], facts: Mapping[str, str], notes: Sequence[str]) -> str:
    """The table, what is needed to read it, and what it was made with."""
    keys = column_keys(lines)
    head = ["objective", "sampler", "NFE", *column_titles(lines, keys)]
    rows = []
    for line in lines:
        rows.append([line.name, line.sampler, to_nfe(line), *(format_cell(line.values.get(key)) for key in keys)])
    text = [f"# {TITLE}", "", f"    {facts['command']}", ""]
    text.append(markdown_table(head, rows, numbers=len(keys)))
    text += ["", *(f"- {note}" for note in notes)]
    text += [f"- {name}: {value}" for name, value in facts.items() if name != "command"]
    return "\n".join(text) + "\n"


def to_nfe(line: Line) -> str:
    """The number of evaluations, or a dash."""
    return str(line.nfe or "–")


def format_cell(estimate: Estimate | None) -> str:
    """A number and its interval as plain text."""
    return "–" if estimate is None else f"{format_number(estimate.value)} {format_interval(estimate)}".strip()


# ------------------------------------------------------------------------------------------------------------ HTML
def to_html(results: Sequence[Result], lines: Sequence[Line], facts: Mapping[str, str], notes: Sequence[str]) -> str:
    """The page: the table, quality against evaluations, samples, loss curves and settings."""
    keys = column_keys(lines)
    first_seed = [result for result in results if result.seed == 0]
    grids, _ = embed_pictures((r.measured.picture, f"{r.row}, NFE {r.nfe}") for r in first_seed)
    settings = [result.measured.card.flat_settings for result in results]
    shared = {}
    if settings:
        shared = {k: v for k, v in settings[0].items() if k not in {*varying_keys(settings), "notes"}}
    return render_page(
        TITLE,
        facts["command"],
        [
            ("", [html_summary(lines, keys), render("lines", lines=notes),
                  render("fold", name="All numbers", inner=html_table(lines, keys))]),
            ("Quality against network evaluations", quality_plots(lines, keys)),
            ("Samples", [render_gallery(grids, "Grid of samples")] if grids else []),
            ("Training", loss_plots(first_seed)),
            ("Settings", [render_listing(facts),
                          render("fold", name="Settings of all cards", inner=render_listing(shared))]),
        ],
    )  # fmt: skip


def html_summary(lines: Sequence[Line], keys: Sequence[str]) -> Markup:
    """A line for each row: its first metric at each number of evaluations, and the others at the largest number."""
    first, others = keys[0], [key for key in keys[1:] if key not in ("precision", "ms")]  # of which a page has room
    counts = sorted({line.nfe for line in lines if line.nfe is not None})
    rows, highlighted = [], []
    for i, name in enumerate(dict.fromkeys(line.name for line in lines)):
        own = {line.nfe: line.values for line in lines if line.name == name}
        if None in own:
            highlighted.append(i)
            own |= {counts[0]: own.pop(None)} if counts else {}
        most = own[max(own, key=lambda nfe: nfe or 0)]
        distances = [render_value(own[nfe].get(first)) if nfe in own else "" for nfe in counts]
        rows.append([name, *distances, *(render_value(most.get(key)) for key in others)])
    head = ["objective", *(f"{nfe} NFE" for nfe in counts)]
    head += [COSTS.get(key) or format_metric(key, key) for key in others]
    (title,) = column_titles(lines, [first])
    caption = f"{title} by the number of network evaluations (NFE); the others at the largest number. {LEGEND}"
    return render_table(caption, head, rows, number_columns=head[1:], highlighted_rows=highlighted)


def html_table(lines: Sequence[Line], keys: Sequence[str]) -> Markup:
    """The table, with held-out data highlighted."""
    titles = column_titles(lines, keys)
    rows = []
    for line in lines:
        rows.append([line.name, line.sampler, to_nfe(line), *(render_value(line.values.get(key)) for key in keys)])
    caption = f"Values with their intervals. {LEGEND}"
    highlighted = [i for i, line in enumerate(lines) if line.nfe is None]
    head = ["objective", "sampler", "NFE", *titles]
    return render_table(caption, head, rows, number_columns=["NFE", *titles], highlighted_rows=highlighted)


def quality_plots(lines: Sequence[Line], keys: Sequence[str]) -> list[Markup]:
    """Each metric against the number of evaluations, one curve a row."""
    floor = next((line.values for line in lines if line.nfe is None), {})
    series: dict[str, list[Card]] = {}
    for line in lines:
        if line.nfe is not None:
            series.setdefault(line.name, []).append(
                Card(line.values, {"nfe": line.nfe, "features": {"name": line.features}})
            )
    return plot_metrics_by_cost([key for key in keys if key not in COSTS], series, floor)


def loss_plots(results: Sequence[Result]) -> list[Markup]:
    """The loss curves of each row."""
    logs = {result.row: read_log(result.run / "log.jsonl") for result in results}
    plots = []
    for row, log in logs.items():
        for key, points in log.curves.items():
            if key.endswith("/loss"):
                plots.append(plot_curves(f"{row} {key}", {key: points}, log_scale=True))
    if not plots:
        return []
    return [render_note("Each objective has its own loss: they cannot be compared."), render("plots", plots=plots)]


# ----------------------------------------------------------------------------------------------------------- notes
def make_notes(settings: Quality, results: Sequence[Result], real: Card | None, device: torch.device) -> list[str]:
    """What a reader of the table has to know, including the notes of the cards."""
    notes = []
    if settings.seeds > 1:
        notes.append(note_of_seeds(settings, results))
    for name in settings.row_names:
        row = find_row(name)
        if row.first_stage:
            shape = "x".join(map(str, latent_shape(settings.data.load("train").spec.shape)))
            steps = settings.first_stage_steps(row)
            notes.append(
                f"{name}: {steps} of the steps train a first stage of {shape}, the rest a flow of its latents."
            )
    if real is not None:
        notes.append(f"real: {real.settings.get('n', '?')} held-out samples, measured in the same way against the "
                     "training data. Distances of finite sets are never 0, and larger for fewer samples.")  # fmt: skip
    notes += dict.fromkeys(note for result in results for note in result.measured.card.notes)
    clock = "wall" if device.type == "cuda" else "CPU"
    notes.append("All models draw the same seeds and classes, from the slowest average of their weights, unguided.")
    notes.append("training: CPU seconds of the whole genkit train process, including its start and pictures; "
                 f"ms per sample: {clock} time in a batch of {TIMED_SAMPLES}.")  # fmt: skip
    return notes


def note_of_seeds(settings: Quality, results: Sequence[Result]) -> str:
    """Over how many trainings the numbers are means, also while some of them are still to come."""
    done = [len({result.seed for result in results if result.row == name}) for name in settings.row_names]
    if min(done) == settings.seeds:
        return f"Means over {settings.seeds} trainings; in brackets the smallest and the largest."
    return (f"So far {min(done)} to {max(done)} of {settings.seeds} trainings of each row. Means over them; in "
            "brackets the smallest and the largest or, of a single one, the interval over its samples.")  # fmt: skip


def write_results(
    settings: Quality, argv: Sequence[str], results: Sequence[Result], real: Card | None, device: torch.device
) -> None:
    """Write ``report.md``, ``report.html`` and ``results.json`` with the results so far."""
    lines = make_lines(results, real, settings.steps)
    tree = config.dump(settings)
    facts = {
        "command": shlex.join(["genkit", "bench", "quality", *argv]),
        "data": to_text(tree["data"]),
        "backbone": to_text(tree["backbone"]),
        "budget": ", ".join(f"{name} {tree[name]}" for name in ("steps", "batch", "lr", "n", "seeds")),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": f"genkit {__version__}, torch {torch.__version__}",
    }
    notes, out = make_notes(settings, results, real, device), Path(settings.out)
    rows = []
    for line in lines:
        values = {(name if name in COSTS else line.title(name)): e._asdict() for name, e in line.values.items()}
        rows.append({"name": line.name, "sampler": line.sampler, "nfe": line.nfe, "values": values})
    write_text(out / "results.json", json.dumps({**facts, "notes": notes, "rows": rows}, indent=1) + "\n")
    write_text(out / "report.md", to_markdown(lines, facts, notes))
    write_text(out / "report.html", to_html(results, lines, facts, notes))
