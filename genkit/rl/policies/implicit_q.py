"""A Q-function of action chunks from the rewards of recorded demonstrations, without the world.

Implicit Q-learning (Kostrikov, Nair & Levine 2022) never asks for the value of an action that was not recorded: V is an
expectile of Q over the recorded actions, and Q is regressed onto reward plus V. Choosing the best of N chunks that the
policy draws by such a Q is IDQL (Hansen-Estruch et al. 2023).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genkit.core import Batch, Codec, Spec
from genkit.data.demonstrations.windows import Demonstrations, window_starts
from genkit.rl.policies.q_function import QFunction, held_out_tenth

TARGET_RATE = 0.005  # of the average of Q that V follows (Kostrikov et al. 2022, appendix B)


class Transitions(NamedTuple):
    """M recorded decisions, each of some steps of the environment."""

    obs: Tensor
    """[M, To, Do]"""
    chunks: Tensor
    """[M, A, T], in the model's units"""
    rewards: Tensor
    """[M], the sums over the steps that a decision lasts"""
    next_obs: Tensor
    """[M, To, Do], at the decision after"""
    ended: Tensor
    """[M], 1 if the episode had ended by then, else 0"""


def recorded_transitions(source: Demonstrations, act_steps: int, codec: Codec) -> Transitions:
    """A decision at every recorded step, of ``act_steps`` steps; the end of a recording counts as an end.

    ``codec`` is the policy's. ``ValueError`` unless samples are chunks of actions given observed numbers, and all
    episodes have rewards.
    """
    obs_steps = source.obs_steps
    # rewards are read for a condition; and windows reach to the last step if all their actions are to be executed
    whole = replace(source, conditions=("returns",), act_steps=source.pred_steps - obs_steps + 1)
    episodes = whole.episodes("train")
    rewards = [e.rewards for e in episodes if e.rewards is not None]
    if len(rewards) < len(episodes):
        raise ValueError("offline_q: the demonstrations have no rewards; train with --data.reward, the array of them")
    windows = whole.windows("train")
    sums, following, ended = [], [], []
    for episode, reward in zip(episodes, rewards, strict=True):
        length = len(episode.actions)
        now = np.arange(len(window_starts(length, obs_steps, source.pred_steps, whole.act_steps)))
        after = now + act_steps
        total = np.concatenate([[0.0], np.cumsum(reward)])
        sums.append(total[after.clip(max=length)] - total[now.clip(max=length)])
        ended.append(after >= length)
        following.append(episode.obs[np.clip(after[:, None] + np.arange(1 - obs_steps, 1), 0, length - 1)])
    x = codec.encode(Batch(windows.actions)).x
    sums, following, ended = (torch.from_numpy(np.concatenate(v)).float() for v in (sums, following, ended))
    return Transitions(source.observed_states(windows), x, sums, following, ended)


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """``|expectile - 1(difference < 0)| difference^2`` (Kostrikov et al. 2022, eq. 4)."""
    return torch.where(difference < 0, 1 - expectile, expectile) * difference**2


def learn_implicit_q(
    spec: Spec,
    used: Tensor,
    data: Transitions,
    *,
    gamma: float,
    expectile: float = 0.7,
    steps: int = 4000,
    batch: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
) -> tuple[QFunction, float]:
    """Q, and the share of the variance of its targets that it explains on a held-out tenth of the decisions.

    ``gamma`` discounts from one decision to the next. V sees observations alone.
    """
    torch.manual_seed(seed)
    q, target, v = (QFunction(spec, mask) for mask in (used, used, torch.zeros_like(used)))
    scale = max(1e-6, float(data.rewards.std(correction=0)))
    for net in (q, target, v):
        net.scale.fill_(scale)
    target.load_state_dict(q.state_dict())
    g = torch.Generator().manual_seed(seed)
    test, train = held_out_tenth(len(data.rewards), g)
    optimizer = torch.optim.Adam([*q.parameters(), *v.parameters()], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def bootstrap(rows: Tensor) -> Tensor:
        with torch.no_grad():
            following = v(data.chunks[rows], {"obs": data.next_obs[rows]})
        return data.rewards[rows] / scale + gamma * (1 - data.ended[rows]) * following

    for _ in range(steps):
        rows = train[torch.randint(len(train), (batch,), generator=g)]
        obs, chunks = {"obs": data.obs[rows]}, data.chunks[rows]
        with torch.no_grad():
            value = target(chunks, obs)
        loss = expectile_loss(value - v(chunks, obs), expectile).mean()
        loss = loss + (q(chunks, obs) - bootstrap(rows)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for a, b in zip(target.parameters(), q.parameters(), strict=True):
                a.lerp_(b, TARGET_RATE)
    q.eval().requires_grad_(False)
    expected = bootstrap(test)
    error = (q(data.chunks[test], {"obs": data.obs[test]}) - expected).square().mean()
    return q, float(1 - error / expected.var(correction=0).clamp(min=1e-12))
