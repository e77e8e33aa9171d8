"""Pages: what a run did, on one HTML page that stands alone. No network, no file beside it, one small script in it.

A page is made of parts, each a function that returns safe markup: :func:`tiles`, :func:`table`, :func:`plot`,
:func:`frames`, :func:`listing`. Whatever comes from a user's file goes through jinja2's escaping, or through
matplotlib's. Figures are inline SVG whose colours are CSS variables: light and dark, on screen and in print.

:func:`run_page` reads ``config.yaml``, ``log.jsonl``, ``samples/*.png``, ``eval/*.json`` and ``env.json`` of a run, and
can do without all but the first.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from genkit import __version__
from genkit.config import load_yaml
from genkit.core.files import write_text
from genkit.training.directory import find_run

POINTS = 500  # of a curve: about as many as the pixels that it gets
FRAMES = 12  # grids of samples on a page, evenly over the training
OTHERS = 8  # further pictures
BETTER = {  # which way a known metric is better
    "lower": ("fid", "fid_inf", "kid", "w2", "sliced_w2", "mmd", "cpu_seconds", "ms_per_sample"),
    "higher": ("is", "accuracy", "precision", "recall", "density", "coverage"),
}
ARROWS = {"lower": "↓", "higher": "↑"}
# settings of cards that part one curve from another
CURVES = ("step", "ema", "sampler", "grid", "guidance", "label", "n", "features.name", "features.mode")


# ------------------------------------------------------------------------------------------------------- reading
class Point(NamedTuple):
    """Some lines of the log in a row: the last one's step, and the mean, least and largest of a number in them."""

    step: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Log:
    curves: Mapping[str, list[Point]]
    lines: int
    """complete lines"""
    each: int
    """lines that one point stands for"""
    last: Mapping[str, Any]
    """the last complete line"""
    seconds: float
    """of training, over all the times that it was taken up again"""
    missing: Mapping[str, int]
    """lines whose number was not finite"""
    damaged: bool
    """whether a line could not be read; it and what follows are left out"""


def records_of(lines: Sequence[bytes]) -> tuple[list[Any], bool]:
    """The lines' objects up to the first that cannot be read, and whether there was one."""
    try:
        return json.loads(b"[" + b",".join(lines) + b"]"), False
    except (ValueError, RecursionError):
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError):
                return found, True
        return found, False


