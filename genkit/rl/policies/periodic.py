"""A policy while it is trained: episodes on starts of their own, and the error of its actions on held-out
demonstrations."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from genkit.core import Batch, Data, Direction, Draw
from genkit.data.codecs import Actions
from genkit.data.demonstrations.windows import Demonstrations
from genkit.diffusion.samplers import Seeds
from genkit.envs import Env
from genkit.rl.policies.episodes import Episodes, joined, require_compatible, run_episodes
from genkit.rl.policies.policy import Policy, executed_mask
from genkit.rl.policies.rollout import RolloutSettings, load_policy
from genkit.training.measurements import Measured, MeasurementStopped
from genkit.training.ranks import Ranks
from genkit.training.run import Run
from genkit.training.settings import TrainSettings
from genkit.training.state import State

ROLLOUT_SEED = 5 * 2**27  # first seed of the episodes: no other command has its starts there unless it is told to
NUM_ENVS = 50  # parallel environments of a rank
WINDOWS = 64  # held-out windows whose actions are predicted
DRAWS = 8  # chunks for each of them
RESULTS = ("success", "coverage", "best_reward", "return")
ERRORS = ("action_error", "action_error_nearest")
DIRECTIONS: Mapping[str, Direction] = {**dict.fromkeys(RESULTS, "higher"), **dict.fromkeys(ERRORS, "lower")}


@dataclass
class PeriodicRollouts:
    """What a policy is measured with while it is trained. Set up before the first step (:meth:`create`)."""

    settings: TrainSettings
    data: Data
    """the training data as the model sees it"""
    ranks: Ranks
    env: Env | None = None
    """this rank's environments; None: the demonstrations name none, or there are more ranks than episodes"""
    observable: tuple[str, ...] = ()
    """the results of episodes that the environment reports"""
    held_out: Batch | None = None
    """windows of held-out demonstrations, in the environment's units; None: there are none"""

    @classmethod
    def create(cls, settings: TrainSettings, state: State, data: Data, accelerator: Accelerator) -> PeriodicRollouts:
        """The measurement that ``settings.rollout_*`` describe.

        ``ValueError`` unless the model is a policy that fits its environment, or its actions can be compared with those
        of held-out demonstrations.
        """
        source, every = settings.data, settings.rollout_every
        if not isinstance(source, Demonstrations):
            raise ValueError(
                f"rollout_every: given {every}, but {type(source).__name__} has no demonstrations, so the model is no "
                "policy; try --eval-every"
            )
        rollouts = cls(settings, data, Ranks.of(accelerator))
        policy = rollouts.policy(state, Path(os.devnull))
        seeds = rollouts.seeds
        if policy.env and seeds:
            env = policy.make_env(min(NUM_ENVS, len(seeds)), policy.env, (), settings.rollout_max_steps)
            require_compatible(policy, env)
            rollouts = replace(rollouts, env=env, observable=observable_results(env))
        if isinstance(data.codec, Actions):
            with accelerator.main_process_first():
                rollouts = replace(rollouts, held_out=held_out_windows(source))
        if not policy.env and rollouts.held_out is None:
            raise ValueError(
                f"rollout_every: given {every}, but the demonstrations name no environment and none are held out; give "
                "--data.env, or --data.held-out 0.1"
            )
        return rollouts

    @property
    def seeds(self) -> range:
        """This rank's episodes."""
        last = ROLLOUT_SEED + self.settings.rollout_episodes
        return range(ROLLOUT_SEED + self.ranks.rank, last, self.ranks.world)

    @property
    def directions(self) -> Mapping[str, Direction]:
        """The results of episodes that the environment has, and the errors of actions."""
        return {name: DIRECTIONS[name] for name in (*self.observable, *(() if self.held_out is None else ERRORS))}

    def describe(self) -> str:
        """``rollout  50 episodes of pusht, 64 held-out windows, every 500 steps``."""
        parts = []
        if self.settings.data.environment:
            parts.append(f"{self.settings.rollout_episodes} episodes of {self.settings.data.environment}")
        if self.held_out is not None:
            parts.append(f"{len(self.held_out)} held-out windows")
        return f"rollout  {', '.join(parts)}, every {self.settings.rollout_every} steps"

    def policy(self, state: State, run: Path) -> Policy:
        """The policy of the slowest average."""
        nets = state.slowest_average
        device = next(p for net in nets.values() for p in net.parameters()).device
        current = Run(run, self.settings, nets, self.data.spec, self.data.codec, state.step, "", device)
        s = self.settings
        return load_policy(current, RolloutSettings(steps=s.rollout_steps, conditions=s.rollout_conditions))

    def __call__(self, state: State, run: Path, stop: Callable[[], bool]) -> Measured | None:
        """Success and return with 95 % intervals, and the errors of actions; None on all ranks but the main one.

        The episodes are those of one rank, however many share them.
        """
        for net in state.slowest_average.values():
            net.eval()
        part, errors, error = None, {}, None
        try:
            policy = self.policy(state, run)
            if self.env is not None:
                part = run_episodes(policy, self.env, self.seeds, on_decision=lambda *decision: check_stop(stop))
            if self.held_out is not None and self.ranks.is_main:
                errors = action_errors(policy, self.held_out)
        except ValueError as e:
            error = e
        finally:
            for net in state.nets.values():
                net.train()
        self.ranks.raise_together(error)
        parts = self.ranks.gather(None if part is None else results_only(part))
        if not self.ranks.is_main:
            return None
        values: dict[str, float | None] = {}
        if episodes := [p for p in parts if p is not None]:
            summary = joined(episodes).summary()
            for name in self.observable:
                ends = zip(("", "_low", "_high"), ("value", "low", "high"), strict=True)
                values |= {f"{name}{end}": summary[name][key] for end, key in ends}
        shown = {name: value for name in self.observable if (value := values[name]) is not None}
        return Measured({**values, **errors}, {**shown, **errors})


