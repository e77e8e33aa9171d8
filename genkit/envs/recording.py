"""Recording an expert's episodes as demonstrations: :func:`record_demonstrations`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from genkit.config import table
from genkit.config.numbers import Count, Natural, Seed
from genkit.core.arrays import refuse_other_kind, save_npz
from genkit.core.files import refuse_foreign
from genkit.core.progress import Progress, reporting, silent
from genkit.envs import Env, Expert, check_outcome, make, make_expert, parse_arguments, plain_id
from genkit.envs.ars import LinearPolicy, SearchSettings, search

MAX_COPIES = 100  # copies of the environment that run at once
MAX_WAVES = 4  # batches of episodes without a success after which the recording fails
EARLY_END = 0.05  # fraction of the time limit before which a terminated episode counts as a failure


# --------------------------------------------------------------------------------------------------- the experts
class ExpertSource(ABC):
    """How an expert is obtained: an entry of ``EXPERT_SOURCES``, a frozen dataclass of settings."""

    @abstractmethod
    def open(self, env: str, num: int, progress: Progress = silent, **arguments: Any) -> Expert:
        """The expert for ``num`` copies of an environment, made with these keyword arguments. Raise ``ValueError`` if
        there is none."""


@dataclass(frozen=True)
class Scripted(ExpertSource):
    """The expert that is written for the environment."""

    def open(self, env: str, num: int, progress: Progress = silent, **arguments: Any) -> Expert:
        return make_expert(env, "scripted", num)


@dataclass(frozen=True)
class ARS(SearchSettings, ExpertSource):
    """A linear policy that a random search finds (Mania, Guy & Recht 2018)."""

    def open(self, env: str, num: int, progress: Progress = silent, **arguments: Any) -> Expert:
        def report(done: int, mean_return: float) -> None:
            progress(f"rounds of search, mean return {mean_return:.0f}", done, self.rounds)

        return search(env, self, report, **arguments)


@dataclass(frozen=True)
class Saved(ExpertSource):
    """A linear policy that an earlier search found."""

    path: str = ""
    """the .json that a recording with ars wrote"""

    def open(self, env: str, num: int, progress: Progress = silent, **arguments: Any) -> Expert:
        return LinearPolicy.load(self.path)


EXPERT_SOURCES: Mapping[str, type[ExpertSource]] = {"scripted": Scripted, "ars": ARS, "saved": Saved}


# ------------------------------------------------------------------------------------------------- the recording
@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Which episodes of an expert are recorded."""

    env: str
    """The environment: four-ways, an id of gymnasium, such as HalfCheetah-v5, or module:id of your own."""
    env_args: tuple[str, ...] = ()
    """Keyword arguments of an environment of gymnasium: reward_type=dense."""
    expert: ExpertSource = table(
        "genkit.envs.recording:EXPERT_SOURCES", "scripted", kind="genkit.envs.recording:ExpertSource"
    )
    """Source of the expert: scripted, ars (searches a linear policy) or saved."""
    episodes: Count = 200
    """Episodes to keep."""
    seed: Seed = 0
    """Seed of the first episode. Failed episodes are dropped and further ones recorded."""
    keep_failures: bool = False
    """Keep episodes without success too."""
    min_return: float | None = None
    """Smallest return of an episode that is kept; None: any."""
    pixels: Natural = 0
    """Side of square images that are recorded too, as img, if the environment renders any; 0: none."""


@dataclass(frozen=True)
class Recording:
    """A replay buffer that was recorded."""

    path: Path
    """the replay buffer, an .npz"""
    returns: tuple[float, ...]
    """of each episode that was kept"""
    num_steps: int
    """of all episodes together"""
    num_tried: int
    """episodes, with those that were dropped"""
    expert_path: Path | None = None
    """the linear policy that was searched or loaded, for ``--expert=saved``"""
    expert_origin: str = ""
    """how that policy was found"""


def record_demonstrations(
    settings: DemoSettings, out: str | Path | None = None, *, progress: Progress | None = None
) -> Recording:
    """Record episodes of an expert as a replay buffer, which ``--data=replay`` reads.

    ``out`` is the .npz; None: the environment's name. A linear expert is saved beside it. ``ValueError`` if there is no
    expert, it does not fit the environment, or it does not succeed once in several waves.
    """
    path = Path(out or f"{plain_id(settings.env).replace('/', '-')}.npz")
    if path.suffix != ".npz":
        raise ValueError(f"out: given {path}; a replay buffer is an .npz")
    expert_path = None if isinstance(settings.expert, Scripted) else path.with_suffix(".expert.json")
    refuse_other_kind(path, ("episode_ends", "action"))
    refuse_foreign(*([expert_path] if expert_path else []))
    with reporting(progress) as report:
        demos = collect_episodes(settings, report)
    ends = np.cumsum([len(actions) for actions in demos.arrays["action"]])
    arrays: Any = {name: np.concatenate(parts) for name, parts in demos.arrays.items()}
    save_npz(path, {"episode_ends": ends, **arrays})
    origin = ""
    if expert_path and isinstance(demos.expert, LinearPolicy):
        origin = demos.expert.origin
        demos.expert.save(expert_path)
    return Recording(path, tuple(demos.returns), int(ends[-1]), demos.num_tried, expert_path, origin)


