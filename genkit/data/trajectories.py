"""Demonstrations: windows of recorded episodes, as samples of action chunks given observations.

A window has ``pred_steps`` steps. The first ``obs_steps`` hold what is observed, the last of them being *now*; all of
them hold actions. So the first ``obs_steps - 1`` predicted actions lie in the past, and of those from now on a policy
carries out ``act_steps`` before it looks again (Chi et al. 2023, section 3.1). Windows reach over both ends of an
episode, where its first and last step are repeated.
"""

from __future__ import annotations

import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor

from genkit.codecs import Actions, MinMax, Standardize
from genkit.core import Batch, Condition, Label, Spec, Vector
from genkit.data.images import InMemory, Split, check_split

Steps = Annotated[int, Ge(1)]
FURTHEST = 5.0  # from 0, that networks see a scaled observation: a cheetah on its back was a hundred deviations away
SCALINGS: Mapping[str, type[MinMax] | type[Standardize]] = {"min-max": MinMax, "standardize": Standardize}


class Episode(NamedTuple):
    """One recording: what was observed ``[T, Do]`` and what was done ``[T, A]``, in the world's units."""

    obs: np.ndarray
    actions: np.ndarray


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


def windows(
    episodes: Sequence[Episode], obs_steps: int, pred_steps: int, act_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """``(obs [N, To, Do], actions [N, Tp, A])`` of all episodes, one after the other."""
    check_horizons(obs_steps, pred_steps, act_steps)
    steps = steps_of([len(e.actions) for e in episodes], obs_steps, pred_steps, act_steps)
    obs, actions = (np.concatenate([e[i] for e in episodes]) for i in (0, 1))
    return obs[steps[:, :obs_steps]], actions[steps]


def steps_of(lengths: Sequence[int], obs_steps: int, pred_steps: int, act_steps: int) -> np.ndarray:
    """The steps ``[N, Tp]`` of all windows of episodes of these lengths, counted on from one episode to the next."""
    found, before = [], 0
    for length in lengths:
        first = starts(length, obs_steps, pred_steps, act_steps)
        found.append(before + np.clip(first[:, None] + np.arange(pred_steps), 0, length - 1))
        before += length
    return np.concatenate(found)


def checked(episodes: Sequence[Episode], where: str) -> Sequence[Episode]:
    """The episodes themselves; ``ValueError`` names the first that is empty, misshapen or not finite."""
    if not episodes:
        raise ValueError(f"{where}: holds no episodes")
    for i, (obs, actions) in enumerate(episodes):
        if not len(actions):
            raise ValueError(f"{where}: episode {i} is empty")
        if len(obs) != len(actions):
            raise ValueError(f"{where}: episode {i} has {len(obs)} observations and {len(actions)} actions")
        for what, values in (("observation", obs), ("action", actions)):
            bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
            if len(bad):
                raise ValueError(f"{where}: episode {i} has an {what} that is not finite, first at step {bad[0]}")
    return episodes


@dataclass(frozen=True, kw_only=True)
class Demonstrations(ABC):
    """Episodes of an environment, as windows. Samples are action chunks ``(A, Tp)``, conditions ``obs`` ``(To, Do)``.

    Scalings and anchors are of the training episodes alone; the codec and the spec keep them, beside the weights.
    """

    obs_steps: Steps = 2
    """steps that a policy sees, the last of them now"""
    pred_steps: Steps = 16
    """steps of a chunk; the first obs_steps - 1 of them lie in the past"""
    act_steps: Steps = 8
    """actions, counted from now, that are carried out before the policy looks again"""
    scaling: Literal["min-max", "standardize"] = "min-max"
    """of actions and observations: each dimension's range to [-1, 1], or its mean to 0 and its deviation to 1"""
    anchors: Annotated[int, Ge(0)] = 0
    """typical chunks (k-means), of which each chunk gets the nearest as a class "anchor", for --objective=anchored"""
    env: str = ""
    """the environment in which a policy is tried"""

    suits: ClassVar[str] = "mlp"
    use: ClassVar[str] = "genkit rollout {run}"

    def __post_init__(self) -> None:
        check_horizons(self.obs_steps, self.pred_steps, self.act_steps)

    @abstractmethod
    def episodes(self, split: Split) -> Sequence[Episode]:
        """The recordings. ``ValueError`` where something is missing or damaged."""

    def counted_from(self) -> tuple[int, ...]:
        """The columns of an observation that the actions are counted from; () where they are absolute."""
        return ()

    def load(self, split: Split = "train") -> InMemory:
        check_split(split)
        train = self.chunks("train")
        x, obs = train if split == "train" else self.chunks(split)
        fit = SCALINGS[self.scaling].fit
        shift, scale = fit(train[0]).shift_scale()
        codec = Actions(tuple(shift.tolist()), tuple(scale.tolist()), tuple(float(i) for i in self.counted_from()))
        shift, scale = fit(train[1].flatten(0, 1)).shift_scale()
        scales = torch.where(scale > 0, scale, 1)
        seen = Vector(tuple(obs.shape[1:]), tuple(shift.tolist()), tuple(scales.tolist()), FURTHEST)
        kinds: dict[str, Condition] = {"obs": seen}
        cond = {"obs": obs}
        if self.anchors:
            centers = anchors_of(codec.encode(Batch(train[0])).x, self.anchors)
            kinds["anchor"] = Label(self.anchors, centers=tuple(centers.flatten().tolist()))
            cond["anchor"] = torch.cdist(codec.encode(Batch(x)).x.flatten(1), centers.flatten(1)).argmin(1)
        return InMemory(x, cond, Spec(tuple(x.shape[1:]), kinds), codec)

    def chunks(self, split: Split) -> tuple[Tensor, Tensor]:
        """``(x [N, A, Tp], obs [N, To, Do])`` in the world's units, the actions counted from where they should be."""
        obs, actions = windows(self.episodes(split), self.obs_steps, self.pred_steps, self.act_steps)
        if columns := self.counted_from():
            if len(columns) != actions.shape[2]:
                raise ValueError(f"relative_to: given {len(columns)} numbers for actions of {actions.shape[2]}")
            actions = actions - obs[:, -1:, list(columns)]
        return torch.from_numpy(actions).float().transpose(1, 2).contiguous(), torch.from_numpy(obs).float()


def anchors_of(x: Tensor, num: int) -> Tensor:
    """``num`` typical chunks ``[num, *S]`` of ``x`` ``[N, *S]``, by k-means; the same ones each time."""
    from sklearn.cluster import KMeans

    if num > len(x):
        raise ValueError(f"anchors: given {num} for {len(x)} chunks; take fewer")
    means = KMeans(num, random_state=0, n_init=1, max_iter=50)  # pyright: ignore[reportArgumentType]
    found = means.fit(x.flatten(1).numpy()).cluster_centers_
    return torch.from_numpy(found).to(x).unflatten(1, x.shape[1:])


@dataclass(frozen=True, kw_only=True)
class FourWays(Demonstrations):
    """The built-in task of four ways past two obstacles: its expert's demonstrations, made on the fly."""

    n: Annotated[int, Ge(1)] = 200
    """episodes; the four ways come in turn"""
    seed: Annotated[int, Ge(0)] = 0
    obs_steps: Steps = 1
    """the place is all there is to know"""
    env: str = "four-ways"

    def episodes(self, split: Split) -> Sequence[Episode]:
        from genkit.envs.four_ways import demonstrations

        return [Episode(*e) for e in demonstrations(self.n, 2 * self.seed + ("train", "test").index(split))]


# ------------------------------------------------------------------------------------------------- replay buffers
class Part(NamedTuple):
    """Columns ``low..high`` of an array of a replay buffer."""

    name: str
    low: int | None
    high: int | None

    @classmethod
    def parse(cls, text: str) -> Part:
        """``state`` or ``state[0:2]``."""
        found = re.fullmatch(r"([^\[\]]+)(?:\[(\d*):(\d*)\])?", text)
        if not found:
            raise ValueError(f"column: given {text!r}; needs the name of an array, or of some columns: state[0:2]")
        low, high = (int(v) if v else None for v in found.groups()[1:])
        return cls(found[1], low, high)

    def of(self, arrays: Mapping[str, np.ndarray], where: str) -> np.ndarray:
        """``[N, columns]``, of an array of any number of dimensions."""
        values = arrays[self.name]
        values = values.reshape(len(values), -1)[:, self.low : self.high]
        if not values.shape[1]:
            raise ValueError(f"{where}: {self.name}[{self.low}:{self.high}] has no columns")
        return values


def require_arrays(where: object, names: Iterable[str], there: Iterable[str]) -> None:
    """``ValueError`` where an array that is asked for is not there."""
    for name in names:
        if name not in (known := list(there)):
            raise ValueError(f"{where}: has no array {name!r}; it holds {', '.join(known)}")


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            there = list(stored.files)
            found = {k: stored[k] for k in names if k in there}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"{path}: cannot be read as an .npz without pickles (truncated?): {reason}") from e
    require_arrays(path, names, there)
    return found


