"""A policy for a control loop that does not wait: the next chunk of actions is drawn while the last one is carried out.

policy = AsynchronousPolicy(Policy.load("runs/latest"), execution="real-time")
policy.reset(seed=0)
while True:
    robot.send(policy.step(robot.observe()))      # [Do] -> [A], at once
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from torch import Tensor

from genkit.rl.policies.episodes import require_actions
from genkit.rl.policies.execution import continue_underway, require_delay, underway_conditions
from genkit.rl.policies.policy import Policy

REMEMBERED_DELAYS = 10  # the longest of so many decisions is what the next is expected to take (Black et al. 2025)


@dataclass
class AsynchronousPolicy:
    """One environment's policy, with a thread that draws chunks.

    A chunk is begun every ``policy.act_steps`` steps, if no other is being drawn, from the newest observations; when it
    is ready, its actions are carried out from the one on whose time it is. :meth:`step` waits only for the first chunk
    of an episode, and if the actions have run out (:attr:`waited`). ``real-time`` draws each chunk as a continuation of
    the one under way, for the longest delay of the last ten chunks, at first ``delay`` steps; ``limit`` bounds its
    guidance. ``ValueError`` for ``real-time`` as by :class:`genkit.rl.policies.execution.DelayedPolicy`.
    """

    policy: Policy
    execution: Literal["naive", "real-time"] = "real-time"
    delay: int = 1
    limit: float = math.inf
    executor: ThreadPoolExecutor | None = None
    """the thread that draws; None: one of its own"""
    time: int = field(default=0, init=False)
    """number of actions so far"""
    waited: int = field(default=0, init=False)
    """number of steps, besides the first, that had to wait for a chunk"""
    delays: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED_DELAYS), init=False)
    """steps that the newest chunks took"""
    drawing: Future[np.ndarray] | None = field(default=None, init=False)
    """the chunk that is being drawn"""

    def __post_init__(self) -> None:
        require_delay(self.policy, self.delay)
        if self.execution == "real-time":
            self.policy = continue_underway(self.policy, self.limit)
        self.executor = self.executor or ThreadPoolExecutor(1, "genkit-policy")
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Begin an episode, whose random numbers follow from ``seed``; a chunk that is being drawn is not used."""
        if self.drawing is not None and not self.drawing.cancel():
            self.drawing.exception()  # waits: the policy's random numbers belong to one episode at a time
        self.policy.reset([seed])
        self.time, self.waited = 0, 0
        self.history: list[tuple[np.ndarray, np.ndarray | None]] = []
        self.chunk: np.ndarray | None = None  # [H, A], of which the first action is that of step `start`
        self.start = self.drawing_start = 0
        self.drawing = None

    def step(self, obs: np.ndarray, frames: np.ndarray | None = None) -> np.ndarray:
        """The action ``[A]`` of this step, given its observation ``[Do]`` (pictures uint8 ``[C, H, W]``).

        ``ValueError`` if they do not fit the policy; the episode then goes on as if it had not been called.
        """
        obs_steps, obs_dim = self.policy.obs_shape
        newest = np.asarray(obs, np.float32)
        if newest.shape != (obs_dim,):
            raise ValueError(f"obs: given shape {list(newest.shape)}; this policy needs [{obs_dim}]")
        if not np.isfinite(newest).all():
            raise ValueError("obs: is not finite")
        self.policy.check_frames(None if frames is None else frames[None, None].repeat(obs_steps, 1), 1, False)
        self.history = [*(self.history or [(newest, frames)] * (obs_steps - 1)), (newest, frames)][-obs_steps:]
        if self.drawing is None and (self.chunk is None or self.time - self.start >= self.policy.act_steps):
            self.begin()
        self.collect()
        assert self.chunk is not None
        action = self.chunk[self.time - self.start]
        self.time += 1
        return action

    def collect(self) -> None:
        """Take the chunk that is being drawn if it is ready; wait for it if there is no action without it."""
        left = 0 if self.chunk is None else self.start + len(self.chunk) - self.time
        if self.drawing is None or (left > 0 and not self.drawing.done()):
            return
        if left <= 0 and self.chunk is not None:
            self.waited += 1
        pending, self.drawing = self.drawing, None
        chunk = pending.result()
        require_actions(chunk[None], 1, self.policy.action_dim)
        if self.chunk is not None:
            self.delays.append(self.time - self.drawing_start)
        self.chunk, self.start = chunk, self.drawing_start

    def begin(self) -> None:
        """Begin to draw a chunk from the newest observations, in the other thread."""
        window = np.stack([seen for seen, _ in self.history])[None]
        images = [v for _, v in self.history if v is not None]
        frames = np.stack(images)[None] if images else None
        whole = replace(self.policy, act_steps=self.policy.future_steps)
        if self.execution == "real-time" and self.chunk is not None:
            whole.conditions = {**self.policy.conditions, **self.underway(window, frames)}
        assert self.executor is not None
        self.drawing_start = self.time
        self.drawing = self.executor.submit(lambda: whole.act(window, frames)[0])

    def underway(self, window: np.ndarray, frames: np.ndarray | None) -> dict[str, Tensor]:
        """The conditions of a chunk that continues this one, if it takes as long as it is expected to."""
        assert self.chunk is not None
        passed = self.time - self.start
        delay = min(max(self.delays, default=self.delay), len(self.chunk) - passed)
        fixed: Sequence[np.ndarray] = [action[None] for action in self.chunk[passed : passed + delay]]
        return underway_conditions(self.policy, window, fixed, self.chunk[None], passed, frames)
