"""What the files of a run directory say about it: its settings, progress, log, cards, notes and rollouts.

Nothing is imported that the run names and no network is made, so the directory may be anybody's; what is missing or
damaged is named in ``problem`` and left out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from genkit.config import load_yaml
from genkit.core.messages import warn_once
from genkit.evaluation.best import Best, find_best, group_cards, measurement_settings
from genkit.evaluation.cards import Card, flatten, parse_card, rankable, to_number
from genkit.evaluation.metrics import Estimate, metric_direction
from genkit.training.annotations import Annotations, read_annotations
from genkit.training.best import BestCheckpoint, read_best
from genkit.training.directory import find_run, list_checkpoints, list_incomplete, read_state, step_of
from genkit.training.lock import is_locked

TAIL = 1 << 18  # bytes at the end of a log in which its last numbers are looked up
REWARDS = ("return", "reward", "success")  # numbers of an iteration of fine-tuning
RESULTS = ("val/", "eval/", "rollout/", "before/", "after/", "checkpoint/")  # of evaluations, not of training steps


class Headline(NamedTuple):
    """The best value of a metric among the cards of a run that were measured in the same way, with most samples."""

    metric: str
    title: str
    estimate: Estimate
    card: Card
    best: Best | None
    """None if there is no other card to compare it with"""


@dataclass(frozen=True)
class RunRecord:
    """A run directory as its files describe it."""

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    """``config.yaml``"""
    finetuning: Mapping[str, Any] = field(default_factory=dict)
    """``finetune.yaml``; empty for a run that was not fine-tuned"""
    checkpoints: tuple[int, ...] = ()
    """steps of the complete checkpoints, oldest first"""
    problem: str = ""
    """what is damaged, in one line; empty if nothing is"""

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.path.name

    @property
    def objective(self) -> str:
        """The objective's NAME, for a fine-tuned run with the method's."""
        method = f" + {block_name(self.finetuning.get('method', 'dppo'))}" if self.finetuning else ""
        return block_name(self.config.get("objective")) + method

    @property
    def backbone(self) -> str:
        """The backbone's NAME."""
        return block_name(self.config.get("backbone"))

    @property
    def data(self) -> str:
        """The data's NAME."""
        return block_name(self.config.get("data"))

    @property
    def steps(self) -> int | None:
        """The steps that were asked for; iterations of fine-tuning."""
        number = self.finetuning.get("iterations", 60) if self.finetuning else self.config.get("steps")
        return number if isinstance(number, int) else None

    @property
    def step(self) -> int | None:
        """The step of the newest line of the log, or of the newest checkpoint; None if there is neither."""
        known = [step for step in (self.last.get("step"), *self.checkpoints[-1:]) if isinstance(step, int)]
        return max(known, default=None)

    @cached_property
    def state(self) -> str:
        """``training now``, ``finished``, ``stopped early`` (by its patience), ``stopped``, ``no checkpoint yet`` or
        ``damaged``."""
        if is_locked(self.path):
            return "training now"
        if not self.config:
            return "damaged"
        if not self.checkpoints:
            return "no checkpoint yet"
        if self.steps is not None and self.checkpoints[-1] >= self.steps:
            return "finished"
        patience, best = to_number(self.config.get("patience")), self.best_checkpoint
        return "stopped early" if best and patience and best.is_stale(int(patience)) else "stopped"

    @cached_property
    def best_checkpoint(self) -> BestCheckpoint | None:
        """The checkpoint that ``--keep-best`` of training has chosen; None if there is none."""
        best = read_best(self.path)
        return best if best and best.value is not None else None

    # ------------------------------------------------------------------------------------------------------ the log
    @cached_property
    def last(self) -> Mapping[str, Any]:
        """The last line of training in the log; empty if there is none."""
        for record in tail_records(self.path / "log.jsonl"):
            if any(is_progress(key) for key in record):
                return record
        return {}

    @property
    def losses(self) -> dict[str, float]:
        """The last losses by their keys in the log (``denoise/loss``); of fine-tuning return, reward and success."""
        keys = [k for k in self.last if is_progress(k)]
        numbers = {k: to_number(self.last[k]) for k in keys}
        return {k: v for k, v in numbers.items() if v is not None}

    # --------------------------------------------------------------------------------------------- cards, checkpoints
    @cached_property
    def card_files(self) -> tuple[tuple[Card, ...], tuple[str, ...]]:
        """The cards in ``eval``, and a line for each file that is no card."""
        cards, errors = read_cards(self.path / "eval")
        return tuple(cards), tuple(errors)

    @property
    def cards(self) -> tuple[Card, ...]:
        """The cards in ``eval``."""
        return self.card_files[0]

    @cached_property
    def headlines(self) -> tuple[Headline, ...]:
        """The best value of each metric, among the cards with the most samples that were measured in one way."""
        groups = group_cards(self.cards, measurement_settings)
        chosen = max(groups, key=lambda g: (to_number(g[0].settings.get("n")) or 0, len(g)), default=[])
        found = []
        for metric in dict.fromkeys(name for card in chosen for name in card.metrics):
            having = [card for card in chosen if metric in card.metrics]
            best = find_best(metric_direction(metric), [rankable(card, metric) for card in having])
            card = having[best.index if best else -1]
            found.append(Headline(metric, card.title(metric), card.metrics[metric], card, best))
        return tuple(found)

    @cached_property
    def checkpoint_state(self) -> Mapping[str, Any]:
        """``state.json`` of the newest checkpoint; empty if there is none."""
        try:
            return read_state(self.newest_checkpoint) if self.checkpoints else {}
        except ValueError:
            return {}

    @property
    def newest_checkpoint(self) -> Path:
        """The directory of the newest checkpoint. ``IndexError`` if there is none."""
        return self.path / "checkpoints" / f"step-{self.checkpoints[-1]:07d}"

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Numbers in the newest checkpoint's ``nets.safetensors``, by network; of a LoRA run its adapter's."""
        return count_numbers(self.newest_checkpoint / "nets.safetensors") if self.checkpoints else {}

    @cached_property
    def environment(self) -> Mapping[str, Any]:
        """``env.json``; empty if it is missing or damaged."""
        return read_json(self.path / "env.json")

    # ------------------------------------------------------------------------------------------------- notes, files
    @cached_property
    def annotations(self) -> Annotations:
        """Notes and tags."""
        return read_annotations(self.path)

    @cached_property
    def modified(self) -> float:
        """When training last wrote something, in seconds since 1970."""
        files = [self.path / "config.yaml", self.path / "log.jsonl"]
        files += [self.newest_checkpoint / "state.json"] if self.checkpoints else []
        return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)

    @cached_property
    def size(self) -> int:
        """Bytes of all files; links are not followed."""
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_size
                except OSError:  # removed meanwhile by training
                    continue
        return total

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration by dotted name, that of fine-tuning below ``finetune``."""
        return flatten(self.config) | flatten({"finetune": self.finetuning} if self.finetuning else {})

    def to_dict(self) -> dict[str, Any]:
        """Everything that ``genkit list`` shows, ready for JSON."""
        return {
            "path": str(self.path),
            "name": self.name,
            "state": self.state,
            "objective": self.objective,
            "backbone": self.backbone,
            "data": self.data,
            "step": self.step,
            "steps": self.steps,
            "losses": self.losses,
            "best": {
                h.title: {**h.estimate._asdict(), "n": h.card.settings.get("n"), "card": h.card.name}
                for h in self.headlines
            },
            "parameters": sum(self.parameters.values()) or None,
            "age_seconds": round(time.time() - self.modified, 1) if self.modified else None,
            "size_bytes": self.size,
            "best_checkpoint": str(self.best_checkpoint) if self.best_checkpoint else None,
            **self.annotations.to_dict(),
            "problem": self.problem or None,
        }


