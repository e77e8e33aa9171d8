"""`genkit rollout RUN`: a trained policy in its environment, with success, return and the time that it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from rich.console import Console
from rich.progress import Progress
from tyro.conf import Positional

from genkit import __version__, config
from genkit.config import parse
from genkit.core import pictures
from genkit.core.files import write_text
from genkit.diffusion.value_guidance import by_value
from genkit.envs import Env, make
from genkit.rl.policies.best_of_n import best_of, learn_q, load_q, save_q, tried
from genkit.rl.policies.planner import Planner
from genkit.rl.policies.planner import load as actor
from genkit.rl.policies.plots import fans, plans
from genkit.rl.policies.policy import Policy, carried_out
from genkit.rl.policies.rollout import Episodes, look, rollout, shown

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
    """A name in genkit.diffusion.samplers.SAMPLERS; None: ddim, one evaluation a step."""
    given: tuple[str, ...] = ()
    """What it is told, of what it was trained with (--data.conditions): skill=2, returns=0.9, goal=1.5,0.4."""
    guidance: float = 1.0
    """From the prediction without what is given through that with it; 1: none."""
    best_of: Count = 1
    """Chunks that are drawn for a decision; the one of the largest Q is carried out."""
    q_guidance: Annotated[float, Ge(0)] = 0.0
    """Draw chunks from the policy's law times exp(this Q), Q in deviations of the returns; 0: off."""
    fit_q: Annotated[int, Ge(0)] = 0
    """First learn Q from so many episodes of the policy itself, and keep it in the run's folder; 0: the one there."""
    gamma: Annotated[float, Gt(0), Le(1)] = 0.95
    """Of Q: discount from one decision to the next."""
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
    """Draw the ways that were taken, where the environment can, and what the policy may do at moments of the first."""
    out: str | None = None
    """Where results go; None: into the run's rollouts folder."""
    json: bool = False
    """Print JSON alone."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Of the networks; small ones are fastest on a CPU."""


