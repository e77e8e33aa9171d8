"""Datasets of Minari as demonstrations.

They become named arrays of all steps, one episode after the other, as a replay buffer has them. Minari itself reads
them; it is imported when it is needed. Nothing in them is executed: no pickle, and no environment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from genkit.config.paths import PathText
from genkit.core.files import format_error
from genkit.data.demonstrations.frames import cached_pieces, image_shape
from genkit.data.demonstrations.replay import Recorded, require_arrays
from genkit.data.source import DataSource
from genkit.envs import parse_arguments
from genkit.envs.gym import REGISTERING_PACKAGES

INSTALL = "pip install 'genkit-torch[data]'"


@dataclass(frozen=True, kw_only=True)
class Minari(Recorded):
    """A dataset of Minari: episodes of a gymnasium environment, without the observation after the last action."""

    root: PathText
    """its folder, or an id such as D4RL/pointmaze/umaze-v2, which is downloaded if it is missing"""
    observed: tuple[str, ...] = ()
    """if observations are dictionaries, the observed entries in this order; (): all that are not images"""
    reward: str = "reward"
    """the array of rewards, for the condition returns"""

    def with_decisions(self) -> Minari:
        return self if self.env else self.with_recorded_environment()

    def with_decisions_of(self, earlier: DataSource) -> Minari:
        if self.env or not isinstance(earlier, Minari):
            return self
        return replace(self, env=earlier.env, env_args=earlier.env_args)

    def with_recorded_environment(self) -> Minari:
        """A copy with the environment that the dataset names for evaluation, else the one that it was recorded in.

        ``env_args`` add to its keyword arguments, or replace them. An environment with wrappers is left out, since it
        could not be made again.
        """
        metadata = open_minari(self.root).storage.metadata
        stored = metadata.get("eval_env_spec") or metadata.get("env_spec")
        spec = json.loads(stored) if stored else {}
        if not spec or spec.get("additional_wrappers"):
            return self
        module = str(spec.get("entry_point") or "").partition(":")[0]
        known = not module or module.partition(".")[0] in REGISTERING_PACKAGES
        values = {"max_episode_steps": spec.get("max_episode_steps"), **spec.get("kwargs", {})}
        own = parse_arguments(self.env_args)
        arguments = [
            f"{k}={json.dumps(v)}" for k, v in values.items() if k not in own and k != "render_mode" and v is not None
        ]
        name = spec["id"] if known else f"{module}:{spec['id']}"
        return replace(self, env=name, env_args=(*arguments, *self.env_args))

    def observed_columns(self) -> tuple[str, ...]:
        if self.observed:
            return self.observed
        space = open_minari(self.root).observation_space
        paths = box_paths(space, "obs", self.root)
        return tuple(name for name, path in paths.items() if len(follow_path(space, path).shape) < 3)

    def observed_entries(self) -> tuple[str, ...]:
        """Also the name of a single one, if the environment's observations have more, such as images."""
        boxes = box_paths(open_minari(self.root).observation_space, "obs", self.root)
        return tuple(self.observed_columns()) if len(boxes) > 1 else ()

    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        data = open_minari(self.root)
        obs = box_paths(data.observation_space, "obs", self.root)
        actions = box_paths(data.action_space, "action", self.root)
        require_arrays(self.root, names, [*obs, *actions, "reward"])
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        ends = [0]
        for i in range(data.total_episodes):
            values, length = self.read_episode(data, i, obs, actions)
            for name in names:
                expected = length + int(name in obs and name != "reward")  # one observation more than actions
                if len(values[name]) != expected:
                    raise ValueError(
                        f"{self.root}: episode {i} has {length} rewards and {len(values[name])} of {name}; "
                        f"needs {expected}"
                    )
                parts[name].append(np.asarray(values[name])[:length])
            ends.append(ends[-1] + length)
        if ends[-1] != data.total_steps:
            raise ValueError(f"{self.root}: holds {ends[-1]} steps of {data.total_steps}; it is cut off")
        return {**{k: np.concatenate(v) for k, v in parts.items()}, "episode_ends": np.array(ends[1:])}

    def camera(self, name: str) -> np.ndarray:
        data = open_minari(self.root)
        boxes = box_paths(data.observation_space, "obs", self.root)
        require_arrays(self.root, [name], boxes)

        def pieces() -> Iterator[np.ndarray]:
            for i in range(data.total_episodes):
                values, length = self.read_episode(data, i, {name: boxes[name]}, {})
                yield np.asarray(values[name])[:length]

        example = next(pieces())
        shape = image_shape((data.total_steps, *example.shape[1:]), example.dtype, name, self.root)
        files = sorted(p for p in Path(data.storage.data_path).rglob("*") if p.is_file())
        return cached_pieces(files, name, shape, pieces, self.image_size)

    def read_episode(
        self, data: Any, i: int, obs: Mapping[str, Sequence[Any]], actions: Mapping[str, Sequence[Any]]
    ) -> tuple[dict[str, Any], int]:
        """All arrays of an episode by name, and its length. ``ValueError`` if it is damaged or empty."""
        try:
            episode = next(iter(data.iterate_episodes([i])))
            length = len(episode.rewards)
            values = {k: follow_path(episode.observations, path) for k, path in obs.items()}
            values |= {k: follow_path(episode.actions, path) for k, path in actions.items()}
        except Exception as e:  # h5py and pyarrow raise anything over a damaged file
            raise ValueError(f"{self.root}: episode {i} cannot be read (truncated?): {format_error(e)}") from e
        if not length:
            raise ValueError(f"{self.root}: episode {i} is empty")
        return {**values, "reward": episode.rewards}, length


