"""`genkit rollout RUN`: a trained policy in its environment, with success, return and the time that it takes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as File
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from rich.console import Console
from rich.progress import Progress
from tyro.conf import Positional

from genkit import __version__, config, pictures
from genkit.config import parse
from genkit.envs import make
from genkit.rl.policy import Policy
from genkit.rl.rollout import Episodes, rollout

console = Console(highlight=False, soft_wrap=True)
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Rollout:
    """Let a policy act, and measure what it reaches."""

    run: Positional[str]
    """The run's folder, such as runs/latest."""
    env: str | None = None
    """four-ways, pusht, or an id of gymnasium; None: that of the demonstrations."""
    episodes: Count = 50
    """How many."""
    seeds: Annotated[int, Ge(0)] = 100_000
    """The first; episode i begins and draws by seeds + i."""
    steps: Count = 4
    """Steps of the sampler, for each chunk of actions."""
    sampler: str | None = None
    """A name in genkit.sampling.SAMPLERS; None: ddim, one evaluation a step."""
    guidance: float = 1.0
    """From the unconditional prediction through the policy's own; 1: none."""
    act_steps: Count | None = None
    """Actions of a chunk that are carried out, counted from now; None: as in training."""
    max_steps: Count | None = None
    """The time limit of an episode; None: the environment's own."""
    parallel: Count = 50
    """Worlds side by side."""
    ema: str | None = None
    """Which averaged weights, by decay; None: the slowest; "none": the weights themselves."""
    step: Annotated[int, Ge(0)] | None = None
    """Which checkpoint; None: the newest."""
    film: Annotated[int, Ge(0)] = 0
    """How many of the first episodes are filmed, as one GIF each."""
    picture: bool = True
    """Draw the ways that were taken, where the environment can."""
    out: str | None = None
    """Where results go; None: into the run's rollouts folder."""
    json: bool = False
    """Print JSON alone."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Of the networks; small ones are fastest on a CPU."""


def main(argv: list[str]) -> int:
    asked = parse(Rollout, argv, prog="genkit rollout", description="Let a policy act in its environment.")
    how: dict[str, Any] = {} if asked.guidance == 1 else {"guidance": asked.guidance}
    policy = Policy.load(
        asked.run, steps=asked.steps, sampler=asked.sampler, act_steps=asked.act_steps,
        ema=asked.ema, step=asked.step, device=asked.device, **how,
    )  # fmt: skip
    if policy.run.config.threads:
        torch.set_num_threads(policy.run.config.threads)
    limit = {} if asked.max_steps is None else {"max_steps": asked.max_steps}
    env = make(asked.env or policy.env, min(asked.parallel, asked.episodes), **limit)
    seeds = range(asked.seeds, asked.seeds + asked.episodes)
    with Progress(console=console, disable=asked.json or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("episodes", total=asked.episodes)
        done = rollout(policy, env, seeds, film=asked.film, progress=lambda n: bar.update(task, completed=n))
    found = {
        **done.summary(),
        "ms_per_chunk": latency(policy, env.reset(list(seeds)[: env.num])),
        "ms_per_batch": done.summary()["ms_per_chunk"],
        "steps": asked.steps if policy.run.objective.sampler else 1,
        "weights": policy.run.weights,
        "run": str(policy.run.directory),
        "asked": config.dump(asked),
        "genkit": __version__,
    }
    out = File(asked.out) if asked.out else policy.run.directory / "rollouts"
    out.mkdir(parents=True, exist_ok=True)
    stem = f"step{policy.run.step}-k{found['steps']}-seeds{asked.seeds}-n{asked.episodes}"
    written = [write(found, out / f"{stem}.json"), *draw(asked, env, done, out, stem)]
    if asked.json:
        print(json.dumps(found))
        return 0
    console.print(line(found), markup=False)
    for path in written:
        console.print(path, markup=False)
    return 0


def latency(policy: Policy, obs: Any, repeats: int = 20) -> float:
    """Milliseconds for one chunk of one world: the median of some calls, after one that does not count."""
    import time

    import numpy as np

    one = np.repeat(obs[:1, None], policy.obs_shape[0], 1)
    took = []
    for _ in range(repeats + 1):
        policy.reset([0])
        began = time.perf_counter()
        policy.act(one)
        took.append(time.perf_counter() - began)
    return 1e3 * float(np.median(took[1:]))


def line(found: Mapping[str, Any]) -> str:
    """What a person reads first."""
    said = [f"{found['episodes']} episodes"]
    for name in ("success", "coverage", "best_reward", "return"):
        if name in found:
            e = found[name]
            interval = "" if e["low"] is None else f" ({e['low']:.3f} to {e['high']:.3f})"
            said.append(f"{name} {e['value']:.3f}{interval}")
    if "mode_entropy_bits" in found:
        said.append(f"ways {found['mode_entropy_bits']:.2f} bits")
    return ", ".join([*said, f"{found['ms_per_chunk']:.1f} ms a chunk, {found['weights']}"])


def write(found: Mapping[str, Any], path: File) -> File:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(part, path)
    return path


def draw(asked: Rollout, env: Any, done: Episodes, out: File, stem: str) -> list[File]:
    made = []
    picture = getattr(env, "draw", None)
    if asked.picture and picture:
        good = done.info["success"].astype(bool)
        colours = [f"C{int(m)}" if ok else "0.6" for m, ok in zip(done.info["mode"], good, strict=True)]
        made.append(pictures.save(picture(done.paths, colours), out / f"{stem}.png"))
    for i, frames in enumerate(done.frames):
        made.append(pictures.save_gif(frames, out / f"{stem}-episode{i}.gif"))
    return made
