"""Environments in which policies act: N copies side by side, all of one kind (:class:`Env`).

``ENVS`` are those that genkit knows by name; every other name is an id of gymnasium (``genkit.envs.gym``), which may
name the module that registers it: ``my_robot:Reach-v0``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import yaml

from genkit.config import load_object

Rows = Sequence[int] | np.ndarray  # indices of some of N copies
Outcome = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]  # what Env.step returns


class Env(Protocol):
    """N copies of an environment that run side by side. Row i depends on its own seed and actions only.

    A row that has ended stays as it is, with reward 0, until it is reset; nothing resets itself.

    An environment may also have ``modes``, the number of ways that ``info["mode"]`` tells apart; ``frame(row)``, a PIL
    image of one row for films; ``pixels((H, W))``, small images uint8 ``[N, 3, H, W]`` of all rows, for policies that
    observe images; ``draw(paths, colours, title)``, a figure of paths ``[T, Do]`` as a PIL image; and
    ``step_chunk(actions [N, K, A])``, the outcomes of K steps one after another, if it can take them faster at once.
    """

    num: int
    obs_dim: int
    action_dim: int
    max_steps: int

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        """Begin episodes with these seeds in ``rows`` (None: all); the observations of all rows ``[N, Do]``."""
        ...

    def step(self, actions: np.ndarray) -> Outcome:
        """Take ``actions`` ``[N, A]``; ``(obs [N, Do], reward [N], terminated [N], truncated [N], info)``.

        ``terminated`` and ``truncated`` are True in the step that ends a row, and only there. ``info`` holds arrays
        ``[N]`` of every row's own last step: ``success``, ``mode``, ``coverage``, if the environment knows them.
        """
        ...


class Expert(Protocol):
    """A controller of N copies of an environment at once, which demonstrations are recorded from."""

    def reset(self, seeds: Sequence[int]) -> None:
        """Begin episodes with these seeds in all rows."""
        ...

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The actions ``[N, A]`` for observations ``[N, Do]``."""
        ...


ENVS: Mapping[str, str] = {  # name -> "module:Class", called with the number of copies
    "four-ways": "genkit.envs.four_ways:FourWays",
    "pusht": "genkit.envs.gym:PushT",
}
EXPERTS: Mapping[str, Mapping[str, str]] = {  # start of an environment's name -> name of the expert -> "module:Class"
    "four-ways": {"scripted": "genkit.envs.four_ways:FourWaysExpert"},
    "PointMaze_": {"scripted": "genkit.envs.maze:MazeExpert"},
}  # called with the number of copies and the environment's name
EXPERT_ENVS = [f"{name}..." if name.endswith("_") else name for name in EXPERTS]  # for messages


def plain_id(name: str) -> str:
    """An environment's name without the module that registers it: ``Reach-v0`` for ``my_robot:Reach-v0``."""
    return name.rpartition(":")[2]


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """``["reward_type=dense", "size=3"]`` as keyword arguments; values are read as YAML. ``ValueError`` for others."""
    arguments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or name in arguments:
            raise ValueError(f"env_args: {text!r} is not NAME=VALUE, each name once; try reward_type=dense")
        try:
            arguments[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"env_args: {text!r} has a value that is not YAML; quote it: {name}='\"...\"'") from None
    return arguments


def make(name: str, num: int, *, max_steps: int | None = None, entries: Sequence[str] = (), **arguments: Any) -> Env:
    """Make ``num`` copies of an environment with these keyword arguments.

    ``max_steps`` is the time limit of an episode; None: the environment's. ``entries`` are those of observations that
    are dictionaries, in the order of the policy's training. ``ValueError`` says what to install, or what is allowed.
    """
    if num < 1:
        raise ValueError(f"env: given {num} copies; needs at least one")
    limit = {} if max_steps is None else {"max_steps": max_steps}
    if name in ENVS:
        if arguments:
            raise ValueError(f"env_args: {name} takes none, given {', '.join(arguments)}; leave them out")
        kind = load_object(ENVS[name])
        chosen = {"entries": entries} if entries and hasattr(kind, "ENTRIES") else {}
        return kind(num, **limit, **chosen)
    if not name:
        raise ValueError(f"env: not given, and the run's data name none; allowed: {', '.join(ENVS)}, a gymnasium id")
    close = difflib.get_close_matches(name, ENVS, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return load_object("genkit.envs.gym:Gym")(num, name, hint=hint, entries=entries, **limit, **arguments)


def step_chunk(env: Env, actions: np.ndarray) -> Iterator[Outcome]:
    """The outcomes of ``actions`` ``[N, K, A]``, one step after another, as :meth:`Env.step` returns each.

    An environment of its own processes has taken all K of them when the first outcome is here.
    """
    at_once: Any = getattr(env, "step_chunk", None)
    outcomes: Iterable[Outcome] = at_once(actions) if at_once else map(env.step, actions.swapaxes(0, 1))
    yield from outcomes


def check_actions(actions: np.ndarray, num: int, dim: int, env: str) -> np.ndarray:
    """Actions ``[num, dim]`` as floats. ``ValueError`` for another shape or numbers that are not finite."""
    actions = np.asarray(actions, float)
    if actions.shape != (num, dim):
        raise ValueError(f"actions: given shape {actions.shape}; {env} needs {(num, dim)}")
    if not np.isfinite(actions).all():
        bad = int(np.flatnonzero(~np.isfinite(actions).all(1))[0])
        raise ValueError(f"actions: row {bad} is not finite; the policy has diverged")
    return actions


def check_outcome(name: str, values: np.ndarray, rows: Rows, episode: Callable[[int], tuple[int, int]]) -> None:
    """``ValueError`` unless what an environment gave (``values`` ``[N, ...]``, called ``name``) is finite in ``rows``.

    ``episode(row)`` is the seed of a row's episode and the number of its step, for the message.
    """
    finite = np.isfinite(values[rows])
    if finite.all():
        return
    row = int(np.asarray(rows)[np.flatnonzero(~finite.reshape(len(finite), -1).all(1))[0]])
    seed, step = episode(row)
    bad = np.ravel(values[row])[~np.isfinite(np.ravel(values[row]))][0]
    raise ValueError(f"env: gave {name} {bad} in step {step} of the episode of seed {seed}; needs finite numbers")


def make_expert(env: str, name: str, num: int) -> Expert:
    """The expert ``name`` for ``num`` copies of an environment. ``ValueError`` if there is none."""
    experts = next((names for start, names in EXPERTS.items() if plain_id(env).startswith(start)), {})
    if name not in experts:
        allowed = ", ".join(experts)
        allowed = allowed or f"none for {env!r}; there are experts for {', '.join(EXPERT_ENVS)}, and ars finds one"
        raise ValueError(f"expert: given {name!r}; allowed: {allowed}")
    return load_object(experts[name])(num, env)
