"""`genkit demo ENV`: an expert's episodes as a replay buffer, an .npz that --data=replay reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from annotated_types import Ge
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tyro.conf import Positional

from genkit.config import parse, table
from genkit.core.files import atomic_write
from genkit.envs import Expert, expert, make
from genkit.envs.ars import Linear, Search, search

console = Console(highlight=False, soft_wrap=True)
TRIES = 4  # waves without one success after which an expert is said not to know how
FALL = 0.05  # share of the time limit before which an episode that terminates was no demonstration of anything


class Guide(Protocol):
    """A way to come by an expert."""

    def __call__(self, env: str, num: int) -> Expert: ...


@dataclass(frozen=True)
class Scripted:
    """The one that is written for the environment."""

    def __call__(self, env: str, num: int) -> Expert:
        return expert(env, "scripted", num)


@dataclass(frozen=True)
class ARS(Search):
    """A linear policy that a random search finds."""

    def __call__(self, env: str, num: int) -> Expert:
        said = TextColumn("round {task.completed}/{task.total}  mean return {task.fields[mean]}")
        with Progress(said, BarColumn(), TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("search", total=self.rounds, mean="")

            def watch(done: int, mean: float) -> None:
                bar.update(task, completed=done, mean=f"{mean:.0f}")
                if not console.is_terminal and done % 20 == 0:
                    console.print(f"round {done}/{self.rounds}  mean return {mean:.0f}", markup=False)

            return search(env, self, watch)


@dataclass(frozen=True)
class Found:
    """A linear policy that was found before."""

    path: str = ""
    """the .json that ars wrote"""

    def __call__(self, env: str, num: int) -> Expert:
        return Linear.load(self.path)


GUIDES: Mapping[str, type] = {"scripted": Scripted, "ars": ARS, "found": Found}


@dataclass(frozen=True)
class Demo:
    """Record an expert."""

    env: Positional[str]
    """four-ways, or an id of gymnasium, such as HalfCheetah-v5."""
    expert: Guide = table("genkit.cli.commands.demo:GUIDES", "scripted")
    """Who knows how."""
    episodes: Annotated[int, Ge(1)] = 200
    """How many are kept."""
    seeds: Annotated[int, Ge(0)] = 0
    """The first; those that fail are left out, and further ones recorded."""
    failures: bool = False
    """Keep episodes without success too."""
    least: float | None = None
    """The least return of an episode that is kept; None: any."""
    pixels: Annotated[int, Ge(0)] = 0
    """Side of square pictures that are recorded too, as img, where the environment draws any; 0: none."""
    out: str | None = None
    """The .npz; None: ENV.npz."""


def main(argv: list[str]) -> int:
    asked = parse(Demo, argv, prog="genkit demo", description="Record an expert's episodes.")
    out = Path(asked.out or f"{asked.env.replace('/', '-')}.npz")
    if out.suffix != ".npz":
        raise ValueError(f"out: given {out}; a replay buffer is an .npz")
    guide, tried, obs, actions, returns, more = record(asked)
    ends = np.cumsum([len(a) for a in actions])
    arrays: Any = {name: np.concatenate(v) for name, v in {"obs": obs, "action": actions, **more}.items()}
    with atomic_write(out) as part, open(part, "wb") as f:
        np.savez(f, episode_ends=ends, **arrays)
    told = f"{out}  {len(ends)} episodes of {tried} tried, {ends[-1]} steps, return {np.mean(returns):.1f}"
    console.print(f"{told} ({min(returns):.1f} to {max(returns):.1f})", markup=False)
    if isinstance(guide, Linear):
        guide.save(found := out.with_suffix(".expert.json"))
        console.print(f"{found}  {guide.found}; --expert=found --expert.path={found} takes it again", markup=False)
    see = " --data.frames img" if asked.pixels else ""
    console.print(f"next     genkit train --data=replay --data.root {out} --data.env {asked.env}{see}", markup=False)
    return 0


class Recorded(NamedTuple):
    """The episodes that are kept: observations ``[T, Do]``, actions ``[T, A]`` and the return of each."""

    guide: Expert
    tried: int
    """episodes, those that are left out among them"""
    obs: list[np.ndarray]
    actions: list[np.ndarray]
    returns: list[float]
    more: dict[str, list[np.ndarray]]
    """of each episode: ``reward`` ``[T]``, ``mode`` ``[T]`` (the way it went) where the environment says, and ``img``
    ``[T, H, W, 3]`` where pictures are asked for"""


def record(asked: Demo) -> Recorded:
    """Let the expert act. Where the environment knows no success, an episode is one that does not fall in the first
    twentieth of its time. ``ValueError`` where the expert does not succeed once in some waves, or does not fit."""
    num = min(asked.episodes, 100)
    guide = asked.expert(asked.env, num)
    env = make(asked.env, num)
    if isinstance(guide, Linear) and guide.weight.shape != (env.action_dim, env.obs_dim):
        a, do = guide.weight.shape
        has = f"{asked.env} has {env.obs_dim} and {env.action_dim}"
        raise ValueError(f"expert: is for {do} observed numbers and {a} of action; {has}")
    obs: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    returns: list[float] = []
    more: dict[str, list[np.ndarray]] = {}
    see: Any = getattr(env, "pixels", None)
    if asked.pixels and see is None:
        raise ValueError(f"pixels: {asked.env} draws no pictures; leave it out")
    size = (asked.pixels, asked.pixels)
    tried = 0
    while len(actions) < asked.episodes:
        seeds = range(asked.seeds + tried, asked.seeds + tried + num)
        seen, done = [env.reset(list(seeds))], []
        guide.reset(list(seeds))
        alive, length, total = np.ones(num, bool), np.zeros(num, int), np.zeros(num)
        success = fell = np.zeros(num, bool)
        info: dict[str, np.ndarray] = {}
        rewards, looks = [], []
        while alive.any():
            done.append(guide.act(seen[-1]))
            looks += [see(size)] if asked.pixels else []
            after, reward, terminated, truncated, info = env.step(done[-1])
            length += alive
            total += reward
            rewards.append(reward)
            success = success | (alive & info.get("success", success).astype(bool))
            fell = fell | (terminated & (length < FALL * env.max_steps))
            alive &= ~(terminated | truncated)
            seen.append(after)
        tried += num
        good = (success if "success" in info else ~fell) | asked.failures
        good &= total >= (-np.inf if asked.least is None else asked.least)
        for i in np.flatnonzero(good)[: asked.episodes - len(actions)]:
            obs.append(np.stack([o[i] for o in seen[: length[i]]]))
            actions.append(np.stack([a[i] for a in done[: length[i]]]))
            returns.append(float(total[i]))
            told = {"reward": np.array([r[i] for r in rewards[: length[i]]])}
            if "mode" in info:
                told["mode"] = np.full(length[i], int(info["mode"][i]))
            if looks:
                told["img"] = np.stack([v[i].transpose(1, 2, 0) for v in looks[: length[i]]])
            for name, values in told.items():
                more.setdefault(name, []).append(values)
        if not actions and tried >= TRIES * num:
            who = type(asked.expert).__name__.lower()
            raise ValueError(
                f"expert: {who} did not succeed once in {tried} episodes of {asked.env}; the last took "
                f"{length.mean():.0f} of {env.max_steps} steps and brought {total.mean():.1f}"
            )
    return Recorded(guide, tried, obs, actions, returns, more)
