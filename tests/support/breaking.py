"""An environment that breaks, in a module that other processes import fast."""

import time

import numpy as np


class Breaking:
    """Row 0 raises an error of its own in the second step."""

    num, obs_dim, action_dim, max_steps = 2, 1, 1, 9

    def __init__(self, num):
        self.num, self.steps = num, 0

    def reset(self, seeds, rows=None):
        return np.zeros((self.num, 1))

    def step(self, actions):
        self.steps += 1
        if self.steps == 2:
            raise ValueError("the gripper is stuck")
        none = np.zeros(self.num, bool)
        return np.zeros((self.num, 1)), np.zeros(self.num), none, none, {}


class Gaps(Breaking):
    """The reward, or what is observed, is no number in the third step of the second row."""

    def __init__(self, num, name="reward"):
        super().__init__(num)
        self.name = name

    def reset(self, seeds, rows=None):
        self.steps = 0
        return super().reset(seeds, rows)

    def step(self, actions):
        self.steps += 1
        obs, reward = np.zeros((self.num, 1)), np.zeros(self.num)
        if self.steps == 3:
            (obs if self.name == "obs" else reward)[1] = np.nan
        return obs, reward, np.zeros(self.num, bool), np.full(self.num, self.steps == self.max_steps), {}


class Slow(Breaking):
    """Steps take a fifth of a second."""

    def step(self, actions):
        time.sleep(0.2)
        none = np.zeros(self.num, bool)
        return np.zeros((self.num, 1)), np.zeros(self.num), none, none, {}
