"""The HTML of report pages: one template a part, a style sheet and a small script, all inside the page.

Each ``render_*`` function returns safe markup. Everything that comes from a user's file passes through jinja2's
escaping. Pages load nothing from the network and no other file; colours are CSS variables for light, dark and print.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from genkit import __version__
from genkit.data.images import open_image
from genkit.evaluation.cards import to_text
from genkit.evaluation.metrics import Estimate, metric_direction

ARROWS = {"lower": "↓", "higher": "↑"}

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b1f24;--muted:#59636e;--line:#d1d9e0;--panel:#f6f8fa;
--c0:#0072b2;--c1:#c44e00;--c2:#007a5a;--c3:#a3428a;--c4:#7a5c00;--c5:#3b82c4;--c6:#b3261e;--c7:#4d4d4d}
@media screen and (prefers-color-scheme:dark){:root{--bg:#0d1117;--ink:#e6edf3;--muted:#9aa4af;--line:#353c45;
--panel:#161b22;--c0:#58b4f0;--c1:#ff9447;--c2:#3fd0a0;--c3:#f0a0d8;--c4:#e8cf3a;--c5:#9cc9ff;--c6:#ff8a80;--c7:#c8c8c8}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:75rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.6rem;margin:0 0 .25rem;overflow-wrap:anywhere}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;margin:.75rem 0;padding:0}
a{color:var(--c0)}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;background:var(--bg);padding:.25rem .5rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
.best{font-weight:700}.mark{color:var(--c2)}
.tags{display:inline-block;background:var(--panel);border:1px solid var(--line);border-radius:9px;padding:0 .5rem;
margin-right:.35rem;font-size:.85rem}
.note{white-space:pre-wrap;border-left:3px solid var(--line);padding-left:.75rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--line)}
p{margin:.5rem 0;max-width:70ch}
.muted,figcaption{color:var(--muted);font-size:.875rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.5rem;margin:1rem 0}
.tiles div{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.5rem .75rem}
.tiles dt{color:var(--muted);font-size:.8rem}
.tiles dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));gap:1rem}
.plots.large{grid-template-columns:minmax(0,56rem)}
figure{margin:0;break-inside:avoid}
.plots svg{width:100%;height:auto;display:block;font-family:inherit}
.plots svg *{stroke-linejoin:round;stroke-linecap:butt}
.frames{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr));gap:1rem}
.frames img{max-width:100%;height:auto;display:block;border:1px solid var(--line)}
.wide img{max-width:100%;height:auto;border:1px solid var(--line)}
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
td small{white-space:nowrap;color:var(--muted);display:block}
tr.highlighted{background:var(--panel)}
pre{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.75rem;margin:.5rem 0;
overflow-x:auto;font:13px/1.45 ui-monospace,"DejaVu Sans Mono",monospace}
dl.list{display:grid;grid-template-columns:minmax(8rem,max-content) 1fr;gap:.15rem 1rem;margin:.5rem 0}
dl.list dt{color:var(--muted)}dl.list dd{margin:0;overflow-wrap:anywhere}
summary{cursor:pointer;padding:.2rem 0}
@media screen{.one .frame:not(.on){display:none}.one{grid-template-columns:min(40rem,100%)}}
@media (max-width:30rem){dl.list{grid-template-columns:1fr}dl.list dd{margin-bottom:.4rem}}
@media print{body{font-size:10pt}main{max-width:none;padding:0}
.control,nav,.skip{display:none!important}pre{white-space:pre-wrap}
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
<a class="skip" href="#content">Skip to the content</a>
<main id="content">
<h1>{{ title }}</h1>
<p class="muted">{{ lead }}</p>
{% if contents|length > 1 %}<nav aria-label="Contents"><ul>{% for heading, id in contents %}
<li><a href="#{{ id }}">{{ heading }}</a></li>{% endfor %}
</ul></nav>{% endif %}
{% for heading, parts in sections %}
<section{% if heading %} aria-labelledby="section-{{ loop.index }}"{% endif %}>
{% if heading %}<h2 id="section-{{ loop.index }}">{{ heading }}</h2>{% endif %}
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
<tr{% if loop.index0 in highlighted %} class="highlighted"{% endif %}>{% for cell in row %}{% if loop.first %}\
<th scope="row">{{ cell }}</th>{% else %}\
<td{% if head[loop.index0] in right %} class="num"{% endif %}>{{ cell }}</td>{% endif %}{% endfor %}</tr>{% endfor %}
</tbody>
</table>
</div>""",
    "value": """{% if mark.startswith('best') %}<strong class="best">{% endif %}\
<data value="{{ value }}">{{ shown }}</data>\
{% if mark.startswith('best') %}</strong>{% endif %}{% if interval %} <small>{{ interval }}</small>{% endif %}\
{% if mark %} <small class="mark">{{ mark }}</small>{% endif %}""",
    "small": """<small>{{ text }}</small>""",
    "heading": """<h3>{{ text }}</h3>""",
    "annotations": """{% for tag in tags %}<span class="tags">{{ tag }}</span>{% endfor %}
{% for note in notes %}<p class="note">{% if note.time %}<small class="muted">{{ note.time }}</small>
{% endif %}{{ note.text }}</p>{% endfor %}""",
    "plot": """<figure>{{ svg }}<figcaption>{{ caption }}</figcaption></figure>""",
    "plots": """<div class="plots">{% for plot in plots %}
{{ plot }}{% endfor %}
</div>""",
    "large-plot": """<div class="plots large">{{ plot }}</div>""",
    "frames": """{% if slider %}<div class="control" hidden>
<label>{{ slider }} <input type="range" min="0" max="0" step="1" value="0"></label>
<output></output> <button type="button">Show all</button>
</div>{% endif %}
<div class="frames">{% for p in pictures %}
<figure class="frame" data-name="{{ p.caption }}"><img src="{{ p.uri }}" width="{{ p.width }}" height="{{ p.height }}" \
alt="{{ alt }}: {{ p.caption }}"><figcaption>{{ p.caption }}</figcaption></figure>{% endfor %}
</div>""",
    "wide": """<figure class="wide"><img src="{{ p.uri }}" width="{{ p.width }}" height="{{ p.height }}" \
alt="{{ alt }}: {{ p.caption }}"><figcaption>{{ p.caption }}</figcaption></figure>""",
    "text": """<p{% if muted %} class="muted"{% endif %}>{{ text }}</p>""",
    "lines": """<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>""",
    "code": """<pre tabindex="0" aria-label="{{ name }}">{{ text }}</pre>""",
    "fold": """<details><summary>{{ name }}</summary>
{{ inner }}
</details>""",
}
ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, loader=DictLoader(TEMPLATES))


