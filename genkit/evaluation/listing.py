"""Finding, filtering and sorting runs: what `genkit list` and ``genkit.list_runs`` do."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from genkit.config.blocks import suggest
from genkit.core.links import follow_links
from genkit.evaluation.cards import setting_differences, to_number, to_text
from genkit.evaluation.metrics import METRICS, metric_direction
from genkit.evaluation.run_records import Headline, RunRecord, block_name, read_run

logger = logging.getLogger("genkit")
MAX_DEPTH = 3  # levels of directories below a given one in which runs are looked for
OWN_FILES = ("log.jsonl", "checkpoints", "env.json")  # with one of these a directory is a run, however damaged
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "k": 1e3, "M": 1e6, "G": 1e9}
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda a, b: a < b, ">": lambda a, b: a > b, "<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b
}  # fmt: skip
FIELDS: dict[str, Callable[[RunRecord], Any]] = {
    "name": lambda run: run.name,
    "objective": lambda run: (block_name(run.config.get("objective")), run.objective),  # flow, and flow + dppo
    "backbone": lambda run: run.backbone,
    "data": lambda run: run.data,
    "state": lambda run: run.state,
    "step": lambda run: run.step,
    "steps": lambda run: run.steps,
    "loss": lambda run: next(iter(run.losses.values()), None),
    "parameters": lambda run: sum(run.parameters.values()) or None,
    "age": lambda run: time.time() - run.modified if run.modified else None,
    "size": lambda run: run.size,
    "tag": lambda run: run.annotations.tags,
    "note": lambda run: tuple(note.text for note in run.annotations.notes),
}


def list_runs(
    *directories: str | Path, where: Sequence[str] = (), sort: str = "name", reverse: bool = False
) -> list[RunRecord]:
    """The runs in ``directories`` (``runs`` if none is given) and below, without importing what they name.

    ``where`` holds conditions that must all be met, FIELD=VALUE, !=, <, >, <= or >=: a FIELD is one of ``FIELDS``, a
    dotted name of the configuration (``backbone.width``) or a metric of the cards (``fid``), texts are compared as
    patterns (``digits*``), and ages and sizes have units (``age<2d``). ``sort`` is such a field too; for a metric the
    best comes first. Runs without the field come last. Damaged runs are listed with their ``problem``. Raises
    ``ValueError`` for a directory that does not exist, or a field that no run has.
    """
    runs = [read_run(path) for path in find_runs(directories or ("runs",))]
    conditions = [Condition.parse(text) for text in where]
    for name in [sort, *(condition.name for condition in conditions)]:
        require_field(name, runs)
    runs = [run for run in runs if all(condition.is_met(run) for condition in conditions)]
    return sort_runs(runs, sort, reverse)


def find_runs(directories: Iterable[str | Path]) -> list[Path]:
    """The run directories at or below ``directories``, each once, in the order of their names.

    Hidden directories are not entered, and neither are runs. ``ValueError`` if one does not exist.
    """
    found: list[Path] = []
    entered: set[Path] = set()
    for directory in directories:
        top = follow_links(Path(directory).expanduser())
        if not top.is_dir():
            raise ValueError(f"list: given {directory}, which is no directory; runs are in --out of genkit train")
        found += walk_runs(top.resolve(), MAX_DEPTH, entered)
    return found


def walk_runs(folder: Path, depth: int, entered: set[Path]) -> Iterator[Path]:
    """The run directories at and below the resolved ``folder``, except those in ``entered``, to which all are added."""
    if folder in entered:  # links may form a loop, and name a run twice
        return
    entered.add(folder)
    if (folder / "config.yaml").is_file():
        if is_own(folder):
            yield folder
        else:
            logger.warning(f"note     {folder}: left out, its config.yaml is of another program")
        return
    if depth == 0:
        return
    try:
        inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as e:
        logger.warning(f"note     {folder}: left out ({e.strerror})")
        return
    for name in inner:
        if not name.startswith("."):
            yield from walk_runs((folder / name).resolve(), depth - 1, entered)


def is_own(folder: Path) -> bool:
    """Whether a directory with a ``config.yaml`` is a run of genkit, whole or damaged."""
    if any((folder / name).exists() for name in OWN_FILES):
        return True
    return "objective" in read_run(folder).config


# --------------------------------------------------------------------------------------------- filtering, sorting
@dataclass(frozen=True)
class Condition:
    """What a run must meet to be listed."""

    name: str
    operator: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """``objective=flow`` as a condition. ``ValueError`` for another form."""
        match = re.fullmatch(r"\s*([\w.()\- ]+?)\s*(!=|<=|>=|=|<|>)(.*)", text, re.S)
        if not match or (match[2] in OPERATORS and to_quantity(match[3]) is None):
            raise ValueError(f"where: given {text!r}; allowed: FIELD=VALUE, FIELD!=VALUE, or FIELD<NUMBER, >, <=, >=, "
                             "such as objective=flow or age<2d")  # fmt: skip
        return cls(match[1], match[2], match[3].strip())

    def is_met(self, run: RunRecord) -> bool:
        """Whether the run meets it. A field that the run does not have equals nothing."""
        values = field_values(run, self.name)
        if self.operator in OPERATORS:
            limit = to_quantity(self.value)
            assert limit is not None
            return any(isinstance(v, int | float) and OPERATORS[self.operator](v, limit) for v in values)
        equal = any(is_equal(value, self.value) for value in values)
        return equal == (self.operator == "=")


def is_equal(value: Any, text: str) -> bool:
    """Whether a setting is what ``text`` states: equal as a number, or as a text that may be a pattern."""
    number, wanted = to_number(value), to_quantity(text)
    if number is not None and wanted is not None:
        return number == wanted
    return fnmatch(to_text(value).casefold(), text.casefold())


def to_quantity(text: str) -> float | None:
    """``text`` as a number, with a unit (``2d``, ``1.5M``) if it has one; None if it is none."""
    match = re.fullmatch(r"\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*([a-zA-Z]*?)B?\s*", text)
    if not match or (match[2] and match[2] not in UNITS):
        return None
    try:
        return float(match[1]) * UNITS.get(match[2], 1)
    except ValueError:
        return None


def field_values(run: RunRecord, name: str) -> tuple[Any, ...]:
    """The values of a field: several for tags and notes, none if the run does not have it."""
    if name in FIELDS:
        value = FIELDS[name](run)
        return value if isinstance(value, tuple) else () if value is None else (value,)
    settings = run.settings
    if name in settings:
        return (settings[name],)
    if headline := find_headline(run, name):
        return (headline.estimate.value,)
    return (settings[f"{name}.name"],) if f"{name}.name" in settings else ()


def find_headline(run: RunRecord, name: str) -> Headline | None:
    """The run's best value of a metric, by its name or title."""
    return next((h for h in run.headlines if name in (h.metric, h.title)), None)


