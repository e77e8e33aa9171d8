"""Let a trained policy act in its environment: what `genkit rollout` and ``genkit.rollout`` do."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Gt, Le, Lt
from PIL import Image

from genkit import __version__
from genkit.config import override
from genkit.config.numbers import CheckpointStep, Count, Natural, NonNegative, Positive, Scale, Seed
from genkit.config.paths import PathText
from genkit.core import Generator, Guidance, pictures
from genkit.core.arrays import refuse_other_kind
from genkit.core.device import DeviceName
from genkit.core.files import refuse_foreign, write_text
from genkit.core.progress import Progress, reporting
from genkit.data.demonstrations.windows import Demonstrations
from genkit.diffusion.value_guidance import value_guidance
from genkit.envs import Env
from genkit.rl.policies.best_of_n import best_of
from genkit.rl.policies.episodes import Episodes, frames_argument, run_episodes, see
from genkit.rl.policies.execution import DelayedPolicy, ExecutionName
from genkit.rl.policies.implicit_q import learn_implicit_q, recorded_transitions
from genkit.rl.policies.planner import Planner
from genkit.rl.policies.plots import plot_actions, plot_plans
from genkit.rl.policies.policy import ConditionValue, Policy, executed_mask
from genkit.rl.policies.preferences import collect_pairs, find_score
from genkit.rl.policies.q_function import collect_decisions, learn_q, load_q, save_q
from genkit.training.run import Run
from genkit.training.sampling import SamplerName

logger = logging.getLogger("genkit")
# settings that a file name holds in a form of its own (the checkpoint and K as they are used), or that change no result
NAMED = {"step", "steps", "best_of", "q_guidance", "conditions", "guidance", "seed", "episodes", "film", "workers",
         "pairs", "pair_episodes", "prefer"}  # fmt: skip
Q_SEED = 3 * 2**28  # first seed of the episodes that Q is learned from; used neither in training nor in evaluation
PAIR_SEED = 7 * 2**27  # the same of preference pairs


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Settings of a policy's episodes in an environment."""

    env: str | None = None
    """Environment: four-ways, pusht, a gymnasium id or module:id of your own; None: that of the demonstrations."""
    env_args: tuple[str, ...] = ()
    """Keyword arguments of an environment of gymnasium: reward_type=dense; they add to those of the demonstrations."""
    episodes: Count = 50
    """Number of episodes."""
    seed: Seed = 100_000
    """Episode i starts and draws from seed + i."""
    steps: Count | None = None
    """Sampler steps for each chunk of actions; None: those of fine-tuning, else 1 of an anchored flow, else 4."""
    sampler: SamplerName | None = None
    """Sampler. None: ddim, or flow_map for a flow map; one evaluation a step."""
    conditions: tuple[str, ...] = ()
    """Conditions that the policy was trained with (--data.conditions): skill=2, returns=0.9, goal=1.5,0.4, or the text
    of a task, "text=go left"."""
    guidance: Scale = 1.0
    """Guidance scale toward these conditions; 1: none."""
    best_of: Count = 1
    """Chunks drawn for each decision; the one with the largest Q is executed."""
    q_guidance: NonNegative = 0.0
    """Draw chunks from the policy's distribution times exp(q_guidance Q), Q in deviations of the returns; 0: off."""
    fit_q: Natural = 0
    """Learn Q first, from this many episodes of the policy, and save it in the run's folder; 0: use the saved one."""
    offline_q: bool = False
    """Learn Q first from the rewards of the demonstrations (--data.reward), without the environment, by implicit
    Q-learning; with --best-of 16 it is IDQL."""
    expectile: Annotated[float, Gt(0), Lt(1)] = 0.7
    """Of implicit Q-learning: 0.5 values the recorded actions, larger ones the best among them."""
    gamma: Annotated[float, Gt(0), Le(1)] = 0.95
    """Discount of Q from one decision to the next."""
    pairs: PathText | None = None
    """Write preference pairs into this .npz first, for finetune --method dpo: two chunks of the policy for the same
    observation, the better by what followed."""
    pair_episodes: Count = 1000
    """Episodes that pairs are drawn from. Each runs twice, the second time with other chunks from a random decision on;
    those in which nothing is preferred give no pair."""
    prefer: str = "return"
    """What the preferred one of two episodes has more of: return, best_reward, success, coverage, or mode=2, success by
    that way."""
    act_steps: Count | None = None
    """Actions of each chunk that are executed before the next decision; None: as in training."""
    delay: Natural = 0
    """Steps of the environment that a decision takes: its chunk arrives as many steps after the observation."""
    execution: ExecutionName = "naive"
    """How chunks follow each other: naive, the newest that has arrived; ensemble, the average of all that have (Zhao et
    al. 2023; with --act-steps 1 as in the paper); real-time, each drawn as a continuation of the one under way (Black
    et al. 2025)."""
    ensemble_decay: NonNegative = 0.01
    """Decay of the weights of an ensemble: exp(-decay i), i = 0 for the oldest chunk."""
    guidance_limit: Positive = 1000.0
    """Largest weight of the guidance of real-time execution: the paper's beta. At most 3 for an anchored flow."""
    max_steps: Count | None = None
    """Time limit of an episode; None: the environment's."""
    num_envs: Count = 50
    """Parallel environments."""
    workers: Natural = 0
    """Processes that step the environments, for those that are slower than the policy; results are the same. 0: this
    process alone."""
    ema: str | None = None
    """Averaged weights to use, by decay; None: the slowest; "none": the raw weights."""
    step: CheckpointStep | None = None
    """Checkpoint to use, by its step or "best" (of train --keep-best); None: the newest."""
    film: Natural = 0
    """Number of first episodes to film, as one GIF each."""
    device: DeviceName = "cpu"
    """Device of the networks; small ones are fastest on a CPU."""


