"""Demonstrations: windows of recorded episodes, as samples of action chunks given observations.

A window has ``pred_steps`` steps. The first ``obs_steps`` of them are observed, the last of these being *now*; all of
them have actions. So the first ``obs_steps - 1`` predicted actions lie in the past, and of the rest a policy executes
``act_steps`` before it observes again (Chi et al. 2023, section 3.1). Windows reach over both ends of an episode, where
its first and last step are repeated.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from genkit.config.names import NameIn
from genkit.config.numbers import Count, Natural
from genkit.config.paths import PathText
from genkit.core import Batch, Condition, Frames, Label, Spec, Vector
from genkit.data.captions import Caption, Captions, caption_table
from genkit.data.codecs import Actions, MinMax, Plans, Standardize, loses_digits
from genkit.data.demonstrations.frames import FrameStore, WithFrames
from genkit.data.in_memory import InMemory
from genkit.data.source import DataSource, Split, check_split

ExtraCondition = Literal["returns", "skill", "goal", "text"]
OBS_LIMIT = 5.0  # largest scaled observation that networks see: a fallen cheetah was a hundred deviations away
SCALINGS: Mapping[str, type[MinMax] | type[Standardize]] = {"min-max": MinMax, "standardize": Standardize}


class Episode(NamedTuple):
    """One recording: observations ``[T, Do]`` and actions ``[T, A]`` in the environment's units.

    If known: rewards ``[T]``, the skill of each step ``[T]``, the observation after the last action ``[Do]``, the
    images ``frames`` of each camera, uint8 ``[T, C, H, W]``, and the ``task`` of each step ``[T]``, a row of
    :meth:`Demonstrations.task_texts`. If only images are observed, Do is 0.
    """

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray | None = None
    skill: np.ndarray | None = None
    last_obs: np.ndarray | None = None
    frames: tuple[np.ndarray, ...] | None = None
    task: np.ndarray | None = None


# --------------------------------------------------------------------------------------------------- the windows
def check_horizons(obs_steps: int, pred_steps: int, act_steps: int) -> None:
    """Raise ``ValueError`` unless the executed actions, counted from now, are among the predicted ones."""
    if min(obs_steps, pred_steps, act_steps) < 1:
        raise ValueError(f"obs_steps, pred_steps, act_steps: given {obs_steps}, {pred_steps}, {act_steps}; each >= 1")
    if obs_steps - 1 + act_steps > pred_steps:
        raise ValueError(
            f"act_steps: given {act_steps}, but of {pred_steps} predicted steps {obs_steps - 1} lie in the past, "
            f"which leaves {max(0, pred_steps - obs_steps + 1)}; take fewer, or a longer pred_steps"
        )


def window_starts(length: int, obs_steps: int, pred_steps: int, act_steps: int) -> np.ndarray:
    """First steps of all windows of an episode: those of diffusion_policy's ``create_indices`` with ``obs_steps - 1``
    steps of padding before and ``act_steps - 1`` after; at least one window, however short the episode is.
    """
    first = 1 - obs_steps
    return np.arange(first, max(first, length - pred_steps + act_steps - 1) + 1)


def window_steps(
    episodes: Sequence[Episode], obs_steps: int, pred_steps: int, act_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the steps ``[N, Tp]`` of all windows, and of their states.

    Both count on from one episode to the next. Each episode has one state more than steps: that after its last action.
    """
    steps, states, before = [], [], 0
    for i, episode in enumerate(episodes):
        length = len(episode.actions)
        window = window_starts(length, obs_steps, pred_steps, act_steps)[:, None] + np.arange(pred_steps)
        steps.append(before + np.clip(window, 0, length - 1))
        states.append(before + i + np.clip(window, 0, length))
        before += length
    return np.concatenate(steps), np.concatenate(states)


