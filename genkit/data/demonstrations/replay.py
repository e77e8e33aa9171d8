"""Recorded demonstrations in files: named arrays of all steps, one episode after the other.

:class:`Recorded` turns such arrays into episodes. :class:`Replay` reads them from a replay buffer, an .npz or zarr;
``minari``, ``lerobot`` and ``robomimic`` from the formats of these projects.
"""

from __future__ import annotations

import re
import shlex
import zipfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from genkit.config.numbers import Count, Fraction, Natural, Seed
from genkit.config.paths import PathText
from genkit.core.arrays import ArrayPieces, npz_pieces, open_npz, require_memory, rows_of_piece
from genkit.core.files import format_error
from genkit.core.messages import warn_once
from genkit.data.demonstrations.frames import cached_pieces, image_shape
from genkit.data.demonstrations.windows import Demonstrations, Episode, check_episodes
from genkit.data.source import Split
from genkit.envs import EXPERTS, plain_id


# ----------------------------------------------------------------------------------------------------- arrays
class ColumnRange(NamedTuple):
    """Columns ``low..high`` of a named array."""

    name: str
    low: int | None
    high: int | None

    @classmethod
    def parse(cls, text: str) -> ColumnRange:
        """Parse ``state`` or ``state[0:2]``."""
        match = re.fullmatch(r"([^\[\]]+)(?:\[(\d*):(\d*)\])?", text)
        if not match:
            raise ValueError(f"column: given {text!r}; needs the name of an array, or of some columns: state[0:2]")
        low, high = (int(v) if v else None for v in match.groups()[1:])
        return cls(match[1], low, high)

    def select(self, arrays: Mapping[str, np.ndarray], location: str) -> np.ndarray:
        """These columns ``[N, columns]`` of an array with any number of dimensions."""
        values = arrays[self.name]
        values = values.reshape(len(values), -1)[:, self.low : self.high]
        if not values.shape[1]:
            raise ValueError(f"{location}: {self.name}[{self.low}:{self.high}] has no columns")
        return values


def require_arrays(location: object, names: Iterable[str], available: Iterable[str]) -> None:
    """Raise ``ValueError`` unless all arrays ``names`` are ``available``."""
    allowed = list(available)
    for name in names:
        if name not in allowed:
            raise ValueError(f"{location}: has no array {name!r}; it holds {', '.join(allowed)}")


def single_column(values: np.ndarray, name: str, location: str) -> np.ndarray:
    """``values`` ``[N, 1]`` as ``[N]``."""
    if values.shape[1] != 1:
        raise ValueError(f"{location}: {name} has {values.shape[1]} columns; needs one number for each step")
    return values[:, 0]


