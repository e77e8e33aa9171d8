"""Environments of one's own, as a user registers them: ``tests.support.worlds:Reach-v0`` and ``Shelf-v0``."""

from collections import OrderedDict

import gymnasium
import numpy as np
from gymnasium import spaces


class Reach(gymnasium.Env):
    """A point on a line that goes where it is pushed; ``reward_type`` dense pays what is left to the goal."""

    observation_space = spaces.Box(-10, 10, (2,), np.float64)
    action_space = spaces.Box(-1, 1, (1,), np.float64)

    def __init__(self, goal: float = 1.0, reward_type: str = "dense"):
        self.goal, self.reward_type = goal, reward_type

    def observe(self):
        return np.array([self.place, self.goal])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0.1 * self.np_random.uniform()
        return self.observe(), {}

    def step(self, action):
        self.place = float(np.clip(self.place + 0.1 * action[0], -10, 10))
        near = abs(self.goal - self.place) < 0.2
        reward = -abs(self.goal - self.place) if self.reward_type == "dense" else float(near)
        return self.observe(), reward, False, False, {"is_success": near}


class Shelf(Reach):
    """Reach with a dictionary of observations that does not list its entries by name."""

    observation_space = spaces.Dict(
        OrderedDict(zpos=spaces.Box(-10, 10, (1,), np.float64), agoal=spaces.Box(-10, 10, (2,), np.float64))
    )

    def observe(self):
        return {"zpos": np.array([self.place]), "agoal": np.array([self.goal, 7.0])}


gymnasium.register("Reach-v0", f"{__name__}:Reach", max_episode_steps=12)
gymnasium.register("Shelf-v0", Shelf, max_episode_steps=12)