def all_states(episodes: Sequence[Episode]) -> np.ndarray:
    """The states of all episodes ``[steps + episodes, Do]``; the last one is repeated if none is recorded after it."""
    parts = []
    for episode in episodes:
        parts += [episode.obs, (episode.obs[-1] if episode.last_obs is None else episode.last_obs)[None]]
    return np.concatenate(parts)


def discounted_return(rewards: np.ndarray, discount: float) -> float:
    """``sum_k discount^k r_k`` of an episode's rewards ``[T]``."""
    return float((rewards * discount ** np.arange(len(rewards))).sum())


def check_episodes(episodes: Sequence[Episode], location: str) -> None:
    """Raise ``ValueError`` that names the first episode that is empty, misshapen or not finite."""
    if not episodes:
        raise ValueError(f"{location}: holds no episodes")
    for i, (obs, actions, rewards, *_) in enumerate(episodes):
        if not len(actions):
            raise ValueError(f"{location}: episode {i} is empty")
        if len(obs) != len(actions):
            raise ValueError(f"{location}: episode {i} has {len(obs)} observations and {len(actions)} actions")
        if wrong := [len(camera) for camera in episodes[i].frames or () if len(camera) != len(actions)]:
            raise ValueError(f"{location}: episode {i} has {wrong[0]} images and {len(actions)} actions")
        for name, values in (("observation", obs), ("action", actions), ("reward", rewards)):
            if values is None:
                continue
            bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
            if len(bad):
                raise ValueError(f"{location}: episode {i} has an {name} that is not finite, first at step {bad[0]}")
    for name, arrays in (("observation", [e.obs for e in episodes]), ("action", [e.actions for e in episodes])):
        for column in range(arrays[0].shape[1]):
            values = torch.from_numpy(np.concatenate([a[:, column] for a in arrays]).astype(np.float64))
            if loses_digits(values[:, None]):
                span = f"{float(values.min()):.9g}..{float(values.max()):.9g}"
                raise ValueError(
                    f"{location}: column {column} of the {name}s is {span}, whose differences float32 does not hold; "
                    "subtract a constant from it"
                )


class Windows(NamedTuple):
    """All windows of some episodes, one after the other, in the environment's units."""

    actions: Tensor
    """``[N, A, Tp]``, relative to the reference if there is one"""
    states: Tensor
    """``[N, Do, Tp]``: the first To are observed, the others follow; only the first To if no more are needed"""
    returns: Tensor | None
    """``[N, 1]``: the discounted return of the whole episode, the same at each of its steps"""
    skill: Tensor | None
    """``[N]``, now"""
    task: Tensor | None
    """``[N]``, now"""
    frames: FrameStore | None
    """of all steps of the episodes"""
    frame_rows: Tensor
    """``[N, To]``: the rows of ``frames`` that each window observes"""


def action_rows(windows: Windows) -> Tensor:
    """Samples that hold actions."""
    return windows.actions


def state_rows(windows: Windows) -> Tensor:
    """Samples that hold states."""
    return windows.states


def action_and_state_rows(windows: Windows) -> Tensor:
    """Samples that hold actions above states."""
    return torch.cat([windows.actions, windows.states], 1)


PLANS: Mapping[str, Callable[[Windows], Tensor]] = {
    "actions": action_rows,
    "states": state_rows,
    "both": action_and_state_rows,
}


def to_rows(values: np.ndarray) -> Tensor:
    """Arrays ``[N, T, D]`` as float32 tensors ``[N, D, T]``."""
    return torch.from_numpy(values).float().transpose(1, 2).contiguous()


def fit_anchors(x: Tensor, num: int) -> Tensor:
    """``num`` typical chunks ``[num, *S]`` of ``x`` ``[N, *S]``, by k-means with a fixed seed."""
    from sklearn.cluster import KMeans  # lazy: speed

    if num > len(x):
        raise ValueError(f"anchors: given {num} for {len(x)} chunks; take fewer")
    means = KMeans(num, random_state=0, n_init=1, max_iter=50)  # pyright: ignore[reportArgumentType]
    centers = means.fit(x.flatten(1).numpy()).cluster_centers_
    return torch.from_numpy(centers).to(x).unflatten(1, x.shape[1:])