@dataclass(frozen=True, kw_only=True)
class Recorded(Demonstrations):
    """Base of the sources of recorded episodes: named arrays of all their steps."""

    root: PathText
    """the file or folder"""
    observed: tuple[str, ...] = ("obs",)
    """observed arrays, or some of their columns: state[0:2]; none if images are enough"""
    frames: tuple[str, ...] = ()
    """arrays of images that are observed too, uint8 [N, H, W, C] or [N, C, H, W]; each camera has its own encoder"""
    image_size: tuple[Count, Count] | None = None
    """height and width to which observed images are resized; None: as recorded, which several cameras need to share"""
    action: str = "action"
    """the array of actions"""
    reward: str = ""
    """the array of rewards, for the condition returns"""
    skill: str = ""
    """an array of whole numbers, the kind of each step's episode, for the condition skill"""
    relative_to: str | None = None
    """one of ``observed``, whose newest value actions are relative to; None: they are absolute"""
    absolute: tuple[Natural, ...] = ()
    """dimensions of the actions, counted from 0, that stay absolute although the others are relative: a gripper"""
    held_out: Fraction = 0.0
    """fraction of the episodes, drawn by ``seed``, that is the test split; 0: all are for training"""
    seed: Seed = 0
    """seed of the choice of test episodes"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observed and self.relative_to is not None and self.relative_to not in self.observed:
            raise ValueError(f"relative_to: given {self.relative_to!r}; allowed: {', '.join(self.observed)}")

    @abstractmethod
    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """These arrays of all steps ``[N, ...]``, and ``episode_ends`` ``[episodes]``, the step after each episode.

        Raise ``ValueError`` if one is missing or damaged, or an episode is empty.
        """

    def observed_columns(self) -> tuple[str, ...]:
        """The arrays, or columns of arrays, that are observed."""
        return self.observed

    def observed_entries(self) -> tuple[str, ...]:
        columns = tuple(self.observed_columns())
        return columns if len(columns) > 1 else ()

    def read_columns(self, columns: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Columns ``[N, D]`` of all steps, and ``episode_ends``."""
        ranges = [ColumnRange.parse(text) for text in columns]
        arrays = self.arrays(list(dict.fromkeys(r.name for r in ranges)))
        return [r.select(arrays, self.root) for r in ranges], arrays["episode_ends"]

    def images(self) -> list[np.ndarray]:
        """Observed images of all steps of each camera, uint8 ``[N, C, H, W]``, of one size."""
        cameras = [self.camera(name) for name in self.frames]
        for name, values in zip(self.frames, cameras, strict=True):
            if values.shape[2:] != cameras[0].shape[2:]:
                size, first = ("x".join(map(str, v.shape[2:])) for v in (values, cameras[0]))
                raise ValueError(
                    f"{self.root}: {name} holds images of {size}, {self.frames[0]} of {first}; needs one size: give "
                    f"--data.image-size, say {values.shape[2]} {values.shape[3]}"
                )
        return cameras

    @abstractmethod
    def camera(self, name: str) -> np.ndarray:
        """The images of a camera at all steps, uint8 ``[N, C, H, W]``, in the size that is asked for.

        Raise ``ValueError`` as :meth:`arrays` does. Recordings may be larger than memory:
        :func:`~genkit.data.demonstrations.frames.cached_pieces` makes a mapped file of them.
        """

    def step_tasks(self) -> np.ndarray | None:
        """The task of each step ``[N]``, a row of :meth:`task_texts`; None if the recording names none."""
        return None

    def reference_columns(self) -> tuple[int, ...]:
        if self.relative_to is None:
            return ()
        observed = self.observed_columns()
        if self.relative_to not in observed:
            raise ValueError(f"relative_to: given {self.relative_to!r}; allowed: {', '.join(observed)}")
        columns, _ = self.read_columns([*observed, self.action])
        widths = [values.shape[1] for values in columns]
        position, dims = observed.index(self.relative_to), widths[-1]
        if wrong := [i for i in self.absolute if i >= dims]:
            raise ValueError(f"absolute: given dimension {wrong[0]} of actions of {dims}, which are 0..{dims - 1}")
        first, last = sum(widths[:position]), sum(widths[: position + 1])
        relative = [i for i in range(dims) if i not in self.absolute]
        if len(relative) != last - first:
            raise ValueError(
                f"relative_to: given {last - first} numbers for actions of {dims}, of which {len(self.absolute)} are "
                "absolute; name the others by --data.absolute, counted from 0 (a gripper)"
            )
        reference = dict(zip(relative, range(first, last), strict=True))
        return tuple(reference.get(i, -1) for i in range(dims))

    def episodes(self, split: Split) -> Sequence[Episode]:
        # conditions besides obs that need an array
        arrays = {"returns": self.reward, "skill": self.skill}
        extra = {k: name for k, name in arrays.items() if name and k in self.conditions}
        columns, ends = self.read_columns([*self.observed_columns(), self.action, *extra.values()])
        num = len(columns) - len(extra)
        *observed, actions = columns[:num]
        known = {k: single_column(v, extra[k], self.root) for k, v in zip(extra, columns[num:], strict=True)}
        if not observed and not self.frames:
            raise ValueError("observed, frames: given neither; a policy needs observations")
        rewards, skill, cameras = known.get("returns"), known.get("skill"), self.images()
        tasks = self.step_tasks() if "text" in self.conditions else None
        if skill is not None and ((skill != skill.astype(int)) | (skill < 0)).any():
            raise ValueError(f"{self.root}: {self.skill} holds {skill.min():g} … {skill.max():g}; needs 0, 1, 2 ...")

        obs = np.concatenate([np.zeros((len(actions), 0)), *observed], 1)
        episodes = []
        for a, b in pairwise([0, *ends.tolist()]):
            reward, kind, task = (None if v is None else v[a:b] for v in (rewards, skill, tasks))
            frames = tuple(camera[a:b] for camera in cameras) or None
            episodes.append(Episode(obs[a:b], actions[a:b], reward, kind, None, frames, task))
        check_episodes(episodes, self.root)
        return self.select_split(episodes, split)

    def select_split(self, episodes: Sequence[Episode], split: Split) -> Sequence[Episode]:
        """The episodes of a split. ``ValueError`` if there are none."""
        order = np.random.default_rng(self.seed).permutation(len(episodes))
        test = set(order[: round(self.held_out * len(episodes))].tolist())
        chosen = [e for i, e in enumerate(episodes) if (i in test) == (split == "test")]
        if not chosen:
            hint = "--data.held-out 0.1 holds out a tenth of them" if split == "test" else "hold out fewer"
            raise ValueError(f"{self.root}: no episode is left for the {split} split; {hint}")
        return chosen


