"""`genkit demo ENV`: an expert's episodes as a replay buffer, an .npz that --data=replay reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path as File
from typing import Annotated

import numpy as np
from annotated_types import Ge
from rich.console import Console
from tyro.conf import Positional

from genkit.config import parse
from genkit.envs import expert, make

console = Console(highlight=False, soft_wrap=True)
TRIES = 4  # waves without one success after which an expert is said not to know how


@dataclass(frozen=True)
class Demo:
    """Record an expert."""

    env: Positional[str]
    """four-ways, or another environment that has an expert."""
    expert: str = "scripted"
    """Which one."""
    episodes: Annotated[int, Ge(1)] = 200
    """How many are kept."""
    seeds: Annotated[int, Ge(0)] = 0
    """The first; those that fail are left out, and further ones recorded."""
    failures: bool = False
    """Keep episodes without success too."""
    out: str | None = None
    """The .npz; None: ENV.npz."""


def main(argv: list[str]) -> int:
    asked = parse(Demo, argv, prog="genkit demo", description="Record an expert's episodes.")
    out = File(asked.out or f"{asked.env.replace('/', '-')}.npz")
    if out.suffix != ".npz":
        raise ValueError(f"out: given {out}; a replay buffer is an .npz")
    obs, actions, tried = record(asked)
    ends = np.cumsum([len(a) for a in actions])
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part.npz")
    np.savez(part, obs=np.concatenate(obs), action=np.concatenate(actions), episode_ends=ends)
    os.replace(part, out)
    console.print(f"{out}  {len(ends)} episodes of {tried} tried, {ends[-1]} steps", markup=False)
    console.print(f"next     genkit train --data=replay --data.root {out} --data.env {asked.env}", markup=False)
    return 0


def record(asked: Demo) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Observations ``[T, Do]`` and actions ``[T, A]`` of each episode that is kept, and how many were tried.

    ``ValueError`` where the expert does not succeed once in some waves.
    """
    num = min(asked.episodes, 100)
    guide, env = expert(asked.env, asked.expert, num), make(asked.env, num)
    obs: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    tried = 0
    while len(actions) < asked.episodes:
        seeds = range(asked.seeds + tried, asked.seeds + tried + num)
        seen, done = [env.reset(list(seeds))], []
        guide.reset(list(seeds))
        alive, length, success = np.ones(num, bool), np.zeros(num, int), np.zeros(num, bool)
        while alive.any():
            done.append(guide.act(seen[-1]))
            after, _, terminated, truncated, info = env.step(done[-1])
            length += alive
            success |= alive & info.get("success", np.ones(num)).astype(bool)
            alive &= ~(terminated | truncated)
            seen.append(after)
        tried += num
        for i in np.flatnonzero(success | asked.failures)[: asked.episodes - len(actions)]:
            obs.append(np.stack([o[i] for o in seen[: length[i]]]))
            actions.append(np.stack([a[i] for a in done[: length[i]]]))
        if not actions and tried >= TRIES * num:
            raise ValueError(f"expert: {asked.expert!r} did not succeed once in {tried} episodes of {asked.env}")
    return obs, actions, tried