def read_log(path: Path, points: int = POINTS) -> Log:
    """The log, thinned to at most ``points`` points as it is read: a million lines need no more memory than these."""
    curves: dict[str, list[Point]] = {}
    missing: dict[str, int] = {}
    last: Mapping[str, Any] = {}
    lines, past, before, damaged = 0, 0.0, 0.0, False
    if not path.is_file():
        return Log({}, 0, 1, {}, 0.0, {}, False)
    with open(path, "rb") as f:
        total = sum(block.count(b"\n") for block in iter(lambda: f.read(1 << 20), b""))
        f.seek(0)
        each = max(1, -(-total // points))
        while not damaged and (chunk := list(itertools.islice(f, each))):
            found, damaged = records_of(chunk)
            values: dict[str, list[float]] = {}
            for record in found:
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    continue
                lines, last = lines + 1, record
                now = record.get("seconds")
                if isinstance(now, int | float) and math.isfinite(now):  # it starts at 0 in every session
                    past, before = past + (before if now < before else 0.0), now
                for key, value in record.items():
                    if value is None or (isinstance(value, float) and not math.isfinite(value)):
                        missing[key] = missing.get(key, 0) + 1
                    elif isinstance(value, int | float):
                        values.setdefault(key, []).append(value)
            for key, v in values.items():
                curves.setdefault(key, []).append(Point(last["step"], math.fsum(v) / len(v), min(v), max(v)))
    return Log(curves, lines, each, last, past + before, missing, damaged)


class Value(NamedTuple):
    """A metric with its interval, of which either end may be unknown."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Card:
    """What was measured once: ``eval/NAME.json``."""

    name: str
    metrics: Mapping[str, Value]
    settings: Mapping[str, Any]
    """by dotted name"""

    @property
    def nfe(self) -> float | None:
        return number_in(self.settings.get("nfe"))

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers has to know."""
        notes = self.settings.get("notes")
        return [text_of(note) for note in notes] if isinstance(notes, list) else []


def number_in(value: object) -> float | None:
    """A finite number; None for anything else."""
    given = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return cast(float, value) if given else None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        out |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return out


def card_of(name: str, text: str | bytes) -> Card:
    """A card from its JSON. ``ValueError`` says what is not a card's."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    metrics = tree.get("metrics") if isinstance(tree, dict) else None
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError("has no metrics")
    values = {}
    for key, entry in metrics.items():
        value, low, high = (number_in(entry.get(k)) if isinstance(entry, dict) else None for k in Value._fields)
        if value is None:
            raise ValueError(f"holds no number for {key}")
        values[key] = Value(value, low, high)
    settings = tree.get("settings")
    return Card(name, values, flat(settings) if isinstance(settings, dict) else {})


def read_cards(folder: Path) -> tuple[list[Card], list[str]]:
    """The cards of a folder, by checkpoint and number of evaluations; and a line for each file that is none."""
    cards, skipped = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            cards.append(card_of(path.stem, path.read_bytes()))
        except (ValueError, OSError) as e:
            skipped.append(f"{path.name}: {e.strerror if isinstance(e, OSError) else e}")
    order = lambda card: [(v is None, v or 0) for v in (number_in(card.settings.get("step")), card.nfe)]  # noqa: E731
    return sorted(cards, key=lambda card: (order(card), card.name)), skipped


class Picture(NamedTuple):
    uri: str
    width: int
    height: int
    caption: str


def embed(image: Image.Image | Path, caption: str) -> Picture:
    """A picture as a data URI; a file's own bytes. ``ValueError`` where a file is damaged or no picture."""
    if isinstance(image, Image.Image):
        out = io.BytesIO()
        image.save(out, "PNG", optimize=True)
        data, size = out.getvalue(), image.size
    else:
        data = image.read_bytes()
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
                opened.load()
                size = opened.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise ValueError(f"{image.name}: is damaged, or no PNG") from None
    width, height = size
    return Picture("data:image/png;base64," + base64.b64encode(data).decode(), width, height, caption)


def embed_all(paths: Iterable[tuple[Path, str]]) -> tuple[list[Picture], list[str]]:
    """The pictures that can be read, and a line for each that cannot."""
    pictures, skipped = [], []
    for path, caption in paths:
        try:
            pictures.append(embed(path, caption))
        except (ValueError, OSError) as e:
            skipped.append(str(e))
    return pictures, skipped


def spread(items: Sequence[Any], num: int) -> list[Any]:
    """At most ``num`` of the items, evenly, with the first and the last."""
    if len(items) <= num:
        return list(items)
    return [items[round(i * (len(items) - 1) / (num - 1))] for i in range(num)]


# --------------------------------------------------------------------------------------------------------- parts
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b1f24;--muted:#59636e;--line:#d1d9e0;--panel:#f6f8fa;
--c0:#0072b2;--c1:#c44e00;--c2:#007a5a;--c3:#a3428a;--c4:#7a5c00;--c5:#3b82c4;--c6:#b3261e;--c7:#4d4d4d}
@media screen and (prefers-color-scheme:dark){:root{--bg:#0d1117;--ink:#e6edf3;--muted:#9aa4af;--line:#353c45;
--panel:#161b22;--c0:#58b4f0;--c1:#ff9447;--c2:#3fd0a0;--c3:#f0a0d8;--c4:#e8cf3a;--c5:#9cc9ff;--c6:#ff8a80;--c7:#c8c8c8}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:75rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.6rem;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--line)}
p{margin:.5rem 0;max-width:70ch}
.muted,figcaption{color:var(--muted);font-size:.875rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.5rem;margin:1rem 0}
.tiles div{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.5rem .75rem}
.tiles dt{color:var(--muted);font-size:.8rem}
.tiles dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));gap:1rem}
figure{margin:0;break-inside:avoid}
.plots svg{width:100%;height:auto;display:block;font-family:inherit}
.plots svg *{stroke-linejoin:round;stroke-linecap:butt}
.frames{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr));gap:1rem}
.frames img{max-width:100%;height:auto;display:block;border:1px solid var(--line)}
.control{display:flex;flex-wrap:wrap;align-items:center;gap:.5rem 1rem;margin:.5rem 0}
.control input{flex:1 1 12rem;max-width:30rem;accent-color:var(--c0)}
button{font:inherit;color:inherit;background:var(--panel);border:1px solid var(--line);border-radius:6px;
padding:.2rem .7rem}
:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{white-space:nowrap;border-bottom:2px solid var(--line)}
tbody th{font-weight:600;white-space:nowrap}
td.num,th.num{text-align:right;white-space:nowrap}
td small{color:var(--muted);display:block}
tr.floor{background:var(--panel)}
pre{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.75rem;margin:.5rem 0;
overflow-x:auto;font:13px/1.45 ui-monospace,"DejaVu Sans Mono",monospace}
dl.list{display:grid;grid-template-columns:minmax(8rem,max-content) 1fr;gap:.15rem 1rem;margin:.5rem 0}
dl.list dt{color:var(--muted)}dl.list dd{margin:0;overflow-wrap:anywhere}
summary{cursor:pointer;padding:.2rem 0}
@media screen{.one .frame:not(.on){display:none}.one{grid-template-columns:min(40rem,100%)}}
@media (max-width:30rem){dl.list{grid-template-columns:1fr}dl.list dd{margin-bottom:.4rem}}
@media print{body{font-size:10pt}main{max-width:none;padding:0}.control{display:none!important}pre{white-space:pre-wrap}
.scroll{overflow:visible}h2{break-after:avoid}tr{break-inside:avoid}
details::details-content{content-visibility:visible;display:block;height:auto}}
"""

SCRIPT = """
for (const control of document.querySelectorAll('.control')) {
  const box = control.nextElementSibling, frames = [...box.querySelectorAll('.frame')];
  const range = control.querySelector('input'), out = control.querySelector('output');
  const button = control.querySelector('button');
  const show = () => {
    frames.forEach((frame, i) => frame.classList.toggle('on', i == range.value));
    out.textContent = frames[range.value].dataset.name;
    range.setAttribute('aria-valuetext', out.textContent);
  };
  const one = (on) => {
    box.classList.toggle('one', on);
    range.disabled = !on;
    button.textContent = on ? 'Show all' : 'Show one';
  };
  range.max = frames.length - 1;
  range.value = frames.length - 1;
  range.addEventListener('input', show);
  button.addEventListener('click', () => one(range.disabled));
  control.hidden = false;
  show();
  one(true);
}
"""

TEMPLATES = {
    "page": """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<meta name="generator" content="genkit {{ version }}">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="muted">{{ lead }}</p>
{% for heading, parts in sections %}
<section>
{% if heading %}<h2>{{ heading }}</h2>{% endif %}
{% for part in parts %}{{ part }}
{% endfor %}
</section>
{% endfor %}
</main>
<script>{{ script }}</script>
</body>
</html>
""",
    "tiles": """<dl class="tiles">{% for name, value in items %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}
