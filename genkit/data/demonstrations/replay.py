"""Demonstrations in files: replay buffers, .npz or zarr, as named arrays of all steps of all episodes."""

from __future__ import annotations

import re
import zipfile
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge, Lt

from genkit.core.files import one_line
from genkit.data.demonstrations.windows import Demonstrations, Episode, checked
from genkit.data.source import Split


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
        reason = one_line(e)
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
        reason = one_line(e)
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


def channels_first(values: np.ndarray, name: str, where: str) -> np.ndarray:
    """Pictures ``[N, H, W, C]`` or ``[N, C, H, W]`` as the latter."""
    last = values.ndim == 4 and values.shape[3] in (1, 3)
    if values.dtype != np.uint8 or values.ndim != 4 or not (last or values.shape[1] in (1, 3)):
        given = f"{values.shape} of {values.dtype}"
        raise ValueError(f"{where}: {name} is {given}; pictures are uint8 [N, H, W, 3], or with one channel")
    return values.transpose(0, 3, 1, 2) if last else values


def one_column(values: np.ndarray, name: str, where: str) -> np.ndarray:
    if values.shape[1] != 1:
        raise ValueError(f"{where}: {name} has {values.shape[1]} columns; needs one number for each step")
    return values[:, 0]


@dataclass(frozen=True, kw_only=True)
class Recorded(Demonstrations):
    """Episodes that lie in files, as named arrays of all their steps."""

    root: str
    """where they are"""
    observed: tuple[str, ...] = ("obs",)
    """arrays of what is observed, or some of their columns: state[0:2]; none where pictures are enough"""
    frames: tuple[str, ...] = ()
    """arrays of pictures, uint8 [N, H, W, C] or [N, C, H, W], that are seen too; several cameras have one size"""
    action: str = "action"
    """the array of what was done"""
    reward: str = ""
    """the array of what each step brought, for returns"""
    skill: str = ""
    """an array of whole numbers, of which kind each step's episode is, for skill"""
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

    def pictures(self) -> np.ndarray | None:
        """uint8 ``[N, C, H, W]``, the cameras' channels one after the other."""
        if not self.frames:
            return None
        arrays = self.arrays(list(self.frames))
        found = [channels_first(arrays[name], name, self.root) for name in self.frames]
        for name, values in zip(self.frames, found, strict=True):
            if values.shape[2:] != found[0].shape[2:]:
                one, other = ("x".join(map(str, v.shape[2:])) for v in (values, found[0]))
                raise ValueError(
                    f"{self.root}: {name} holds pictures of {one}, {self.frames[0]} of {other}; needs one size"
                )
        return np.concatenate(found, 1)

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
        named = {"returns": self.reward, "skill": self.skill}
        more = {k: v for k, v in named.items() if v and k in self.conditions}
        found, ends = self.read([*self.seen(), self.action, *more.values()])
        told = {
            k: one_column(v, named[k], self.root) for k, v in zip(more, found[len(found) - len(more) :], strict=True)
        }
        *seen, actions = found[: len(found) - len(more)]
        if not seen and not self.frames:
            raise ValueError("observed, frames: given neither; a policy has to see something")
        obs = np.concatenate([np.zeros((len(actions), 0)), *seen], 1)
        rewards, skill, pictures = told.get("returns"), told.get("skill"), self.pictures()
        if skill is not None and ((skill != skill.astype(int)) | (skill < 0)).any():
            raise ValueError(f"{self.root}: {self.skill} holds {skill.min():g} … {skill.max():g}; needs 0, 1, 2 ...")
        part = lambda v, a, b: None if v is None else v[a:b]  # noqa: E731
        whole = [
            Episode(obs[a:b], actions[a:b], part(rewards, a, b), part(skill, a, b), None, part(pictures, a, b))
            for a, b in pairwise([0, *ends.tolist()])
        ]
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