# ---------------------------------------------------------------------------------------------- replay buffers
def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """These arrays of an .npz. ``ValueError`` if one is missing or the file is damaged."""
    try:
        with open_npz(path, names) as stored:
            available = list(stored.files)
            arrays = {k: stored[k] for k in names if k in available}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path}: cannot be read: {format_error(e)}") from e
    require_arrays(path, names, available)
    return arrays


def read_zarr(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """These arrays in diffusion_policy's layout, ``data/NAME`` and ``meta/episode_ends``, of a folder or a .zip of one.

    ``ValueError`` if zarr or an array is missing, or the store is damaged.
    """
    with open_zarr(path) as stored:
        arrays = {}
        for k in names:
            if k in stored:
                require_memory(k, stored[k].nbytes)
                report_missing_chunks(path, k, stored[k])
                arrays[k] = np.asarray(stored[k][:])
    require_arrays(path, names, stored)
    return arrays


@contextmanager
def open_zarr(path: Path) -> Iterator[dict[str, Any]]:
    """The arrays of zarr by name, unread. ``ValueError``, also for what is raised while they are read."""
    try:
        import zarr  # lazy: optional
        from zarr.storage import ZipStore
    except ImportError:
        raise ValueError(f"{path}: reading zarr needs the package zarr; install it: pip install zarr") from None
    try:
        group: Any = zarr.open_group(ZipStore(path, mode="r") if path.is_file() else str(path), mode="r")
        arrays = {k: group[f"data/{k}"] for k in group["data"].array_keys()}
        yield {**arrays, "episode_ends": group["meta/episode_ends"]}
    except Exception as e:  # zarr raises anything over a damaged store
        reason = format_error(e)
        raise ValueError(f"{path}: is not a zarr replay buffer with data/ and meta/episode_ends: {reason}") from e


def report_missing_chunks(path: Path, name: str, array: Any) -> None:
    """Warn of chunks of a zarr's array that are not stored: zarr reads its fill value there, without an error."""
    if missing := array.nchunks - array.nchunks_initialized:
        warn_once(f"{path}: {missing} of {array.nchunks} chunks of {name} are not stored and read as "
                  f"{array.fill_value}: zarr leaves out chunks that hold nothing else, but an incomplete download "
                  "looks the same")  # fmt: skip


def zarr_pieces(path: Path, name: str) -> ArrayPieces:
    """An array of a zarr in pieces: whole chunks, unless one is larger than a piece. ``ValueError`` if damaged."""
    with open_zarr(path) as stored:
        shape, dtype, chunk = stored[name].shape, stored[name].dtype, stored[name].chunks[0]
        report_missing_chunks(path, name, stored[name])

    def read() -> Iterator[np.ndarray]:
        rows = rows_of_piece(shape, dtype)
        rows = rows // chunk * chunk or rows
        with open_zarr(path) as stored:
            for first in range(0, shape[0], rows):
                yield np.asarray(stored[name][first : first + rows])

    return ArrayPieces(shape, dtype, read)


def recording_hint(path: Path, env: str) -> str:
    """How to get demonstrations of an environment."""
    if env == "pusht":
        return "Chi et al. (2023) have theirs in https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip"
    scripted = any(plain_id(env or "four-ways").startswith(start) for start in EXPERTS)
    expert = "" if scripted else " --expert=ars"  # searches a linear policy
    return f"record one: genkit demo {env or 'four-ways'}{expert} --out {shlex.quote(str(path))}"


def read_replay_buffer(root: str, names: Sequence[str], env: str = "") -> Mapping[str, np.ndarray]:
    """These arrays of a replay buffer, with ``episode_ends``. ``ValueError`` if one is missing or damaged."""
    path = Path(root).expanduser()
    if not path.exists():
        raise ValueError(f"{path}: there is no such replay buffer; {recording_hint(path, env)}")
    if path.is_dir() and not path.name.endswith(".zarr"):
        raise ValueError(f"{path}: is a folder; a replay buffer is an .npz, or a folder whose name ends in .zarr")
    arrays = (read_zarr if ".zarr" in path.name else read_npz)(path, ["episode_ends", *names])
    ends = arrays["episode_ends"]
    if ends.ndim != 1 or not np.issubdtype(ends.dtype, np.integer) or not len(ends):
        raise ValueError(f"{path}: episode_ends has shape {ends.shape} of {ends.dtype}; needs [episodes] integers")
    lengths = np.diff(ends, prepend=0)
    if (lengths <= 0).any():
        raise ValueError(f"{path}: episode {int(np.argmax(lengths <= 0))} is empty; episode_ends must increase")
    for name in names:
        require_steps(path, name, arrays[name].shape, ends)
    return arrays


def require_steps(path: Path, name: str, shape: Sequence[int], ends: np.ndarray) -> None:
    """Raise ``ValueError`` unless an array of this shape has all steps."""
    if (length := shape[0] if shape else 0) < ends[-1]:
        episode = int(np.searchsorted(ends, length, side="right"))
        raise ValueError(f"{path}: {name} has {length} steps of {ends[-1]}; it is cut off in episode {episode}")


@dataclass(frozen=True, kw_only=True)
class Replay(Recorded):
    """A replay buffer of any environment: an .npz, or diffusion_policy's .zarr, with ``episode_ends``."""

    root: PathText
    """the file"""

    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        return read_replay_buffer(self.root, names, self.env)

    def camera(self, name: str) -> np.ndarray:
        path, ends = Path(self.root).expanduser(), read_replay_buffer(self.root, [], self.env)["episode_ends"]
        if ".zarr" in path.name:
            with open_zarr(path) as stored:
                require_arrays(path, [name], stored)
            images = zarr_pieces(path, name)
            files = sorted(p for p in (path / "data" / name).rglob("*") if p.is_file()) if path.is_dir() else [path]
        else:
            with open_npz(path, []) as stored:
                require_arrays(path, [name], stored.files)
            images, files = npz_pieces(path, name), [path]
        shape = image_shape(images.shape, images.dtype, name, self.root)
        require_steps(path, name, images.shape, ends)
        return cached_pieces(files, name, (int(ends[-1]), *shape[1:]), images.read, self.image_size)
