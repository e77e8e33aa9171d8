"""The page of :mod:`benchmarks.race`: for each data set the curves, their numbers, and the shares of the seconds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from benchmarks.race import curves, geometric_estimate, rows_of_means, rows_of_shares
from benchmarks.race_loops import GENKIT, TITLES
from benchmarks.results import ResultsFile
from genkit.evaluation.metrics import Estimate
from genkit.evaluation.report.html import format_number, render, render_note, render_page, render_table
from genkit.evaluation.report.plots import COLOURS, MARKERS, render_plot, use_log_scale

Curves = Mapping[str, Mapping[float, Sequence[float]]]
DISTANCE = "Fréchet distance (classifier)"
NOTE = (
    "Points are geometric means over the seeds, bars are 95 % intervals of Student of the logarithms, as the brackets "
    "of the shares are; the table has means and standard deviations."
)


def render_race(results: ResultsFile, sets: Sequence[str], description: str) -> str:
    """The page of some data sets; ``description`` says how they were measured."""
    clock = results.head["settings"]["clock"]
    sections = [(data, parts) for data in sets if (parts := data_parts(results.cells, data, clock))]
    command = shlex.join(results.head["command"])
    return render_page("Quality for seconds of training", command, [*sections, ("How", [render_note(NOTE),
                       render_note(" ".join(description.replace("``", "").split()))])])  # fmt: skip


def data_parts(cells: Mapping[str, Mapping[str, Any]], data: str, clock: str) -> list[Markup]:
    """What the page shows of a data set; nothing if it was not measured."""
    found = curves(cells, data)
    if not found:
        return []
    head, rows = rows_of_means(found)
    rows = [[TITLES[name], *numbers, steps_at_end(cells, data, name)] for name, *numbers in rows]
    caption = f"{DISTANCE} after {clock} of training: mean and standard deviation"
    means = render_table(caption, ["", *head, "steps"], rows, [*head, "steps"])
    every = [
        [TITLES[name], f"{entry['mark']:g}", seed, entry["steps"], f"{entry['seconds']:.1f}",
         f"{entry['value']:.3f}", f"[{entry['low']:.3f}, {entry['high']:.3f}]"]
        for cell, values in cells.items()
        for own, name, seed in [cell.split("/")] if own == data
        for entry in values["marks"]
    ]  # fmt: skip
    columns = ["contender", "mark", "seed", "steps", "seconds", "distance", "its interval"]
    table = render_table("Every model that was measured", columns, every, columns[1:])
    return [
        render("large-plot", plot=plot_race(found, f"{clock} of training")),
        means,
        *share_table(cells, data),
        render("fold", name="All numbers", inner=table),
    ]


def steps_at_end(cells: Mapping[str, Mapping[str, Any]], data: str, name: str) -> str:
    """The steps of each seed's whole training."""
    counts = [c["marks"][-1]["steps"] for cell, c in cells.items() if cell.split("/")[:2] == [data, name]]
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def share_table(cells: Mapping[str, Mapping[str, Any]], data: str) -> list[Markup]:
    """The shares of the seconds, a line for each of the others; nothing without two that can be compared."""
    head, rows = rows_of_shares(cells, data, GENKIT)
    caption = "The share of the seconds of another library in which genkit has the distance that it has at its end"
    return [render_table(caption, ["", *head], rows, head)] if rows else []


def plot_race(found: Curves, x_label: str) -> Markup:
    """Distance against seconds, a curve for each contender, both axes logarithmic."""
    series = {
        name: [(mark, geometric_estimate(values)) for mark, values in sorted(curve.items())]
        for name, curve in found.items()
    }
    places = sorted({mark for curve in series.values() for mark, _ in curve})
    values = [e.value for curve in series.values() for _, e in curve]

    def draw(axes: Any) -> None:
        from matplotlib.ticker import FixedLocator  # lazy: matplotlib

        for i, (name, curve) in enumerate(series.items()):
            seconds, estimates = zip(*curve, strict=True)
            axes.errorbar(
                seconds, [e.value for e in estimates], yerr=lengths(estimates), label=TITLES[name], lw=1.8, ms=5.5,
                capsize=3, elinewidth=1, marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)],
            )  # fmt: skip
        use_log_scale(axes.xaxis, places)
        axes.xaxis.set_major_locator(FixedLocator(places))
        use_log_scale(axes.yaxis, values)
        axes.set_ylim(min(values) / 1.5, max(values) * 1.5)  # an interval over two seeds may leave the plot
        axes.set_xlabel(x_label)
        axes.set_ylabel(DISTANCE)
        axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    words = "; ".join(
        f"{TITLES[name]}: " + ", ".join(f"{format_number(e.value)} at {mark:g}" for mark, e in curve)
        for name, curve in series.items()
    )
    return render_plot(draw, f"{DISTANCE} ↓", f"{DISTANCE} against {x_label}. {words}", size=(8.4, 4.4))


def lengths(estimates: Sequence[Estimate]) -> list[list[float]]:
    """How far the intervals reach below and above."""
    below = [e.value - (e.value if e.low is None else e.low) for e in estimates]
    above = [(e.value if e.high is None else e.high) - e.value for e in estimates]
    return [below, above]
