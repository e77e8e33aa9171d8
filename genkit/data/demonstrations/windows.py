"""Demonstrations: windows of recorded episodes, as samples of action chunks given observations.

A window has ``pred_steps`` steps. The first ``obs_steps`` hold what is observed, the last of them being *now*; all of
them hold actions. So the first ``obs_steps - 1`` predicted actions lie in the past, and of those from now on a policy
carries out ``act_steps`` before it looks again (Chi et al. 2023, section 3.1). Windows reach over both ends of an
episode, where its first and last step are repeated.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from genkit.core import Batch, Condition, Draw, Frames, Label, Spec, Vector
from genkit.data.codecs import Actions, MinMax, Plans, Standardize
from genkit.data.images import InMemory
from genkit.data.source import DataSource, Split, check_split

Steps = Annotated[int, Ge(1)]
FURTHEST = 5.0  # from 0, that networks see a scaled observation: a cheetah on its back was a hundred deviations away
SCALINGS: Mapping[str, type[MinMax] | type[Standardize]] = {"min-max": MinMax, "standardize": Standardize}


class Episode(NamedTuple):
    """One recording: what was observed ``[T, Do]`` and what was done ``[T, A]``, in the world's units. Where they are
    known: what it brought ``[T]``, of which kind it was at each step ``[T]``, what was observed at the end ``[Do]``,
    and pictures ``[T, C, H, W]``. Where these are all there is to see, Do is 0."""

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray | None = None
    skill: np.ndarray | None = None
    last: np.ndarray | None = None
    frames: np.ndarray | None = None


def check_horizons(obs_steps: int, pred_steps: int, act_steps: int) -> None:
    """``ValueError`` unless the actions that are carried out, counted from now, are among those predicted."""
    if min(obs_steps, pred_steps, act_steps) < 1:
        raise ValueError(f"obs_steps, pred_steps, act_steps: given {obs_steps}, {pred_steps}, {act_steps}; each >= 1")
    if obs_steps - 1 + act_steps > pred_steps:
        raise ValueError(
            f"act_steps: given {act_steps}, but of {pred_steps} predicted steps {obs_steps - 1} lie in the past, "
            f"which leaves {max(0, pred_steps - obs_steps + 1)}; take fewer, or a longer pred_steps"
        )


def starts(length: int, obs_steps: int, pred_steps: int, act_steps: int) -> np.ndarray:
    """First steps of all windows of an episode: those of diffusion_policy's ``create_indices`` with ``obs_steps - 1``
    steps of padding before and ``act_steps - 1`` behind; one window at least, where the episode is shorter than that.
    """
    first = 1 - obs_steps
    return np.arange(first, max(first, length - pred_steps + act_steps - 1) + 1)


def steps_of(
    episodes: Sequence[Episode], obs_steps: int, pred_steps: int, act_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """The steps ``[N, Tp]`` of all windows, counted on from one episode to the next, and the places of their states,
    which are one more in each episode: after the last action there is a last state."""
    steps, places, before = [], [], 0
    for i, episode in enumerate(episodes):
        length = len(episode.actions)
        window = starts(length, obs_steps, pred_steps, act_steps)[:, None] + np.arange(pred_steps)
        steps.append(before + np.clip(window, 0, length - 1))
        places.append(before + i + np.clip(window, 0, length))
        before += length
    return np.concatenate(steps), np.concatenate(places)


def discounted(rewards: np.ndarray, discount: float) -> float:
    """``sum_k discount^k r_k`` of an episode's rewards ``[T]``."""
    return float((rewards * discount ** np.arange(len(rewards))).sum())


def checked(episodes: Sequence[Episode], where: str) -> Sequence[Episode]:
    """The episodes themselves; ``ValueError`` names the first that is empty, misshapen or not finite."""
    if not episodes:
        raise ValueError(f"{where}: holds no episodes")
    for i, (obs, actions, rewards, *_) in enumerate(episodes):
        if not len(actions):
            raise ValueError(f"{where}: episode {i} is empty")
        if len(obs) != len(actions):
            raise ValueError(f"{where}: episode {i} has {len(obs)} observations and {len(actions)} actions")
        for what, values in (("observation", obs), ("action", actions), ("reward", rewards)):
            if values is None:
                continue
            bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
            if len(bad):
                raise ValueError(f"{where}: episode {i} has an {what} that is not finite, first at step {bad[0]}")
    return episodes


class Windows(NamedTuple):
    """All windows of some episodes, one after the other, in the world's units."""

    actions: Tensor
    """``[N, A, Tp]``, counted from where they should be"""
    states: Tensor
    """``[N, Do, Tp]``: the first To are observed, the others to come; only the first To, if no more are needed"""
    returns: Tensor | None
    """``[N, 1]``: the discounted rewards of the whole episode, the same at each of its steps"""
    skill: Tensor | None
    """``[N]``, now"""
    frames: Tensor | None
    """uint8 ``[steps, C, H, W]``, of all steps of the episodes"""
    rows: Tensor
    """``[N, To]``: which of these are seen"""


