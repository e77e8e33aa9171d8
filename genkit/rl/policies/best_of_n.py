"""Choosing at inference: the best of N samples, by a reward or by a Q that is learned from what a policy tried.

The critic of `genkit finetune` is V(obs), what a state is worth; of two chunks of actions it says nothing. Q(obs,
chunk) is regressed onto the discounted returns that followed a chunk when the policy itself went on (Monte Carlo): so
to act by the largest of it is one step of policy improvement, and no more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from genkit.backbones import MLP
from genkit.core import Cond, Generator, Noise, Spec
from genkit.core.files import whole
from genkit.diffusion.samplers.steps import fresh
from genkit.diffusion.value_guidance import Value
from genkit.envs import Env
from genkit.rl.policies.policy import Policy
from genkit.rl.policies.rollout import rollout


def best_of(generate: Generator, value: Value, n: int) -> Generator:
    """Of ``n`` samples for each row the one of the largest ``value``; the first is what ``generate`` alone would give.

    All are drawn as one batch. Row i still depends on its own random numbers only.
    """
    if n < 1:
        raise ValueError(f"best_of: given {n}; needs 1 or more")

    def best(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
        draw, rows = noise or fresh(z), len(z)
        several: Noise = lambda shape: torch.cat([draw(shape) for _ in range(n)])  # noqa: E731
        every = torch.cat([z, *(draw(z.shape[1:]) for _ in range(n - 1))])
        many = {k: torch.cat([v] * n) for k, v in cond.items()}
        x = generate(every, many, several)
        with torch.no_grad():
            worth = value(x, many).reshape(n, rows)
        return x[worth.argmax(0) * rows + torch.arange(rows, device=z.device)]

    return best


# ------------------------------------------------------------------------------------------------------ what was tried
class Tried(NamedTuple):
    """M decisions: what was seen, the chunk in the model's own numbers, and the discounted return that followed."""

    obs: Tensor
    chunks: Tensor
    returns: Tensor


@dataclass
class Logged:
    """An environment that remembers the rewards of the episodes since its reset, and when each ended."""

    env: Env
    rewards: list[np.ndarray] = field(default_factory=list)
    ended: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        env = self.env
        self.num, self.obs_dim, self.action_dim, self.max_steps = env.num, env.obs_dim, env.action_dim, env.max_steps

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        self.rewards, self.ended = [], []
        return self.env.reset(seeds, rows)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        found = self.env.step(actions)
        self.rewards.append(np.asarray(found[1], np.float64))
        self.ended.append(found[2] | found[3])
        return found


def tried(policy: Policy, env: Env, seeds: Sequence[int], gamma: float) -> Tried:
    """The decisions of an episode of every seed. ``gamma`` discounts from one decision to the next; a time limit counts
    as an end."""
    chunks: list[tuple[Tensor, Tensor]] = []

    def remembering(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
        x = policy.generate(z, cond, noise)
        chunks.append((cond["obs"], x))
        return x

    logged, found = Logged(env), []
    for first in range(0, len(seeds), env.num):
        here = list(seeds[first : first + env.num])
        chunks.clear()
        rollout(replace(policy, generate=remembering), logged, here)
        value, valid = to_go(np.stack(logged.rewards), np.stack(logged.ended), policy.act_steps, gamma)
        rows = torch.from_numpy(valid[:, : len(here)])
        for d, (obs, x) in enumerate(chunks):
            keep = rows[d].nonzero()[:, 0]
            found.append((obs[keep], x[keep], torch.from_numpy(value[d])[keep].float()))
    return Tried(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def to_go(rewards: np.ndarray, ended: np.ndarray, act_steps: int, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Of rewards and ends ``[T, N]``: the return from each decision on ``[D, N]``, and whether it was still to make."""
    before = np.concatenate([np.zeros_like(ended[:1]), np.maximum.accumulate(ended)[:-1]])  # ended in an earlier step
    counted = np.where(before, 0, rewards)
    starts = range(0, len(rewards), act_steps)
    value, carried = [], np.zeros(rewards.shape[1])
    for t in reversed(starts):
        carried = counted[t : t + act_steps].sum(0) + gamma * carried
        value.append(carried)
    return np.stack(value[::-1]), ~before[list(starts)]


# ------------------------------------------------------------------------------------------------------------------- Q
class Q(nn.Module):
    """``Q(chunk [B, A, T], cond) -> [B]``, in deviations of the returns that it was learned from.

    It sees the actions that are carried out, ``used`` [A, T], and is blind to the rest of the chunk.
    """

    used: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, spec: Spec, used: Tensor, width: int = 128, depth: int = 2):
        super().__init__()
        obs = {"obs": spec.cond["obs"]}
        self.net = MLP(width, depth).encoder(Spec(spec.shape, obs), (1,))
        self.register_buffer("used", used)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        return self.net(x * self.used, {"obs": cond["obs"]})[:, 0]


def learn_q(
    spec: Spec, used: Tensor, seen: Tried, *, epochs: int = 30, batch: int = 512, lr: float = 1e-3, seed: int = 0
) -> tuple[Q, float]:
    """Q, and the share of the variance of a held-out tenth of the returns that it explains (0: none, 1: all)."""
    torch.manual_seed(seed)
    q = Q(spec, used)
    q.shift.fill_(float(seen.returns.mean()))
    q.scale.fill_(max(1e-6, float(seen.returns.std(correction=0))))
    target = (seen.returns - q.shift) / q.scale
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(target), generator=g)
    held, rest = order[: len(order) // 10], order[len(order) // 10 :]
    steps = epochs * -(-len(rest) // batch)
    optimizer = torch.optim.AdamW(q.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(2, steps))
    for _ in range(epochs):
        for rows in rest[torch.randperm(len(rest), generator=g)].split(batch):
            loss = (q(seen.chunks[rows], {"obs": seen.obs[rows]}) - target[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    q.eval().requires_grad_(False)
    error = (q(seen.chunks[held], {"obs": seen.obs[held]}) - target[held]).square().mean()
    return q, float(1 - error / target[held].var(correction=0).clamp(min=1e-12))


FILE = "q.safetensors"


def save_q(run: File, q: Q, about: dict[str, Any]) -> File:
    """Into the run's folder, with what it was learned from."""
    with whole(run / FILE) as part:
        save_file({k: v.contiguous() for k, v in q.state_dict().items()}, part, {"about": json.dumps(about)})
    return run / FILE


def load_q(run: File, spec: Spec, needs: dict[str, Any]) -> Q:
    """The run's Q. ``ValueError`` where there is none, or where it is of another policy than ``needs`` says."""
    file = run / FILE
    if not file.is_file():
        raise ValueError(f"best_of, q_guidance: {run.name} has no {FILE} yet; learn one: --fit-q 500")
    q = Q(spec, torch.zeros(spec.shape))
    try:
        with safe_open(file, "pt") as f:
            about = json.loads((f.metadata() or {})["about"])
            q.load_state_dict({k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118  it is no dict
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as e:
        raise ValueError(f"{file}: is damaged; learn it again: --fit-q 500") from e
    for name, value in needs.items():
        if about.get(name) != value:
            raise ValueError(f"{file}: was learned with {name} {about.get(name)}, not {value}; learn it: --fit-q 500")
    return q.eval().requires_grad_(False)