</dl>""",
    "listing": """<dl class="list">{% for name, value in items %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}
</dl>""",
    "table": """<p class="muted">{{ caption }}</p>
<div class="scroll" role="region" aria-label="{{ caption }}" tabindex="0">
<table aria-label="{{ caption }}">
<thead><tr>{% for cell in head %}<th scope="col"{% if cell in right %} class="num"{% endif %}>{{ cell }}</th>\
{% endfor %}</tr></thead>
<tbody>{% for row in rows %}
<tr{% if loop.index0 in floor %} class="floor"{% endif %}>{% for cell in row %}{% if loop.first %}\
<th scope="row">{{ cell }}</th>{% else %}\
<td{% if head[loop.index0] in right %} class="num"{% endif %}>{{ cell }}</td>{% endif %}{% endfor %}</tr>{% endfor %}
</tbody>
</table>
</div>""",
    "value": """<data value="{{ value }}">{{ shown }}</data>{% if interval %} \
<small>{{ interval }}</small>{% endif %}""",
    "plot": """<figure>{{ svg }}<figcaption>{{ caption }}</figcaption></figure>""",
    "plots": """<div class="plots">{% for plot in plots %}
{{ plot }}{% endfor %}
</div>""",
    "frames": """{% if slider %}<div class="control" hidden>
