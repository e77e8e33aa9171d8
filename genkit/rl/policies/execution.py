"""Chunks of actions carried out one step at a time, by a policy that takes time to decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genkit.core import Cond, Generator, Label, Noise
from genkit.data.codecs import Actions
from genkit.envs import Rows
from genkit.objectives import AnchoredFlow
from genkit.rl.policies.policy import Policy
from genkit.rl.policies.real_time import UNDERWAY, UNDERWAY_WEIGHT, continue_chunk, soft_mask
from genkit.training.run import Run

ExecutionName = Literal["naive", "ensemble", "real-time"]
# by the scaling of actions: twice the range of the demonstrations, or ten standard deviations from their mean
WIDEST = {"min-max": 2.0, "standardize": 10.0}
ANCHORED_LIMIT = 3.0  # of the guidance of an anchored flow; from 30 on its first step is thrown far from the chunks


@dataclass
class DelayedPolicy:
    """A policy whose chunks arrive ``delay`` steps after the observations that they are drawn for.

    It decides every ``policy.act_steps`` steps. Until a chunk arrives, the earlier ones go on; only the first chunk of
    an episode is waited for. ``naive`` carries out the newest chunk that has arrived, from the action on whose time it
    is. ``ensemble`` averages the actions that all chunks which have arrived have for a step, with weights
    ``exp(-decay i)``, where i = 0 is the oldest of them (temporal ensembling, Zhao et al. 2023, algorithm 2).
    ``real-time`` carries out the newest that has arrived too, but each is drawn as a continuation of the one before
    (:mod:`genkit.rl.policies.real_time`); ``limit`` bounds the guidance. ``ValueError`` if the chunks are too short for
    the delay, or for ``real-time`` of a policy that draws no chunks of actions by the steps of a diffusion.
    """

    policy: Policy
    delay: int = 0
    execution: ExecutionName = "naive"
    decay: float = 0.01
    limit: float = math.inf
    time: int = field(default=0, init=False)
    begun: np.ndarray = field(default_factory=lambda: np.zeros(0, int), init=False)
    """the step that each row's episode began at, [N]"""
    chunks: list[tuple[int, np.ndarray]] = field(default_factory=list, init=False)
    """the step that each chunk begins at, and its actions [N, H, A]; those of rows that were not asked are 0"""

    def __post_init__(self) -> None:
        require_delay(self.policy, self.delay)
        if self.execution == "real-time":
            self.policy = continue_underway(self.policy, self.limit)

    @property
    def obs_shape(self) -> tuple[int, int]:
        """(To, Do); Do is 0 if pictures are all it sees."""
        return self.policy.obs_shape

    @property
    def frame_shape(self) -> tuple[int, ...] | None:
        """(C, H, W) of the pictures that it sees; None if it sees none."""
        return self.policy.frame_shape

    @property
    def action_dim(self) -> int:
        """Dimension of an action."""
        return self.policy.action_dim

    def reset(self, seeds: Sequence[int], rows: Rows | None = None) -> None:
        """Begin episodes in ``rows`` (None: all): they draw from their own seeds, and no chunk of theirs is under
        way."""
        self.policy.reset(seeds, rows)
        if rows is None:
            self.time, self.chunks, self.begun = 0, [], np.zeros(len(seeds), int)
        else:
            self.begun[list(rows)] = self.time

    def act(self, obs: np.ndarray, frames: np.ndarray | None = None, rows: Rows | None = None) -> np.ndarray:
        """The actions ``[M, Ta, A]`` of the next steps, for observations ``[M, To, Do]`` and pictures as
        :meth:`Policy.act` takes them, of ``rows`` (None: all)."""
        asked = np.arange(len(self.begun)) if rows is None else np.asarray(rows)
        first = self.begun[asked] == self.time
        parts = [first, ~first] if self.execution == "real-time" else [np.ones(len(asked), bool)]
        newest = np.zeros((len(self.begun), self.policy.future_steps, self.action_dim), np.float32)
        for part in (p for p in parts if p.any()):
            images = None if frames is None else frames[part]
            newest[asked[part]] = self.draw(
                obs[part], images, asked[part], self.execution == "real-time" and part is not first
            )
        self.chunks.append((self.time, newest))
        actions = [self.action(t, asked) for t in range(self.time, self.time + self.policy.act_steps)]
        self.time += self.policy.act_steps
        self.chunks = [(start, chunk) for start, chunk in self.chunks if start + chunk.shape[1] > self.time]
        return np.stack(actions, 1)

    def draw(self, obs: np.ndarray, frames: np.ndarray | None, rows: np.ndarray, continued: bool) -> np.ndarray:
        """New chunks ``[M, H, A]`` of ``rows``, which continue those under way if ``continued``."""
        policy = self.policy.select(rows)
        whole = replace(policy, act_steps=policy.future_steps)
        if continued:
            start, newest = self.chunks[-1]
            fixed = [self.action(t, rows) for t in range(self.time, self.time + self.delay)]
            underway = underway_conditions(policy, obs, fixed, newest[rows], self.time - start, frames)
            whole.conditions = {**policy.conditions, **underway}
        return whole.act(obs, frames)

    def action(self, t: int, rows: np.ndarray) -> np.ndarray:
        """The actions ``[M, A]`` of ``rows`` in step ``t``, from the chunks of their episodes that have arrived."""
        chunks = [(start, chunk) for start, chunk in self.chunks if t - start < chunk.shape[1]]
        starts, begun = np.array([start for start, _ in chunks])[:, None], self.begun[rows]
        arrived = (starts >= begun) & ((starts == begun) | (starts + self.delay <= t))  # [K, M]
        actions = np.stack([chunk[rows, t - start] for start, chunk in chunks])
        if self.execution != "ensemble":
            newest = len(chunks) - 1 - arrived[::-1].argmax(0)
            return actions[newest, np.arange(len(rows))]
        age = arrived.cumsum(0) - 1  # 0 is the oldest of a row's own
        weights = np.where(arrived, np.exp(-self.decay * age), 0)
        return np.einsum("km,kma->ma", weights / weights.sum(0), actions).astype(actions.dtype)


