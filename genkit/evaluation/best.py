"""Which of several cards is best, among cards that were measured in the same way, with respect to their intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from genkit.evaluation.cards import Card, comparable_settings, flatten, hash_json
from genkit.evaluation.metrics import Direction, Estimate
from genkit.training.sampling import Sampling

T = TypeVar("T")
SAMPLING = {f.name for f in dataclasses.fields(Sampling)} - {"batch"}  # how samples are drawn
COMPUTED = {"metrics"}  # which numbers were asked for; each is computed by itself


def measurement_settings(card: Card) -> dict[str, Any]:
    """The settings, by dotted name, that say how a card was measured: what ``eval --compare`` requires to be equal, but
    for those that say how the samples were drawn."""
    return {k: v for k, v in comparable_settings(card).items() if k.partition(".")[0] not in SAMPLING | COMPUTED}


def sampling_settings_of(card: Card) -> dict[str, Any]:
    """The settings, by dotted name, that say how a card's samples were drawn."""
    return flatten({k: v for k, v in card.settings.items() if k in SAMPLING})


def group_cards(cards: Iterable[Card], settings: Callable[[Card], Mapping[str, Any]]) -> list[list[Card]]:
    """The cards in groups of equal ``settings``, in the order of their first cards."""
    groups: dict[Hashable, list[Card]] = {}
    for card in cards:
        groups.setdefault(hash_json(dict(settings(card))), []).append(card)
    return list(groups.values())


@dataclass(frozen=True)
class Best:
    """The best of some estimates of one number."""

    index: int
    """of the best value"""
    ties: tuple[int, ...]
    """others whose intervals overlap the best one's: the data do not tell them apart"""
    unknown: tuple[int, ...]
    """others without an interval, which cannot be told from the best; all of them if the best has none"""
    has_interval: bool
    """whether the best value has one"""

    def mark(self, index: int) -> str:
        """What a table says beside a value: ``best``, ``best, tied`` or ``best, no interval``; ``tied`` or ``no
        interval`` for another one; the empty string for what is worse, or not known to be."""
        if index == self.index:
            return "best" + (", tied" if self.ties else "" if self.has_interval else ", no interval")
        if index in self.ties:
            return "tied"
        return "no interval" if index in self.unknown and self.has_interval else ""


def find_best(direction: Direction | None, estimates: Sequence[Estimate | None]) -> Best | None:
    """The best of ``estimates``; None if there are fewer than two, or it is not known which ``direction`` is better."""
    present = [(i, e) for i, e in enumerate(estimates) if e is not None]
    if direction is None or len(present) < 2:
        return None
    sign = 1 if direction == "lower" else -1
    index, best = min(present, key=lambda item: sign * item[1].value)
    others = [(i, best.overlaps(e)) for i, e in present if i != index]
    ties = tuple(i for i, both in others if both)
    unknown = tuple(i for i, both in others if both is None)
    return Best(index, ties, unknown, best.low is not None and best.high is not None)


def pareto_front(items: Sequence[T], cost: Callable[[T], float], loss: Callable[[T], float]) -> list[T]:
    """The items that no other equals or beats in both cost and loss (lower is better), by cost."""
    front: list[T] = []
    for item in sorted(items, key=lambda item: (cost(item), loss(item))):
        if not front or loss(item) < loss(front[-1]):
            front.append(item)
    return front
