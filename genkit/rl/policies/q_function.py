"""A Q-function of action chunks, learned from episodes of the policy itself.

The critic of `genkit finetune` is V(obs), the value of a state; it cannot compare two chunks of actions. Q(obs, chunk)
is regressed onto the discounted returns that followed a chunk when the policy went on by itself (Monte Carlo). So
choosing actions by the largest Q is one step of policy improvement, and no more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from genkit.backbones import MLP
from genkit.core import Cond, Noise, Spec
from genkit.core.files import atomic_write
from genkit.envs import Env
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.policy import Policy

FILE = "q.safetensors"


# ------------------------------------------------------------------------------------------------------ the data
class Decisions(NamedTuple):
    """M decisions: observations [M, To, Do], chunks in the model's units [M, A, T], discounted returns after [M]."""

    obs: Tensor
    chunks: Tensor
    returns: Tensor


def collect_decisions(policy: Policy, env: Env, seeds: Sequence[int], gamma: float) -> Decisions:
    """The decisions of one episode for every seed. ``gamma`` discounts from one decision to the next; a time limit
    counts as an end."""
    drawn: list[tuple[Tensor, Tensor]] = []  # (obs, chunks) of each call of the policy
    asked: list[np.ndarray] = []  # the episodes that it was for

    def recording(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
        x = policy.generate(z, cond, noise)
        drawn.append((cond["obs"].cpu(), x.cpu()))
        return x

    episodes = run_episodes(
        replace(policy, generate=recording), env, seeds, on_decision=lambda numbers, obs, actions: asked.append(numbers)
    )
    returns = [discounted_returns(rewards, policy.act_steps, gamma) for rewards in episodes.rewards]
    decided, parts = np.zeros(len(episodes), int), []
    for numbers, (obs, x) in zip(asked, drawn, strict=True):
        followed = [returns[i][decided[i]] for i in numbers]
        decided[numbers] += 1
        parts.append((obs[: len(numbers)], x[: len(numbers)], torch.tensor(followed, dtype=torch.float32)))
    return Decisions(*(torch.cat(values) for values in zip(*parts, strict=True)))


def discounted_returns(rewards: np.ndarray, act_steps: int, gamma: float) -> np.ndarray:
    """Returns ``[D]`` from each decision of an episode on, for the rewards ``[T]`` of its steps."""
    returns, following = [], 0.0
    for t in reversed(range(0, len(rewards), act_steps)):
        following = rewards[t : t + act_steps].sum() + gamma * following
        returns.append(following)
    return np.array(returns[::-1])


# -------------------------------------------------------------------------------------------------- the function
def held_out_tenth(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of a tenth of ``num`` decisions, at least two, by which Q is judged, and of the others, in random order.

    ``ValueError`` for fewer than three: of one value there is no variance to explain.
    """
    if num < 3:
        raise ValueError(f"fit_q, offline_q: given {num} decisions; needs 3 or more, and a useful Q hundreds")
    order = torch.randperm(num, generator=g)
    test = max(2, num // 10)
    return order[:test], order[test:]


class QFunction(nn.Module):
    """``Q(chunk [B, A, T], cond) -> [B]``, in deviations of the returns that it was learned from.

    It depends on the actions that are carried out, ``used`` [A, T] (1, else 0), and not on the rest of the chunk.
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
        """``[B]`` for chunks ``x`` [B, A, T] and ``cond["obs"]`` [B, To, Do]."""
        return self.net(x * self.used, {"obs": cond["obs"]})[:, 0]


def learn_q(
    spec: Spec, used: Tensor, data: Decisions, *, epochs: int = 30, batch: int = 512, lr: float = 1e-3, seed: int = 0
) -> tuple[QFunction, float]:
    """Q, and the share of the variance of a held-out tenth of the returns that it explains (0: none, 1: all)."""
    torch.manual_seed(seed)
    q = QFunction(spec, used)
    q.shift.fill_(float(data.returns.mean()))
    q.scale.fill_(max(1e-6, float(data.returns.std(correction=0))))
    target = (data.returns - q.shift) / q.scale
    g = torch.Generator().manual_seed(seed)
    test, train = held_out_tenth(len(target), g)
    steps = epochs * -(-len(train) // batch)
    optimizer = torch.optim.AdamW(q.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(2, steps))
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train), generator=g)].split(batch):
            loss = (q(data.chunks[rows], {"obs": data.obs[rows]}) - target[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    q.eval().requires_grad_(False)
    error = (q(data.chunks[test], {"obs": data.obs[test]}) - target[test]).square().mean()
    return q, float(1 - error / target[test].var(correction=0).clamp(min=1e-12))


def save_q(run: Path, q: QFunction, about: dict[str, Any]) -> Path:
    """Write Q into the run's folder, with a record of what it was learned from; the file."""
    with atomic_write(run / FILE) as part:
        save_file({k: v.contiguous() for k, v in q.state_dict().items()}, part, {"about": json.dumps(about)})
    return run / FILE


def load_q(run: Path, spec: Spec, needs: dict[str, Any]) -> QFunction:
    """The Q in the run's folder. ``ValueError`` if there is none, or if its record contradicts ``needs``."""
    file = run / FILE
    if not file.is_file():
        raise ValueError(f"best_of, q_guidance: {run.name} has no {FILE} yet; learn one: --fit-q 500")
    q = QFunction(spec, torch.zeros(spec.shape))
    try:
        with safe_open(file, "pt") as f:
            about = json.loads((f.metadata() or {})["about"])
            q.load_state_dict({k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118  not a dict
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as e:
        raise ValueError(f"{file}: is damaged; learn it again: --fit-q 500") from e
    for name, value in needs.items():
        if about.get(name) != value:
            raise ValueError(f"{file}: was learned with {name} {about.get(name)}, not {value}; learn it: --fit-q 500")
    return q.eval().requires_grad_(False)
