"""Sources of rewards: an environment in which a policy acts, or a function of samples."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from genkit.core import Codec, Cond, Label, Spec, Vector, seed_of
from genkit.data.codecs import Actions, decode_smoothly
from genkit.envs import Env, check_outcome, step_chunk
from genkit.rl.finetune.advantages import gae, group_advantages
from genkit.rl.finetune.chain import DenoisingTrajectory, seeded_noise
from genkit.rl.finetune.env_rewards import REWARDS
from genkit.rl.finetune.experience import Experience
from genkit.rl.finetune.learner import Learner
from genkit.rl.policies.episodes import entropy_bits
from genkit.rl.policies.policy import executed_mask
from genkit.training.sampling import sample_conditions

Reward = Callable[[Tensor, Cond], Tensor]  # decoded samples [B, *S] (pictures in [0, 1]), conditions -> [B]


# ------------------------------------------------------------------------------------------------- an environment
class FinishedEpisode(NamedTuple):
    """An episode that ended by itself or at the environment's time limit."""

    decision: int
    """after which decision of the iteration"""
    row: int
    """in which environment"""
    total: float
    """return"""
    success: bool
    mode: int


class Decision(NamedTuple):
    """One decision in each of N environments, and its outcome."""

    cond: Cond
    trajectory: DenoisingTrajectory
    next_obs: np.ndarray
    """observations after it, before any reset, [N, To, Do]"""
    reward: np.ndarray
    terminated: np.ndarray
    ended: np.ndarray
    """terminated, truncated or cut, [N]"""


