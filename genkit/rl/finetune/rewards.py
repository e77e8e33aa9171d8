"""Where rewards come from: an environment in which a policy acts, or a function of samples."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from genkit.core import Codec, Cond, Label, Spec, Vector, seed_of
from genkit.data.codecs import Actions, Pixels
from genkit.envs import Env
from genkit.rl.finetune.advantages import gae, of_groups
from genkit.rl.finetune.chain import Walk, start
from genkit.rl.finetune.learner import Experience, Learner
from genkit.rl.policies.episodes import entropy_bits
from genkit.rl.policies.policy import executed_mask
from genkit.training.sampling import sample_conditions

Reward = Callable[[Tensor, Cond], Tensor]  # samples as the world sees them [B, *S] (pictures in [0, 1]), cond -> [B]


class Paid:
    """An environment that pays otherwise than by its own rewards."""

    def __init__(self, env: Env):
        self.env, self.modes = env, getattr(env, "modes", 0)
        self.num, self.obs_dim, self.action_dim, self.max_steps = env.num, env.obs_dim, env.action_dim, env.max_steps

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        return self.env.reset(seeds, rows)


class OneWay(Paid):
    """Rewards count only where the episode's ``mode`` is the one that is asked for."""

    def __init__(self, env: Env, mode: int):
        super().__init__(env)
        if not 0 <= mode < self.modes:
            known = f"allowed 0..{self.modes - 1}" if self.modes else "this environment knows no modes; leave it out"
            raise ValueError(f"mode: given {mode}; {known}")
        self.mode = mode

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        right = info["mode"] == self.mode
        return obs, reward * right, terminated, truncated, {**info, "success": info["success"] & right}


