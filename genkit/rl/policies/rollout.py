"""Rollouts: episodes of a policy in an environment, many at a time, and what came of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from genkit.envs import Env
from genkit.evaluation.metrics.estimate import Estimate, bootstrap, proportion


class Actor(Protocol):
    """What a rollout needs of a policy; :class:`genkit.rl.policies.policy.Policy` has it."""

    @property
    def obs_shape(self) -> tuple[int, int]: ...
    @property
    def action_dim(self) -> int: ...
    def reset(self, seeds: Sequence[int]) -> None: ...
    def act(self, obs: np.ndarray) -> np.ndarray: ...


@dataclass
class Episodes:
    """What came of N episodes, one number each."""

    returns: np.ndarray
    """the sum of the rewards"""
    best: np.ndarray
    """the largest reward of a step: on PushT what its papers report, coverage over 0.95, at most 1"""
    lengths: np.ndarray
    truncated: np.ndarray
    """whether the time limit ended it"""
    info: dict[str, np.ndarray]
    """``success`` (ever), ``coverage`` (the largest), ``mode`` (the last); those that the environment knows"""
    paths: list[np.ndarray]
    """observations of each, ``[T + 1, Do]``"""
    modes: int = 0
    """how many there are"""
    seconds: list[float] = field(default_factory=list)
    """of each call of the policy"""
    frames: list[list[Any]] = field(default_factory=list)
    """pictures (PIL) of the first episodes"""

    def __len__(self) -> int:
        return len(self.returns)

    @property
    def mode_entropy_bits(self) -> float | None:
        """Entropy of the mode among the successful episodes (0 without any); None where there are no modes."""
        if "mode" not in self.info:
            return None
        good = self.info["mode"][self.info["success"].astype(bool) & (self.info["mode"] >= 0)]
        return entropy_bits(np.bincount(good.astype(int), minlength=self.modes))

    def summary(self) -> dict[str, Any]:
        """Estimates with 95 % intervals, ready for JSON: Wilson's of a share, the bootstrap's of a mean."""
        out: dict[str, Any] = {"episodes": len(self)}
        if "success" in self.info:
            out["success"] = proportion(int(self.info["success"].sum()), len(self))._asdict()
        out["return"] = mean_of(self.returns)._asdict()
        out["best_reward"] = mean_of(self.best)._asdict()
        if "coverage" in self.info:
            out["coverage"] = mean_of(self.info["coverage"])._asdict()
        out["length"] = float(self.lengths.mean())
        out["truncated"] = float(self.truncated.mean())
        if (bits := self.mode_entropy_bits) is not None:
            out["mode_entropy_bits"] = bits
        out["ms_per_chunk"] = 1e3 * float(np.median(self.seconds)) if self.seconds else None
        return out


def entropy_bits(counts: np.ndarray) -> float:
    """``-sum p log2 p`` of counts; 0 where there are none."""
    p = counts[counts > 0] / max(1, counts.sum())
    return float(max(0.0, -(p * np.log2(p)).sum()))


def mean_of(values: np.ndarray) -> Estimate:
    x = torch.from_numpy(np.asarray(values, np.float64))
    if len(x) < 2:
        return Estimate(float(x.mean()))
    return bootstrap(lambda v: float(v.mean()), x, num=1000)


KEEP: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # what of each step's info is kept: old, new
    "success": np.logical_or,
    "coverage": np.fmax,
    "mode": lambda old, new: new,
}
FIRST: dict[str, Any] = {"success": False, "coverage": -math.inf, "mode": -1}


def require_fit(policy: Actor, env: Env) -> None:
    """``ValueError`` where a policy has not as many numbers to see and to do as an environment."""
    do = policy.obs_shape[1] or env.obs_dim  # who sees pictures alone is told no numbers
    if (do, policy.action_dim) != (env.obs_dim, env.action_dim):
        raise ValueError(
            f"env: has {env.obs_dim} observed numbers and {env.action_dim} of action; the policy was trained on "
            f"{do} and {policy.action_dim}; give the environment of its demonstrations"
        )


def rollout(
    policy: Actor,
    env: Env,
    seeds: Sequence[int],
    *,
    film: int = 0,
    watch: Callable[[np.ndarray, np.ndarray], None] = lambda obs, actions: None,
    progress: Callable[[int], None] = lambda done: None,
) -> Episodes:
    """An episode of every seed, ``env.num`` at a time. Episode i depends on ``seeds[i]`` alone.

    Receding horizon: the policy sees the newest To observations (the first repeated before the start), and all of its
    Ta actions are carried out before it looks again. A row that has ended stays out of what is counted. ``film`` is
    how many of the first episodes are filmed; ``watch(obs [N, To, Do], actions [N, Ta, A])`` sees each decision.
    ``ValueError`` where observations or actions do not fit the environment.
    """
    require_fit(policy, env)
    to, _ = policy.obs_shape
    if not seeds:
        raise ValueError("seeds: given none; needs one for each episode")
    done: list[Episodes] = []
    for first in range(0, len(seeds), env.num):
        here = list(seeds[first : first + env.num])
        done.append(wave(policy, env, here, to, max(0, film - first), watch))
        progress(first + len(here))
    return joined(done)


def wave(policy: Actor, env: Env, seeds: Sequence[int], to: int, film: int, watch: Callable[..., None]) -> Episodes:
    n = len(seeds)
    padded = [*seeds, *[seeds[-1]] * (env.num - n)]  # a last wave that is not full repeats its last seed
    policy.reset(padded)
    obs = env.reset(padded)
    history, looks = [obs] * to, [look(policy, env)] * to
    do = policy.obs_shape[1]
    alive, returns, lengths = np.ones(env.num, bool), np.zeros(env.num), np.zeros(env.num, int)
    cut, kept, best = np.zeros(env.num, bool), {}, np.full(env.num, -np.inf)
    paths, seconds = [obs], []
    draw: Any = getattr(env, "frame", None)
    frames: list[list[Any]] = [[draw(i)] for i in range(min(film, n))] if draw else []
    while alive[:n].any():
        seen = np.stack(history[-to:], 1)
        began = time.perf_counter()
        chunk = policy.act(seen[:, :, :do], **shown(looks[-to:]))
        seconds.append(time.perf_counter() - began)
        if chunk.ndim != 3 or chunk.shape[::2] != (env.num, env.action_dim):
            raise ValueError(f"policy: gave actions {chunk.shape}; needs ({env.num}, steps, {env.action_dim})")
        if not np.isfinite(chunk[alive]).all():
            raise ValueError("policy: gave actions that are not finite; the run has diverged, or needs more steps")
        watch(seen, chunk)
        for k in range(chunk.shape[1]):
            actions = np.where(alive[:, None], chunk[:, k], 0)
            obs, reward, terminated, truncated, info = env.step(actions)
            returns += np.where(alive, reward, 0)
            best = np.where(alive, np.maximum(best, reward), best)
            lengths += alive
            for name in KEEP.keys() & info.keys():
                old = kept.setdefault(name, np.full(env.num, FIRST[name]))
                kept[name] = np.where(alive, KEEP[name](old, info[name]), old)
            cut |= alive & truncated & ~terminated
            for i, film_of in enumerate(frames):
                if alive[i]:
                    film_of.append(draw(i))
            alive &= ~(terminated | truncated)
            history.append(obs)
            if k >= chunk.shape[1] - to:  # the others will not be seen
                looks.append(look(policy, env))
            paths.append(obs)
            if not alive[:n].any():
                break
        del history[:-to], looks[:-to]
    ways = np.stack(paths, 1)
    return Episodes(
        returns[:n], best[:n], lengths[:n], cut[:n], {k: v[:n] for k, v in kept.items()},
        [ways[i, : lengths[i] + 1] for i in range(n)], getattr(env, "modes", 0), seconds, frames,
    )  # fmt: skip


def look(policy: Actor, env: Env) -> np.ndarray | None:
    """The pictures ``[N, C, H, W]`` that a policy sees of the worlds now; None where it sees none."""
    shape = getattr(policy, "frame_shape", None)
    if shape is None:
        return None
    see: Any = getattr(env, "pixels", None)
    if see is None:
        raise ValueError("env: this policy sees pictures, and the environment draws none; give that of its training")
    return see(shape[1:])


def shown(looks: Sequence[np.ndarray | None]) -> dict[str, np.ndarray]:
    """What ``act`` is given of them, ``[N, To, C, H, W]``."""
    there = [v for v in looks if v is not None]
    return {"frames": np.stack(there, 1)} if there else {}


def joined(parts: Sequence[Episodes]) -> Episodes:
    one = parts[0]
    cat = lambda get: np.concatenate([get(p) for p in parts])  # noqa: E731
    return Episodes(
        cat(lambda p: p.returns),
        cat(lambda p: p.best),
        cat(lambda p: p.lengths),
        cat(lambda p: p.truncated),
        {k: cat(lambda p, k=k: p.info[k]) for k in one.info},
        [path for p in parts for path in p.paths],
        one.modes,
        [s for p in parts for s in p.seconds],
        [f for p in parts for f in p.frames],
    )