def require_field(name: str, runs: Sequence[RunRecord]) -> None:
    """``ValueError`` if ``name`` is neither a field nor a setting or metric of one of the runs."""
    metrics = [value for metric in METRICS.values() for value in metric.values]
    if name in FIELDS or name in metrics or not runs or any(field_values(run, name) for run in runs):
        return
    known = [*FIELDS, *dict.fromkeys(key for run in runs for key in run.settings)]
    raise ValueError(f"list: no run has a field {name!r}; allowed: {', '.join(FIELDS)}, a dotted setting such as "
                     f"backbone.width, or a metric{suggest(name, known)}")  # fmt: skip


def sort_runs(runs: Sequence[RunRecord], name: str, reverse: bool = False) -> list[RunRecord]:
    """The runs by a field, those without it last; metrics from the best to the worst, and last those of runs that were
    trained on the features."""
    key = {id(run): (values[0] if (values := field_values(run, name)) else None) for run in runs}
    for run in runs:
        if name not in FIELDS and (headline := find_headline(run, name)) and headline.card.is_trained_on:
            key[id(run)] = None
    having = [run for run in runs if key[id(run)] is not None]
    missing = [run for run in runs if key[id(run)] is None]
    better_high = name not in FIELDS and metric_direction(name) == "higher"

    def order(run: RunRecord) -> tuple[Any, ...]:
        value = key[id(run)]
        number = to_number(value)
        return (0, number, "") if number is not None else (1, 0, natural(to_text(value)))

    return sorted(having, key=order, reverse=reverse != better_high) + missing


def natural(text: str) -> tuple[Any, ...]:
    """A sort key by which run 10 comes after run 9."""
    parts = re.split(r"(\d+)", text)
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts if part)


def incomparable(runs: Sequence[RunRecord], name: str) -> str:
    """Why the order of the runs by a metric says little: how two of their cards differ; empty if they do not."""
    cards = [headline.card for run in runs if (headline := find_headline(run, name))]
    for card in cards[1:]:
        if differences := setting_differences(cards[0], card):
            return f"the cards differ in more than the weights: {'; '.join(differences[:3])}"
    return ""