@dataclass(eq=False)
class Seen(InMemory):
    """Samples that are conditioned on pictures, each of which is kept once, though it is in several windows."""

    pictures: Tensor | None = None
    rows: Tensor | None = None

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        batch = super().batch(indices, draw)
        assert self.pictures is not None
        assert self.rows is not None
        return replace(batch, cond={**batch.cond, "frames": self.pictures[self.rows[indices]]})


Further = Literal["returns", "skill", "goal"]


@dataclass(frozen=True, kw_only=True)
class Demonstrations(DataSource):
    """Episodes of an environment, as windows. Samples are action chunks ``(A, Tp)``, conditions ``obs`` ``(To, Do)``.

    Or they are plans ``(Do, Tp)``, ``(A + Do, Tp)``: the states to come, as Decision Diffuser has them (Ajay et al.
    2023), or the actions above the states, as Diffuser does (Janner et al. 2022). Windows of plans reach as far over
    the end as they can, and there stand still. Scalings and anchors are of the training episodes alone; the codec and
    the spec keep them, beside the weights.
    """

    obs_steps: Steps = 2
    """steps that a policy sees, the last of them now"""
    pred_steps: Steps = 16
    """steps of a chunk; the first obs_steps - 1 of them lie in the past"""
    act_steps: Steps = 8
    """actions, counted from now, that are carried out before the policy looks again"""
    plan: Literal["actions", "states", "both"] = "actions"
    """what a sample holds: actions; the states to come, from which learned inverse dynamics find the actions; both"""
    conditions: tuple[Further, ...] = ()
    """what it is told besides obs: returns (of the whole episode), skill (the kind of episode), goal (the state at the
    window's end). With --objective.drop-each 0.2 each may be left out later, and guided by"""
    discount: Annotated[float, Gt(0), Le(1)] = 0.99
    """of the returns, for each step"""
    scaling: Literal["min-max", "standardize"] = "min-max"
    """of actions and observations: each dimension's range to [-1, 1], or its mean to 0 and its deviation to 1"""
    anchors: Annotated[int, Ge(0)] = 0
    """typical chunks (k-means), of which each chunk gets the nearest as a class "anchor", for --objective=anchored"""
    env: str = ""
    """the environment in which a policy is tried"""

    default_backbone: ClassVar[str] = "mlp"
    usage: ClassVar[str] = "genkit rollout {run}"
    skills: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_horizons(self.obs_steps, self.pred_steps, self.act_steps)
        if self.plan == "states" and self.obs_steps + self.act_steps > self.pred_steps:
            raise ValueError(
                f"act_steps: given {self.act_steps}, but {self.pred_steps} planned states have "
                f"{self.pred_steps - self.obs_steps} steps from now on between them; take fewer, or a longer pred_steps"
            )

    @property
    def environment(self) -> str:
        return self.env

    @abstractmethod
    def episodes(self, split: Split) -> Sequence[Episode]:
        """The recordings. ``ValueError`` where something is missing or damaged."""

    def counted_from(self) -> tuple[int, ...]:
        """The columns of an observation that the actions are counted from; () where they are absolute."""
        return ()

    def load(self, split: Split = "train") -> InMemory:
        check_split(split)
        train = self.windows("train")
        found = train if split == "train" else self.windows(split)
        x, codec = SAMPLES[self.plan](found), self.codec(train)
        observed = lambda w: w.states[:, :, : self.obs_steps].transpose(1, 2).contiguous()  # noqa: E731
        cond: dict[str, Tensor] = {}
        kinds: dict[str, Condition] = {}
        if train.states.shape[1]:
            cond["obs"], kinds["obs"] = observed(found), self.scaled(observed(train))
        if "goal" in self.conditions:
            cond["goal"], kinds["goal"] = found.states[:, :, -1], self.scaled(train.states[:, :, -1])
        if found.returns is not None and train.returns is not None:
            cond["returns"], kinds["returns"] = found.returns, self.scaled(train.returns)
        if found.skill is not None and train.skill is not None:
            num = max(len(self.skills), int(train.skill.max()) + 1)
            cond["skill"], kinds["skill"] = found.skill, Label(num, self.skills)
        if self.anchors:
            centers = anchors_of(codec.encode(Batch(SAMPLES[self.plan](train))).x, self.anchors)
            kinds["anchor"] = Label(self.anchors, centers=tuple(centers.flatten().tolist()))
            cond["anchor"] = torch.cdist(codec.encode(Batch(x)).x.flatten(1), centers.flatten(1)).argmin(1)
        if found.frames is None:
            return InMemory(x, cond, Spec(tuple(x.shape[1:]), kinds), codec)
        kinds["frames"] = Frames((self.obs_steps, *found.frames.shape[1:]))
        return Seen(x, cond, Spec(tuple(x.shape[1:]), kinds), codec, pictures=found.frames, rows=found.rows)

    def codec(self, train: Windows) -> Actions | Plans:
        x = SAMPLES[self.plan](train)
        shift, scale = (tuple(v.tolist()) for v in SCALINGS[self.scaling].fit(x).shift_scale())
        if self.plan == "actions":
            return Actions(shift, scale, tuple(float(i) for i in self.counted_from()))
        return Plans(shift, scale, (float(train.states.shape[1]),))

    def scaled(self, train: Tensor) -> Vector:
        """A condition ``[N, ..., D]``, as networks see it."""
        shift, scale = SCALINGS[self.scaling].fit(train.flatten(0, -2)).shift_scale()
        return Vector(
            tuple(train.shape[1:]), tuple(shift.tolist()), tuple(torch.where(scale > 0, scale, 1).tolist()), FURTHEST
        )

    def told(self, what: str, found: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """What each episode has of it. ``ValueError`` where one has nothing."""
        known = [v for v in found if v is not None]
        if len(known) < len(found):
            raise ValueError(
                f"conditions: given {', '.join(self.conditions)}, but these episodes have no {what}; say which "
                "array holds it, --data.reward or --data.skill, or leave it out"
            )
        return known

    def windows(self, split: Split) -> Windows:
        """``ValueError`` where what they should be told of is not known."""
        episodes = self.episodes(split)
        if not episodes[0].obs.shape[1] and (self.plan != "actions" or "goal" in self.conditions):
            raise ValueError(
                "plan, goal: need observed numbers, and these episodes have pictures alone; leave them out"
            )
        behind = self.act_steps if self.plan == "actions" else self.pred_steps - self.obs_steps + 1
        steps, places = steps_of(episodes, self.obs_steps, self.pred_steps, behind)
        all_of = lambda parts: np.concatenate(list(parts))  # noqa: E731
        last = [e.obs[-1] if e.last is None else e.last for e in episodes]
        every = all_of(v for e, end in zip(episodes, last, strict=True) for v in (e.obs, end[None]))
        seen = self.obs_steps if self.plan == "actions" and "goal" not in self.conditions else self.pred_steps
        states, actions = every[places[:, :seen]], all_of(e.actions for e in episodes)[steps]
        if columns := self.counted_from():
            if self.plan != "actions":
                raise ValueError(f"relative_to: has no meaning in a plan of {self.plan}; leave it out, or plan actions")
            if len(columns) != actions.shape[2]:
                raise ValueError(f"relative_to: given {len(columns)} numbers for actions of {actions.shape[2]}")
            actions = actions - states[:, self.obs_steps - 1 : self.obs_steps, list(columns)]
        now, returns, skill = steps[:, self.obs_steps - 1], None, None
        if "returns" in self.conditions:
            told = self.told("rewards", [e.rewards for e in episodes])
            returns = all_of(np.full(len(r), discounted(r, self.discount)) for r in told)[now]
        if "skill" in self.conditions:
            skill = all_of(self.told("skill", [e.skill for e in episodes]))[now]
        turned = lambda v: torch.from_numpy(v).float().transpose(1, 2).contiguous()  # noqa: E731
        return Windows(
            turned(actions), turned(states),
            None if returns is None else torch.from_numpy(returns).float()[:, None],
            None if skill is None else torch.from_numpy(skill).long(),
            None if episodes[0].frames is None else torch.from_numpy(all_of(e.frames for e in episodes)),
            torch.from_numpy(steps[:, : self.obs_steps]),
        )  # fmt: skip


SAMPLES: Mapping[str, Callable[[Windows], Tensor]] = {
    "actions": lambda w: w.actions,
    "states": lambda w: w.states,
    "both": lambda w: torch.cat([w.actions, w.states], 1),
}


def anchors_of(x: Tensor, num: int) -> Tensor:
    """``num`` typical chunks ``[num, *S]`` of ``x`` ``[N, *S]``, by k-means; the same ones each time."""
    from sklearn.cluster import KMeans

    if num > len(x):
        raise ValueError(f"anchors: given {num} for {len(x)} chunks; take fewer")
    means = KMeans(num, random_state=0, n_init=1, max_iter=50)  # pyright: ignore[reportArgumentType]
    found = means.fit(x.flatten(1).numpy()).cluster_centers_
    return torch.from_numpy(found).to(x).unflatten(1, x.shape[1:])
