"""Plots as inline SVG. Colours and fonts become CSS variables, so that a plot follows the page it stands in."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from genkit.evaluation.cards import Card
from genkit.evaluation.metrics import Estimate, metric_direction
from genkit.evaluation.report.html import format_metric, format_number, render
from genkit.evaluation.report.records import Point

INK, FAINT = "#fe00ff", "#fe00fe"  # placeholders, replaced by CSS variables
COLOURS = [f"#fe010{i}" for i in range(8)]
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
_plot_ids = itertools.count()


def render_plot(draw: Callable[[Any], None], caption: str, alt: str, size: tuple[float, float] = (4.8, 2.9)) -> Markup:
    """A figure with what ``draw(axes)`` plots. ``size`` is in inches, ``alt`` the text for screen readers."""
    import matplotlib  # lazy: takes half a second
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    style = {"svg.fonttype": "none", "svg.hashsalt": "genkit", "font.size": 9, "text.parse_math": False, **ink}
    svg = io.StringIO()
    with matplotlib.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False, "grid.color": FAINT}):
        fig = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(fig)
        axes = fig.add_subplot()
        axes.grid(lw=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        fig.savefig(svg, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return render("plot", svg=inline_svg(svg.getvalue(), alt), caption=caption)


def inline_svg(svg: str, alt: str) -> Markup:
    """matplotlib's SVG as part of a page: without prologue, with unique ids, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", svg, count=3)
    # ids must be unique in the page, and references follow them
    prefix = f"f{next(_plot_ids)}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('xlink:href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    variables = {INK: "var(--ink)", FAINT: "var(--line)", **{c: f"var(--c{i})" for i, c in enumerate(COLOURS)}}
    for colour, variable in variables.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r'^<svg width="[^"]*" height="[^"]*"', "", svg)
    return Markup('<svg role="img" aria-label="{}"').format(alt) + Markup(svg)


# ----------------------------------------------------------------------------------------------------------- axes
def shorten(text: str, length: int = 40) -> str:
    """``text``, cut to ``length`` characters with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def line_style(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th curve."""
    return {"color": COLOURS[i % 8], "ls": DASHES[i // 8 % 4]}


def use_plain_ticks(axis: Any) -> None:
    """Label the ticks without exponents or offsets."""
    from matplotlib.ticker import FuncFormatter  # lazy: matplotlib

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def use_log_scale(axis: Any, values: Iterable[float]) -> None:
    """A logarithmic axis with plain tick labels; at 1, 2 and 5 if it covers few decades."""
    from matplotlib.ticker import LogLocator, NullLocator  # lazy: matplotlib

    values = list(values)
    low, high = min(values), max(values)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=8))
    axis.set_minor_locator(NullLocator())
    use_plain_ticks(axis)


# ---------------------------------------------------------------------------------------------------------- plots
def plot_curves(title: str, curves: Mapping[str, list[Point]], log_scale: bool = False) -> Markup:
    """Numbers of the log against the step: the mean as a line, minimum to maximum shaded."""
    points = [point for curve in curves.values() for point in curve]

    def draw(axes: Any) -> None:
        for i, (key, curve) in enumerate(curves.items()):
            step, mean, low, high = zip(*curve, strict=True)
            if low != high:
                axes.fill_between(step, low, high, color=COLOURS[i % 8], alpha=0.25, lw=0)
            marker = "o" if len(step) == 1 else ""
            axes.plot(step, mean, label=shorten(key), lw=1.3, marker=marker, **line_style(i))
        if log_scale and max(p.high for p in points) > 3 * min(p.low for p in points) > 0:
            use_log_scale(axes.yaxis, [p.low for p in points] + [p.high for p in points])
        use_plain_ticks(axes.xaxis)
        axes.set_xlabel("step")
        axes.set_ylabel(shorten(title))
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=8)

    summary = "; ".join(summarise_curve(key, curve) for key, curve in curves.items())
    return render_plot(draw, ", ".join(curves), f"{title} against the step: {summary}")