<label>{{ slider }} <input type="range" min="0" max="0" step="1" value="0"></label>
<output></output> <button type="button">Show all</button>
</div>{% endif %}
<div class="frames">{% for p in pictures %}
<figure class="frame" data-name="{{ p.caption }}"><img src="{{ p.uri }}" width="{{ p.width }}" height="{{ p.height }}" \
alt="{{ alt }}: {{ p.caption }}"><figcaption>{{ p.caption }}</figcaption></figure>{% endfor %}
</div>""",
    "text": """<p{% if muted %} class="muted"{% endif %}>{{ text }}</p>""",
    "lines": """<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>""",
    "code": """<pre tabindex="0" aria-label="{{ name }}">{{ text }}</pre>""",
    "fold": """<details><summary>{{ name }}</summary>
{{ inner }}
</details>""",
}
JINJA = Environment(autoescape=True, undefined=StrictUndefined, loader=DictLoader(TEMPLATES))


def render(template: str, **values: Any) -> Markup:
    return Markup(JINJA.get_template(template).render(values))


def page(title: str, lead: str, sections: Iterable[tuple[str, Sequence[Markup]]]) -> str:
    """A whole document: each section is a heading and its parts; a section without parts is left out."""
    kept = [(heading, parts) for heading, parts in sections if parts]
    style, script = Markup(STYLE), Markup(SCRIPT)
    return str(render("page", title=title, lead=lead, sections=kept, style=style, script=script, version=__version__))


def tiles(items: Mapping[str, Any]) -> Markup:
    return render("tiles", items=items.items())


def listing(items: Mapping[str, Any]) -> Markup:
    """Names and values, one below the other."""
    return render("listing", items=[(k, text_of(v)) for k, v in items.items()])


def table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    right: Iterable[str] = (),
    floor: Iterable[int] = (),
) -> Markup:
    """``right`` names the columns of numbers, ``floor`` the rows that stand apart."""
    return render("table", caption=caption, head=head, rows=rows, right=set(right), floor=set(floor))


def note(text: str, muted: bool = True) -> Markup:
    return render("text", text=text, muted=muted)


def text_of(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def number(value: float | None) -> str:
    """Four significant digits, without an exponent where that is short."""
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:.{digits}f}" if not float(value).is_integer() or abs(value) < 1 else f"{value:.0f}"
    return f"{value:.3e}"


def interval(v: Value) -> str:
    return "" if v.low is None and v.high is None else f"[{number(v.low)}, {number(v.high)}]"


def value_cell(v: Value | None) -> Markup:
    """The number with its interval; the exact one is in the markup."""
    if v is None:
        return Markup("–")
    return render("value", value=repr(v.value), shown=number(v.value), interval=interval(v))


def duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {s} s" if minutes else f"{seconds:.1f} s"


def titled(metric: str) -> str:
    """A metric's name, and an arrow the way that is better where that is known."""
    return metric + next((f" {ARROWS[way]}" for way, names in BETTER.items() if metric in names), "")


def frames(pictures: Sequence[Picture], alt: str, slider: str = "") -> Markup:
    """Pictures side by side; with the name of a ``slider``, one at a time on a screen."""
    return render("frames", pictures=pictures, alt=alt, slider=slider if len(pictures) > 1 else "")


# ------------------------------------------------------------------------------------------------------- figures
INK, FAINT = "#fe00ff", "#fe00fe"  # stand-ins, which become CSS variables
COLOURS = [f"#fe010{i}" for i in range(8)]
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
_figures = itertools.count()


