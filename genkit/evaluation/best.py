"""Which of several cards is best, among cards that were measured in the same way, with respect to their intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from genkit.evaluation.cards import Card, comparable_settings, flatten, hash_json
from genkit.evaluation.metrics import Estimate, metric_direction
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
    """others that cannot be told from the best, because one of the two has no interval"""

    def mark(self, index: int) -> str:
        """``best``, ``tied``, ``interval unknown``, or the empty string for what is worse."""
        if index == self.index:
            return "best"
        return "tied" if index in self.ties else "interval unknown" if index in self.unknown else ""


def find_best(metric: str, estimates: Sequence[Estimate | None]) -> Best | None:
    """The best of ``estimates``; None if there are fewer than two, or it is not known which direction is better."""
    direction = metric_direction(metric)
    present = [(i, e) for i, e in enumerate(estimates) if e is not None]
    if direction is None or len(present) < 2:
        return None
    sign = 1 if direction == "lower" else -1
    index, best = min(present, key=lambda item: sign * item[1].value)
    others = [(i, best.overlaps(e)) for i, e in present if i != index]
    return Best(index, tuple(i for i, both in others if both), tuple(i for i, both in others if both is None))


def pareto_front(items: Sequence[T], cost: Callable[[T], float], loss: Callable[[T], float]) -> list[T]:
    """The items that no other equals or beats in both cost and loss (lower is better), by cost."""
    front: list[T] = []
    for item in sorted(items, key=lambda item: (cost(item), loss(item))):
        if not front or loss(item) < loss(front[-1]):
            front.append(item)
    return front