def refuse_idle(settings: RolloutSettings) -> None:
    """``ValueError`` for the first setting that has no effect together with the others."""
    s = settings
    learns_q = bool(s.fit_q or s.offline_q)
    needs = {  # by the setting: whether it has an effect, and what it belongs to
        "expectile": (s.offline_q, "--offline-q"),
        "gamma": (learns_q, "--fit-q or --offline-q"),
        "pair_episodes": (s.pairs is not None, "--pairs FILE"),
        "prefer": (s.pairs is not None, "--pairs FILE"),
        "ensemble_decay": (s.execution == "ensemble", "--execution ensemble"),
        "guidance_limit": (s.execution == "real-time", "--execution real-time"),
    }
    defaults = {f.name: f.default for f in fields(RolloutSettings)}
    for name, (used, owner) in needs.items():
        value = getattr(s, name)
        if not used and value != defaults[name]:
            raise ValueError(f"{name}: given {value}, which has no effect without {owner}; leave it out")


@dataclass(frozen=True)
class Rollouts:
    """Episodes of a run's policy, with the settings that they depend on."""

    policy: Policy
    env: Env
    episodes: Episodes
    settings: RolloutSettings
    chunk_ms: float
    """median time to draw one chunk for one environment, in milliseconds"""
    q_explained_variance: float | None = None
    """share of held-out returns' variance that a newly learned Q explains"""
    folder: Path | None = None
    """where :meth:`save` writes unless another folder is given; None: ``rollouts`` in the run's folder"""

    def summary(self) -> dict[str, Any]:
        """Everything measured, with 95 % intervals, and the settings that it depends on, ready for JSON."""
        run, episodes = self.policy.run, self.episodes.summary()
        q = {} if self.q_explained_variance is None else {"q_explained_variance": self.q_explained_variance}
        return {
            **episodes,
            "ms_per_chunk": self.chunk_ms,
            "ms_per_batch": episodes["ms_per_chunk"],
            "steps": self.policy.steps,
            **q,
            **self.policy.details,
            "weights": run.weights,
            "run": str(run.directory),
            "settings": asdict(self.settings),
            "genkit": __version__,
        }

    def pictures(self) -> dict[str, Image.Image]:
        """``paths`` taken, if the environment can draw them; ``plans`` of a planner, and ``actions`` that the policy
        would take, at three moments of the first episode. Policies that see pictures have no plans and actions, since
        the pictures that they saw are not kept."""
        draw: Callable[..., Image.Image] | None = getattr(self.env, "draw", None)
        drawn, info = {}, self.episodes.info
        if draw:
            successful = info["success"].astype(bool)
            colours = [f"C{int(m)}" if ok else "0.6" for m, ok in zip(info["mode"], successful, strict=True)]
            drawn["paths"] = draw(self.episodes.paths, colours)
        if self.policy.frame_shape is None:
            first = self.episodes.paths[0]
            if draw and isinstance(self.policy, Planner):
                drawn["plans"] = plot_plans(self.policy, first, draw)
            drawn["actions"] = plot_actions(self.policy, first)
        return drawn

    @property
    def name(self) -> str:
        """A file name, without suffix, that is different for other settings, except for the number of films."""
        return rollout_name(self.policy, self.settings)

    def save(self, folder: str | Path | None = None, *, draw: bool = True) -> list[Path]:
        """Write the summary as JSON, the pictures (if ``draw``) and the films into ``folder``; the files.

        ``folder`` None is :attr:`folder`. ``ValueError`` if a file there would be replaced that genkit did not write.
        """
        folder = Path(folder or self.folder or self.policy.run.directory / "rollouts")
        refuse_foreign(*existing_files(folder, self.name))
        files = [write_text(folder / f"{self.name}.json", json.dumps(self.summary(), indent=1) + "\n")]
        if draw:
            files += [pictures.save_image(p, folder / f"{self.name}-{kind}.png") for kind, p in self.pictures().items()]
        for i, frames in enumerate(self.episodes.frames):
            files.append(pictures.save_gif(frames, folder / f"{self.name}-episode{i}.gif"))
        return files

    def __str__(self) -> str:
        """The results in one line."""
        result = self.summary()
        parts = [f"{result['episodes']} episodes"]
        for name in ("success", "coverage", "best_reward", "return"):
            if name in result:
                e = result[name]
                interval = "" if e["low"] is None else f" ({e['low']:.3f} to {e['high']:.3f})"
                parts.append(f"{name} {e['value']:.3f}{interval}")
        if "mode_entropy_bits" in result:
            parts.append(f"mode entropy {result['mode_entropy_bits']['value']:.2f} bits")
        return ", ".join([*parts, f"{self.chunk_ms:.1f} ms a chunk, {result['weights']}"])