def look(i: int) -> dict[str, Any]:
    """Colour and dash of the i-th curve."""
    return {"color": COLOURS[i % 8], "ls": DASHES[i // 8 % 4]}


def plot(draw: Callable[[Any], None], caption: str, alt: str, size: tuple[float, float] = (4.8, 2.9)) -> Markup:
    """What ``draw(axes)`` plots, as an inline SVG that follows the page's colours and font."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    style = {"svg.fonttype": "none", "svg.hashsalt": "genkit", "font.size": 9, "text.parse_math": False, **ink}
    out = io.StringIO()
    with matplotlib.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False, "grid.color": FAINT}):
        fig = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(fig)
        axes = fig.add_subplot()
        axes.grid(lw=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        fig.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return render("plot", svg=inline(out.getvalue(), alt), caption=caption)


def inline(svg: str, alt: str) -> Markup:
    """matplotlib's SVG as a part of a page: no prologue, ids of its own, colours and font of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", svg, count=3)
    key = f"f{next(_figures)}-"
    svg = re.sub(r'\bid="', f'id="{key}', svg)
    svg = svg.replace('xlink:href="#', f'href="#{key}').replace("url(#", f"url(#{key}")
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    stand_in = {INK: "var(--ink)", FAINT: "var(--line)", **{c: f"var(--c{i})" for i, c in enumerate(COLOURS)}}
    for colour, variable in stand_in.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r'^<svg width="[^"]*" height="[^"]*"', "", svg)
    return Markup('<svg role="img" aria-label="{}"').format(alt) + Markup(svg)


def short(text: str, most: int = 40) -> str:
    """What fits into a figure."""
    return text if len(text) <= most else text[: most - 1] + "…"


def plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def logarithmic(axis: Any, values: Iterable[float]) -> None:
    """A logarithmic axis with ticks in plain figures, at 1, 2 and 5 where there are few decades."""
    from matplotlib.ticker import LogLocator, NullLocator

    every = list(values)
    low, high = min(every), max(every)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=8))
    axis.set_minor_locator(NullLocator())
    plain_ticks(axis)


def curve_plot(title: str, curves: Mapping[str, list[Point]], log_scale: bool = False) -> Markup:
    """Numbers of the log against the step: the mean, and in the background from the least to the largest."""
    every = [p for points in curves.values() for p in points]

    def draw(axes: Any) -> None:
        for i, (key, points) in enumerate(curves.items()):
            step, mean, low, high = zip(*points, strict=True)
            if low != high:
                axes.fill_between(step, low, high, color=COLOURS[i % 8], alpha=0.25, lw=0)
            axes.plot(step, mean, label=short(key), lw=1.3, marker="o" if len(step) == 1 else "", **look(i))
        if log_scale and max(p.high for p in every) > 3 * min(p.low for p in every) > 0:
            logarithmic(axes.yaxis, [p.low for p in every] + [p.high for p in every])
        plain_ticks(axes.xaxis)
        axes.set_xlabel("step")
        axes.set_ylabel(short(title))
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=8)

    said = "{} from {} at step {} to {} at step {}"
    ends = "; ".join(
        said.format(key, number(p[0].mean), p[0].step, number(p[-1].mean), p[-1].step) for key, p in curves.items()
    )
    return plot(draw, ", ".join(curves), f"{title} against the step: {ends}")


def nfe_plot(metric: str, series: Mapping[str, list[tuple[float, Value]]], floor: Value | None = None) -> Markup:
    """A metric against the number of network evaluations; ``floor`` is what real data reach."""
    values = [v.value for points in series.values() for _, v in points] + ([floor.value] if floor else [])

    def draw(axes: Any) -> None:
        for i, (name, points) in enumerate(series.items()):
            nfe, found = zip(*sorted(points), strict=True)
            y = [v.value for v in found]
            down = [max(0.0, v.value - (v.value if v.low is None else v.low)) for v in found]
            up = [max(0.0, (v.value if v.high is None else v.high) - v.value) for v in found]
            line = {"label": short(name), "lw": 1.3, "ms": 4.5, "capsize": 2, "elinewidth": 0.9}
            axes.errorbar(nfe, y, yerr=[down, up], marker=MARKERS[i % 8], **line, **look(i))
        if floor is not None:
            axes.axhline(floor.value, color=INK, lw=1, ls=":", label="real data")
        places = sorted({nfe for points in series.values() for nfe, _ in points})
        logarithmic(axes.xaxis, places)
        if len(places) <= 8:
            axes.xaxis.set_major_locator(fixed(places))
        if metric in BETTER["lower"] and min(values) > 0 and max(values) > 8 * min(values):
            logarithmic(axes.yaxis, values)
        axes.set_xlabel("network evaluations a sample (NFE)")
        axes.set_ylabel(short(metric))
        if len(series) > 1 or floor:
            axes.legend(frameon=False, fontsize=8)

    ends = "; ".join(
        f"{name}: " + ", ".join(f"{number(v.value)} at {nfe:g}" for nfe, v in sorted(points))
        for name, points in series.items()
    )
    real = f"; real data: {number(floor.value)}" if floor else ""
    return plot(draw, titled(metric), f"{metric} against the number of network evaluations. {ends}{real}")


def fixed(places: Sequence[float]) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator(list(places))


