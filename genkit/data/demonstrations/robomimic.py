"""Datasets of robomimic (Mandlekar et al. 2021) as demonstrations: an HDF5 file with a group for each episode.

``data/demo_0`` holds ``actions`` and ``rewards``, and its group ``obs`` the observations by name; ``mask/NAME`` lists
the episodes of a filter. So do the files of MimicGen and LIBERO. The environment that the file names belongs to
robosuite; give one of gymnasium by ``env``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genkit.config.paths import PathText
from genkit.core.arrays import rows_of_piece
from genkit.core.files import format_error
from genkit.data.demonstrations.frames import cached_pieces, image_shape
from genkit.data.demonstrations.replay import Recorded, require_arrays

INSTALL = "pip install 'genkit-torch[data]'"


@dataclass(frozen=True, kw_only=True)
class Robomimic(Recorded):
    """A dataset of robomimic: an HDF5 file. Observations and images (``frames``) are named as in its groups ``obs``."""

    root: PathText
    """the file, with observations"""
    observed: tuple[str, ...] = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
    """observed arrays, or some of their columns: object[0:7]; none if images are enough"""
    action: str = "actions"
    """the array of actions"""
    reward: str = "rewards"
    """the array of rewards, for the condition returns"""
    mask: str = ""
    """only the episodes of this filter, say train; "": all"""

    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        ends = [0]
        with open_episodes(self.root, self.mask) as episodes:
            for title, episode in episodes:
                entries = episode_entries(episode)
                require_arrays(f"{self.root}: {title}", [*names, "actions"], entries)
                length = len(entries["actions"])
                for name in names:
                    require_length(f"{self.root}: {title}", name, entries)
                    parts[name].append(entries[name][:])
                if not length:
                    raise ValueError(f"{self.root}: {title} is empty")
                ends.append(ends[-1] + length)
        return {**{k: np.concatenate(v) for k, v in parts.items()}, "episode_ends": np.array(ends[1:])}

    def camera(self, name: str) -> np.ndarray:
        num = 0
        shape: Any = None
        with open_episodes(self.root, self.mask) as episodes:
            for title, episode in episodes:
                entries = episode_entries(episode)
                require_arrays(f"{self.root}: {title}", [name, "actions"], entries)
                require_length(f"{self.root}: {title}", name, entries)
                num += len(entries[name])
                shape = shape or image_shape(entries[name].shape, entries[name].dtype, name, self.root)[1:]

        def pieces() -> Iterator[np.ndarray]:
            with open_episodes(self.root, self.mask) as again:
                for _, opened in again:
                    images = episode_entries(opened)[name]
                    rows = rows_of_piece(images.shape, images.dtype)
                    for first in range(0, len(images), rows):
                        yield images[first : first + rows]

        file = Path(self.root).expanduser()
        return cached_pieces([file], name, (num, *shape), pieces, self.image_size, mask=self.mask)


@contextmanager
def open_episodes(root: str, mask: str = "") -> Iterator[list[tuple[str, Any]]]:
    """``(name, group)`` of the episodes, by their number. ``ValueError`` if h5py or the file is missing or damaged."""
    try:
        import h5py  # lazy: optional
    except ImportError:
        raise ValueError(f"{root}: reading HDF5 needs h5py; install it: {INSTALL}") from None
    path = Path(root).expanduser()
    try:
        file = h5py.File(path, "r")
    except OSError as e:
        raise ValueError(f"{path}: cannot be read as HDF5: {format_error(e)[:120]}") from e
    with file:
        if "data" not in file:
            raise ValueError(f"{path}: has no group data; a dataset of robomimic has one, with demo_0, demo_1 ...")
        names: Any = list(file["data"])  # type: ignore[arg-type]
        if mask:
            masks = list(file["mask"]) if "mask" in file else []  # type: ignore[arg-type]
            if mask not in masks:
                raise ValueError(f"mask: given {mask!r}; {path} has {', '.join(masks) or 'none'}")
            names = [n.decode() if isinstance(n, bytes) else str(n) for n in file[f"mask/{mask}"][:]]  # type: ignore[index]
        if not names:
            raise ValueError(f"{path}: holds no episodes" + (f" of the filter {mask}" if mask else ""))
        names = sorted(names, key=lambda name: int((re.findall(r"\d+", name) or [0])[-1]))
        try:
            yield [(name, file[f"data/{name}"]) for name in names]
        except (OSError, KeyError, RuntimeError) as e:  # h5py's, over a truncated file
            raise ValueError(f"{path}: is damaged: {format_error(e)[:120]}") from e


def require_length(location: str, name: str, entries: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless an array has one entry for each action."""
    if (found := len(entries[name])) != (length := len(entries["actions"])):
        raise ValueError(f"{location} has {length} actions and {found} of {name}; it is cut off")


OWN = ("actions", "rewards", "dones")  # of an episode, whatever an observation is called


def episode_entries(episode: Any) -> dict[str, Any]:
    """The data sets of an episode by name: its own, and those of its group ``obs``."""
    entries = {name: value for name, value in episode.items() if hasattr(value, "shape")}
    observed = dict(episode["obs"]) if "obs" in episode else {}
    own = {name: entries[name] for name in OWN if name in entries}
    return entries | observed | own
