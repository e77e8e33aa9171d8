"""Rewards of an environment other than its own: wrappers of environments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from genkit.envs import Env, Outcome, step_chunk


def own_reward(env: Env) -> Env:
    """The environment as it is."""
    return env


class RewardWrapper(ABC):
    """An environment with other rewards; subclasses implement :meth:`change`."""

    def __init__(self, env: Env):
        self.env, self.modes = env, getattr(env, "modes", 0)
        self.num, self.obs_dim, self.action_dim, self.max_steps = env.num, env.obs_dim, env.action_dim, env.max_steps

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        """Begin episodes, as :meth:`genkit.envs.Env.reset`."""
        return self.env.reset(seeds, rows)

    def step(self, actions: np.ndarray) -> Outcome:
        """Step all rows, as :meth:`genkit.envs.Env.step`, with these rewards."""
        return self.change(self.env.step(actions))

    def step_chunk(self, actions: np.ndarray) -> Iterator[Outcome]:
        """Take K steps of all rows, ``actions`` ``[N, K, A]``, with these rewards."""
        return map(self.change, step_chunk(self.env, actions))

    @abstractmethod
    def change(self, outcome: Outcome) -> Outcome:
        """The outcome of one step with these rewards."""


class SingleModeReward(RewardWrapper):
    """Rewards and successes count only in episodes of one ``mode``."""

    def __init__(self, env: Env, mode: int):
        super().__init__(env)
        if not 0 <= mode < self.modes:
            allowed = f"allowed 0..{self.modes - 1}" if self.modes else "this environment has no modes; leave it out"
            raise ValueError(f"mode: given {mode}; {allowed}")
        self.mode = mode

    def change(self, outcome: Outcome) -> Outcome:
        """The outcome of one step with these rewards."""
        obs, reward, terminated, truncated, info = outcome
        right = info["mode"] == self.mode
        return obs, reward * right, terminated, truncated, {**info, "success": info["success"] & right}


class SuccessReward(RewardWrapper):
    """1 for the first success of an episode, and nothing else.

    In an environment such as PushT, where each step is rewarded for being near the goal and success ends the episode,
    staying close to the goal pays more than reaching it. ``ValueError`` if the environment does not report ``success``.
    """

    def __init__(self, env: Env):
        super().__init__(env)
        self.succeeded = np.zeros(env.num, bool)
        env.reset(range(env.num))
        if "success" not in env.step(np.zeros((env.num, env.action_dim)))[4]:
            raise ValueError("reward: this environment does not say when an episode has succeeded; take --reward env")

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        self.succeeded[list(range(self.num) if rows is None else rows)] = False
        return super().reset(seeds, rows)

    def change(self, outcome: Outcome) -> Outcome:
        """The outcome of one step with these rewards."""
        obs, reward, terminated, truncated, info = outcome
        success = info["success"].astype(bool)
        first = success & ~self.succeeded
        self.succeeded |= success
        return obs, self.pay(reward, first), terminated, truncated, info

    def pay(self, reward: np.ndarray, first: np.ndarray) -> np.ndarray:
        """The rewards [N] of a step with the environment's own ``reward`` [N], where ``first`` [N] marks first
        successes."""
        return first.astype(float)


class ProgressReward(SuccessReward):
    """The increase of the environment's reward from one step to the next (all of it in the first step), and 1 for the
    first success.

    An environment's reward for being near is thus paid for coming near, not for staying: the potential-based shaping of
    Ng, Harada & Russell (1999) without its discount, on top of :class:`SuccessReward`.
    """

    def __init__(self, env: Env):
        super().__init__(env)
        self.previous = np.zeros(env.num)

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        self.previous[list(range(self.num) if rows is None else rows)] = 0
        return super().reset(seeds, rows)

    def pay(self, reward: np.ndarray, first: np.ndarray) -> np.ndarray:
        increase = reward - self.previous
        self.previous = reward.copy()
        return increase + super().pay(reward, first)


REWARDS: Mapping[str, Callable[[Env], Env]] = {"env": own_reward, "success": SuccessReward, "progress": ProgressReward}