def rollout(
    run: str | Path | Run,
    settings: RolloutSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Rollouts:
    """Let the policy of ``run`` act for some episodes. ``changes`` are settings by name: ``rollout(run, steps=2)``.

    ``out`` is the folder in which :meth:`Rollouts.save` will write; None: ``rollouts`` in the run's folder.

    ``progress("episodes", done, total)`` is called as they end. Messages go to the logger ``genkit``. ``ValueError`` if
    the run is not of a policy, does not fit the environment, or a file in ``out`` would be replaced that genkit did not
    write. For a policy or an environment of your own there is
    :func:`genkit.rl.policies.episodes.run_episodes`.
    """
    settings = override(settings or RolloutSettings(), **changes)
    refuse_idle(settings)
    score = find_score(settings.prefer)
    if settings.pairs:
        refuse_other_kind(settings.pairs, ("chosen", "rejected"), "pairs")
    policy = load_policy(run, settings)
    folder = Path(out) if out else policy.run.directory / "rollouts"
    refuse_foreign(*existing_files(folder, rollout_name(policy, settings)))
    if policy.run.config.threads:
        torch.set_num_threads(policy.run.config.threads)

    def make_env(episodes: int) -> Env:
        num = min(settings.num_envs, episodes)
        return policy.make_env(num, settings.env, settings.env_args, settings.max_steps, settings.workers)

    if settings.pairs:
        seeds = range(PAIR_SEED, PAIR_SEED + settings.pair_episodes)
        pairs = collect_pairs(policy, make_env(len(seeds)), seeds, score)
        file = pairs.save(settings.pairs)
        logger.info(f"{file}: {len(pairs.chosen)} pairs from {len(seeds)} episodes, each run twice")
    learns = settings.fit_q or settings.offline_q
    explained_variance = fit_q(policy, make_env(max(1, settings.fit_q)), settings) if learns else None
    env, seeds = make_env(settings.episodes), range(settings.seed, settings.seed + settings.episodes)
    policy = with_q(policy, settings)
    actor: Policy | DelayedPolicy = policy
    if settings.delay or settings.execution != "naive":
        actor = DelayedPolicy(
            policy, settings.delay, settings.execution, settings.ensemble_decay, settings.guidance_limit
        )
    with reporting(progress) as report:
        episodes = run_episodes(actor, env, seeds, film=settings.film, progress=report)
    chunk_ms = chunk_latency(policy, env, env.reset(list(seeds)[: env.num]))
    return Rollouts(policy, env, episodes, settings, chunk_ms, explained_variance, folder)


def existing_files(folder: Path, name: str) -> list[Path]:
    """The files of a rollout that are there already."""
    pictures_and_films = [p for end in ("png", "gif") for p in folder.glob(f"{glob.escape(name)}-*.{end}")]
    return [folder / f"{name}.json", *pictures_and_films]


def rollout_name(policy: Policy, settings: RolloutSettings) -> str:
    """The name of the files of a rollout, without suffix: different for other settings, except the number of films."""
    s = settings
    parts = [f"step{policy.run.step}", f"k{policy.steps}"]
    parts += [f"best{s.best_of}"] if s.best_of > 1 else []
    parts += [f"q{s.q_guidance:g}"] if s.q_guidance else []
    parts += [*s.conditions, *([f"w{s.guidance:g}"] if s.guidance != 1 else [])]
    parts += [f"seed{s.seed}", f"n{s.episodes}"]
    for f in fields(s):
        value = getattr(s, f.name)
        if f.name not in NAMED and value != f.default:
            text = " ".join(value) if isinstance(value, tuple) else str(value)
            parts.append(f"{f.name}={text}")
    name = "-".join(parts)
    short = re.sub(r"[^\w.,=+-]", "_", name)[:150]
    return short if short == name else f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def load_policy(run: str | Path | Run, settings: RolloutSettings, **options: Any) -> Policy:
    """The policy that ``settings`` describe, without Q. ``ValueError`` if they need a Q that it cannot have."""
    policy = Policy.load(
        run,
        steps=settings.steps,
        sampler=settings.sampler,
        act_steps=settings.act_steps,
        ema=settings.ema,
        step=settings.step,
        device=settings.device,
        conditions=parse_conditions(settings.conditions),
        guidance=settings.guidance,
        **options,
    )
    if settings.fit_q and settings.offline_q:
        raise ValueError(f"fit_q: given {settings.fit_q} with offline_q, which takes no episodes; choose one of them")
    if not policy.supports_q and (settings.fit_q or settings.offline_q or settings.q_guidance or settings.best_of > 1):
        raise ValueError(
            "fit_q, offline_q, best_of, q_guidance: need chunks of actions given obs, not plans or pictures; leave "
            "them out"
        )
    return policy


def parse_conditions(texts: Sequence[str]) -> dict[str, ConditionValue]:
    """``["skill=2", "text=go left"]`` as ``{"skill": [2.0], "text": "go left"}``."""
    conditions: dict[str, ConditionValue] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            conditions[name] = value if name == "text" else [float(n) for n in value.split(",")]
        except ValueError:
            raise ValueError(
                f"conditions: {text!r} is not NAME=NUMBER, NAME=NUMBER,NUMBER or text=WORDS; try skill=2"
            ) from None
    return conditions


def q_requirements(policy: Policy, settings: RolloutSettings) -> dict[str, Any]:
    """The settings that a saved Q must have been learned with, to apply to this policy."""
    env = " ".join([settings.env or policy.env, *settings.env_args])
    return {
        "weights": policy.run.weights,
        "act_steps": policy.act_steps,
        "env": env,
        "conditions": parse_conditions(settings.conditions),
        "guidance": settings.guidance,
    }


def fit_q(policy: Policy, env: Env, settings: RolloutSettings) -> float:
    """Learn Q and save it in the run's folder; the share of held-out returns' variance that it explains."""
    used = executed_mask(policy.run.spec.shape, policy.obs_shape[0], policy.act_steps)
    if settings.offline_q:
        source = policy.run.config.data
        assert isinstance(source, Demonstrations), "a policy's"
        transitions = recorded_transitions(source, policy.act_steps, policy.run.codec)
        num, what = len(transitions.rewards), "of its targets on held-out decisions"
        q, explained = learn_implicit_q(
            policy.run.spec, used, transitions, gamma=settings.gamma, expectile=settings.expectile
        )
    else:
        data = collect_decisions(policy, env, range(Q_SEED, Q_SEED + settings.fit_q), settings.gamma)
        num, what = len(data.returns), "of held-out returns"
        q, explained = learn_q(policy.run.spec, used, data)
    about = {"steps": policy.steps, "gamma": settings.gamma, "episodes": settings.fit_q, "explained": explained}
    file = save_q(policy.run.directory, q, q_requirements(policy, settings) | about)
    logger.info(f"{file}: {num} decisions, explains {explained:.2f} {what}")
    return explained


def with_q(policy: Policy, settings: RolloutSettings) -> Policy:
    """The policy with Q guidance and the choice of the best chunk, if ``settings`` have them."""
    if settings.best_of == 1 and not settings.q_guidance:
        return policy
    run = policy.run
    q = load_q(run.directory, run.spec, q_requirements(policy, settings)).to(run.device)
    if settings.q_guidance:
        policy = load_policy(run, settings, guide=value_guidance(q, settings.q_guidance))
    generate_with = policy.generate_with

    def best_with(guide: Guidance) -> Generator:
        assert generate_with is not None, "Policy.guided checks it"
        return best_of(generate_with(guide), q, settings.best_of)

    return replace(
        policy,
        generate=best_of(policy.generate, q, settings.best_of),
        generate_with=best_with if generate_with else None,
    )


def chunk_latency(policy: Policy, env: Env, obs: np.ndarray, repeats: int = 20) -> float:
    """Milliseconds to draw one chunk for one environment: median of ``repeats`` calls, after a warm-up."""
    obs_steps, obs_dim = policy.obs_shape
    window = np.repeat(obs[:1, None, :obs_dim], obs_steps, 1)
    frames = {k: v[:1] for k, v in frames_argument([see(policy, env)] * obs_steps).items()}
    seconds = []
    for _ in range(repeats + 1):
        policy.reset([0])
        start = time.perf_counter()
        policy.act(window, **frames)
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds[1:]))