# --------------------------------------------------------------------------------------------------- the source
@dataclass(frozen=True, kw_only=True)
class Demonstrations(DataSource):
    """Episodes of an environment as windows. Samples are action chunks ``(A, Tp)``, the condition ``obs`` ``(To, Do)``.

    Or samples are plans: states ``(Do, Tp)`` as in Decision Diffuser (Ajay et al. 2023), or actions above states
    ``(A + Do, Tp)`` as in Diffuser (Janner et al. 2022). Windows of plans reach beyond the end of an episode as far as
    they can, and repeat the last state there. Scalings and anchors are fitted to the training episodes; codec and spec
    store them.
    """

    obs_steps: Count = 2
    """observed steps, the last of them now"""
    pred_steps: Count = 16
    """steps of a chunk; the first obs_steps - 1 of them lie in the past"""
    act_steps: Count = 8
    """actions, counted from now, that are executed before the policy observes again"""
    plan: Literal["actions", "states", "both"] = "actions"
    """content of a sample: actions; the coming states, from which inverse dynamics infer the actions; or both"""
    conditions: tuple[ExtraCondition, ...] = ()
    """conditions besides obs: returns (discounted, of the whole episode), skill (kind of episode), goal (state at the
    window's end), text (of the task). With --objective.cond-dropout-each 0.2 each may be omitted later, and guided
    by"""
    encoder: PathText | None = None
    """the frozen text encoder that reads the tasks: a folder or hub id of transformers; None: bytes, learned"""
    text_length: Count = 128
    """largest number of bytes of a task's text, without an encoder"""
    observation_tokens: bool = False
    """each observed step, and each image, is a token for cross-attention (--backbone=dit), not all one vector"""
    crop: tuple[Count, Count] | None = None
    """height and width of the part of observed images that is seen: at a random place in training (the same for all
    images of a sample), the centre otherwise"""
    color_jitter: Annotated[float, Ge(0), Lt(1)] = 0.0
    """largest change of brightness, contrast and saturation of observed images in training, as a factor: 0.2"""
    camera_encoder: Annotated[str, NameIn("genkit.backbones.cameras:CAMERA_ENCODERS")] = "cnn"
    """network that each camera has: a small cnn, or torchvision's resnet18 or resnet34 with GroupNorm"""
    camera_weights: PathText | None = None
    """file of torchvision's weights that these ResNets begin with, safetensors or .pth"""
    discount: Annotated[float, Gt(0), Le(1)] = 0.99
    """discount of the returns for each step"""
    scaling: Literal["min-max", "standardize"] = "min-max"
    """scaling of actions and observations: each dimension's range to [-1, 1], or to mean 0 and standard deviation 1"""
    anchors: Natural = 0
    """typical chunks (k-means), of which each chunk gets the nearest as its class "anchor", for --objective=anchored"""
    env: str = ""
    """the environment in which a policy is evaluated: four-ways, pusht, an id of gymnasium, or module:id of your own"""
    env_args: tuple[str, ...] = ()
    """keyword arguments of that environment: reward_type=dense"""

    default_backbone: ClassVar[str] = "mlp"
    usage: ClassVar[str] = "genkit rollout {run}"
    skills: ClassVar[tuple[str, ...]] = ()
    """names of the skills"""

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

    @property
    def environment_arguments(self) -> Sequence[str]:
        return self.env_args

    @abstractmethod
    def episodes(self, split: Split) -> Sequence[Episode]:
        """The recordings. Raise ``ValueError`` if something is missing or damaged."""

    def reference_columns(self) -> tuple[int, ...]:
        """The column of an observation that each dimension of the actions is relative to, -1 for one that is absolute;
        () if all are."""
        return ()

    def observed_entries(self) -> tuple[str, ...]:
        """The names of the entries of an observation, in their order; () if it has one, or they have no names."""
        return ()

    def task_texts(self, split: Split = "train") -> Sequence[Sequence[str]]:
        """The wordings of each task, of which every sample of a split gets one at random. All have equally many."""
        return ()

    def unaugmented(self) -> Demonstrations:
        return replace(self, color_jitter=0.0)

    def load(self, split: Split = "train") -> InMemory:
        check_split(split)
        train = self.windows("train")
        windows = train if split == "train" else self.windows(split)
        x, codec = PLANS[self.plan](windows), self.fit_codec(train)
        cond, kinds = self.build_conditions(windows, train)
        if self.anchors:
            centers = fit_anchors(codec.encode(Batch(PLANS[self.plan](train))).x, self.anchors)
            kinds["anchor"] = Label(self.anchors, centers=tuple(centers.flatten().tolist()))
            cond["anchor"] = torch.cdist(codec.encode(Batch(x)).x.flatten(1), centers.flatten(1)).argmin(1)
        captions = None
        if windows.task is not None:
            captions, text_kinds = self.task_captions(windows.task, split)
            kinds |= text_kinds
        if windows.frames is None:
            return InMemory(x, cond, Spec(tuple(x.shape[1:]), kinds), codec, captions=captions)
        kinds["frames"] = self.frames_kind(windows.frames)
        spec, training = Spec(tuple(x.shape[1:]), kinds), split == "train"
        crop, jitter = (self.crop, self.color_jitter) if training else (None, 0.0)
        return WithFrames(x, cond, spec, codec, captions=captions, frames=windows.frames,
                          frame_rows=windows.frame_rows, crop=crop, jitter=jitter)  # fmt: skip

    def frames_kind(self, frames: FrameStore) -> Frames:
        """The kind of observed images. ``ValueError`` if they are smaller than the crop."""
        _, h, w = frames.shape
        if self.crop is not None and (self.crop[0] > h or self.crop[1] > w):
            raise ValueError(f"crop: given {self.crop[0]}x{self.crop[1]} of images of {h}x{w}; take a smaller part")
        encoder = "" if self.camera_encoder == "cnn" else self.camera_encoder
        cameras = frames.cameras if len(frames.cameras) > 1 else ()
        return Frames((self.obs_steps, *frames.shape), cameras, self.crop or (), encoder, self.observation_tokens)

    def task_captions(self, task: Tensor, split: Split) -> tuple[Captions, Mapping[str, Condition]]:
        """The texts of the tasks ``[N]`` of all windows, and their kinds of condition."""
        texts = self.task_texts(split)
        num = len(texts[0])
        every = [Caption(wording, f"task {i}") for i, wordings in enumerate(texts) for wording in wordings]
        table, kinds = caption_table(every, self.text_length, self.encoder, [wordings[0] for wordings in texts])
        return Captions(task[:, None] * num + torch.arange(num), table), kinds

    def build_conditions(self, windows: Windows, train: Windows) -> tuple[dict[str, Tensor], dict[str, Condition]]:
        """The conditions of ``windows`` and their kinds, scaled by the training split."""
        cond: dict[str, Tensor] = {}
        kinds: dict[str, Condition] = {}
        if train.states.shape[1]:
            kind = replace(self.fit_vector(self.observed_states(train)), tokens=self.observation_tokens)
            cond["obs"], kinds["obs"] = self.observed_states(windows), replace(kind, entries=self.observed_entries())
        if "goal" in self.conditions:
            cond["goal"], kinds["goal"] = windows.states[:, :, -1], self.fit_vector(train.states[:, :, -1])
        if windows.returns is not None and train.returns is not None:
            cond["returns"], kinds["returns"] = windows.returns, self.fit_vector(train.returns)
        if windows.skill is not None and train.skill is not None:
            num = max(len(self.skills), int(train.skill.max()) + 1)
            cond["skill"], kinds["skill"] = windows.skill, Label(num, self.skills)
        return cond, kinds

    def observed_states(self, windows: Windows) -> Tensor:
        """Observations ``[N, To, Do]``."""
        return windows.states[:, :, : self.obs_steps].transpose(1, 2).contiguous()

    def fit_codec(self, train: Windows) -> Actions | Plans:
        """The codec of the training windows."""
        x = PLANS[self.plan](train)
        shift, scale = (tuple(v.tolist()) for v in SCALINGS[self.scaling].fit(x).shift_scale())
        if self.plan == "actions":
            return Actions(shift, scale, tuple(float(i) for i in self.reference_columns()))
        return Plans(shift, scale, (float(train.states.shape[1]),))

    def fit_vector(self, train: Tensor) -> Vector:
        """The kind of a condition ``[N, ..., D]``, with the scaling of the training split."""
        shift, scale = SCALINGS[self.scaling].fit(train.flatten(0, -2)).shift_scale()
        nonzero = torch.where(scale > 0, scale, 1)
        return Vector(tuple(train.shape[1:]), tuple(shift.tolist()), tuple(nonzero.tolist()), OBS_LIMIT)

    def require_known(self, name: str, values: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """``values`` of all episodes. ``ValueError`` if an episode has none."""
        present = [v for v in values if v is not None]
        if len(present) < len(values):
            raise ValueError(
                f"conditions: given {', '.join(self.conditions)}, but these episodes have no {name}; name the array "
                "that holds it by --data.reward, --data.skill or --data.task, or leave it out"
            )
        return present

    def windows(self, split: Split) -> Windows:
        """All windows of a split. ``ValueError`` if a condition is not known, or settings contradict the episodes."""
        episodes = self.episodes(split)
        if not episodes[0].obs.shape[1] and (self.plan != "actions" or "goal" in self.conditions):
            raise ValueError("plan, goal: need observed numbers, but these episodes have only images; leave them out")
        padding = self.act_steps if self.plan == "actions" else self.pred_steps - self.obs_steps + 1
        steps, places = window_steps(episodes, self.obs_steps, self.pred_steps, padding)
        num = self.obs_steps if self.plan == "actions" and "goal" not in self.conditions else self.pred_steps
        states = all_states(episodes)[places[:, :num]]
        actions = np.concatenate([e.actions for e in episodes])[steps]
        if columns := self.reference_columns():
            actions = self.relative_actions(actions, states, columns)
        now, returns, skill, task, frames = steps[:, self.obs_steps - 1], None, None, None, None
        if "returns" in self.conditions:
            rewards = self.require_known("rewards", [e.rewards for e in episodes])
            each = [np.full(len(r), discounted_return(r, self.discount)) for r in rewards]
            returns = torch.from_numpy(np.concatenate(each)[now]).float()[:, None]
        if "skill" in self.conditions:
            skills = self.require_known("skill", [e.skill for e in episodes])
            skill = torch.from_numpy(np.concatenate(skills)[now]).long()
        if "text" in self.conditions:
            tasks = self.require_known("text", [e.task for e in episodes])
            task = torch.from_numpy(np.concatenate(tasks)[now]).long()
        if episodes[0].frames is not None:
            frames = FrameStore([e.frames for e in episodes if e.frames is not None])
        frame_rows = torch.from_numpy(steps[:, : self.obs_steps])
        return Windows(to_rows(actions), to_rows(states), returns, skill, task, frames, frame_rows)

    def relative_actions(self, actions: np.ndarray, states: np.ndarray, columns: Sequence[int]) -> np.ndarray:
        """Actions ``[N, Tp, A]`` relative to these columns of the newest observation in ``states`` ``[N, T, Do]``."""
        if self.plan != "actions":
            raise ValueError(f"relative_to: has no meaning in a plan of {self.plan}; leave it out, or plan actions")
        if len(columns) != actions.shape[2]:
            raise ValueError(f"relative_to: given {len(columns)} numbers for actions of {actions.shape[2]}")
        reference = states[:, self.obs_steps - 1 : self.obs_steps, np.maximum(columns, 0)]
        return actions - np.where(np.array(columns) < 0, 0, reference)