def open_minari(root: str) -> Any:
    """A ``minari.MinariDataset``. ``ValueError`` if Minari, the dataset or the network is missing."""
    try:
        import minari  # lazy: optional
        from minari.dataset.minari_storage import MinariStorage
        from minari.storage.datasets_root_dir import get_dataset_path
    except ImportError as e:
        raise ValueError(f"{root}: reading it needs Minari ({format_error(e)}); install it: {INSTALL}") from None
    folder = Path(root).expanduser()
    if not folder.is_dir():
        folder = get_dataset_path(root)
        if not folder.is_dir():
            try:
                minari.download_dataset(root)
            except Exception as e:  # its storages raise anything without a network
                reason = format_error(e)[:160]
                raise ValueError(
                    f"{root}: is neither a folder nor in {folder.parent}, and cannot be downloaded ({reason}); "
                    "give --data.root a folder that contains metadata.json, or a Minari id"
                ) from e
    inside = folder / "data" if (folder / "data" / "metadata.json").is_file() else folder
    try:
        stored = MinariStorage.read_raw_metadata(inside)
        if missing := [k for k in ("observation_space", "action_space") if k not in stored]:
            # Minari would make the environment to look, and so import whatever the dataset names
            raise ValueError(f"metadata.json has no {missing[0]}")
        return minari.MinariDataset(inside)
    except Exception as e:
        reason = format_error(e)[:200]
        raise ValueError(f"{root}: is not a dataset that Minari {minari.__version__} reads: {reason}") from e


def box_paths(space: Any, name: str, location: str) -> dict[str, tuple[Any, ...]]:
    """The boxes of a gymnasium space, by name, with the path to each: ``{name: ()}``, or one for each entry of a
    dictionary, named after it (``goal.place`` inside another one)."""
    paths = [path for path, _ in list_boxes(space, (), location)]
    return {".".join(map(str, path)) or name: path for path in paths}


def list_boxes(space: Any, path: tuple[Any, ...], location: str) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """``(path, box)`` of every box in a space. ``ValueError`` if it contains anything else."""
    inside = getattr(space, "spaces", None)
    if inside is None:
        if type(space).__name__ != "Box":
            raise ValueError(f"{location}: has {'.'.join(map(str, path)) or 'a space'} {space}; needs boxes of numbers")
        yield path, space
        return
    for key, value in inside.items() if isinstance(inside, Mapping) else enumerate(inside):
        yield from list_boxes(value, (*path, key), location)


def follow_path(values: Any, path: Sequence[Any]) -> Any:
    """``values[path[0]][path[1]] ...``"""
    for key in path:
        values = values[key]
    return values
