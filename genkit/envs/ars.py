"""Experts that are found: linear policies by augmented random search (Mania, Guy & Recht 2018, ARS V2-t)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt

from genkit.core.files import one_line, write_text
from genkit.envs import Env
from genkit.envs.gym import Gym

TARGETS = {
    "HalfCheetah-v5": 2000.0,
    "Hopper-v5": 1300.0,
}  # mean returns; seeds 2 and 1 find them in half a CPU minute
SURVIVAL = {"Hopper-v5": 1.0, "Walker2d-v5": 1.0, "Ant-v5": 1.0, "Humanoid-v5": 5.0}  # part of each step's reward


@dataclass(frozen=True)
class Linear:
    """Acts by ``weight @ (obs - mean) / std``, -1 … 1 becoming ``low`` … ``high``; any number of worlds at once."""

    weight: np.ndarray
    """[A, Do], or one for each world, [N, A, Do]"""
    mean: np.ndarray
    """[Do], of the observations that the search met"""
    std: np.ndarray
    low: np.ndarray
    """[A], the least that an action may be"""
    high: np.ndarray
    found: str = ""
    """how, for a person"""

    def reset(self, seeds: Sequence[int]) -> None: ...

    def act(self, obs: np.ndarray) -> np.ndarray:
        """``[N, Do]`` to ``[N, A]``."""
        told = np.einsum("...ad,...d->...a", self.weight, (obs - self.mean) / self.std).clip(-1, 1)
        return (self.high + self.low) / 2 + (self.high - self.low) / 2 * told

    def save(self, path: Path) -> None:
        record = {"found": self.found, **{name: getattr(self, name).tolist() for name in ARRAYS}}
        write_text(path, json.dumps(record) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Linear:
        """What :meth:`save` wrote. ``ValueError`` where it is missing or damaged."""
        path = Path(path)
        try:
            record = json.loads(path.read_text())
            arrays = [np.asarray(record[name], float) for name in ARRAYS]
            a, do = arrays[0].shape
        except (OSError, ValueError, KeyError, TypeError) as e:
            reason = one_line(e)
            raise ValueError(
                f"expert: {path} is no linear policy ({reason}); genkit demo --expert ars finds one"
            ) from e
        shapes = [v.shape for v in arrays]
        if shapes != [(a, do), (do,), (do,), (a,), (a,)] or not all(np.isfinite(v).all() for v in arrays):
            raise ValueError(f"expert: {path} is damaged: {', '.join(ARRAYS)} have shapes {shapes}, or are not finite")
        return cls(*arrays, found=str(record.get("found", "")))


ARRAYS = ("weight", "mean", "std", "low", "high")


@dataclass(frozen=True)
class Search:
    """Settings of the search; those of the paper's tables are near."""

    target: Annotated[float, Gt(0)] | None = None
    """Mean return at which it ends; None: what genkit knows to be in reach."""
    rounds: Annotated[int, Ge(1)] = 300
    """After which it gives up."""
    directions: Annotated[int, Ge(1)] = 8
    """Directions of a round, each of which is tried forwards and backwards."""
    best: Annotated[int, Ge(1)] = 4
    """Directions of these that are followed."""
    lr: Annotated[float, Gt(0)] = 0.02
    """Length of the step, in deviations of the returns."""
    spread: Annotated[float, Gt(0)] = 0.03
    """Deviation of a trial's weights."""
    survival: Annotated[float, Ge(0)] | None = None
    """Taken from each step's reward while searching: who is paid for standing learns to stand still (section 4.1 of the
    paper). None: what the environment is known to pay, for all steps but that of a fall."""
    seed: Annotated[int, Ge(0)] = 0
    """Every random number depends on it."""

    def aim(self, name: str) -> float:
        if self.target is None and name not in TARGETS:
            raise ValueError(f"expert.target: not given, and none is known for {name}; say which mean return is enough")
        return TARGETS[name] if self.target is None else self.target


def search(name: str, how: Search, watch: Callable[[int, float], None] = lambda done, mean: None) -> Linear:
    """A linear policy for an environment of gymnasium. ``watch(round, mean return)`` sees each round.

    Observations are standardised by those met so far. Whenever the trials of a round are the best so far, the policy
    in their middle acts in as many episodes; the first to come to the target ends the search: an expert as good as was
    asked for, not the best there is. ``ValueError`` where none does.
    """
    aim = how.aim(name)
    env = Gym(2 * how.directions, name)
    low, high = (np.asarray(v, float) for v in (env.action_space.low, env.action_space.high))
    if not np.isfinite([low, high]).all():
        raise ValueError(f"expert: the actions of {name} have no bounds; a search needs them")
    survival = SURVIVAL.get(name, 0.0) if how.survival is None else how.survival
    g, met = np.random.default_rng(how.seed), Met(env.obs_dim)
    weight, most, top = np.zeros((env.action_dim, env.obs_dim)), -np.inf, -np.inf
    for i in range(how.rounds):
        delta = g.standard_normal((how.directions, *weight.shape))
        mean, std = met.mean.copy(), met.std
        tried = weight + how.spread * np.concatenate([delta, -delta])
        seeds = [how.seed * 1_000_003 + i] * env.num
        returns = trial(env, Linear(tried, mean, std, low, high), seeds, met, survival)
        now = float(returns.mean())
        watch(i + 1, now)
        if now > most:
            most, middle = now, Linear(weight, mean, std, low, high)
            own = float(trial(env, middle, range(env.num)).mean())
            top = max(top, own)
            if own >= aim:
                return replace(middle, found=f"ARS on {name}, seed {how.seed}, round {i + 1}: {own:.0f}")
        forth, back = returns[: how.directions], returns[how.directions :]
        chosen = np.argsort(-np.maximum(forth, back))[: how.best]
        scale = max(1e-6, float(np.concatenate([forth[chosen], back[chosen]]).std()))
        weight = weight + how.lr / (how.best * scale) * np.tensordot(forth[chosen] - back[chosen], delta[chosen], 1)
    raise ValueError(
        f"expert: the search reached a mean return of {top:.0f} on {name} in {how.rounds} rounds, not {aim:g}; try a "
        "lower --expert.target, more --expert.rounds or another --expert.seed"
    )


def trial(env: Env, policy: Linear, seeds: Sequence[int], met: Met | None = None, survival: float = 0.0) -> np.ndarray:
    """Returns ``[N]`` of an episode in each world, less ``survival`` for each step of it; ``met`` sees all observations
    that were acted on."""
    obs = env.reset(seeds)
    alive, returns = np.ones(env.num, bool), np.zeros(env.num)
    while alive.any():
        if met is not None:
            met.add(obs[alive])
        obs, reward, terminated, truncated, _ = env.step(policy.act(obs))
        returns += reward - survival * alive
        alive &= ~(terminated | truncated)
    return returns


class Met:
    """Mean and deviation of all observations so far (Chan, Golub & LeVeque 1983)."""

    def __init__(self, dim: int):
        self.count, self.mean, self.square = 0, np.zeros(dim), np.zeros(dim)

    @property
    def std(self) -> np.ndarray:
        """1 where nothing has varied."""
        std = np.sqrt(self.square / max(1, self.count))
        return np.where(std > 1e-7, std, 1.0)

    def add(self, obs: np.ndarray) -> None:
        count, here = self.count + len(obs), obs.mean(0)
        away = here - self.mean
        self.square += ((obs - here) ** 2).sum(0) + away**2 * self.count * len(obs) / count
        self.mean = self.mean + away * len(obs) / count
        self.count = count
