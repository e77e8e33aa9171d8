"""Episodes of a policy in an environment, many side by side, and their results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from genkit.core.progress import Progress, silent
from genkit.envs import Env
from genkit.evaluation.metrics.estimate import Estimate, bootstrap, proportion


class Actor(Protocol):
    """The interface that :func:`run_episodes` needs; :class:`genkit.rl.policies.policy.Policy` has it.

    A policy that sees pictures also has ``frame_shape``, (C, H, W), and takes them as ``act(obs, frames=...)``.
    """

    @property
    def obs_shape(self) -> tuple[int, int]:
        """(To, Do); Do is 0 if pictures are all it sees."""
        ...

    @property
    def action_dim(self) -> int:
        """Dimension of an action."""
        ...

    def reset(self, seeds: Sequence[int]) -> None:
        """Begin episodes, one for each seed."""
        ...

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions ``[N, Ta, A]`` to carry out for observations ``[N, To, Do]``."""
        ...


@dataclass
class Episodes:
    """The results of N episodes, one number each."""

    returns: np.ndarray
    """sum of the rewards, [N]"""
    best: np.ndarray
    """largest reward of any step, [N]; on PushT the number its papers report, coverage / 0.95, at most 1"""
    lengths: np.ndarray
    """number of steps, [N]"""
    truncated: np.ndarray
    """whether the time limit ended the episode, [N]"""
    info: dict[str, np.ndarray]
    """``success`` (in any step), ``coverage`` (maximum) and ``mode`` (last), if the environment reports them, [N]"""
    paths: list[np.ndarray]
    """observations of each episode, ``[T + 1, Do]``"""
    modes: int = 0
    """number of modes that the environment distinguishes; 0: none"""
    seconds: list[float] = field(default_factory=list)
    """duration of each call of the policy"""
    frames: list[list[Any]] = field(default_factory=list)
    """pictures (PIL) of the first episodes, for films"""

    def __len__(self) -> int:
        return len(self.returns)

    @property
    def mode_entropy_bits(self) -> float | None:
        """Entropy of the mode among the successful episodes (0 if there are none); None if there are no modes."""
        estimate = self.mode_entropy(resamples=0)
        return None if estimate is None else estimate.value

    def mode_entropy(self, resamples: int = 1000) -> Estimate | None:
        """:attr:`mode_entropy_bits` with the bootstrap's interval, if there are two or more successful episodes."""
        if "mode" not in self.info:
            return None
        successful = self.info["mode"][self.info["success"].astype(bool) & (self.info["mode"] >= 0)]
        modes = torch.from_numpy(successful.astype(np.int64))
        largest = math.log2(max(1, self.modes))

        def entropy(x: torch.Tensor) -> float:
            return entropy_bits(np.bincount(x.numpy(), minlength=self.modes))

        if len(modes) < 2 or not resamples:
            return Estimate(entropy(modes))
        value, low, high = bootstrap(entropy, modes, num=resamples)
        assert low is not None
        assert high is not None
        return Estimate(value, min(value, max(0.0, low)), max(value, min(largest, high)))

    def summary(self) -> dict[str, Any]:
        """Estimates with 95 % intervals, ready for JSON: Wilson's for a share, the bootstrap's for a mean."""
        out: dict[str, Any] = {"episodes": len(self)}
        if "success" in self.info:
            out["success"] = proportion(int(self.info["success"].sum()), len(self))._asdict()
        out["return"] = mean_estimate(self.returns)._asdict()
        out["best_reward"] = mean_estimate(self.best)._asdict()
        if "coverage" in self.info:
            out["coverage"] = mean_estimate(self.info["coverage"])._asdict()
        out["length"] = float(self.lengths.mean())
        out["truncated"] = float(self.truncated.mean())
        if (bits := self.mode_entropy()) is not None:
            out["mode_entropy_bits"] = bits._asdict()
        out["ms_per_chunk"] = 1e3 * float(np.median(self.seconds)) if self.seconds else None
        return out


def entropy_bits(counts: np.ndarray) -> float:
    """``-sum p log2 p`` of counts; 0 if all are 0."""
    p = counts[counts > 0] / max(1, counts.sum())
    return float(max(0.0, -(p * np.log2(p)).sum()))