# ---------------------------------------------------------------------------------------------- the page of a run
def run_page(path: str | Path, more: Mapping[str, Sequence[Markup]] | None = None) -> str:
    """The page of a run, with ``more`` sections after the samples. ``ValueError`` where there is no run; what is
    missing or damaged in it is said on the page."""
    run = find_run(path)
    cfg, log = load_yaml(run / "config.yaml"), read_log(run / "log.jsonl")
    names = {k: name_in(cfg.get(k)) for k in ("objective", "backbone", "data")}
    lead = f"{names['objective']} on {names['data']}, network {names['backbone']}; drawn by genkit {__version__}"
    cards, skipped = read_cards(run / "eval")
    sections = [
        ("", [summary(cfg, names, log)]),
        ("Quality", quality_parts(cards, skipped)),
        ("Samples over time", training_samples(run)),
        ("Further samples", further_samples(run)),
        *(more or {}).items(),
        ("Training", training_parts(log)),
        ("Configuration", [render("code", name="config.yaml", text=(run / "config.yaml").read_text("utf-8"))]),
        ("Environment", environment_parts(run / "env.json")),
    ]
    return page(run.name, lead, sections)


def name_in(block: object) -> str:
    return str(block.get("name", "?") if isinstance(block, Mapping) else block or "?")