def summarise_curve(key: str, curve: Sequence[Point]) -> str:
    """The two ends of a curve in words, for screen readers."""
    first, last = curve[0], curve[-1]
    return (
        f"{key} from {format_number(first.mean)} at step {first.step} to {format_number(last.mean)} at step {last.step}"
    )


def plot_metric_by_nfe(
    metric: str,
    series: Mapping[str, list[tuple[float, Estimate]]],
    floor: Estimate | None = None,
    title: str | None = None,
) -> Markup:
    """A metric against the number of network evaluations (NFE) a sample; ``floor`` is the value of real data."""
    values = [e.value for points in series.values() for _, e in points] + ([floor.value] if floor else [])
    places = sorted({nfe for points in series.values() for nfe, _ in points})

    def draw(axes: Any) -> None:
        for i, (name, points) in enumerate(series.items()):
            nfe, estimates = zip(*sorted(points), strict=True)
            below = [max(0.0, e.value - (e.value if e.low is None else e.low)) for e in estimates]
            above = [max(0.0, (e.value if e.high is None else e.high) - e.value) for e in estimates]
            style = {"lw": 1.3, "ms": 4.5, "capsize": 2, "elinewidth": 0.9, "marker": MARKERS[i % 8], **line_style(i)}
            axes.errorbar(nfe, [e.value for e in estimates], yerr=[below, above], label=shorten(name), **style)
        if floor is not None:
            axes.axhline(floor.value, color=INK, lw=1, ls=":", label="real data")
        use_log_scale(axes.xaxis, places)
        if len(places) <= 8:
            from matplotlib.ticker import FixedLocator  # lazy: matplotlib

            axes.xaxis.set_major_locator(FixedLocator(places))
        if metric_direction(metric) == "lower" and min(values) > 0 and max(values) > 8 * min(values):
            use_log_scale(axes.yaxis, values)
        axes.set_xlabel("network evaluations per sample (NFE)")
        axes.set_ylabel(shorten(title or metric))
        if len(series) > 1 or floor:
            axes.legend(frameon=False, fontsize=8)

    summary = "; ".join(
        f"{name}: " + ", ".join(f"{format_number(e.value)} at {nfe:g}" for nfe, e in sorted(points))
        for name, points in series.items()
    )
    real = f"; real data: {format_number(floor.value)}" if floor else ""
    alt = f"{title or metric} against the number of network evaluations. {summary}{real}"
    return render_plot(draw, format_metric(metric, title), alt)


def titled_metrics(metrics: Iterable[str], cards: Iterable[Card]) -> list[tuple[str, str]]:
    """Each metric with each of the titles that it has in ``cards``, by the features that it was measured in."""
    titles = {(metric, card.title(metric)): None for card in cards for metric in card.metrics}
    return [(metric, title) for metric in metrics for name, title in titles if name == metric]


def plot_metrics_by_nfe(
    metrics: Iterable[str], groups: Mapping[str, Sequence[Card]], floor: Mapping[str, Estimate] | None = None
) -> list[Markup]:
    """One plot for each metric and kind of features with two or more numbers of evaluations, all in one block.

    ``groups`` are the cards of each curve by its label, ``floor`` the metrics of real data.
    """
    plots = []
    cards = [card for group in groups.values() for card in group]
    for metric, title in titled_metrics(metrics, cards):
        series: dict[str, list[tuple[float, Estimate]]] = {}
        for name, group in groups.items():
            for card in group:
                if card.nfe and metric in card.metrics and card.title(metric) == title:
                    series.setdefault(name, []).append((card.nfe, card.metrics[metric]))
        if len({nfe for points in series.values() for nfe, _ in points}) > 1:
            plots.append(plot_metric_by_nfe(metric, series, (floor or {}).get(metric), title))
    return [render("plots", plots=plots)] if plots else []
