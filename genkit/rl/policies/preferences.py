"""Preference pairs from rollouts: two chunks of actions for one observation, the better by what followed.

Every episode runs twice. The second time its decisions are the same up to one, at random, that is drawn anew, as are
those after it. So the two chunks of that decision have one observation, and what differs afterwards is their doing. No
state is stored: an environment needs only to repeat the episode of a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genkit.core import Cond, Noise, seed_of
from genkit.core.arrays import save_npz
from genkit.data.codecs import Actions
from genkit.envs import Env, Rows
from genkit.rl.policies.episodes import Episodes, run_episodes
from genkit.rl.policies.execution import draw_choice
from genkit.rl.policies.policy import Policy

Score = Callable[[Episodes], np.ndarray]  # [N] of N episodes; of two, the one with the larger number is preferred


class Decision(NamedTuple):
    """One decision of an episode."""

    obs: np.ndarray
    """[To, Do]"""
    chunk: np.ndarray
    """the whole chunk in the environment's units, [A, Tp]"""
    choice: int | None
    """what the model chose before its first step, if it does"""


class PolicyPairs(NamedTuple):
    """N pairs of chunks, for :class:`genkit.rl.finetune.dpo.DPO`."""

    chosen: np.ndarray
    """the preferred ones in the environment's units, past steps included, [N, A, Tp]"""
    rejected: np.ndarray
    cond: Mapping[str, np.ndarray]
    """obs [N, To, Do] and the other conditions, and ``chosen_NAME`` and ``rejected_NAME`` [N] of a choice NAME"""

    def save(self, path: str | Path) -> Path:
        """Write an .npz that ``genkit finetune --method dpo --method.pairs`` reads; its path."""
        return save_npz(path, {"chosen": self.chosen, "rejected": self.rejected, **self.cond})


def find_score(name: str) -> Score:
    """``return``, ``best_reward``, ``success`` or ``coverage`` of episodes, or ``mode=2``: success by that way.

    ``ValueError`` for another name, and, when it is called, for what the environment does not report.
    """
    key, _, mode = name.partition("=")
    if key == "mode" and mode.isdecimal():
        return lambda episodes: (reported(episodes, "mode") == int(mode)) & reported(episodes, "success").astype(bool)
    scores: dict[str, Score] = {
        "return": lambda episodes: episodes.returns,
        "best_reward": lambda episodes: episodes.best,
        "success": lambda episodes: reported(episodes, "success"),
        "coverage": lambda episodes: reported(episodes, "coverage"),
    }
    if name not in scores:
        raise ValueError(f"prefer: given {name!r}; allowed: {', '.join(scores)}, or mode=2 for success by that way")
    return scores[name]


def reported(episodes: Episodes, name: str) -> np.ndarray:
    """What the environment reports of the episodes, ``[N]``. ``ValueError`` if it does not."""
    if name not in episodes.info:
        raise ValueError(f"prefer: this environment reports no {name}; allowed: return, best_reward")
    return episodes.info[name]


@dataclass
class BranchingPolicy:
    """A policy that draws by other random numbers from a given decision of an episode on."""

    policy: Policy
    branches: Mapping[int, int]
    """the number of that decision by the seed of the episode; episodes that are not in it are as they were"""
    seeds: np.ndarray = field(default_factory=lambda: np.zeros(0, int), init=False)
    decided: np.ndarray = field(default_factory=lambda: np.zeros(0, int), init=False)
    """the seed of each row's episode, and the number of its decisions so far, [N]"""

    @property
    def obs_shape(self) -> tuple[int, int]:
        """(To, Do)."""
        return self.policy.obs_shape

    @property
    def action_dim(self) -> int:
        """Dimension of an action."""
        return self.policy.action_dim

    def reset(self, seeds: Sequence[int], rows: Rows | None = None) -> None:
        """Begin episodes with these seeds in ``rows`` (None: all)."""
        self.policy.reset(seeds, rows)
        if rows is None:
            self.seeds, self.decided = np.array(seeds), np.zeros(len(seeds), int)
        else:
            self.seeds[list(rows)], self.decided[list(rows)] = seeds, 0

    def act(self, obs: np.ndarray, *, rows: Rows) -> np.ndarray:
        """Actions ``[M, Ta, A]`` for observations ``[M, To, Do]`` of ``rows``."""
        assert self.policy.noise is not None
        for row in rows:
            if self.branches.get(int(self.seeds[row])) == self.decided[row]:
                self.policy.noise.restart([row], [seed_of(int(self.seeds[row]), 1)])
        self.decided[list(rows)] += 1
        return self.policy.act(obs, rows=rows)