def check_stop(stop: Callable[[], bool]) -> None:
    """Raise ``MeasurementStopped`` if ``stop()``."""
    if stop():
        raise MeasurementStopped


def observable_results(env: Env) -> tuple[str, ...]:
    """The results of episodes that an environment reports, from one step of it."""
    env.reset([ROLLOUT_SEED] * env.num)
    info = env.step(np.zeros((env.num, env.action_dim)))[-1]
    return tuple(name for name in RESULTS if name in info or name in ("best_reward", "return"))


def results_only(episodes: Episodes) -> Episodes:
    """Episodes without their observations and rewards, to be sent to another rank."""
    return replace(episodes, paths=[], rewards=[])


def held_out_windows(source: Demonstrations) -> Batch | None:
    """``WINDOWS`` windows of the test split, evenly spaced; None if no demonstrations are held out."""
    try:
        data = source.load("test")
    except ValueError:
        return None
    rows = torch.linspace(0, len(data) - 1, min(WINDOWS, len(data)), dtype=torch.float64).round().long()
    return data.batch(rows, Draw((0,), 0, len(rows)))


def action_errors(policy: Policy, held_out: Batch) -> dict[str, float]:
    """The root mean square error of the actions that would be executed, in the model's units, averaged over windows:
    ``action_error`` of a drawn chunk, ``action_error_nearest`` of the nearest of ``DRAWS``.

    In the model's units an action ranges over [-1, 1] (min-max) or has standard deviation 1. A policy of several modes
    keeps an ``action_error`` above 0, since it may draw another mode than the demonstration's.
    """
    run, n = policy.run, len(held_out)
    true = run.codec.encode(held_out.to(run.device)).x
    cond = {k: v.to(run.device) for k, v in held_out.cond.items() if k != run.objective.chosen_condition}
    mask = executed_mask(run.spec.shape, policy.obs_shape[0], policy.act_steps).to(run.device)
    errors: list[Tensor] = []
    for draw in range(DRAWS):
        noise = Seeds([ROLLOUT_SEED + draw * n + i for i in range(n)], run.device)
        with torch.no_grad():
            x = policy.generate(noise(run.objective.noise_shape(run.spec)), cond, noise)
        errors.append(((((x.float() - true) * mask) ** 2).sum((1, 2)) / mask.sum()).sqrt())
    each = torch.stack(errors)
    return {"action_error": float(each.mean()), "action_error_nearest": float(each.amin(0).mean())}
