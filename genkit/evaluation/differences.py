"""What differs between runs: what `genkit diff` and ``genkit.diff_runs`` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genkit.evaluation.best import Best, find_best, group_cards
from genkit.evaluation.cards import Card, comparable_settings, describe_settings, flatten, rankable, setting_differences
from genkit.evaluation.metrics import Estimate, metric_direction
from genkit.evaluation.run_records import RunRecord, read_run

IGNORED = ("argv", "cwd", "init", "date")  # of the environment: they differ between any two runs, or are settings
NAMES = ("name", "out", "finetune.name", "finetune.out")  # where a run is, not what it is


@dataclass(frozen=True)
class MetricRow:
    """One number, measured in the same way for two or more of the runs."""

    metric: str
    title: str
    estimates: tuple[Estimate | None, ...]
    """one a run; None if the run has no such card"""
    cards: tuple[Card | None, ...]
    best: Best | None

    @property
    def measurement(self) -> str:
        """How it was measured, in one line."""
        settings = next(dict(card.settings) for card in self.cards if card)
        return describe_settings({k: v for k, v in settings.items() if k not in ("seconds", "ema", "nfe")})


@dataclass(frozen=True)
class RunDifferences:
    """What differs between runs. Each difference is a name and one value a run, None for what a run does not have."""

    runs: tuple[RunRecord, ...]
    settings: Mapping[str, tuple[Any, ...]]
    """of the configuration, by dotted name"""
    data: Mapping[str, tuple[Any, ...]]
    """of the fingerprint of the training data"""
    parameters: Mapping[str, tuple[Any, ...]]
    """numbers of parameters by network"""
    environment: Mapping[str, tuple[Any, ...]]
    """version of genkit, git commit, packages, device"""
    progress: Mapping[str, tuple[Any, ...]]
    """state, step and last losses"""
    metrics: tuple[MetricRow, ...]
    """of cards that ``eval --compare`` would compare, whether or not they differ"""
    incomparable: tuple[str, ...]
    """one line for each run whose cards all differ from the others' in how they were measured"""

    @property
    def short_settings(self) -> dict[str, tuple[Any, ...]]:
        """``settings``, with one row for those of fine-tuning if some of the runs were not fine-tuned."""
        names = [name for name in self.settings if name.startswith("finetune.")]
        if None not in self.settings.get("finetune.run", ()):
            return dict(self.settings)
        short = {k: v for k, v in self.settings.items() if k not in names}
        return short | {f"finetune ({len(names)} settings)": self.settings["finetune.method.name"]}

    def to_dict(self) -> dict[str, Any]:
        """The differences as JSON has them."""
        rows = [
            {
                "metric": row.metric,
                "title": row.title,
                "measurement": row.measurement,
                "values": [e and e._asdict() for e in row.estimates],
                "cards": [card and str(card.path) for card in row.cards],
                "marks": [row.best.mark(i) if row.best and e else "" for i, e in enumerate(row.estimates)],
            }
            for row in self.metrics
        ]
        parts = ("settings", "data", "parameters", "environment", "progress")
        differences = {part: {k: list(v) for k, v in getattr(self, part).items()} for part in parts}
        paths = [str(run.path) for run in self.runs]
        return {"runs": paths, **differences, "metrics": rows, "incomparable": list(self.incomparable)}


def diff_runs(*runs: Any) -> RunDifferences:
    """What differs between two or more runs, given as directories or :class:`RunRecord` objects.

    Metrics are compared of cards that ``genkit eval --compare`` would compare: equal in everything but the weights. Of
    several such cards of one run the one of the latest step counts. ``ValueError`` for fewer than two runs, or one
    whose configuration is damaged.
    """
    records = tuple(run if isinstance(run, RunRecord) else read_run(run) for run in runs)
    if len(records) < 2:
        raise ValueError(f"diff: given {len(records)} run; needs two or more: genkit diff RUN RUN")
    for record in records:
        if record.problem:
            raise ValueError(f"diff: {record.path}: {record.problem}")
    environments = [
        {k: v for k, v in flatten(record.environment).items() if k.partition(".")[0] not in IGNORED and v is not None}
        for record in records
    ]
    progress = [{"state": r.state, "step": r.step, "steps": r.steps, **r.losses} for r in records]
    return RunDifferences(
        records,
        differing([{k: v for k, v in record.settings.items() if k not in NAMES} for record in records]),
        compare_data(records),
        differing([{**record.parameters, "all": sum(record.parameters.values())} for record in records]),
        differing(environments),
        differing(progress),
        compare_metrics(records),
        tuple(describe_incomparable(records)),
    )


def differing(trees: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The entries that are not equal in all ``trees``: ``{name: (value in each, None if it is absent)}``."""
    names = dict.fromkeys(name for tree in trees for name in tree)
    values = {name: tuple(tree.get(name) for tree in trees) for name in names}
    present = {name: {name in tree for tree in trees} for name in names}
    return {k: v for k, v in values.items() if len(present[k]) > 1 or any(x != v[0] for x in v[1:])}


def compare_data(runs: Sequence[RunRecord]) -> dict[str, tuple[Any, ...]]:
    """What differs between the fingerprints of the training data and how samples are encoded.

    Runs without a fingerprint (fine-tuned ones) have None everywhere, and ``fingerprint`` names them.
    """
    fingerprints = [flatten(run.checkpoint_state.get("data") or {}) for run in runs]
    codecs = [flatten({"codec": run.checkpoint_state.get("codec") or {}}) for run in runs]
    having = [i for i, fingerprint in enumerate(fingerprints) if fingerprint]
    among = differing([fingerprints[i] for i in having]) if having else {}
    spread = {k: tuple(fingerprints[i].get(k) for i in range(len(runs))) for k in among}
    if len(having) not in (0, len(runs)):
        spread["fingerprint"] = tuple("stored" if fingerprint else None for fingerprint in fingerprints)
    return {**spread, **differing(codecs)}


def compare_metrics(runs: Sequence[RunRecord]) -> tuple[MetricRow, ...]:
    """The metrics of cards that two or more runs have, measured in the same way."""
    owner = {id(card): i for i, run in enumerate(runs) for card in run.cards}
    rows = []
    for group in group_cards([card for run in runs for card in run.cards], comparable_settings):
        cards: list[Card | None] = [None] * len(runs)
        for card in group:
            earlier = cards[owner[id(card)]]
            if earlier is None or (card.step or 0) >= (earlier.step or 0):
                cards[owner[id(card)]] = card
        if sum(card is not None for card in cards) < 2:
            continue
        for metric in dict.fromkeys(name for card in cards if card for name in card.metrics):
            estimates = tuple(card.metrics.get(metric) if card else None for card in cards)
            title = next(card.title(metric) for card in cards if card)
            best = find_best(metric_direction(metric), [rankable(card, metric) for card in cards])
            rows.append(MetricRow(metric, title, estimates, tuple(cards), best))
    return tuple(rows)


def describe_incomparable(runs: Sequence[RunRecord]) -> list[str]:
    """A line for each run whose cards cannot be compared with those of any other run."""
    lines = []
    for run in runs:
        others = [card for other in runs if other is not run for card in other.cards]
        if not run.cards or not others:
            continue
        if all(setting_differences(card, other) for card in run.cards for other in others):
            reasons = min((setting_differences(card, other) for card in run.cards for other in others), key=len)
            lines.append(f"{run.name}: no card is comparable with another run's; {'; '.join(reasons)}")
    return lines
