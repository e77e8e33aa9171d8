"""Environments in which policies act: N worlds side by side, all of one kind (:class:`Env`).

``ENVS`` are those that genkit knows by name; every other name is an id of gymnasium (``genkit.envs.gym``).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Env(Protocol):
    """N worlds that run beside each other. Row i depends on its own seed and actions alone.

    A row that has ended stands still, with reward 0, until it is reset; nothing resets itself.
    """

    num: int
    obs_dim: int
    action_dim: int
    max_steps: int

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        """Begin episodes of these seeds in ``rows`` (all of them); the observations of all rows ``[N, Do]``."""
        ...

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """``actions`` [N, A] to ``(obs [N, Do], reward [N], terminated [N], truncated [N], info)``.

        ``terminated`` and ``truncated`` are True in the step that ends a row, and only there. ``info`` holds arrays
        [N], of every row's own last step: ``success``, ``mode``, ``coverage``, where the environment knows them.
        """
        ...


class Expert(Protocol):
    """Somebody who knows how: acts in N worlds at once."""

    def reset(self, seeds: Sequence[int]) -> None: ...
    def act(self, obs: np.ndarray) -> np.ndarray: ...


ENVS: Mapping[str, str] = {  # name -> "module:Class", called with the number of worlds
    "four-ways": "genkit.envs.four_ways:FourWays",
    "pusht": "genkit.envs.gym:PushT",
}
EXPERTS: Mapping[str, Mapping[str, str]] = {  # environments whose name begins like this -> name -> "module:Class"
    "four-ways": {"scripted": "genkit.envs.four_ways:Expert"},
    "PointMaze_": {"scripted": "genkit.envs.maze:Expert"},
}  # called with the number of worlds and the environment's name
NAMED = [f"{name}..." if name.endswith("_") else name for name in EXPERTS]  # for people


def make(name: str, num: int, **options: Any) -> Env:
    """``num`` worlds of an environment. ``ValueError`` says what to install, or what else there is."""
    if num < 1:
        raise ValueError(f"env: given {num} worlds; needs at least one")
    if name in ENVS:
        return named(ENVS[name])(num, **options)
    if not name:
        raise ValueError(f"env: not given, and the run's data name none; allowed: {', '.join(ENVS)}, a gymnasium id")
    from genkit.envs.gym import Gym

    close = difflib.get_close_matches(name, ENVS, 1)
    return Gym(num, name, hint=f"; did you mean {close[0]}?" if close else "", **options)


def expert(env: str, name: str, num: int) -> Expert:
    """An expert in ``num`` worlds of an environment. ``ValueError`` where there is none."""
    known = next((found for begin, found in EXPERTS.items() if env.startswith(begin)), {})
    if name not in known:
        there = ", ".join(known) or f"none for {env!r}; there are experts for {', '.join(NAMED)}, and ars finds one"
        raise ValueError(f"expert: given {name!r}; allowed: {there}")
    return named(known[name])(num, env)


def named(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