def read_zarr(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """diffusion_policy's layout: ``data/NAME`` arrays and ``meta/episode_ends``; a folder or a .zip of one."""
    try:
        import zarr
    except ImportError:
        raise ValueError(f"{path}: reading zarr needs the package zarr; install it: pip install zarr") from None
    try:
        group = zarr.open_group(str(path), mode="r")
        at = {**{k: f"data/{k}" for k in group["data"].array_keys()}, "episode_ends": "meta/episode_ends"}  # type: ignore[union-attr]
        found = {k: np.asarray(group[at[k]][:]) for k in names if k in at}  # type: ignore[index]
    except Exception as e:  # zarr raises anything over a damaged store
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"{path}: is no zarr replay buffer with data/ and meta/episode_ends: {reason}") from e
    require_arrays(path, names, at)
    return found


def read_buffer(root: str, names: Sequence[str]) -> Mapping[str, np.ndarray]:
    """These arrays of a replay buffer, with ``episode_ends``. ``ValueError`` where one is missing or damaged."""
    path = Path(root).expanduser()
    if not path.exists():
        raise ValueError(f"{path}: there is no such replay buffer; record one: genkit demo four-ways --out demos.npz")
    if path.is_dir() and not path.name.endswith(".zarr"):
        raise ValueError(f"{path}: is a folder; a replay buffer is an .npz, or a folder whose name ends in .zarr")
    arrays = (read_zarr if ".zarr" in path.name else read_npz)(path, ["episode_ends", *names])
    ends = arrays["episode_ends"]
    if ends.ndim != 1 or not np.issubdtype(ends.dtype, np.integer) or not len(ends):
        raise ValueError(f"{path}: episode_ends has shape {ends.shape} of {ends.dtype}; needs [episodes] integers")
    lengths = np.diff(ends, prepend=0)
    if (lengths <= 0).any():
        raise ValueError(f"{path}: episode {int(np.argmax(lengths <= 0))} is empty; episode_ends must rise")
    for name in names:
        if (there := len(arrays[name]) if arrays[name].ndim else 0) < ends[-1]:
            cut = int(np.searchsorted(ends, there, side="right"))
            raise ValueError(f"{path}: {name} has {there} steps of {ends[-1]}; it is cut off in episode {cut}")
    return arrays