# ---------------------------------------------------------------------------------------------------------- parts
def render(template: str, **values: Any) -> Markup:
    """Fill the template of this name in ``TEMPLATES``; values that are not ``Markup`` are escaped."""
    return Markup(ENVIRONMENT.get_template(template).render(values))


def render_page(title: str, lead: str, sections: Iterable[tuple[str, Sequence[Markup]]]) -> str:
    """A complete document. Each section is a heading and its parts; sections without parts are left out."""
    filled = [(heading, parts) for heading, parts in sections if parts]
    contents = [(heading, f"section-{i}") for i, (heading, _) in enumerate(filled, 1) if heading]
    values = {"title": title, "lead": lead, "sections": filled, "contents": contents, "version": __version__}
    return str(render("page", style=Markup(STYLE), script=Markup(SCRIPT), **values))


def render_tiles(items: Mapping[str, Any]) -> Markup:
    """Names and values as a grid of small boxes."""
    return render("tiles", items=items.items())


def render_listing(items: Mapping[str, Any]) -> Markup:
    """Names and values as a definition list."""
    return render("listing", items=[(key, to_text(value)) for key, value in items.items()])


def render_table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    number_columns: Iterable[str] = (),
    highlighted_rows: Iterable[int] = (),
) -> Markup:
    """A table. Columns named in ``number_columns`` are right-aligned, ``highlighted_rows`` have a background."""
    return render(
        "table", caption=caption, head=head, rows=rows, right=set(number_columns), highlighted=set(highlighted_rows)
    )


def render_note(text: str, muted: bool = True) -> Markup:
    """A paragraph."""
    return render("text", text=text, muted=muted)


def render_heading(text: str) -> Markup:
    """A heading within a section."""
    return render("heading", text=text)


def render_value(estimate: Estimate | None, mark: str = "") -> Markup:
    """A number and its interval, rounded, and a ``mark`` such as best; the exact value is in the markup. A dash for
    None."""
    if estimate is None:
        return Markup("–")
    value, interval = format_number(estimate.value), format_interval(estimate)
    return render("value", value=repr(estimate.value), shown=value, interval=interval, mark=mark)


# -------------------------------------------------------------------------------------------------------- numbers
def format_number(value: float | None) -> str:
    """Four significant digits, without an exponent if that is short; a dash for None."""
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:.{digits}f}" if not float(value).is_integer() or abs(value) < 1 else f"{value:.0f}"
    return f"{value:.3e}"


def format_interval(estimate: Estimate) -> str:
    """``[low, high]``, or the empty string if neither bound is known."""
    if estimate.low is None and estimate.high is None:
        return ""
    return f"[{format_number(estimate.low)}, {format_number(estimate.high)}]"


def format_metric(name: str, title: str | None = None) -> str:
    """The name of a metric, or its ``title``, with an arrow in the direction of better values if genkit knows it."""
    direction = metric_direction(name)
    return title or name if direction is None else f"{title or name} {ARROWS[direction]}"


# ------------------------------------------------------------------------------------------------------- pictures
class Picture(NamedTuple):
    """A picture inside the page: a data URI, its size in pixels and its caption."""

    uri: str
    width: int
    height: int
    caption: str


def embed_picture(image: Image.Image | Path, caption: str) -> Picture:
    """A picture as a data URI; a PNG or GIF file is embedded byte for byte. ``ValueError`` if the file is neither."""
    kind = "png"
    if isinstance(image, Image.Image):
        encoded = io.BytesIO()
        image.save(encoded, "PNG", optimize=True)
        data, (width, height) = encoded.getvalue(), image.size
    else:
        data, kind = image.read_bytes(), "gif" if image.suffix.lower() == ".gif" else "png"
        try:
            with open_image(data, [kind.upper()]) as opened:
                opened.load()
                width, height = opened.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise ValueError(f"{image.name}: is damaged, or not a {kind.upper()}") from None
    return Picture(f"data:image/{kind};base64," + base64.b64encode(data).decode(), width, height, caption)


def embed_pictures(paths: Iterable[tuple[Path, str]]) -> tuple[list[Picture], list[str]]:
    """The pictures (path, caption) that can be read, and one line for each that cannot."""
    pictures, errors = [], []
    for path, caption in paths:
        try:
            pictures.append(embed_picture(path, caption))
        except (ValueError, OSError) as e:
            errors.append(str(e))
    return pictures, errors


def render_gallery(pictures: Sequence[Picture], alt: str, slider: str = "") -> Markup:
    """Pictures side by side. With the label of a ``slider``, a browser shows one at a time."""
    return render("frames", pictures=pictures, alt=alt, slider=slider if len(pictures) > 1 else "")