def mean_estimate(values: np.ndarray) -> Estimate:
    """The mean of ``values`` [N], with an interval if there are two or more."""
    x = torch.from_numpy(np.asarray(values, np.float64))
    if len(x) < 2:
        return Estimate(float(x.mean()))
    return bootstrap(lambda v: float(v.mean()), x, num=1000)


# How the info of a step is merged with that of the earlier ones (old, new), and the value before the first step.
MERGE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "success": np.logical_or,
    "coverage": np.fmax,
    "mode": lambda old, new: new,
}
INITIAL: dict[str, Any] = {"success": False, "coverage": -math.inf, "mode": -1}


def require_compatible(policy: Actor, env: Env) -> None:
    """``ValueError`` unless a policy and an environment have equal dimensions of observations and actions."""
    obs_dim = policy.obs_shape[1] or env.obs_dim  # a policy that sees pictures alone gets no numbers
    if (obs_dim, policy.action_dim) != (env.obs_dim, env.action_dim):
        raise ValueError(
            f"env: has {env.obs_dim} observed numbers and {env.action_dim} of action; the policy was trained on "
            f"{obs_dim} and {policy.action_dim}; give the environment of its demonstrations"
        )


def run_episodes(
    policy: Actor,
    env: Env,
    seeds: Sequence[int],
    *,
    film: int = 0,
    on_decision: Callable[[np.ndarray, np.ndarray], None] = lambda obs, actions: None,
    progress: Progress = silent,
) -> Episodes:
    """Run one episode for every seed, ``env.num`` at a time. Episode i depends on ``seeds[i]`` only.

    Receding horizon: the policy sees the newest To observations (the first is repeated before the start), and all of
    its Ta actions are carried out before it decides again. A row that has ended no longer counts. ``film`` is the
    number of first episodes to film; ``on_decision(obs [N, To, Do], actions [N, Ta, A])`` is called at each decision.
    ``ValueError`` if observations or actions do not fit the environment.
    """
    require_compatible(policy, env)
    if not seeds:
        raise ValueError("seeds: given none; needs one for each episode")
    parts: list[Episodes] = []
    progress("episodes", 0, len(seeds))
    for first in range(0, len(seeds), env.num):
        batch = list(seeds[first : first + env.num])
        parts.append(run_batch(policy, env, batch, max(0, film - first), on_decision))
        progress("episodes", first + len(batch), len(seeds))
    return joined(parts)


class EpisodeRecorder:
    """Accumulates the results of episodes that run side by side; a row that has ended is no longer changed."""

    def __init__(self, env: Env, obs: np.ndarray, n: int, film: int):
        self.env, self.n = env, n
        self.alive = np.ones(env.num, bool)
        self.returns, self.best = np.zeros(env.num), np.full(env.num, -np.inf)
        self.lengths, self.truncated = np.zeros(env.num, int), np.zeros(env.num, bool)
        self.info: dict[str, np.ndarray] = {}
        self.obs = [obs]
        self.seconds: list[float] = []
        self.draw: Any = getattr(env, "frame", None)
        self.frames: list[list[Any]] = [[self.draw(i)] for i in range(min(film, n))] if self.draw else []

    @property
    def running(self) -> bool:
        """Whether one of the first n rows has not ended."""
        return bool(self.alive[: self.n].any())

    def add(
        self,
        obs: np.ndarray,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        info: dict[str, np.ndarray],
    ) -> None:
        """Count one step of the environment."""
        alive = self.alive
        self.returns += np.where(alive, reward, 0)
        self.best = np.where(alive, np.maximum(self.best, reward), self.best)
        self.lengths += alive
        for name in MERGE.keys() & info.keys():
            old = self.info.setdefault(name, np.full(self.env.num, INITIAL[name]))
            self.info[name] = np.where(alive, MERGE[name](old, info[name]), old)
        self.truncated |= alive & truncated & ~terminated
        for i, frames in enumerate(self.frames):
            if alive[i]:
                frames.append(self.draw(i))
        self.alive = alive & ~(terminated | truncated)
        self.obs.append(obs)

    def episodes(self) -> Episodes:
        """The results of the first n rows."""
        n, obs = self.n, np.stack(self.obs, 1)
        return Episodes(
            self.returns[:n],
            self.best[:n],
            self.lengths[:n],
            self.truncated[:n],
            {k: v[:n] for k, v in self.info.items()},
            [obs[i, : self.lengths[i] + 1] for i in range(n)],
            getattr(self.env, "modes", 0),
            self.seconds,
            self.frames,
        )


