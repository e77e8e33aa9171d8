"""The quality of a run on its page: tables of cards with the best values marked, and plots against the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from genkit.evaluation.best import SAMPLING, find_best, group_cards, measurement_settings
from genkit.evaluation.cards import (
    OBSERVED,
    WEIGHTS,
    Card,
    comparable_settings,
    describe_data,
    describe_settings,
    rankable,
    to_number,
    to_short,
    to_text,
)
from genkit.evaluation.metrics import metric_direction
from genkit.evaluation.report.html import (
    format_metric,
    format_number,
    render,
    render_heading,
    render_listing,
    render_note,
    render_table,
    render_value,
)
from genkit.evaluation.report.plots import cpu_milliseconds, plot_metrics_by_cost, titled_metrics

CURVE_WEIGHTS = ("run", "step", "ema", "weights_sha256")  # with all that eval --compare refuses, they separate curves
HIDDEN = ("weights", "weights_sha256", "samples")  # of the settings in which samples differ: hashes and file names
LONG_TEXT = 40  # characters; settings with longer values get no column of their own
MARKS_NOTE = (
    "best: the best value of its column; tied: the intervals overlap, so the data do not tell the two apart; no "
    "interval: nothing is known about that."
)


def quality_parts(cards: Sequence[Card], errors: Sequence[str]) -> list[Markup]:
    """A table of the cards for each way of measuring, plots against the cost, and the settings. Cards with fewer
    samples than others, such as those of a sweep's screening, are folded."""
    groups = sorted(group_cards(cards, measurement_settings), key=number_of_samples, reverse=True)
    parts: list[Markup] = []
    titles = title_groups(groups)
    for title, group in zip(titles, groups, strict=True):
        inner = card_parts(group)
        if number_of_samples(group) == number_of_samples(groups[0]):
            parts += [*([render_heading(title)] if len(groups) > 1 else [render_note(title)]), *inner]
        else:
            parts.append(render("fold", name=f"{title}: {count(len(group), 'card')}", inner=Markup("\n").join(inner)))
    if errors:
        parts.append(render_note("Files in eval/ that are not cards, left out:"))
        parts.append(render("lines", lines=errors))
    return parts


def number_of_samples(cards: Sequence[Card]) -> float:
    """The number of samples of each of the cards, which were measured in the same way; 0 if it is not known."""
    return to_number(cards[0].settings.get("n")) or 0


def count(number: int, noun: str) -> str:
    """``1 card``, ``2 cards``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def title_groups(groups: Sequence[Sequence[Card]]) -> list[str]:
    """How each group of cards was measured; what else tells groups apart is added where two would read the same."""
    settings = [measurement_settings(group[0]) for group in groups]
    titles = [describe_measurement(group[0]) for group in groups]
    varying = varying_keys(settings)
    for i, title in enumerate(titles):
        if titles.count(title) > 1:
            own = [f"{key} {to_text(settings[i].get(key))[:LONG_TEXT]}" for key in varying if key in settings[i]]
            titles[i] = f"{title}; {', '.join(own)}"
    return titles


def describe_measurement(card: Card) -> str:
    """How a card was measured, in one line."""
    ignored = {*SAMPLING, *WEIGHTS, *OBSERVED}
    return describe_settings({k: v for k, v in card.settings.items() if k not in ignored})


def card_parts(cards: Sequence[Card]) -> list[Markup]:
    """Table, notes, plots and settings of cards that were measured in the same way."""
    settings = [{k: v for k, v in card.flat_settings.items() if k.partition(".")[0] not in OBSERVED} for card in cards]
    varying = [key for key in varying_keys(settings) if key not in HIDDEN and key != "metrics"]
    columns = [key for key in varying if all(len(to_text(s.get(key, ""))) < LONG_TEXT for s in settings)]
    parts = [card_table(cards, columns)]
    if notes := list(dict.fromkeys(note for card in cards for note in card.notes)):
        parts.append(render("lines", lines=notes))
    parts += plot_metrics_by_cost(list_metrics(cards), group_by_curve(cards))
    # settings that all cards share are listed once; if some differing ones had no column, each card lists its own
    shared = {key: value for key, value in settings[0].items() if all(key in s and s[key] == value for s in settings)}
    if shared:
        title = "Settings of all these cards" if len(cards) > 1 else "Settings of the card"
        parts.append(render("fold", name=title, inner=render_listing(shared)))
    if set(varying) - set(columns):
        for card, its_settings in zip(cards, settings, strict=True):
            own = {key: its_settings[key] for key in varying if key in its_settings}
            parts.append(render("fold", name=f"Settings of {card.name}", inner=render_listing(own)))
    return parts


def list_metrics(cards: Sequence[Card]) -> list[str]:
    """The metrics of the cards."""
    return list(dict.fromkeys(name for card in cards for name in card.metrics))


def card_table(cards: Sequence[Card], columns: Sequence[str]) -> Markup:
    """One row a card: the settings in which they differ, the cost, the metrics with the best marked, the file."""
    titled = titled_metrics(list_metrics(cards), cards)
    heads = [format_metric(name, title) for name, title in titled]
    best = {
        (name, title): find_best(
            metric_direction(name), [rankable(card, name) if card.title(name) == title else None for card in cards]
        )
        for name, title in titled
    }
    cost = {
        "NFE": [to_short(card.settings["nfe"]) if "nfe" in card.settings else "–" for card in cards],
        "ms/sample": [format_number(ms) for ms in map(cpu_milliseconds, cards)],
    }
    cost = {head: cells for head, cells in cost.items() if set(cells) != {"–"} and head.lower() not in columns}
    rows = []
    for i, card in enumerate(cards):
        flat = card.flat_settings
        settings = ["–" if flat.get(key) is None else to_text(flat[key]) for key in columns]
        values = []
        for name, title in titled:
            estimate = card.metrics.get(name) if card.title(name) == title else None
            mark = best[name, title]
            said = "trained on these features" if card.is_trained_on else mark.mark(i) if mark else ""
            values.append(render_value(estimate, said if estimate else ""))
        rows.append([*settings, *(cells[i] for cells in cost.values()), *values, render("small", text=card.name)])
    caption = "Values with their intervals if known; ↓ lower is better, ↑ higher is better."
    if any(best.values()):
        caption += f" {MARKS_NOTE}"
    if "ms/sample" in cost:
        caption += " ms/sample: CPU milliseconds of drawing one."
    return render_table(caption, [*columns, *cost, *heads, "card"], rows, number_columns=[*cost, *heads])


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
        elif card.flat_settings.get(key) is None:
            continue
        elif key == "run":
            words[to_text(card.settings.get(key))] = None
        elif key != "weights_sha256":
            words[f"{name or key} {to_text(card.flat_settings.get(key))}"] = None
    return ", ".join(words)