def require_delay(policy: Policy, delay: int) -> None:
    """``ValueError`` if the chunks of a policy are too short for a delay of so many steps."""
    longest = policy.future_steps - policy.act_steps
    if not 0 <= delay <= longest:
        raise ValueError(
            f"delay: given {delay}; chunks of {policy.future_steps} actions, of which {policy.act_steps} are executed, "
            f"allow 0 … {longest}; take fewer --act-steps"
        )


def underway_conditions(
    policy: Policy,
    obs: np.ndarray,
    fixed: Sequence[np.ndarray],
    newest: np.ndarray,
    passed: int,
    frames: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """The conditions of a chunk for ``obs`` ``[N, To, Do]`` (and pictures) that continues what is under way.

    They are the actions ``[N, A, Tp]`` in the model's units, and their weights ``[1, 1, Tp]``: first the actions
    ``fixed`` ``[N, A]`` that are carried out until it arrives, then those of the ``newest`` chunk ``[N, H, A]`` for the
    steps after, which began ``passed`` steps ago. An anchored policy is also given the anchor that continues them.
    """
    codec, delay, length = policy.run.codec, len(fixed), newest.shape[1]
    assert isinstance(codec, Actions)
    after = list(np.moveaxis(newest[:, passed + delay :], 1, 0))
    actions = torch.from_numpy(np.stack([*fixed, *after], 2))
    past = policy.run.spec.shape[1] - length
    actions = torch.nn.functional.pad(actions, (past, length - actions.shape[2]))
    weights = torch.nn.functional.pad(soft_mask(length, delay, passed), (past, 0))
    device = policy.run.device
    window = torch.from_numpy(np.asarray(obs, np.float32)).to(device)
    samples, weight = codec.from_absolute(actions.to(device), window).float(), weights[None, None].to(device)
    conditions = {UNDERWAY: samples, UNDERWAY_WEIGHT: weight}
    if isinstance(policy.run.objective, AnchoredFlow):
        seen = policy.cond(window, None if frames is None else torch.from_numpy(frames))
        probs = anchor_posterior(policy.run, seen, samples, weight)
        conditions[policy.run.objective.anchor] = draw_choice(probs, policy.noise)
    return conditions


def anchor_posterior(run: Run, cond: Cond, underway: Tensor, weight: Tensor) -> Tensor:
    """Probabilities ``[N, K]`` of the anchors of an anchored flow whose chunk is to be near ``underway`` ``[N, *S]``
    with these weights: of ``p(anchor | cond) exp(-sum weight (underway - anchor)^2 / (2 std^2))``."""
    objective = run.objective
    assert isinstance(objective, AnchoredFlow)
    kind = run.spec.cond[objective.anchor]
    assert isinstance(kind, Label)
    centers = torch.tensor(kind.centers, device=underway.device).reshape(kind.num, *run.spec.shape)
    distance = (weight[:, None] * (underway[:, None] - centers) ** 2).flatten(2).sum(2)
    with torch.no_grad():
        log_probs = objective.choice_log_probs(run.nets, cond, underway)
    return (log_probs.double() - distance / (2 * objective.std**2)).softmax(1)


def draw_choice(probs: Tensor, noise: Noise | None) -> Tensor:
    """One of K choices ``[N]`` for each row of ``probs`` ``[N, K]``, by a normal of the row's own."""
    normal = noise((1,))[:, 0] if noise else torch.randn(len(probs), device=probs.device)
    index = torch.searchsorted(probs.cumsum(1), torch.special.ndtr(normal.double())[:, None])[:, 0]
    return index.clamp(max=probs.shape[1] - 1)


def continue_underway(policy: Policy, limit: float) -> Policy:
    """The policy, which continues what its conditions say is under way; the actions of these chunks are clipped to
    ``WIDEST``.

    ``ValueError`` unless it draws chunks of actions by the steps of a diffusion.
    """
    run = policy.run
    if not isinstance(run.codec, Actions) or policy.generate_with is None:
        raise ValueError(
            f"execution: given real-time, which continues chunks of actions that are drawn in steps; "
            f"{run.directory.name} is a {type(run.objective).__name__} of {type(run.codec).__name__}; take naive or "
            "ensemble"
        )
    if isinstance(run.objective, AnchoredFlow):
        guided = policy.guided(continue_chunk(min(limit, ANCHORED_LIMIT), run.objective.std))
    else:
        guided = policy.guided(continue_chunk(limit))
    widest = WIDEST[getattr(run.config.data, "scaling", "standardize")]
    return replace(guided, generate=clip_continued(guided.generate, widest))


def clip_continued(generate: Generator, widest: float) -> Generator:
    """A generator whose chunks that continue another one are clipped to ``[-widest, widest]``.

    Guidance is the stronger the less a network knows: that of a hardly trained one throws a chunk far away, and the
    next chunk is to continue this one. ``ValueError`` for numbers that are not finite.
    """

    def clipped(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
        x = generate(z, cond, noise)
        if UNDERWAY not in cond:
            return x
        if not bool(x.isfinite().all()):
            raise ValueError("guidance_limit: real-time execution gave actions that are not finite; try a lower one, "
                             "--guidance-limit 5, or --execution naive")  # fmt: skip
        return x.clamp(-widest, widest)

    return clipped
