"""Plots as inline SVG. Colours and fonts become CSS variables, so that a plot follows the page it stands in."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from genkit.evaluation.best import pareto_front
from genkit.evaluation.cards import Card, to_number
from genkit.evaluation.metrics import Estimate, metric_direction
from genkit.evaluation.report.html import format_metric, format_number, render
from genkit.evaluation.report.records import Point

INK, FAINT = "#fe00ff", "#fe00fe"  # placeholders, replaced by CSS variables
COLOURS = [f"#fe010{i}" for i in range(8)]
MARKERS = "osD^vPX*"
CROWDED = 5  # entries that a legend within the axes may have
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


def draw_legend(axes: Any) -> None:
    """The legend of the curves: within the axes, or below them where it would cover much."""
    where = {"loc": "outside lower center", "ncols": 3} if len(axes.get_legend_handles_labels()[1]) > CROWDED else {}
    (axes.figure if where else axes).legend(frameon=False, fontsize=8, **where)


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
def plot_curves(
    title: str, curves: Mapping[str, list[Point]], log_scale: bool = False, x_label: str = "step"
) -> Markup:
    """Numbers of the log against the step: the mean as a line, minimum to maximum shaded. Held-out losses (``val/``)
    are dashed, with a mark at the lowest."""
    points = [point for curve in curves.values() for point in curve]
    lowest = {key: min(curve, key=lambda p: p.mean) for key, curve in curves.items() if is_validation(key)}

    def draw(axes: Any) -> None:
        for i, (key, curve) in enumerate(curves.items()):
            step, mean, low, high = zip(*curve, strict=True)
            if low != high:
                axes.fill_between(step, low, high, color=COLOURS[i % 8], alpha=0.25, lw=0)
            marker = "o" if len(step) == 1 else ""
            style = line_style(i) | ({"ls": "--"} if key in lowest else {})
            axes.plot(step, mean, label=shorten(key), lw=1.3, marker=marker, **style)
            if key in lowest and len(curve) > 1:
                axes.plot(lowest[key].step, lowest[key].mean, ls="", marker="v", ms=6, color=COLOURS[i % 8])
        if log_scale and max(p.high for p in points) > 3 * min(p.low for p in points) > 0:
            use_log_scale(axes.yaxis, [p.low for p in points] + [p.high for p in points])
        use_plain_ticks(axes.xaxis)
        axes.set_xlabel(x_label)
        axes.set_ylabel(shorten(title))
        if len(curves) > 1:
            draw_legend(axes)

    summary = "; ".join(summarise_curve(key, curve, x_label) for key, curve in curves.items())
    least = [f"lowest {key}: {format_number(p.mean)} at {x_label} {p.step}" for key, p in lowest.items()]
    return render_plot(
        draw, ", ".join([*curves, *least]), f"{title} against the {x_label}: {'; '.join([summary, *least])}"
    )


def is_validation(key: str) -> bool:
    """Whether a curve is of a held-out loss; on a page of several runs the run's name comes first."""
    return key.startswith("val/") or ": val/" in key


def plot_trajectory(x_label: str, y_label: str, points: Sequence[tuple[float, float, int]]) -> Markup:
    """Points ``(x, y, iteration)`` joined in their order, the last one marked."""
    x, y, step = zip(*points, strict=True)

    def draw(axes: Any) -> None:
        axes.plot(x, y, lw=1, marker="o", ms=3, color=COLOURS[0])
        axes.plot(x[-1:], y[-1:], ls="", marker="s", ms=7, color=COLOURS[1], label=f"iteration {step[-1]}")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(frameon=False, fontsize=8)

    ends = [f"{format_number(y[i])} at {format_number(x[i])} in iteration {step[i]}" for i in (0, -1)]
    return render_plot(
        draw, f"{y_label} against {x_label}", f"{y_label} against {x_label}: from {ends[0]} to {ends[1]}"
    )


def summarise_curve(key: str, curve: Sequence[Point], x_label: str = "step") -> str:
    """The two ends of a curve in words, for screen readers."""
    ends = [f"{format_number(p.mean)} at {x_label} {p.step}" for p in (curve[0], curve[-1])]
    return f"{key} from {ends[0]} to {ends[1]}"


@dataclass(frozen=True)
class Cost:
    """What the horizontal axis of a quality plot shows."""

    label: str
    measure: Callable[[Card], float | None]
    """the cost of one sample of a card; None if it is not known"""


def cpu_milliseconds(card: Card) -> float | None:
    """CPU milliseconds of drawing one sample; None if it was drawn on another device, or that was not recorded."""
    seconds, n = to_number(card.settings.get("draw_cpu_seconds")), to_number(card.settings.get("n"))
    if not seconds or not n or not str(card.settings.get("device", "")).startswith("cpu"):
        return None
    return 1000 * seconds / n