class Success(Paid):
    """Only success pays: 1, once in an episode.

    Where each step is paid for what it has nearly reached, and success ends the episode, as in PushT, it is worth more
    to stay beside the goal than to reach it. ``ValueError`` where the environment does not say ``success``.
    """

    def __init__(self, env: Env):
        super().__init__(env)
        self.had = np.zeros(env.num, bool)
        env.reset(range(env.num))
        if "success" not in env.step(np.zeros((env.num, env.action_dim)))[4]:
            raise ValueError("reward: this environment does not say when an episode has succeeded; take --reward env")

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        self.had[list(range(self.num) if rows is None else rows)] = False
        return super().reset(seeds, rows)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        obs, worth, terminated, truncated, info = self.env.step(actions)
        now = info["success"].astype(bool)
        first = now & ~self.had
        self.had |= now
        return obs, self.pay(worth, first), terminated, truncated, info

    def pay(self, worth: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Of each row, for a step that was ``worth`` so much by itself and, or not, brought the ``first`` success."""
        return first.astype(float)


class Progress(Success):
    """Each step is paid what it is worth more than the one before (the first: all of it), and success 1 more, once.

    What the environment pays for being near is then paid for coming near, and not for as long as it lasts: the shaping
    by potentials of Ng, Harada & Russell (1999) without its discount, around :class:`Success`.
    """

    def __init__(self, env: Env):
        super().__init__(env)
        self.before = np.zeros(env.num)

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        self.before[list(range(self.num) if rows is None else rows)] = 0
        return super().reset(seeds, rows)

    def pay(self, worth: np.ndarray, first: np.ndarray) -> np.ndarray:
        gained, self.before = worth - self.before, worth.copy()
        return gained + super().pay(worth, first)


PAYS: Mapping[str, Callable[[Env], Env]] = {"env": lambda env: env, "success": Success, "progress": Progress}


@dataclass
class Acting:
    """N worlds, in each of which the policy makes ``decisions`` an iteration. Episodes go on from one to the next.

    The first episode of row i is cut after its share of the time limit, so that the rows do not all come to their
    limits at once; a cut is a truncation, and is bootstrapped from.

    ``lost``: where an observed number is so many of its scales from the middle of the demonstrations, the episode
    terminates. Some worlds know of no end: a HalfCheetah on its back lies there until the time limit, and after a few
    falls most of what is learned from would be of no use.
    """

    env: Env
    codec: Actions
    act_steps: int
    decisions: int
    gamma: float
    lam: float
    lost: float | None = None
    differentiable: ClassVar[bool] = False
    history: list[np.ndarray] = field(default_factory=list)

    def begin(self, learner: Learner, iteration: int) -> None:
        n, to = self.env.num, learner_horizon(learner)
        self.begun, self.resets = iteration, 0
        kind = learner.spec.cond["obs"]
        assert isinstance(kind, Vector)
        self.middle, self.unit = np.array(kind.shift or 0.0), np.array(kind.scale or 1.0)
        obs = self.env.reset(self.seeds(learner, n))
        self.history = [obs.copy() for _ in range(to)]
        self.age = np.zeros(n, int)
        self.limit = np.ceil(self.env.max_steps * (1 + np.arange(n)) / n)
        self.limit[-1] = np.inf  # the last has the environment's own limit
        self.total = np.zeros(n)
        self.good = np.zeros(n, bool)

    def seeds(self, learner: Learner, n: int) -> list[int]:
        """Of the next ``n`` episodes; far from those that a policy is measured with."""
        first = self.resets
        self.resets += n
        return [2**30 + seed_of(learner.seed, self.begun, i) % 2**30 for i in range(first, first + n)]

    @torch.no_grad()
    def collect(self, learner: Learner, iteration: int) -> Experience:
        critic, n, to = learner.critic, self.env.num, learner_horizon(learner)
        assert critic is not None
        g, device = learner.generator(iteration, 0), learner.device
        noise = lambda shape: torch.randn(n, *shape, generator=g).to(device)  # noqa: E731
        starts, walks, obs_after, rewards, terminations, ends, finished = [], [], [], [], [], [], []
        for _ in range(self.decisions):
            obs = torch.from_numpy(np.stack(self.history, 1)).float().to(device)
            z = noise(learner.spec.shape)
            at = start(learner.objective, learner.state.nets, z, {"obs": obs}, noise, learner.chain)
            walk = learner.chain.sample(at.denoise, at.x, at.cond, noise)
            actions = self.codec.to_absolute(walk.xs[-1], obs)[:, :, to - 1 : to - 1 + self.act_steps].cpu().numpy()
            reward, terminated, ended = self.act(actions)
            starts.append(at.cond)
            walks.append(walk)
            del self.history[:-to]
            obs_after.append(np.stack(self.history, 1))
            rewards.append(reward)
            terminations.append(terminated)
            ends.append(ended)
            finished += self.renew(learner, ended)
        after = torch.from_numpy(np.stack(obs_after)).float().to(device)
        cond = {k: torch.cat([c[k] for c in starts]) for k in starts[0]}
        stack = lambda parts: torch.from_numpy(np.stack(parts)).to(device)  # noqa: E731
        reward, terminated, ended = stack(rewards).float(), stack(terminations), stack(ends)
        if float(critic.scale) == 0:  # before any values: what the decisions brought by themselves
            zero = torch.zeros_like(reward)
            critic.note(gae(reward, zero, zero, terminated, ended, self.gamma, 1.0))
        values = critic.values(cond["obs"]).reshape(reward.shape)
        beyond = critic.values(after.flatten(0, 1)).reshape(reward.shape)
        advantages = gae(reward, values, beyond, terminated, ended, self.gamma, self.lam)
        whole = Walk.joined(walks)
        logs = {"reward": float(reward.sum()) / n, **summary(finished, self.judged, getattr(self.env, "modes", 0))}
        used = executed_mask(learner.spec.shape, to, self.act_steps).to(device)
        return Experience(whole, cond, advantages.flatten(), (advantages + values).flatten(), logs, used)

    def act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Carry out chunks ``[N, A, Ta]``: what they brought, which rows terminated, which ended in any way."""
        n = self.env.num
        brought, terminated, ended = np.zeros(n), np.zeros(n, bool), np.zeros(n, bool)
        for j in range(actions.shape[2]):
            obs, reward, stop, cut, info = self.env.step(np.where(ended[:, None], 0, actions[:, :, j]))
            if reward.shape != (n,) or not np.isfinite(reward).all():
                raise ValueError(f"reward: the environment gave {bad(reward)}; needs ({n},) finite numbers")
            brought += np.where(ended, 0, reward)
            self.judged = "success" in info
            if self.judged:
                self.good |= ~ended & info["success"].astype(bool)
            self.mode = info.get("mode", np.full(n, -1))
            terminated |= stop & ~ended
            away = np.abs((obs - self.middle) / self.unit).max(1) > (self.lost or math.inf)
            terminated |= away & ~ended
            self.age += ~ended
            ended |= stop | cut | away
            self.history.append(obs)
        self.total += brought
        return brought, terminated, ended | (self.age >= self.limit)

    def renew(self, learner: Learner, ended: np.ndarray) -> list[tuple[float, bool, int]]:
        """Begin new episodes in rows that have ended: ``(return, success, mode)`` of those that ran their course."""
        rows = np.flatnonzero(ended)
        if not len(rows):
            return []
        told = [(self.total[i], bool(self.good[i]), int(self.mode[i])) for i in rows if self.age[i] < self.limit[i]]
        obs = self.env.reset(self.seeds(learner, len(rows)), rows.tolist())
        for past in self.history:
            past[rows] = obs[rows]
        self.age[rows], self.total[rows], self.good[rows], self.limit[rows] = 0, 0, False, np.inf
        return told

    def draw(self, learner: Learner, iteration: int, n: int) -> tuple[Tensor, Cond]:
        raise NotImplementedError

    def reward(self, x: Tensor, cond: Cond) -> Tensor:
        raise NotImplementedError


def learner_horizon(learner: Learner) -> int:
    shape = getattr(learner.spec.cond["obs"], "shape", (1,))
    return int(shape[0])


def summary(finished: Sequence[tuple[float, bool, int]], judged: bool, modes: int) -> dict[str, float]:
    """Of the episodes that ended in an iteration, in an environment that knows of success (``judged``) or does not."""
    if not finished:
        return {}
    returns, good, mode = (np.array(v) for v in zip(*finished, strict=True))
    out = {"episodes": float(len(finished)), "return": float(returns.mean())}
    if judged:
        out["success"] = float(good.mean())
    if modes:
        out["mode_entropy_bits"] = entropy_bits(np.bincount(mode[good & (mode >= 0)], minlength=modes))
    return out


@dataclass
class Scoring:
    """A function of samples, for models of anything. ``group`` samples of one condition are compared to each other.

    A model of classes draws them in turn, or ``label`` alone; ``unconditional``, it draws as if it knew none.
    """

    function: Reward
    name: str
    codec: Codec
    samples: int
    group: int
    label: int | None = None
    unconditional: bool = False
    differentiable: ClassVar[bool] = True

    def begin(self, learner: Learner, iteration: int) -> None:
        if self.samples % self.group:
            raise ValueError(f"group: given {self.group} of {self.samples} samples; needs a divisor of them")

    def draw(self, learner: Learner, iteration: int, n: int) -> tuple[Tensor, Cond]:
        z = torch.randn(n, *learner.spec.shape, generator=learner.generator(iteration, 0)).to(learner.device)
        cond = self.conditions(learner.spec, n, lambda rows: learner.next_demos(rows).cond)
        return z, {k: v.to(z.device) for k, v in cond.items()}

    def conditions(self, spec: Spec, n: int, demos: Callable[[int], Cond]) -> dict[str, Tensor]:
        """Of ``n`` samples: each ``group`` of them has one, of those classes or of ``demos(groups)``."""
        groups = -(-n // self.group)
        cond = dict(demos(groups)) if spec.cond and not classes(spec) else sample_conditions(spec, groups, self.label)
        if self.unconditional:
            cond["keep"] = torch.zeros(groups, dtype=torch.bool)
        return {k: v.repeat_interleave(self.group, 0)[:n] for k, v in cond.items()}

    def seen(self, x: Tensor) -> Tensor:
        """As the world sees them, differentiably: pictures in [0, 1], all else as the codec says."""
        return ((x + 1) / 2).clamp(0, 1) if isinstance(self.codec, Pixels) else self.codec.decode(x)

    def reward(self, x: Tensor, cond: Cond) -> Tensor:
        found = self.function(self.seen(x), cond)
        if not isinstance(found, Tensor) or found.shape != (len(x),):
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"reward: {self.name} gave {given} for {len(x)} samples; needs a tensor ({len(x)},)")
        if not bool(torch.isfinite(found).all()):
            where = int((~torch.isfinite(found)).nonzero()[0])
            raise ValueError(f"reward: {self.name} gave {float(found[where])} for sample {where}; needs finite numbers")
        return found.float()

    @torch.no_grad()
    def collect(self, learner: Learner, iteration: int) -> Experience:
        z, cond = self.draw(learner, iteration, self.samples)
        g = learner.generator(iteration, 4)
        noise = lambda shape: torch.randn(len(z), *shape, generator=g).to(z)  # noqa: E731
        at = start(learner.objective, learner.state.nets, z, cond, noise, learner.chain)
        walk = learner.chain.sample(at.denoise, at.x, at.cond, noise)
        rewards = self.reward(walk.xs[-1], at.cond)
        spread = learner.spread = learner.spread or max(1e-8, float(rewards.std(correction=0)))
        groups = torch.arange(len(z), device=z.device) // (self.group if self.group > 1 else len(z))
        advantages = spread * of_groups(rewards, groups, spread)  # those who are all alike do not become far apart
        logs = {"reward": float(rewards.mean()), "reward_std": float(rewards.std(correction=0))}
        return Experience(walk, at.cond, advantages, None, logs)


def classes(spec: Spec) -> bool:
    return bool(spec.cond) and all(isinstance(kind, Label) for kind in spec.cond.values())


def function_of(name: str) -> Reward:
    """The function ``package.module:function``. ``ValueError`` where there is none."""
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ValueError(f"reward: given {name!r}; allowed: {', '.join(PAYS)}, or package.module:function")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as e:
        raise ValueError(f"reward: given {name}; there is no module {e.name}; is it on PYTHONPATH?") from None
    except AttributeError:
        raise ValueError(f"reward: given {name}; the module has no such function") from None
    if not callable(found):
        raise ValueError(f"reward: given {name}; needs a function (x [B, ...], cond) -> [B]")
    return cast(Reward, found)


def bad(reward: np.ndarray) -> str:
    """The first number that is none, or the shape, for a message."""
    return f"{reward[~np.isfinite(reward)][0]}" if reward.size and not np.isfinite(reward).all() else f"{reward.shape}"
