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
from genkit.envs import Env, Outcome, Rows, check_outcome, step_chunk
from genkit.evaluation.metrics.estimate import Estimate, bootstrap, proportion

FIRST_STEPS = 64  # room for the steps of an episode at first; it is doubled when it is full


class Actor(Protocol):
    """The interface that :func:`run_episodes` needs; :class:`genkit.rl.policies.policy.Policy` has it.

    A policy that sees pictures also has ``frame_shape``, (C, H, W), and takes ``frames=`` in :meth:`act` too.
    """

    @property
    def obs_shape(self) -> tuple[int, int]:
        """(To, Do); Do is 0 if pictures are all it sees."""
        ...

    @property
    def action_dim(self) -> int:
        """Dimension of an action."""
        ...

    def reset(self, seeds: Sequence[int], rows: Rows | None = None) -> None:
        """Begin episodes with these seeds in ``rows`` (None: all)."""
        ...

    def act(self, obs: np.ndarray, *, rows: Rows) -> np.ndarray:
        """Actions ``[M, Ta, A]`` to carry out for observations ``[M, To, Do]`` of ``rows``, those that go on."""
        ...


OnDecision = Callable[[np.ndarray, np.ndarray, np.ndarray], None]  # episodes [M], obs [M, To, Do], actions [M, Ta, A]


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
    rewards: list[np.ndarray]
    """rewards of the steps of each episode, ``[T]``"""
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
    on_decision: OnDecision = lambda episodes, obs, actions: None,
    progress: Progress = silent,
) -> Episodes:
    """Run one episode for every seed, ``env.num`` at a time. Episode i depends on ``seeds[i]`` only.

    Receding horizon: the policy sees the newest To observations (the first is repeated before the start), and all of
    its Ta actions are carried out before it decides again. Only rows whose episode goes on are asked; one that has
    ended takes the next seed at the next decision. ``film`` is the number of first episodes to film;
    ``on_decision(episodes [M], obs [M, To, Do], actions [M, Ta, A])`` is called at each decision with the numbers of
    the episodes. ``ValueError`` if observations or actions do not fit the environment, or it gives rewards that are not
    finite, or draws no pictures for films.
    """
    require_compatible(policy, env)
    if film and not hasattr(env, "frame"):
        raise ValueError(f"film: given {film}, but this environment draws no pictures; leave it out")
    if not seeds:
        raise ValueError("seeds: given none; needs one for each episode")
    running = RunningEpisodes(policy, env, seeds, film)
    progress("episodes", 0, len(seeds))
    while len(rows := running.rows):
        window, chunk = running.decide(rows)
        on_decision(running.episode[rows], window, chunk)
        running.carry_out(rows, chunk)
        progress("episodes", running.finished, len(seeds))
    return running.results


