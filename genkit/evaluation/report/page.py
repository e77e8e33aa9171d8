"""The page of a run: curves, samples, quality, latent space, settings, in one HTML file.

It is made from ``config.yaml``, ``log.jsonl``, ``samples/*.png``, ``eval/*.json`` and ``env.json`` of the run, of which
only the first is required. The page says what is missing or damaged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genkit import __version__
from genkit.config import load_yaml
from genkit.core import pictures
from genkit.core.durations import format_duration
from genkit.core.files import refuse_foreign, write_text
from genkit.evaluation.cards import Card, comparable_settings, describe_data, flatten, to_number, to_text
from genkit.evaluation.report import latent_space
from genkit.evaluation.report.html import (
    embed_pictures,
    format_metric,
    format_number,
    render,
    render_gallery,
    render_listing,
    render_note,
    render_page,
    render_table,
    render_tiles,
    render_value,
)
from genkit.evaluation.report.plots import plot_curves, plot_metrics_by_nfe, titled_metrics
from genkit.evaluation.report.records import LogSummary, Point, read_log
from genkit.evaluation.run_records import block_name, read_cards
from genkit.objectives.autoencoders.autoencoder import EncoderDecoder
from genkit.training.checkpoint import find_checkpoint
from genkit.training.directory import find_run
from genkit.training.run import load_run
from genkit.training.settings import stored_settings

TRAINING_GRIDS = 12  # grids of samples on a page, spread evenly over the training
OTHER_PICTURES = 8
CURVE_WEIGHTS = ("step", "ema", "weights_sha256")  # with all that eval --compare refuses, they separate curves
LONG_TEXT = 40  # characters; settings with longer values get no column of their own
CURVE_TITLES = {"grad_norm": "gradient norm", "lr": "learning rate", "samples_per_s": "samples per second"}
LATENT_SPACE_NOTE = (
    "Principal directions of the codes of held-out samples (of training samples if none are held out). Traversals: the "
    "most typical sample in each row, moved along one direction from 2.5 standard deviations below the mean to 2.5 "
    "above, largest direction first. Map: the codes of all samples along the first two directions, coloured by class; "
    "a model that is conditioned on the class need not encode it."
)


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the HTML page of a run and return its path.

    ``out`` defaults to ``report.html`` in the run's directory. If the run has a latent code, its pictures are drawn and
    kept in ``space/``. ``ValueError`` if there is no such run, or ``out`` is not an HTML file's name.
    """
    directory = find_run(run)
    path = Path(out) if out else directory / "report.html"
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise ValueError(f"out: given {out}; allowed: a file that ends in .html")
    refuse_foreign(path)
    return write_text(path, render_run(directory, {"Latent space": latent_space_parts(directory)}))


def render_run(run: str | Path, extra_sections: Mapping[str, Sequence[Markup]] | None = None) -> str:
    """The page of a run, with ``extra_sections`` after the samples. ``ValueError`` if there is no such run."""
    directory = find_run(run)
    cfg, log = load_yaml(directory / "config.yaml"), read_log(directory / "log.jsonl")
    names = {key: block_name(cfg.get(key)) for key in ("objective", "backbone", "data")}
    lead = f"{names['objective']} on {names['data']}, network {names['backbone']}; report by genkit {__version__}"
    cards, errors = read_cards(directory / "eval")
    sections = [
        ("", [summary_tiles(cfg, names, log)]),
        ("Quality", quality_parts(cards, errors)),
        ("Samples over time", training_sample_parts(directory)),
        ("Further samples", other_sample_parts(directory)),
        *(extra_sections or {}).items(),
        ("Training", training_parts(log)),
        ("Configuration", [render("code", name="config.yaml", text=(directory / "config.yaml").read_text("utf-8"))]),
        ("Environment", environment_parts(directory / "env.json")),
    ]
    return render_page(directory.name, lead, sections)