def main(argv: list[str]) -> int:
    asked = parse(Rollout, argv, prog="genkit rollout", description="Let a policy act in its environment.")
    policy = load(asked)
    if policy.run.config.threads:
        torch.set_num_threads(policy.run.config.threads)
    limit = {} if asked.max_steps is None else {"max_steps": asked.max_steps}
    env = make(asked.env or policy.env, min(asked.parallel, asked.episodes), **limit)
    seeds = range(asked.seeds, asked.seeds + asked.episodes)
    explained = learned(asked, policy, env) if asked.fit_q else None
    policy = improved(asked, policy)
    with Progress(console=console, disable=asked.json or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("episodes", total=asked.episodes)
        done = rollout(policy, env, seeds, film=asked.film, progress=lambda n: bar.update(task, completed=n))
    found = {
        **done.summary(),
        "ms_per_chunk": latency(policy, env, env.reset(list(seeds)[: env.num])),
        "ms_per_batch": done.summary()["ms_per_chunk"],
        "steps": asked.steps if policy.run.objective.sampler else 1,
        **({} if explained is None else {"q_explains": explained}),
        **policy.about,
        "weights": policy.run.weights,
        "run": str(policy.run.directory),
        "asked": config.dump(asked),
        "genkit": __version__,
    }
    out = File(asked.out) if asked.out else policy.run.directory / "rollouts"
    out.mkdir(parents=True, exist_ok=True)
    chosen = (f"-best{asked.best_of}" if asked.best_of > 1 else "") + (
        f"-q{asked.q_guidance:g}" * bool(asked.q_guidance)
    )
    chosen += "".join(f"-{g}" for g in asked.given) + f"-w{asked.guidance:g}" * (asked.guidance != 1)
    stem = f"step{policy.run.step}-k{found['steps']}{chosen}-seeds{asked.seeds}-n{asked.episodes}"
    written = [write(found, out / f"{stem}.json"), *draw(asked, policy, env, done, out, stem)]
    if asked.json:
        print(json.dumps(found))
        return 0
    console.print(line(found), markup=False)
    for path in written:
        console.print(path, markup=False)
    return 0


def load(asked: Rollout, **how: Any) -> Policy:
    how |= {"guidance": asked.guidance, "given": parsed(asked.given)}
    policy = actor(
        asked.run, steps=asked.steps, sampler=asked.sampler, act_steps=asked.act_steps,
        ema=asked.ema, step=asked.step, device=asked.device, **how,
    )  # fmt: skip
    if not policy.valued and (asked.fit_q or asked.q_guidance or asked.best_of > 1):
        raise ValueError(
            "fit_q, best_of, q_guidance: know chunks of actions given obs, no plans and no pictures; leave them out"
        )
    return policy


def parsed(given: Sequence[str]) -> dict[str, list[float]]:
    """``skill=2`` as ``{"skill": [2]}``."""
    found: dict[str, list[float]] = {}
    for text in given:
        name, _, numbers = text.partition("=")
        try:
            found[name] = [float(n) for n in numbers.split(",")]
        except ValueError:
            raise ValueError(f"given: {text!r} is not NAME=NUMBER or NAME=NUMBER,NUMBER; say skill=2") from None
    return found


FIRST = 3 * 2**28  # of the seeds that Q is learned from: far from those that a policy is trained on or measured with


def about(asked: Rollout, policy: Policy) -> dict[str, Any]:
    """What a Q is of."""
    return {"weights": policy.run.weights, "act_steps": policy.act_steps, "env": asked.env or policy.env}


def learned(asked: Rollout, policy: Policy, env: Env) -> float:
    """Learn Q and keep it; the share of the held-out returns' variance that it explains."""
    seen = tried(policy, env, range(FIRST, FIRST + asked.fit_q), asked.gamma)
    q, explained = learn_q(
        policy.run.spec, carried_out(policy.run.spec.shape, policy.obs_shape[0], policy.act_steps), seen
    )
    more = {"steps": asked.steps, "gamma": asked.gamma, "episodes": asked.fit_q, "explains": explained}
    file = save_q(policy.run.directory, q, about(asked, policy) | more)
    if not asked.json:
        console.print(
            f"{file}: {len(seen.returns)} decisions, explains {explained:.2f} of held-out returns", markup=False
        )
    return explained


def improved(asked: Rollout, policy: Policy) -> Policy:
    """The policy that heeds its Q, where it is asked to."""
    if asked.best_of == 1 and not asked.q_guidance:
        return policy
    q = load_q(policy.run.directory, policy.run.spec, about(asked, policy)).to(policy.run.device)
    if asked.q_guidance:
        policy = load(asked, guide=by_value(q, asked.q_guidance))
    return replace(policy, generate=best_of(policy.generate, q, asked.best_of))


def latency(policy: Policy, env: Env, obs: Any, repeats: int = 20) -> float:
    """Milliseconds for one chunk of one world: the median of some calls, after one that does not count."""
    import time

    import numpy as np

    to, do = policy.obs_shape
    one, seen = np.repeat(obs[:1, None, :do], to, 1), shown([look(policy, env)] * to)
    seen = {k: v[:1] for k, v in seen.items()}
    took = []
    for _ in range(repeats + 1):
        policy.reset([0])
        began = time.perf_counter()
        policy.act(one, **seen)
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
    return write_text(path, json.dumps(found, indent=1) + "\n")


def draw(asked: Rollout, policy: Policy, env: Any, done: Episodes, out: File, stem: str) -> list[File]:
    made = []
    picture = getattr(env, "draw", None)
    if asked.picture and picture:
        good = done.info["success"].astype(bool)
        colours = [f"C{int(m)}" if ok else "0.6" for m, ok in zip(done.info["mode"], good, strict=True)]
        made.append(pictures.save(picture(done.paths, colours), out / f"{stem}.png"))
    if asked.picture and policy.frame_shape is None:  # pictures that were seen are not kept
        if picture and isinstance(policy, Planner):
            made.append(pictures.save(plans(policy, done.paths[0], picture), out / f"{stem}-plans.png"))
        made.append(pictures.save(fans(policy, done.paths[0]), out / f"{stem}-actions.png"))
    for i, frames in enumerate(done.frames):
        made.append(pictures.save_gif(frames, out / f"{stem}-episode{i}.gif"))
    return made