def summary(cfg: Mapping[str, Any], names: Mapping[str, str], log: Log) -> Markup:
    last, items = log.last, dict(names)
    if log.lines:
        items["steps"] = f"{last['step']} of {text_of(cfg.get('steps', '?'))}"
        items["time"] = duration(log.seconds)
        if speed := log.curves.get("samples_per_s"):
            items["samples a second"] = number(sorted(p.mean for p in speed)[len(speed) // 2])
        for key in [k for k in log.curves if k.endswith("/loss")]:
            items[f"last {key}"] = number(number_in(last.get(key)))
        items |= {"steps skipped": text_of(last["skipped"])} if last.get("skipped") else {}
    return tiles(items)


def training_parts(log: Log) -> list[Markup]:
    """Curves of everything that the log holds: losses together, gradients together, the rest by name."""
    if not log.lines:
        return [note("The log holds no line yet.")]
    groups: dict[str, dict[str, list[Point]]] = {"loss": {}, "grad_norm": {}, "lr": {}, "samples_per_s": {}}
    for key, points in log.curves.items():
        if key not in ("step", "samples", "seconds", "skipped") or (key == "skipped" and points[-1].mean > 0):
            groups.setdefault(key.rpartition("/")[2], {})[key] = points
    titles = {"grad_norm": "gradient norm", "lr": "learning rate", "samples_per_s": "samples a second"}
    plots = [
        curve_plot(titles.get(name, name), curves, log_scale=name in ("loss", "grad_norm"))
        for name, curves in groups.items()
        if curves
    ]
    said = [f"{log.lines} lines" + (f", {log.each} to a point; shaded: their range" if log.each > 1 else "")]
    said += [f"{key}: {count} not finite" for key, count in log.missing.items()]
    said += ["one line cannot be read; the log ends before it"] * log.damaged
    return [render("plots", plots=plots), note("Log: " + "; ".join(said) + ".")]


def training_samples(run: Path) -> list[Markup]:
    every = sorted((run / "samples").glob("step-*.png"))
    shown = spread(every, FRAMES)
    pictures, damaged = embed_all((p, step_name(p)) for p in shown)
    parts = [frames(pictures, "Grid of samples", "Checkpoint")] if pictures else []
    if len(shown) < len(every):
        parts.append(note(f"{len(shown)} of {len(every)} grids, evenly over the training."))
    return parts + ([note("Left out: " + "; ".join(damaged) + ".")] if damaged else [])


def step_name(path: Path) -> str:
    digits = path.stem.removeprefix("step-")
    return f"step {int(digits)}" if digits.isdecimal() else path.stem


def further_samples(run: Path) -> list[Markup]:
    """Pictures that ``genkit sample`` put beside those of the training, newest last, with how they were drawn."""
    every = [p for p in (run / "samples").glob("*.png") if not p.name.startswith("step-")]
    shown = sorted(every, key=lambda p: (p.stat().st_mtime, p.name))[-OTHERS:]
    pictures, damaged = embed_all((p, " · ".join([p.stem, *drawn_how(p.with_suffix(".json"))])) for p in shown)
    parts = [frames(pictures, "Samples")] if pictures else []
    if len(shown) < len(every):
        parts.append(note(f"The newest {len(shown)} of {len(every)}."))
    return parts + ([note("Left out: " + "; ".join(damaged) + ".")] if damaged else [])


def drawn_how(path: Path) -> list[str]:
    try:
        settings = json.loads(path.read_bytes())
        return [f"{k} {text_of(settings[k])}" for k in ("sampler", "nfe", "guidance", "seed") if k in settings]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def quality_parts(cards: Sequence[Card], skipped: Sequence[str]) -> list[Markup]:
    """A table of the cards, a plot where they differ in their number of evaluations, and their settings."""
    parts: list[Markup] = []
    if cards:
        varying = differing([{k: v for k, v in card.settings.items() if k != "notes"} for card in cards])
        metrics = list(dict.fromkeys(k for card in cards for k in card.metrics))
        shown = [k for k in varying if all(len(text_of(card.settings.get(k, ""))) < 40 for card in cards)]
        rows = [
            [card.name, *(value_cell(card.metrics.get(m)) for m in metrics)]
            + [text_of(card.settings[k]) if k in card.settings else "–" for k in shown]
            for card in cards
        ]
        head = ["card", *map(titled, metrics), *shown]
        caption = "Each number with its interval, where it has one; ↓ lower is better, ↑ higher. " + (
            "Then the settings in which the cards differ." if shown else ""
        )
        parts.append(table(caption, head, rows, right=map(titled, metrics)))
        if notes := list(dict.fromkeys(n for card in cards for n in card.notes)):
            parts.append(render("lines", lines=notes))
        parts += nfe_plots(metrics, series_of(cards, varying))
        same = {k: v for k, v in cards[0].settings.items() if k not in varying and k != "notes"}
        if same:
            which = "Settings of all cards" if len(cards) > 1 else "Settings of the card"
            parts.append(render("fold", name=which, inner=listing(same)))
        for card in cards if set(varying) - set(shown) else []:
            own = {k: card.settings[k] for k in varying if k in card.settings}
            parts.append(render("fold", name=f"Settings of {card.name}", inner=listing(own)))
    if skipped:
        parts.append(note("Files in eval/ that are no cards, left out:"))
        parts.append(render("lines", lines=skipped))
    return parts


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names whose values are not the same everywhere."""
    names = dict.fromkeys(k for s in settings for k in s)
    return [k for k in names if len({text_of(s[k]) if k in s else None for s in settings}) > 1]


def series_of(cards: Sequence[Card], varying: Iterable[str]) -> dict[str, list[Card]]:
    """The cards that have a number of evaluations, by the other settings that make a curve of its own."""
    parting = [k for k in varying if k in CURVES]
    groups: dict[str, list[Card]] = {}
    for card in cards:
        if card.nfe is not None:
            name = ", ".join(f"{k} {text_of(card.settings.get(k))}" for k in parting)
            groups.setdefault(name, []).append(card)
    return groups


def nfe_plots(
    metrics: Iterable[str], groups: Mapping[str, Sequence[Card]], floor: Mapping[str, Value] | None = None
) -> list[Markup]:
    """One plot a metric, where there are two or more numbers of evaluations to compare."""
    plots = []
    for metric in metrics:
        series = {
            name: [(card.nfe, card.metrics[metric]) for card in cards if card.nfe and metric in card.metrics]
            for name, cards in groups.items()
        }
        series = {name: points for name, points in series.items() if points}
        if len({nfe for points in series.values() for nfe, _ in points}) > 1:
            plots.append(nfe_plot(metric, series, (floor or {}).get(metric)))
    return [render("plots", plots=plots)] if plots else []


def environment_parts(path: Path) -> list[Markup]:
    try:
        env = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return [note("env.json is missing, or cannot be read.")]
    if not isinstance(env, dict):
        return [note("env.json holds no settings.")]
    argv = env.pop("argv", None)
    shown = {k: v for k, v in flat(env).items() if v is not None}
    if isinstance(argv, list):
        shown["command"] = " ".join(map(str, argv))
    return [listing(shown)]


def write(text: str, path: Path) -> Path:
    """Write a page, or its Markdown, so that no half of it can be left behind."""
    return write_text(path, text)