NFE = Cost("network evaluations per sample (NFE)", lambda card: card.nfe or None)
CPU_TIME = Cost("CPU milliseconds per sample", cpu_milliseconds)


def plot_metric_by_cost(
    metric: str,
    series: Mapping[str, list[tuple[float, Estimate]]],
    cost: Cost = NFE,
    title: str | None = None,
    floor: Estimate | None = None,
) -> Markup:
    """A metric against the cost of a sample, a curve for each of ``series``, with the Pareto front: the points that no
    other equals or beats in both. ``floor`` is the value of real data."""
    points = [(x, e, name) for name, curve in series.items() for x, e in curve]
    values = [e.value for _, e, _ in points] + ([floor.value] if floor else [])
    places = sorted({x for x, _, _ in points})
    direction = metric_direction(metric)
    sign = -1 if direction == "higher" else 1
    front = pareto_front(points, lambda p: p[0], lambda p: sign * p[1].value) if direction else []

    def draw(axes: Any) -> None:
        for i, (name, curve) in enumerate(series.items()):
            x, estimates = zip(*sorted(curve), strict=True)
            below = [max(0.0, e.value - (e.value if e.low is None else e.low)) for e in estimates]
            above = [max(0.0, (e.value if e.high is None else e.high) - e.value) for e in estimates]
            style = {"lw": 1.3, "ms": 4.5, "capsize": 2, "elinewidth": 0.9, "marker": MARKERS[i % 8], **line_style(i)}
            axes.errorbar(x, [e.value for e in estimates], yerr=[below, above], label=shorten(name), **style)
        if len(front) > 1 or (front and len(points) > 1):
            x, y = [p[0] for p in front], [p[1].value for p in front]
            axes.step(x, y, where="post", color=INK, lw=1, ls=":", label="Pareto front")
            axes.plot(x, y, ls="", marker="o", ms=9, mfc="none", mec=INK, mew=1)
        if floor is not None:
            axes.axhline(floor.value, color=INK, lw=1, ls="-.", label="real data")
        use_log_scale(axes.xaxis, places)
        if len(places) <= 8 and cost is NFE:
            from matplotlib.ticker import FixedLocator  # lazy: matplotlib

            axes.xaxis.set_major_locator(FixedLocator(places))
        if direction == "lower" and min(values) > 0 and max(values) > 8 * min(values):
            use_log_scale(axes.yaxis, values)
        axes.set_xlabel(cost.label)
        axes.set_ylabel(shorten(title or metric))
        if len(series) > 1 or front or floor:
            draw_legend(axes)

    summary = "; ".join(
        f"{name}: " + ", ".join(f"{format_number(e.value)} at {x:.4g}" for x, e in sorted(curve))
        for name, curve in series.items()
    )
    ends = "; Pareto front: " + ", ".join(f"{format_number(e.value)} at {x:.4g}" for x, e, _ in front) if front else ""
    ends += f"; real data: {format_number(floor.value)}" if floor else ""
    what = "the number of network evaluations" if cost is NFE else cost.label
    return render_plot(draw, format_metric(metric, title), f"{title or metric} against {what}. {summary}{ends}")


def titled_metrics(metrics: Iterable[str], cards: Iterable[Card]) -> list[tuple[str, str]]:
    """Each metric with each of the titles that it has in ``cards``, by the features that it was measured in."""
    titles = {(metric, card.title(metric)): None for card in cards for metric in card.metrics}
    return [(metric, title) for metric in metrics for name, title in titles if name == metric]


def plot_metrics_by_cost(
    metrics: Iterable[str], groups: Mapping[str, Sequence[Card]], floor: Mapping[str, Estimate] | None = None
) -> list[Markup]:
    """A plot of each metric and kind of features against the network evaluations, and one of the first against the CPU
    time, if two or more places on the axis are known. ``groups`` are the cards of each curve by its label, ``floor``
    the metrics of real data."""
    plots = []
    cards = [card for group in groups.values() for card in group]
    for i, (metric, title) in enumerate(titled_metrics(metrics, cards)):
        for cost in (NFE, CPU_TIME) if i == 0 else (NFE,):
            series: dict[str, list[tuple[float, Estimate]]] = {}
            for name, group in groups.items():
                for card in group:
                    x = cost.measure(card)
                    if x is not None and metric in card.metrics and card.title(metric) == title:
                        series.setdefault(name, []).append((x, card.metrics[metric]))
            if len({x for curve in series.values() for x, _ in curve}) > 1:
                plots.append(plot_metric_by_cost(metric, series, cost, title, (floor or {}).get(metric)))
    return [render("plots", plots=plots)] if plots else []
