"""Experts by search: linear policies of augmented random search (Mania, Guy & Recht 2018, ARS V2-t)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from genkit import __version__
from genkit.config.numbers import Count, NonNegative, Positive, Seed
from genkit.core.files import format_error, write_text
from genkit.envs import Env, check_outcome, plain_id
from genkit.envs.gym import Gym

TARGETS = {"HalfCheetah-v5": 2000.0, "Hopper-v5": 1300.0}  # mean returns; seeds 2 and 1 reach them in half a CPU minute
SURVIVAL_BONUS = {"Hopper-v5": 1.0, "Walker2d-v5": 1.0, "Ant-v5": 1.0, "Humanoid-v5": 5.0}  # part of each reward
ARRAYS = ("weight", "mean", "std", "low", "high")


@dataclass(frozen=True)
class LinearPolicy:
    """Acts by ``weight @ (obs - mean) / std``, with -1 … 1 mapped to ``low`` … ``high``; for any number of rows."""

    weight: np.ndarray
    """[A, Do], or one for each row, [N, A, Do]"""
    mean: np.ndarray
    """[Do], of the observations that the search met"""
    std: np.ndarray
    """[Do]"""
    low: np.ndarray
    """[A], smallest action"""
    high: np.ndarray
    """[A], largest action"""
    origin: str = ""
    """how it was found, in words"""

    def reset(self, seeds: Sequence[int]) -> None: ...

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions ``[N, A]`` for observations ``[N, Do]``."""
        scaled = np.einsum("...ad,...d->...a", self.weight, (obs - self.mean) / self.std).clip(-1, 1)
        return (self.high + self.low) / 2 + (self.high - self.low) / 2 * scaled

    def save(self, path: Path) -> None:
        """Write the policy as JSON."""
        arrays = {name: getattr(self, name).tolist() for name in ARRAYS}
        record = {"genkit": __version__, "origin": self.origin, **arrays}
        write_text(path, json.dumps(record) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LinearPolicy:
        """Read a policy that :meth:`save` wrote. ``ValueError`` if it is missing or damaged."""
        path = Path(path)
        try:
            record = json.loads(path.read_text())
            arrays = [np.asarray(record[name], float) for name in ARRAYS]
            a, do = arrays[0].shape
        except (OSError, ValueError, KeyError, TypeError) as e:
            reason = format_error(e)
            raise ValueError(
                f"expert: {path} is not a linear policy ({reason}); genkit demo --expert ars finds one"
            ) from e
        shapes = [v.shape for v in arrays]
        if shapes != [(a, do), (do,), (do,), (a,), (a,)] or not all(np.isfinite(v).all() for v in arrays):
            raise ValueError(f"expert: {path} is damaged: {', '.join(ARRAYS)} have shapes {shapes}, or are not finite")
        return cls(*arrays, origin=str(record.get("origin", "")))


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the search; the defaults are close to the paper's tables."""

    target: float | None = None
    """mean return at which the search ends; None: one that genkit knows to be in reach"""
    rounds: Count = 300
    """rounds after which it gives up"""
    directions: Count = 8
    """random directions per round, each tried with both signs"""
    top_directions: Count = 4
    """the best of these directions, which the update uses"""
    step_size: Positive = 0.02
    """length of the update, in standard deviations of the returns"""
    noise: Positive = 0.03
    """standard deviation of the weights that are tried"""
    survival_bonus: NonNegative | None = None
    """subtracted from each step's reward during the search, because a policy that is paid for standing learns to stand
    still (section 4.1 of the paper); None: the environment's bonus for each step without a fall, if known"""
    seed: Seed = 0
    """seed of directions and episodes"""

    def target_for(self, env: str) -> float:
        """The mean return to reach. ``ValueError`` if none is given or known."""
        if self.target is None and plain_id(env) not in TARGETS:
            raise ValueError(f"expert.target: not given, and none is known for {env}; say which mean return is enough")
        return TARGETS[plain_id(env)] if self.target is None else self.target


class SearchCallback(Protocol):
    """Called after each round with the number of finished rounds and their last mean return."""

    def __call__(self, done: int, mean_return: float) -> None: ...


def ignore(done: int, mean_return: float) -> None:
    """A ``SearchCallback`` that does nothing."""


def search(env: str, settings: SearchSettings, callback: SearchCallback = ignore, **arguments: Any) -> LinearPolicy:
    """Find a linear policy for an environment of gymnasium, made with these keyword arguments. ``ValueError`` if none
    reaches the target.

    Observations are standardised by those met so far. Whenever the mean return of a round is the best so far, the
    policy in its centre acts in as many episodes; the first that reaches the target ends the search: an expert that is
    good enough, not the best there is.
    """
    target = settings.target_for(env)
    envs = Gym(2 * settings.directions, env, **arguments)
    low, high = (np.asarray(v, float) for v in (envs.action_space.low, envs.action_space.high))
    if not np.isfinite([low, high]).all():
        raise ValueError(f"expert: the actions of {env} have no bounds; a search needs them")
    bonus = SURVIVAL_BONUS.get(plain_id(env), 0.0) if settings.survival_bonus is None else settings.survival_bonus
    rng, stats = np.random.default_rng(settings.seed), RunningStats(envs.obs_dim)
    weight = np.zeros((envs.action_dim, envs.obs_dim))
    best_mean, best_centre = -np.inf, -np.inf
    for i in range(settings.rounds):
        delta = rng.standard_normal((settings.directions, *weight.shape))
        mean, std = stats.mean.copy(), stats.std
        tried = weight + settings.noise * np.concatenate([delta, -delta])
        seeds = [settings.seed * 1_000_003 + i] * envs.num
        returns = episode_returns(envs, LinearPolicy(tried, mean, std, low, high), seeds, stats, bonus)
        round_mean = float(returns.mean())
        callback(i + 1, round_mean)
        # only the centre of a record round is worth the episodes of an evaluation
        if round_mean > best_mean:
            best_mean, centre = round_mean, LinearPolicy(weight, mean, std, low, high)
            centre_return = float(episode_returns(envs, centre, range(envs.num)).mean())
            best_centre = max(best_centre, centre_return)
            if centre_return >= target:
                return replace(centre, origin=f"ARS on {env}, seed {settings.seed}, round {i + 1}: {centre_return:.0f}")
        # the update of the paper's Algorithm 2, from the top directions
        plus, minus = returns[: settings.directions], returns[settings.directions :]
        top = np.argsort(-np.maximum(plus, minus))[: settings.top_directions]
        scale = max(1e-6, float(np.concatenate([plus[top], minus[top]]).std()))
        step = settings.step_size / (settings.top_directions * scale)
        weight = weight + step * np.tensordot(plus[top] - minus[top], delta[top], 1)
    raise ValueError(
        f"expert: the search reached a mean return of {best_centre:.0f} on {env} in {settings.rounds} rounds, not "
        f"{target:g}; try a lower --expert.target, more --expert.rounds or another --expert.seed"
    )


def episode_returns(
    env: Env, policy: LinearPolicy, seeds: Sequence[int], stats: RunningStats | None = None, bonus: float = 0.0
) -> np.ndarray:
    """Returns ``[N]`` of one episode in each row, less ``bonus`` for each step. ``stats`` collects the observations
    that the policy acted on."""
    obs = env.reset(seeds)
    alive, returns, steps = np.ones(env.num, bool), np.zeros(env.num), 0

    def locate(row: int) -> tuple[int, int]:
        return int(seeds[row]), steps

    while alive.any():
        if stats is not None:
            stats.add(obs[alive])
        obs, reward, terminated, truncated, _ = env.step(policy.act(obs))
        steps += 1
        check_outcome("reward", reward, np.flatnonzero(alive), locate)
        returns += reward - bonus * alive
        alive &= ~(terminated | truncated)
        check_outcome("obs", obs, np.flatnonzero(alive), locate)
    return returns


class RunningStats:
    """Mean and standard deviation of all observations so far (Chan, Golub & LeVeque 1983)."""

    def __init__(self, dim: int):
        self.count, self.mean, self.square = 0, np.zeros(dim), np.zeros(dim)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation ``[Do]``; 1 for numbers that have not varied."""
        std = np.sqrt(self.square / max(1, self.count))
        return np.where(std > 1e-7, std, 1.0)

    def add(self, obs: np.ndarray) -> None:
        """Add observations ``[N, Do]``."""
        count, mean = self.count + len(obs), obs.mean(0)
        shift = mean - self.mean
        self.square += ((obs - mean) ** 2).sum(0) + shift**2 * self.count * len(obs) / count
        self.mean = self.mean + shift * len(obs) / count
        self.count = count