@dataclass(frozen=True, kw_only=True)
class Recorded(Demonstrations):
    """Episodes that lie in files, as named arrays of all their steps."""

    root: str
    """where they are"""
    observed: tuple[str, ...] = ("obs",)
    """arrays of what is observed, or some of their columns: state[0:2]"""
    action: str = "action"
    """the array of what was done"""
    relative_to: str | None = None
    """one of ``observed``, from whose newest value actions are counted; None: they are absolute"""
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.0
    """share of the episodes, drawn by ``seed``, that is the test split; 0: all are trained on"""
    seed: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observed and self.relative_to is not None and self.relative_to not in self.observed:
            raise ValueError(f"relative_to: given {self.relative_to!r}; allowed: {', '.join(self.observed)}")

    @abstractmethod
    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """These arrays of all steps ``[N, ...]``, and ``episode_ends``. ``ValueError`` where any is missing or damaged,
        or an episode empty."""

    def seen(self) -> tuple[str, ...]:
        """The parts that are observed."""
        return self.observed

    def read(self, parts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Parts ``[N, columns]`` of all steps, and where each episode ends."""
        wanted = [Part.parse(text) for text in parts]
        arrays = self.arrays(list(dict.fromkeys(part.name for part in wanted)))
        return [part.of(arrays, self.root) for part in wanted], arrays["episode_ends"]

    def counted_from(self) -> tuple[int, ...]:
        if self.relative_to is None:
            return ()
        seen = self.seen()
        if self.relative_to not in seen:
            raise ValueError(f"relative_to: given {self.relative_to!r}; allowed: {', '.join(seen)}")
        widths = [part.shape[1] for part in self.read(seen)[0]]
        at = seen.index(self.relative_to)
        return tuple(range(sum(widths[:at]), sum(widths[: at + 1])))

    def episodes(self, split: Split) -> Sequence[Episode]:
        (*seen, actions), ends = self.read([*self.seen(), self.action])
        obs = np.concatenate(seen, 1)
        whole = [Episode(obs[a:b], actions[a:b]) for a, b in pairwise([0, *ends.tolist()])]
        out = set(
            np.random.default_rng(self.seed).permutation(len(whole))[: round(self.held_out * len(whole))].tolist()
        )
        checked(whole, self.root)
        kept = [e for i, e in enumerate(whole) if (i in out) == (split == "test")]
        if not kept:
            hint = "--data.held-out 0.1 keeps a tenth of them" if split == "test" else "hold out fewer"
            raise ValueError(f"{self.root}: no episode is left for the {split} split; {hint}")
        return kept


@dataclass(frozen=True, kw_only=True)
class Replay(Recorded):
    """A replay buffer of any environment: an .npz, or diffusion_policy's .zarr, with ``episode_ends``."""

    root: str
    """the file"""

    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        return read_buffer(self.root, names)


@dataclass(frozen=True, kw_only=True)
class Pusht(Replay):
    """Push a T into place (Chi et al. 2023; Florence et al. 2022), demonstrated by a person: 206 episodes.

    Nine corners of the T and the hand are seen, targets of the hand are the actions, counted from where it is.
    """

    observed: tuple[str, ...] = ("keypoint", "state[0:2]")
    relative_to: str | None = "state[0:2]"
    env: str = "pusht"