# ------------------------------------------------------------------------------------------------------- reading
def read_run(path: str | Path) -> RunRecord:
    """The run directory at ``path``. ``ValueError`` if it is none; a damaged one has its ``problem`` named."""
    directory = find_run(path)
    problems: list[str] = []
    config = load_mapping(directory / "config.yaml", problems)
    tuning = load_mapping(directory / "finetune.yaml", problems) if (directory / "finetune.yaml").is_file() else {}
    try:
        checkpoints = tuple(step_of(checkpoint) for checkpoint in list_checkpoints(directory))
        for checkpoint in list_incomplete(directory):
            warn_once(f"{checkpoint} is damaged (state.json); it is left out")
    except OSError as e:
        checkpoints = ()
        problems.append(f"checkpoints: {e.strerror}")
    return RunRecord(directory, config, tuning, checkpoints, "; ".join(problems))


def load_mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    """The mapping in a YAML file; an empty one, and a line in ``problems``, if it cannot be read or is empty."""
    try:
        tree = load_yaml(path)
    except ValueError as e:
        problems.append(" ".join(str(e).replace(str(path), path.name).split()))
        return {}
    if not tree:
        problems.append(f"{path.name}: is empty")
    return tree


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if it is missing, damaged or something else."""
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def read_cards(folder: Path) -> tuple[list[Card], list[str]]:
    """The cards in ``folder``, by checkpoint and number of evaluations, and one line for each file that is no card."""
    cards, errors = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            cards.append(parse_card(path.read_bytes(), path))
        except (ValueError, OSError) as e:
            errors.append(f"{path.name}: {e.strerror if isinstance(e, OSError) else e}")
    return sorted(cards, key=card_order), errors


def card_order(card: Card) -> tuple[Any, ...]:
    """Sort key: checkpoint, number of network evaluations, name; unknown numbers last."""
    numbers = (card.step, card.nfe)
    return ([(number is None, number or 0) for number in numbers], card.name)


def tail_records(path: Path) -> list[dict[str, Any]]:
    """The last records of a log, newest first; lines that cannot be read are left out."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - TAIL))
            lines = f.read().splitlines()
    except OSError:
        return []
    records = []
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def is_progress(key: str) -> bool:
    """Whether a key of the log is a training loss, or the return or reward of fine-tuning."""
    return (key.endswith("/loss") and not key.startswith(RESULTS)) or key in REWARDS


def block_name(block: object) -> str:
    """The NAME of a block in ``config.yaml``."""
    return str(block.get("name", "?") if isinstance(block, Mapping) else block or "?")


def count_numbers(path: Path) -> dict[str, int]:
    """Numbers in a safetensors file by the first part of their names; empty if it cannot be read."""
    counts: dict[str, int] = {}
    try:
        with safe_open(path, "np") as stored:
            for name in stored.keys():  # noqa: SIM118
                size = 1
                for length in stored.get_slice(name).get_shape():
                    size *= length
                net = name.partition("/")[0].partition(".")[0]
                counts[net] = counts.get(net, 0) + size
    except (OSError, SafetensorError):
        return {}
    return counts