def record_decisions(
    policy: Policy, env: Env, seeds: Sequence[int], branches: Mapping[int, int]
) -> tuple[Episodes, list[list[Decision]]]:
    """One episode for every seed, which draws anew from the decision on that ``branches`` has for it, and the decisions
    of each."""
    codec, name = policy.run.codec, policy.run.objective.chosen_condition
    assert isinstance(codec, Actions)
    drawn: list[tuple[Tensor, Tensor | None]] = []
    decisions: list[list[Decision]] = [[] for _ in seeds]

    def recording(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
        if name is not None:
            probs = policy.run.objective.choice_log_probs(policy.run.nets, cond, z).double().softmax(1)
            cond = {**cond, name: draw_choice(probs, noise)}
        x = policy.generate(z, cond, noise)
        drawn.append((codec.to_absolute(x.float(), cond["obs"]).cpu(), cond.get(name or "")))
        return x

    def keep(numbers: np.ndarray, obs: np.ndarray, actions: np.ndarray) -> None:
        chunks, choices = drawn.pop()
        for i, number in enumerate(numbers):
            choice = None if choices is None else int(choices[i])
            decisions[number].append(Decision(obs[i].astype(np.float32), chunks[i].numpy(), choice))

    actor = BranchingPolicy(replace(policy, generate=recording), branches)
    with torch.no_grad():
        return run_episodes(actor, env, seeds, on_decision=keep), decisions


def collect_pairs(policy: Policy, env: Env, seeds: Sequence[int], score: Score) -> PolicyPairs:
    """Pairs of chunks for the same observation from two episodes of every seed; those of equal scores are left out.

    The decision at which the two part is drawn uniformly from those of the first one, as a function of the seed. The
    worse chunk may be worse by what its later decisions happened to do: one pair says little, many say more.
    ``ValueError`` for policies of plans or pictures, if the environment does not repeat the episode of a seed, or if
    no two scores differ.
    """
    if not policy.supports_q:
        raise ValueError("pairs: need chunks of actions given obs, not plans or pictures; leave them out")
    first, decisions = record_decisions(policy, env, seeds, {})
    branches = [seed_of(seed, 2) % len(made) for seed, made in zip(seeds, decisions, strict=True)]
    second, others = record_decisions(policy, env, seeds, dict(zip(seeds, branches, strict=True)))
    ours = [made[at] for made, at in zip(decisions, branches, strict=True)]
    theirs = [made[at] if at < len(made) else None for made, at in zip(others, branches, strict=True)]
    better = score(first).astype(float) - score(second).astype(float)
    pairs: list[tuple[Decision, Decision]] = []
    for seed, gain, a, b in zip(seeds, better, ours, theirs, strict=True):
        if b is None or not np.allclose(a.obs, b.obs, rtol=1e-4, atol=1e-4):
            raise ValueError(
                f"pairs: the episode of seed {seed} took another course when it was repeated, so that there is no "
                "common observation; needs an environment that its seed determines"
            )
        if gain:
            pairs.append((a, b) if gain > 0 else (b, a))
    if not pairs:
        raise ValueError(f"pairs: none of {len(seeds)} pairs of episodes differ in what is preferred; take more, or "
                         "prefer something else")  # fmt: skip
    return join_pairs(policy, pairs)


def join_pairs(policy: Policy, pairs: Sequence[tuple[Decision, Decision]]) -> PolicyPairs:
    """(chosen, rejected) decisions with their conditions, stacked."""
    chosen, rejected = zip(*pairs, strict=True)
    num, name = len(pairs), policy.run.objective.chosen_condition
    cond = {k: v.expand(num, *v.shape[1:]).cpu().numpy() for k, v in policy.conditions.items()}
    cond["obs"] = np.stack([decision.obs for decision in chosen])
    if name is not None:
        cond |= {f"chosen_{name}": np.array([d.choice for d in chosen]),
                 f"rejected_{name}": np.array([d.choice for d in rejected])}  # fmt: skip
    return PolicyPairs(np.stack([d.chunk for d in chosen]), np.stack([d.chunk for d in rejected]), cond)