@dataclass
class EnvironmentTask:
    """N parallel environments, in each of which the policy makes ``num_steps`` decisions an iteration. Episodes go on
    from one iteration to the next. ``env`` holds this rank's share of the environments, equally many on every rank.

    The first episode of row i is cut after its share of the time limit, so that the rows do not all reach their limits
    at the same time; a cut is a truncation, and is bootstrapped from.

    ``terminate_out_of_range`` ends an episode when an observed number is this many scales from the middle of the
    demonstrations. Some environments never terminate: a HalfCheetah on its back lies there until the time limit, and
    after a few falls most of the experience would be useless.
    """

    env: Env
    codec: Actions
    act_steps: int
    num_steps: int
    gamma: float
    gae_lambda: float
    terminate_out_of_range: float | None = None
    conditions: Cond = field(default_factory=dict)
    """conditions besides obs, each as one row, the same in all episodes"""
    differentiable: ClassVar[bool] = False
    history: list[np.ndarray] = field(default_factory=list)

    def begin(self, learner: Learner, iteration: int) -> None:
        """Begin new episodes in all rows."""
        n = self.env.num * learner.world
        kind = learner.spec.cond["obs"]
        assert isinstance(kind, Vector)
        self.first_iteration, self.resets = iteration, 0
        self.obs_mean, self.obs_scale = np.array(kind.shift or 0.0), np.array(kind.scale or 1.0)
        own = learner.own_rows(n)
        self.seeds = np.array(self.next_seeds(learner, n)[own])
        self.age = np.zeros(self.env.num, int)
        obs = self.env.reset(self.seeds.tolist())
        check_outcome("obs", obs, range(self.env.num), self.locate)
        self.history = [obs.copy() for _ in range(obs_steps_of(learner))]
        limit = np.ceil(self.env.max_steps * (1 + np.arange(n)) / n)
        limit[-1] = np.inf  # the last row keeps the environment's own limit
        self.limit = limit[own]
        self.total = np.zeros(self.env.num)
        self.success = np.zeros(self.env.num, bool)
        self.mode = np.full(self.env.num, -1)

    def next_seeds(self, learner: Learner, n: int) -> list[int]:
        """Seeds of the next ``n`` episodes, in a range that evaluations never use."""
        first = self.resets
        self.resets += n
        return [2**30 + seed_of(learner.seed, self.first_iteration, i) % 2**30 for i in range(first, first + n)]

    @torch.no_grad()
    def collect(self, learner: Learner, iteration: int) -> Experience:
        """``num_steps`` decisions in every environment, with generalised advantage estimates."""
        n, device = self.env.num * learner.world, learner.device
        noise = seeded_noise(n, learner.generator(iteration, 0), device, rows=learner.own_rows(n))
        decisions: list[Decision] = []
        finished: list[FinishedEpisode] = []
        for t in range(self.num_steps):
            decisions.append(self.decide(learner, noise))
            finished += self.restart(learner, t, decisions[-1].ended)

        # of all ranks, stacked over decisions: [T, N, ...], and [T N, ...] for what the networks see
        def stack(parts: Sequence[np.ndarray]) -> Tensor:
            return learner.gather(torch.from_numpy(np.stack(parts)).to(device), 1)

        reward = stack([d.reward.astype(np.float32) for d in decisions])
        terminated, ended = stack([d.terminated for d in decisions]), stack([d.ended for d in decisions])
        next_obs = stack([d.next_obs.astype(np.float32) for d in decisions])
        names = decisions[0].cond
        cond = {k: learner.gather(torch.stack([d.cond[k] for d in decisions]), 1).flatten(0, 1) for k in names}
        trajectory = DenoisingTrajectory.stacked([d.trajectory for d in decisions]).map(
            lambda x: learner.gather(x, 2).flatten(1, 2)
        )
        finished = learner.gather_objects(finished)

        advantages, returns = self.advantages(learner, cond["obs"], next_obs, reward, terminated, ended)
        modes = getattr(self.env, "modes", 0)
        logs = {"reward": float(reward.sum()) / n, **summarize(sorted(finished), self.reports_success, modes)}
        used = executed_mask(learner.spec.shape, obs_steps_of(learner), self.act_steps).to(device)
        return Experience(trajectory, cond, advantages.flatten(), returns.flatten(), logs, used)

    def decide(self, learner: Learner, noise: Callable[[Sequence[int]], Tensor]) -> Decision:
        """Draw a chunk of actions for every environment and execute it."""
        obs_steps = obs_steps_of(learner)
        obs = torch.from_numpy(np.stack(self.history, 1)).float().to(learner.device)
        z = noise(learner.spec.shape)
        own = {k: v.expand(len(obs), *v.shape[1:]).to(obs.device) for k, v in self.conditions.items()}
        trajectory, cond = learner.draw_trajectories(z, {"obs": obs, **own}, noise)
        chunk = self.codec.to_absolute(trajectory.xs[-1], obs)
        actions = chunk[:, :, obs_steps - 1 : obs_steps - 1 + self.act_steps].cpu().numpy()
        reward, terminated, ended = self.act(actions)
        return Decision(cond, trajectory, np.stack(self.history, 1), reward, terminated, ended)

    def advantages(
        self,
        learner: Learner,
        obs: Tensor,
        next_obs: Tensor,
        reward: Tensor,
        terminated: Tensor,
        ended: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Advantages and the critic's targets, ``[T, N]`` each, for ``obs`` [T N, To, Do] and ``next_obs``
        [T, N, To, Do]."""
        critic = learner.critic
        assert critic is not None
        if float(critic.scale) == 0:  # before there are values: the returns of the decisions alone
            zero = torch.zeros_like(reward)
            critic.set_scale(gae(reward, zero, zero, terminated, ended, self.gamma, 1.0))
        values = critic.values(obs).reshape(reward.shape)
        next_values = critic.values(next_obs.flatten(0, 1)).reshape(reward.shape)
        advantages = gae(reward, values, next_values, terminated, ended, self.gamma, self.gae_lambda)
        return advantages, advantages + values

    def act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Carry out chunks ``[N, A, Ta]``: the sums of rewards, which rows terminated, which ended in any way."""
        n = self.env.num
        total, terminated, ended = np.zeros(n), np.zeros(n, bool), np.zeros(n, bool)
        for obs, reward, terminates, truncates, info in step_chunk(self.env, actions.swapaxes(1, 2)):
            if reward.shape != (n,):
                raise ValueError(f"reward: the environment gave {reward.shape}; needs ({n},) numbers")
            self.age += ~ended
            check_outcome("reward", reward, np.flatnonzero(~ended), self.locate)
            check_outcome("obs", obs, np.flatnonzero(~ended), self.locate)  # also the last: it is bootstrapped from
            total += np.where(ended, 0, reward)
            self.reports_success = "success" in info
            if self.reports_success:
                self.success |= ~ended & info["success"].astype(bool)
            self.mode = np.where(ended, self.mode, info.get("mode", np.full(n, -1)))
            terminated |= terminates & ~ended
            distance = np.abs((obs - self.obs_mean) / self.obs_scale).max(1)
            out_of_range = distance > (self.terminate_out_of_range or math.inf)
            terminated |= out_of_range & ~ended
            self.remember(obs, ended)
            ended |= terminates | truncates | out_of_range
        self.total += total
        return total, terminated, ended | (self.age >= self.limit)

    def remember(self, obs: np.ndarray, ended: np.ndarray) -> None:
        """Append observations ``[N, Do]`` to the history. That of rows that had ``ended`` before stays as it was, since
        the critic bootstraps from it."""
        earlier = [np.where(ended[:, None], a, b) for a, b in zip(self.history, self.history[1:], strict=False)]
        self.history = [*earlier, np.where(ended[:, None], self.history[-1], obs)]

    def restart(self, learner: Learner, decision: int, ended: np.ndarray) -> list[FinishedEpisode]:
        """Begin new episodes in the rows that have ended; the results of those that were not cut."""
        everywhere = np.flatnonzero(learner.gather(torch.from_numpy(ended).to(learner.device)).cpu().numpy())
        seeds = dict(zip(everywhere.tolist(), self.next_seeds(learner, len(everywhere)), strict=True))
        rows, first = np.flatnonzero(ended), self.env.num * learner.rank
        if not len(rows):
            return []
        finished = [
            FinishedEpisode(decision, first + int(i), self.total[i], bool(self.success[i]), int(self.mode[i]))
            for i in rows
            if self.age[i] < self.limit[i]
        ]
        self.seeds[rows] = [seeds[first + i] for i in rows.tolist()]
        obs = self.env.reset(self.seeds[rows].tolist(), rows.tolist())
        for past in self.history:
            past[rows] = obs[rows]
        self.age[rows] = 0
        check_outcome("obs", obs, rows, self.locate)
        self.total[rows] = 0
        self.success[rows] = False
        self.limit[rows] = np.inf
        return finished

    def locate(self, row: int) -> tuple[int, int]:
        """The seed of a row's episode, and the number of its last step."""
        return int(self.seeds[row]), int(self.age[row])

    def draw(self, learner: Learner, iteration: int, n: int) -> tuple[Tensor, Cond]:
        """Not available: an environment is not differentiable."""
        raise NotImplementedError

    def reward(self, x: Tensor, cond: Cond) -> Tensor:
        """Not available: rewards come from episodes."""
        raise NotImplementedError


def obs_steps_of(learner: Learner) -> int:
    """To, the number of observations that the networks see."""
    shape = getattr(learner.spec.cond["obs"], "shape", (1,))
    return int(shape[0])


def summarize(finished: Sequence[FinishedEpisode], reports_success: bool, modes: int) -> dict[str, float]:
    """What to log of the episodes that finished in an iteration."""
    if not finished:
        return {}
    _, _, returns, success, mode = (np.array(v) for v in zip(*finished, strict=True))
    logs = {"episodes": float(len(finished)), "return": float(returns.mean())}
    if reports_success:
        logs["success"] = float(success.mean())
    if modes:
        logs["mode_entropy_bits"] = entropy_bits(np.bincount(mode[success & (mode >= 0)], minlength=modes))
    return logs


# ---------------------------------------------------------------------------------------------------- a function
@dataclass
class FunctionTask:
    """A reward function of samples, for models of anything. ``group`` samples of one condition are compared with each
    other.

    A class-conditional model draws all classes in turn, or ``label`` only; with ``unconditional``, without conditions.
    ``ValueError`` if ``group`` does not divide ``samples``.
    """

    function: Reward
    name: str
    codec: Codec
    samples: int
    group: int
    label: int | str | None = None
    unconditional: bool = False
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples % self.group:
            raise ValueError(f"group: given {self.group} of {self.samples} samples; needs a divisor of them")

    def begin(self, learner: Learner, iteration: int) -> None:
        """Nothing is carried from one iteration to the next."""

    def draw(self, learner: Learner, iteration: int, n: int) -> tuple[Tensor, Cond]:
        """Normals ``[n, *S]``, a function of ``iteration``, and conditions for them."""
        shape = learner.objective.noise_shape(learner.spec)
        z = torch.randn(n, *shape, generator=learner.generator(iteration, 0)).to(learner.device)
        chosen = learner.objective.chosen_condition
        cond = self.conditions(learner.spec, n, lambda rows: learner.draw_demos(rows).cond, chosen)
        return z, {k: v.to(z.device) for k, v in cond.items()}

    def conditions(
        self, spec: Spec, n: int, demos: Callable[[int], Cond], chosen: str | None = None
    ) -> dict[str, Tensor]:
        """Conditions of ``n`` samples, the same for each ``group``: classes, or those of ``demos(groups)`` without the
        one whose value is ``chosen`` by the model itself."""
        groups = -(-n // self.group)
        classes = not spec.cond or is_class_conditional(spec)
        cond = sample_conditions(spec, groups, self.label) if classes else dict(demos(groups))
        cond.pop(chosen or "", None)
        if self.unconditional:
            cond["keep"] = torch.zeros(groups, dtype=torch.bool)
        return {k: v.repeat_interleave(self.group, 0)[:n] for k, v in cond.items()}

    def decode(self, x: Tensor) -> Tensor:
        """Samples as the reward function takes them, differentiably: pictures in [0, 1], all else decoded."""
        return decode_smoothly(self.codec, x)

    def reward(self, x: Tensor, cond: Cond) -> Tensor:
        """The rewards ``[B]`` of samples ``[B, *S]`` in the model's units. ``ValueError`` unless they are finite."""
        reward = self.function(self.decode(x), cond)
        if not isinstance(reward, Tensor) or reward.shape != (len(x),):
            given = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
            raise ValueError(f"reward: {self.name} gave {given} for {len(x)} samples; needs a tensor ({len(x)},)")
        if not bool(torch.isfinite(reward).all()):
            bad = int((~torch.isfinite(reward)).nonzero()[0])
            raise ValueError(f"reward: {self.name} gave {float(reward[bad])} for sample {bad}; needs finite numbers")
        return reward.float()

    @torch.no_grad()
    def collect(self, learner: Learner, iteration: int) -> Experience:
        """``samples`` trajectories, with advantages relative to their group."""
        z, cond = self.draw(learner, iteration, self.samples)
        own = learner.own_rows(self.samples)
        noise = seeded_noise(self.samples, learner.generator(iteration, 4), z.device, z.dtype, own)
        trajectory, own_cond = learner.draw_trajectories(z[own], {k: v[own] for k, v in cond.items()}, noise)
        rewards = learner.gather(self.reward(trajectory.xs[-1], own_cond))
        trajectory = trajectory.map(lambda x: learner.gather(x, 1))
        cond = {k: learner.gather(v) for k, v in own_cond.items()}
        learner.reward_std = learner.reward_std or max(1e-8, float(rewards.std(correction=0)))
        groups = torch.arange(len(z), device=z.device) // (self.group if self.group > 1 else len(z))
        # the first deviation is also the least: rewards that are all alike are not blown up
        advantages = learner.reward_std * group_advantages(rewards, groups, learner.reward_std)
        logs = {"reward": float(rewards.mean()), "reward_std": float(rewards.std(correction=0))}
        return Experience(trajectory, cond, advantages, None, logs)


def is_class_conditional(spec: Spec) -> bool:
    """Whether the conditions are classes only."""
    return bool(spec.cond) and all(isinstance(kind, Label) for kind in spec.cond.values())


def load_reward(name: str) -> Reward:
    """The function ``package.module:function``. ``ValueError`` if there is none."""
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ValueError(f"reward: given {name!r}; allowed: {', '.join(REWARDS)}, frechet, or package.module:function")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as e:
        raise ValueError(f"reward: given {name}; there is no module {e.name}; is it on PYTHONPATH?") from None
    except AttributeError:
        raise ValueError(f"reward: given {name}; the module has no such function") from None
    if not callable(function):
        raise ValueError(f"reward: given {name}; needs a function (x [B, ...], cond) -> [B]")
    return cast(Reward, function)