class Demos(NamedTuple):
    """The episodes that are kept, and the expert who acted in them."""

    expert: Expert
    num_tried: int
    returns: list[float]
    arrays: dict[str, list[np.ndarray]]
    """of each episode: ``obs`` ``[T, Do]``, ``action`` ``[T, A]``, ``reward`` ``[T]``; ``mode`` ``[T]`` (the way it
    took) if the environment knows it; ``img`` ``[T, H, W, 3]`` if images are recorded"""


def collect_episodes(settings: DemoSettings, progress: Progress = silent) -> Demos:
    """Let the expert act until enough episodes succeed.

    If the environment knows no success, an episode succeeds that does not terminate in the first twentieth of its time.
    ``ValueError`` as for :func:`record_demonstrations`.
    """
    num = min(settings.episodes, MAX_COPIES)
    arguments = parse_arguments(settings.env_args)
    expert = settings.expert.open(settings.env, num, progress, **arguments)
    env = make(settings.env, num, **arguments)
    if isinstance(expert, LinearPolicy) and expert.weight.shape != (env.action_dim, env.obs_dim):
        a, do = expert.weight.shape
        dims = f"{settings.env} has {env.obs_dim} and {env.action_dim}"
        raise ValueError(f"expert: is for {do} observed numbers and {a} of action; {dims}")
    render = renderer(env, settings)
    demos: dict[str, list[np.ndarray]] = {}
    returns: list[float] = []
    tried = 0
    while len(returns) < settings.episodes:
        first = settings.seed + tried
        wave = run_wave(env, expert, range(first, first + num), render)
        tried += num
        good = wave.succeeded | settings.keep_failures
        good &= wave.returns >= (-np.inf if settings.min_return is None else settings.min_return)
        for i in np.flatnonzero(good)[: settings.episodes - len(returns)]:
            returns.append(float(wave.returns[i]))
            for name, values in wave.arrays_of(int(i)).items():
                demos.setdefault(name, []).append(values)
        progress("episodes", len(returns), settings.episodes)
        if not returns and tried >= MAX_WAVES * num:
            name = type(settings.expert).__name__.lower()
            raise ValueError(
                f"expert: {name} did not succeed once in {tried} episodes of {settings.env}; the last took "
                f"{wave.length.mean():.0f} of {env.max_steps} steps and brought {wave.returns.mean():.1f}"
            )
    return Demos(expert, tried, returns, demos)


def renderer(env: Env, settings: DemoSettings) -> Callable[[], np.ndarray] | None:
    """A function that returns images of all rows now, uint8 ``[N, 3, H, W]``; None if none are recorded."""
    pixels: Any = getattr(env, "pixels", None)
    if not settings.pixels:
        return None
    if pixels is None:
        raise ValueError(f"pixels: {settings.env} renders no images; leave it out")
    size = (settings.pixels, settings.pixels)
    return lambda: pixels(size)


class Wave(NamedTuple):
    """One episode of each of N copies."""

    obs: list[np.ndarray]
    """``[N, Do]`` of each step, and after the last one"""
    actions: list[np.ndarray]
    rewards: list[np.ndarray]
    images: list[np.ndarray]
    length: np.ndarray
    returns: np.ndarray
    succeeded: np.ndarray
    info: Mapping[str, np.ndarray]
    """after the last step"""

    def arrays_of(self, i: int) -> dict[str, np.ndarray]:
        """The arrays of the episode of copy ``i``, as :class:`Demos` has them."""
        n = self.length[i]
        arrays = {
            "obs": np.stack([v[i] for v in self.obs[:n]]),
            "action": np.stack([v[i] for v in self.actions[:n]]),
            "reward": np.array([v[i] for v in self.rewards[:n]]),
        }
        if "mode" in self.info:
            arrays["mode"] = np.full(n, int(self.info["mode"][i]))
        if self.images:
            arrays["img"] = np.stack([v[i].transpose(1, 2, 0) for v in self.images[:n]])
        return arrays


def run_wave(env: Env, expert: Expert, seeds: Sequence[int], render: Callable[[], np.ndarray] | None) -> Wave:
    """Run one episode in each copy of the environment, with these seeds."""
    obs, actions, rewards, images = [env.reset(list(seeds))], [], [], []
    expert.reset(list(seeds))
    alive, length, returns = np.ones(env.num, bool), np.zeros(env.num, int), np.zeros(env.num)
    success = ended_early = np.zeros(env.num, bool)
    info: dict[str, np.ndarray] = {}

    def locate(row: int) -> tuple[int, int]:
        return int(seeds[row]), int(length[row])

    while alive.any():
        actions.append(expert.act(obs[-1]))
        if render is not None:
            images.append(render())
        after, reward, terminated, truncated, info = env.step(actions[-1])
        length += alive
        check_outcome("reward", reward, np.flatnonzero(alive), locate)
        returns += reward
        rewards.append(reward)
        success = success | (alive & info.get("success", success).astype(bool))
        ended_early = ended_early | (terminated & (length < EARLY_END * env.max_steps))
        alive &= ~(terminated | truncated)
        check_outcome("obs", after, np.flatnonzero(alive), locate)
        obs.append(after)
    succeeded = success if "success" in info else ~ended_early
    return Wave(obs, actions, rewards, images, length, returns, succeeded, info)