# ------------------------------------------------------------------------------------------------ summary, training
def summary_tiles(cfg: Mapping[str, Any], names: Mapping[str, str], log: LogSummary) -> Markup:
    """The most important facts of a run."""
    items = dict(names)
    if log.num_lines:
        items["steps"] = f"{log.last['step']} of {to_text(cfg.get('steps', '?'))}"
        items["time"] = format_duration(log.seconds)
        if speed := log.curves.get("samples_per_s"):
            median = sorted(point.mean for point in speed)[len(speed) // 2]
            items["samples per second"] = format_number(median)
        for key in [key for key in log.curves if key.endswith("/loss")]:
            items[f"last {key}"] = format_number(to_number(log.last.get(key)))
        if log.last.get("skipped"):
            items["steps skipped"] = to_text(log.last["skipped"])
    return render_tiles(items)


def training_parts(log: LogSummary) -> list[Markup]:
    """Curves of everything in the log: losses in one plot, gradient norms in one, the others by name."""
    if not log.num_lines:
        return [render_note("The log has no lines yet.")]
    groups: dict[str, dict[str, list[Point]]] = {"loss": {}, "grad_norm": {}, "lr": {}, "samples_per_s": {}}
    for key, points in log.curves.items():
        if key not in ("step", "samples", "seconds", "skipped") or (key == "skipped" and points[-1].mean > 0):
            groups.setdefault(key.rpartition("/")[2], {})[key] = points
    plots = [
        plot_curves(CURVE_TITLES.get(name, name), curves, log_scale=name in ("loss", "grad_norm"))
        for name, curves in groups.items()
        if curves
    ]
    notes = [f"{log.num_lines} lines"]
    if log.lines_per_point > 1:
        notes[0] += f", {log.lines_per_point} per point; shaded: their range"
    notes += [f"{key}: {count} not finite" for key, count in log.nonfinite.items()]
    if log.damaged:
        notes.append("one line cannot be read; the log ends before it")
    return [render("plots", plots=plots), render_note("Log: " + "; ".join(notes) + ".")]


# -------------------------------------------------------------------------------------------------------- samples
def spread_evenly(items: Sequence[Any], num: int) -> list[Any]:
    """At most ``num`` of the items, evenly spaced, including the first and the last."""
    if len(items) <= num:
        return list(items)
    return [items[round(i * (len(items) - 1) / (num - 1))] for i in range(num)]


def training_sample_parts(run: Path) -> list[Markup]:
    """The grids of samples that were drawn while training."""
    paths = sorted((run / "samples").glob("step-*.png"))
    chosen = spread_evenly(paths, TRAINING_GRIDS)
    images, errors = embed_pictures((path, step_caption(path)) for path in chosen)
    parts = [render_gallery(images, "Grid of samples", "Checkpoint")] if images else []
    if len(chosen) < len(paths):
        parts.append(render_note(f"{len(chosen)} of {len(paths)} grids, spread evenly over the training."))
    return parts + damage_note(errors)


def step_caption(path: Path) -> str:
    """``step 500`` for ``step-0000500.png``."""
    digits = path.stem.removeprefix("step-")
    return f"step {int(digits)}" if digits.isdecimal() else path.stem


def other_sample_parts(run: Path) -> list[Markup]:
    """The pictures of ``genkit sample`` in the run's directory, newest last, with their settings."""
    paths = [path for path in (run / "samples").glob("*.png") if not path.name.startswith("step-")]
    chosen = sorted(paths, key=lambda path: (path.stat().st_mtime, path.name))[-OTHER_PICTURES:]
    captions = [" · ".join([path.stem, *sampling_facts(path.with_name(path.name + ".json"))]) for path in chosen]
    images, errors = embed_pictures(zip(chosen, captions, strict=True))
    parts = [render_gallery(images, "Samples")] if images else []
    if len(chosen) < len(paths):
        parts.append(render_note(f"The newest {len(chosen)} of {len(paths)}."))
    return parts + damage_note(errors)


def damage_note(errors: Sequence[str]) -> list[Markup]:
    """A note about pictures that cannot be read, if there are any."""
    return [render_note("Left out: " + "; ".join(errors) + ".")] if errors else []


def sampling_facts(path: Path) -> list[str]:
    """Sampler, evaluations, guidance and seed from the JSON file beside a picture; nothing if it cannot be read."""
    try:
        settings = json.loads(path.read_bytes())
        return [f"{k} {to_text(settings[k])}" for k in ("sampler", "nfe", "guidance", "seed") if k in settings]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


# -------------------------------------------------------------------------------------------------------- quality
def quality_parts(cards: Sequence[Card], errors: Sequence[str]) -> list[Markup]:
    """A table of the cards, plots against the number of evaluations, and their settings."""
    parts = card_parts(cards) if cards else []
    if errors:
        parts.append(render_note("Files in eval/ that are not cards, left out:"))
        parts.append(render("lines", lines=errors))
    return parts


def card_parts(cards: Sequence[Card]) -> list[Markup]:
    """Table, notes, plots and settings of one or more cards."""
    settings = [{k: v for k, v in card.flat_settings.items() if k != "notes"} for card in cards]
    varying = varying_keys(settings)
    metrics = list(dict.fromkeys(name for card in cards for name in card.metrics))
    columns = [key for key in varying if all(len(to_text(s.get(key, ""))) < LONG_TEXT for s in settings)]
    parts = [card_table(cards, metrics, columns)]
    if notes := list(dict.fromkeys(note for card in cards for note in card.notes)):
        parts.append(render("lines", lines=notes))
    parts += plot_metrics_by_nfe(metrics, group_by_curve(cards))
    # settings that all cards share are listed once; if some differing ones had no column, each card lists its own
    shared = {key: value for key, value in settings[0].items() if key not in varying}
    if shared:
        title = "Settings of all cards" if len(cards) > 1 else "Settings of the card"
        parts.append(render("fold", name=title, inner=render_listing(shared)))
    if set(varying) - set(columns):
        for card, its_settings in zip(cards, settings, strict=True):
            own = {key: its_settings[key] for key in varying if key in its_settings}
            parts.append(render("fold", name=f"Settings of {card.name}", inner=render_listing(own)))
    return parts


def card_table(cards: Sequence[Card], metrics: Sequence[str], columns: Sequence[str]) -> Markup:
    """One row a card: its metrics, then the settings in ``columns``."""
    titled = titled_metrics(metrics, cards)
    titles = [format_metric(name, title) for name, title in titled]
    rows = []
    for card in cards:
        values = [render_value(card.metrics.get(name) if card.title(name) == title else None) for name, title in titled]
        settings = [to_text(card.flat_settings[key]) if key in card.flat_settings else "–" for key in columns]
        rows.append([card.name, *values, *settings])
    caption = "Values with their intervals if known; ↓ lower is better, ↑ higher is better. "
    if columns:
        caption += "Then the settings in which the cards differ."
    return render_table(caption, ["card", *titles, *columns], rows, number_columns=titles)


def varying_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all ``settings``."""
    keys = dict.fromkeys(key for s in settings for key in s)
    return [key for key in keys if len({to_text(s[key]) if key in s else None for s in settings}) > 1]


def group_by_curve(cards: Sequence[Card]) -> dict[str, list[Card]]:
    """The cards with a known number of evaluations, by the label of their curve.

    A curve has cards that differ in the number of steps alone: of the same weights, and in nothing else that
    ``eval --compare`` refuses.
    """
    cards = [card for card in cards if card.nfe is not None]
    settings = [curve_settings(card) for card in cards]
    varying = varying_keys(settings)
    groups: dict[tuple[str, ...], list[Card]] = {}
    for card, its_settings in zip(cards, settings, strict=True):
        groups.setdefault(tuple(to_text(its_settings.get(key)) for key in varying), []).append(card)
    curves: dict[str, list[Card]] = {}
    for group in groups.values():
        label = unique = curve_label(group[0], varying)
        while unique in curves:  # cards that differ only in what has no name, such as the content of their data
            unique = f"{label} ({1 + sum(name.startswith(label) for name in curves)})"
        curves[unique] = group
    return curves


def curve_settings(card: Card) -> dict[str, Any]:
    """The settings that are the same along a curve."""
    weights = {key: card.settings[key] for key in CURVE_WEIGHTS if key in card.settings}
    settings = weights | comparable_settings(card)
    settings.pop("steps", None)
    return settings


def curve_label(card: Card, varying: Sequence[str]) -> str:
    """What tells a curve from the others: a block by its name, anything else by its value."""
    words: dict[str, None] = {}
    for key in varying:
        block, _, name = key.partition(".")
        if block == "reference" and isinstance(card.settings.get(block), Mapping):
            words["against " + describe_data(card.settings[block])] = None
        elif block == "features" and isinstance(card.settings.get(block), Mapping):
            features = card.settings[block]
            words[" ".join(to_text(features[k]) for k in ("name", "resize") if k in features) + " features"] = None
        elif key != "weights_sha256":
            words[f"{name or key} {to_text(card.flat_settings.get(key))}"] = None
    return ", ".join(words)


# --------------------------------------------------------------------------------------------------- latent space
def latent_space_parts(run: Path) -> list[Markup]:
    """Pictures of the latent space, if the run has a code; a note if they cannot be drawn."""
    if not has_code(run):
        return []
    try:
        paths = draw_latent_space(run)
    except ValueError as e:
        return [render_note(f"Not drawn: {e}")]
    images, _ = embed_pictures((path, name) for name, path in paths.items())
    return [render_gallery(images, "Latent space"), render_note(LATENT_SPACE_NOTE)]


def has_code(run: Path) -> bool:
    """Whether the run's objective is an autoencoder; False if its configuration is of another version."""
    try:
        return isinstance(stored_settings(run).objective, EncoderDecoder)
    except ValueError:
        return False


def draw_latent_space(run: Path) -> dict[str, Path]:
    """The pictures of the newest checkpoint's latent space, drawn on the first call and kept in ``space/``."""
    step = find_checkpoint(run).name
    paths = {name: run / "space" / f"{step}-{name}.png" for name in ("traversals", "map")}
    if not all(path.is_file() for path in paths.values()):
        for name, image in latent_space.latent_figures(load_run(run)).items():
            pictures.save_image(image, paths[name])
    return paths


# ---------------------------------------------------------------------------------------------------- environment
def environment_parts(path: Path) -> list[Markup]:
    """The command and the versions of a run, from its ``env.json``."""
    try:
        environment = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return [render_note("env.json is missing, or cannot be read.")]
    if not isinstance(environment, dict):
        return [render_note("env.json has no settings.")]
    argv = environment.pop("argv", None)
    items = {key: value for key, value in flatten(environment).items() if value is not None}
    if isinstance(argv, list):
        items["command"] = " ".join(map(str, argv))
    return [render_listing(items)]
