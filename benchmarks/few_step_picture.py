"""The picture of :mod:`benchmarks.few_step`: distance to real data against evaluations, a panel for each experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genkit.core.files import atomic_write

STYLES = {"flow": ":", "reflow": ":"}  # rows that solve an ODE; marks alone are one-step generators
COLUMNS = 3
REAL = {"real": "-", "resampled": ":"}  # grey lines


def save_picture(parts: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Mean and standard deviation over the seeds of each row, ``parts`` by title and row, as ``genkit bench`` has them.

    The grey line is real data's distance, the dotted one that of as many real rows as samples. Rows have the same
    colour in all panels.
    """
    from matplotlib import colormaps  # lazy: slow to import
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # lazy: slow to import
    from matplotlib.figure import Figure

    ways = list(dict.fromkeys(way for rows in parts.values() for way in rows if way not in REAL))
    colours = {way: colormaps["tab20"](2 * i % 20 + i // 10) for i, way in enumerate(ways)}  # ten dark, ten pale
    columns = min(len(parts), COLUMNS)
    rows_of_panels = -(-len(parts) // columns)
    fig = Figure(figsize=(3.6 * columns + 1.6, 3.4 * rows_of_panels), dpi=96, layout="constrained")
    panels = fig.subplots(rows_of_panels, columns, squeeze=False).flatten()
    for empty in panels[len(parts) :]:
        empty.set_axis_off()
    shown: dict[str, Any] = {}
    for panel, (title, rows) in zip(panels, parts.items(), strict=False):
        counts: set[int] = set()
        for way, cell in rows.items():
            if not cell["values"]:  # every seed diverged
                continue
            name, values = next(iter(cell["values"].items()))
            panel.set_ylabel(name, fontsize=9)
            if way in REAL:
                panel.axhline(np.mean(values["1"]), color="0.6", lw=1, ls=REAL[way])
                continue
            counts |= {int(k) for k in values}
            shown[way] = draw_row(panel, values, colours[way], STYLES.get(way, "-"))
        panel.set(title=title, xscale="log", yscale="log", xlabel="evaluations")
        panel.set_xticks(sorted(counts), [str(k) for k in sorted(counts)], minor=False)
        panel.minorticks_off()
        panel.tick_params(labelsize=8)
    fig.legend(shown.values(), shown, loc="outside right center", fontsize=8, frameon=False)
    FigureCanvasAgg(fig)
    with atomic_write(path) as part:
        fig.savefig(part, format="png")


def draw_row(panel: Any, values: Mapping[str, Sequence[float]], colour: Any, style: str) -> Any:
    """A line with error bars, or a mark at one evaluation."""
    x = np.array(sorted(int(k) for k in values))
    y = np.array([np.mean(values[str(k)]) for k in x])
    sd = np.array([np.std(values[str(k)], ddof=1) if len(values[str(k)]) > 1 else 0.0 for k in x])
    one = len(x) == 1
    return panel.errorbar(
        x, y, sd, color=colour, fmt="D" if one else f"o{style}", ms=5 if one else 3, lw=1.2, capsize=2
    )