def run_batch(
    policy: Actor, env: Env, seeds: Sequence[int], film: int, on_decision: Callable[[np.ndarray, np.ndarray], None]
) -> Episodes:
    """Run at most ``env.num`` episodes side by side. Rows without a seed repeat the last one and are not counted."""
    obs_steps, obs_dim = policy.obs_shape
    padded = [*seeds, *[seeds[-1]] * (env.num - len(seeds))]
    policy.reset(padded)
    obs = env.reset(padded)
    recorder = EpisodeRecorder(env, obs, len(seeds), film)
    history, pixels = [obs] * obs_steps, [see(policy, env)] * obs_steps
    while recorder.running:
        # one decision: a chunk of actions from the newest observations
        window = np.stack(history[-obs_steps:], 1)
        start = time.perf_counter()
        chunk = policy.act(window[:, :, :obs_dim], **frames_argument(pixels[-obs_steps:]))
        recorder.seconds.append(time.perf_counter() - start)
        require_actions(chunk, env, recorder.alive)
        on_decision(window, chunk)
        # carry it out; rows that have ended stand still
        for k in range(chunk.shape[1]):
            actions = np.where(recorder.alive[:, None], chunk[:, k], 0)
            obs, reward, terminated, truncated, info = env.step(actions)
            recorder.add(obs, reward, terminated, truncated, info)
            history.append(obs)
            if k >= chunk.shape[1] - obs_steps:  # earlier pictures are never shown to the policy
                pixels.append(see(policy, env))
            if not recorder.running:
                break
        del history[:-obs_steps], pixels[:-obs_steps]
    return recorder.episodes()


def require_actions(chunk: np.ndarray, env: Env, alive: np.ndarray) -> None:
    """``ValueError`` unless a policy's chunk is ``[N, Ta, A]`` and finite in all rows that are ``alive``."""
    if chunk.ndim != 3 or chunk.shape[::2] != (env.num, env.action_dim):
        raise ValueError(f"policy: gave actions {chunk.shape}; needs ({env.num}, steps, {env.action_dim})")
    if not np.isfinite(chunk[alive]).all():
        raise ValueError("policy: gave actions that are not finite; the run has diverged, or needs more steps")


def see(policy: Actor, env: Env) -> np.ndarray | None:
    """The images ``[N, C, H, W]`` of the environments now, at the policy's size; None for a policy that sees none."""
    shape = getattr(policy, "frame_shape", None)
    if shape is None:
        return None
    render: Any = getattr(env, "pixels", None)
    if render is None:
        raise ValueError("env: this policy sees pictures, and the environment draws none; give that of its training")
    return render(shape[1:])


def frames_argument(pixels: Sequence[np.ndarray | None]) -> dict[str, np.ndarray]:
    """The keyword arguments of ``act`` for the newest pictures: ``frames`` [N, To, C, H, W], or none."""
    frames = [v for v in pixels if v is not None]
    return {"frames": np.stack(frames, 1)} if frames else {}


def joined(parts: Sequence[Episodes]) -> Episodes:
    """The episodes of several batches as one."""
    first = parts[0]
    return Episodes(
        np.concatenate([p.returns for p in parts]),
        np.concatenate([p.best for p in parts]),
        np.concatenate([p.lengths for p in parts]),
        np.concatenate([p.truncated for p in parts]),
        {k: np.concatenate([p.info[k] for p in parts]) for k in first.info},
        [path for p in parts for path in p.paths],
        first.modes,
        [s for p in parts for s in p.seconds],
        [f for p in parts for f in p.frames],
    )