class RunningEpisodes:
    """Episodes that run side by side in the rows of an environment, and their results so far."""

    def __init__(self, policy: Actor, env: Env, seeds: Sequence[int], film: int):
        n, obs_steps = len(seeds), policy.obs_shape[0]
        self.policy, self.env, self.seeds, self.film = policy, env, seeds, film
        self.draw: Any = getattr(env, "frame", None) if film else None
        self.results = Episodes(
            np.zeros(n),
            np.full(n, -np.inf),
            np.zeros(n, int),
            np.zeros(n, bool),
            info={},
            paths=[np.zeros(0)] * n,
            rewards=[np.zeros(0)] * n,
            modes=getattr(env, "modes", 0),
            frames=[[] for _ in range(min(film, n))] if self.draw else [],
        )
        self.begun = min(env.num, n)
        self.episode = np.where(np.arange(env.num) < n, np.arange(env.num), -1)
        """the number of each row's episode; -1: it has ended"""
        padded = [*seeds[: env.num], *[seeds[-1]] * (env.num - n)]  # rows without an episode repeat the last seed
        policy.reset(padded)
        obs = env.reset(padded)
        self.path = np.repeat(obs[:, None], FIRST_STEPS, 1)
        """the observations of each row's episode, ``[N, steps, Do]``"""
        self.reward = np.zeros((env.num, FIRST_STEPS))
        self.history = np.repeat(obs[:, None], obs_steps, 1)
        """the newest observations, ``[N, To, Do]``"""
        images = see(policy, env)
        self.pixels = None if images is None else np.repeat(images[:, None], obs_steps, 1)
        """the newest images, ``[N, To, C, H, W]``"""
        self.film_rows(self.rows)

    @property
    def rows(self) -> np.ndarray:
        """The rows whose episodes go on."""
        return np.flatnonzero(self.episode >= 0)

    @property
    def finished(self) -> int:
        """The number of episodes that have ended."""
        return self.begun - len(self.rows)

    def decide(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ask the policy: the observations ``[M, To, Do]`` of ``rows``, and actions ``[M, Ta, A]`` for them."""
        window = self.history[rows]
        images = {} if self.pixels is None else {"frames": self.pixels[rows]}
        start = time.perf_counter()
        chunk = self.policy.act(window[:, :, : self.policy.obs_shape[1]], rows=rows, **images)
        self.results.seconds.append(time.perf_counter() - start)
        require_actions(chunk, len(rows), self.env.action_dim)
        return window, chunk

    def carry_out(self, rows: np.ndarray, chunk: np.ndarray) -> None:
        """Execute actions ``[M, Ta, A]`` in ``rows``, then begin the next episodes in those that have ended."""
        actions = np.zeros((self.env.num, *chunk.shape[1:]))  # rows without an episode stand still
        actions[rows] = chunk
        parts = np.split(actions, self.find_pauses(chunk.shape[1]), 1)
        for i, part in enumerate(parts):
            for outcome in step_chunk(self.env, part):
                self.add(outcome)
                if not len(self.rows):
                    break
            last = i == len(parts) - 1 or not len(self.rows)
            new = self.restart() if last else np.zeros(0, int)
            if self.pixels is not None:
                images = see(self.policy, self.env)
                assert images is not None
                self.pixels = np.concatenate([self.pixels[:, 1:], images[:, None]], 1)
                self.pixels[new] = images[new, None]
            if last:
                break

    def find_pauses(self, steps: int) -> list[int]:
        """After which of a chunk's steps the environment is looked at before it goes on: each if a film is made, and
        those of the images that the policy sees next; earlier images are never shown to it."""
        if self.draw and (self.episode[self.rows] < self.film).any():
            return list(range(1, steps))
        return [] if self.pixels is None else list(range(max(1, steps - self.pixels.shape[1] + 1), steps))

    def add(self, outcome: Outcome) -> None:
        """Count one step of the environment in the episodes that go on."""
        obs, reward, terminated, truncated, info = outcome
        results, rows = self.results, self.rows
        self.history = np.concatenate([self.history[:, 1:], obs[:, None]], 1)
        numbers = self.episode[rows]
        step = results.lengths[numbers]
        check_outcome("reward", reward, rows, self.locate_step)
        if step.max() + 1 >= self.path.shape[1]:
            self.path, self.reward = (np.concatenate([v, np.zeros_like(v)], 1) for v in (self.path, self.reward))
        self.path[rows, step + 1], self.reward[rows, step] = obs[rows], reward[rows]
        results.returns[numbers] += reward[rows]
        results.best[numbers] = np.maximum(results.best[numbers], reward[rows])
        results.lengths[numbers] += 1
        for name in MERGE.keys() & info.keys():
            merged = results.info.setdefault(name, np.full(len(results), INITIAL[name]))
            merged[numbers] = MERGE[name](merged[numbers], info[name][rows])
        results.truncated[numbers] |= truncated[rows] & ~terminated[rows]
        self.film_rows(rows)
        for row in rows[terminated[rows] | truncated[rows]]:
            number, self.episode[row] = self.episode[row], -1
            results.paths[number] = self.path[row, : results.lengths[number] + 1].copy()
            results.rewards[number] = self.reward[row, : results.lengths[number]].copy()

    def locate_step(self, row: int) -> tuple[int, int]:
        """The seed of a row's episode, and the number of the step that is being counted."""
        number = self.episode[row]
        return int(self.seeds[number]), int(self.results.lengths[number]) + 1

    def restart(self) -> np.ndarray:
        """Begin the next episodes in rows that have ended, as far as there are any; these rows."""
        rows = np.flatnonzero(self.episode < 0)[: len(self.seeds) - self.begun]
        if not len(rows):
            return rows
        self.episode[rows] = range(self.begun, self.begun + len(rows))
        seeds = [self.seeds[number] for number in self.episode[rows]]
        self.begun += len(rows)
        self.policy.reset(seeds, rows)
        obs = self.env.reset(seeds, rows.tolist())
        self.path[rows, 0], self.history[rows] = obs[rows], obs[rows, None]
        self.film_rows(rows)
        return rows

    def film_rows(self, rows: np.ndarray) -> None:
        """Take a picture of ``rows`` whose episode is one of the first, for its film."""
        for row in rows if self.draw else ():
            if self.episode[row] < self.film:
                self.results.frames[self.episode[row]].append(self.draw(int(row)))


def require_actions(chunk: np.ndarray, num: int, dim: int) -> None:
    """``ValueError`` unless a policy's chunk is ``[num, Ta, dim]`` and finite."""
    if chunk.ndim != 3 or chunk.shape[::2] != (num, dim):
        raise ValueError(f"policy: gave actions {chunk.shape}; needs ({num}, steps, {dim})")
    if not np.isfinite(chunk).all():
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
    """The episodes of several batches as one. What an environment reports only when it happens, some may not have."""
    first, names = parts[0], {name: None for part in parts for name in part.info}
    return Episodes(
        np.concatenate([p.returns for p in parts]),
        np.concatenate([p.best for p in parts]),
        np.concatenate([p.lengths for p in parts]),
        np.concatenate([p.truncated for p in parts]),
        {k: np.concatenate([p.info.get(k, np.full(len(p), INITIAL[k])) for p in parts]) for k in names},
        [path for p in parts for path in p.paths],
        [rewards for p in parts for rewards in p.rewards],
        first.modes,
        [s for p in parts for s in p.seconds],
        [f for p in parts for f in p.frames],
    )
