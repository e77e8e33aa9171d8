"""Published demonstrations: datasets of Minari and of LeRobot.

Both become named arrays of all steps, one episode after the other, as a replay buffer has them. Each is read by its own
library, which is imported when it is needed. Nothing in them is executed: no pickle, and no environment.
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
from genkit.core.hub import call_hub
from genkit.data.demonstrations.replay import Recorded, require_arrays
from genkit.data.source import DataSource
from genkit.envs import parse_arguments
from genkit.envs.gym import REGISTERING_PACKAGES

INSTALL = "pip install 'genkit[data]'"


# --------------------------------------------------------------------------------------------------------- Minari
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


# -------------------------------------------------------------------------------------------------------- LeRobot
@dataclass(frozen=True, kw_only=True)
class LeRobot(Recorded):
    """A dataset of LeRobot, format v2 or v3: the numbers in its parquet files. (Videos are not read.)"""

    root: PathText
    """its folder, which contains meta/info.json, or a hub id such as lerobot/pusht_keypoints"""
    observed: tuple[str, ...] = ("observation.state",)
    """observed features, or some of their columns: observation.state[0:2]"""
    reward: str = "next.reward"
    """the feature that holds the rewards, for the condition returns"""
    skill: str = "task_index"
    """a feature of whole numbers, the kind of each step's episode, for the condition skill"""

    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        folder = lerobot_folder(self.root)
        info = lerobot_info(folder)
        features: Mapping[str, Any] = info["features"]
        numbers = [k for k, v in features.items() if v.get("dtype") not in ("video", "image", "string")]
        for name in names:
            if (dtype := features.get(name, {}).get("dtype")) and name not in numbers:
                raise ValueError(f"{folder}: {name} is a {dtype}, not numbers; it holds {', '.join(numbers)}")
        require_arrays(folder, names, numbers)
        arrays = read_parquet(folder, list(dict.fromkeys(["episode_index", "frame_index", *names])))
        # files may hold the steps in any order
        episode, frame = (arrays[k].reshape(-1) for k in ("episode_index", "frame_index"))
        order = np.lexsort((frame, episode))
        ends = check_steps(folder, info, episode[order], frame[order])
        return {**{k: arrays[k][order] for k in names}, "episode_ends": ends}


def check_steps(folder: Path, info: Mapping[str, Any], episode: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Return ``episode_ends``, given the sorted episode and step index ``[N]`` of all steps.

    ``ValueError`` if a step or an episode is missing or double, compared with ``meta/``.
    """
    total = int(info["total_episodes"])
    lengths = np.bincount(episode, minlength=total)
    for i, expected in enumerate(recorded_lengths(folder, lengths)):
        if not lengths[i]:
            raise ValueError(f"{folder}: episode {i} is empty or its file is missing; info.json counts {total}")
        if lengths[i] != expected:
            raise ValueError(f"{folder}: episode {i} has {lengths[i]} steps of {expected}; its file is cut off")
    ends = lengths.cumsum()
    steps = np.arange(len(frame)) - (ends - lengths).repeat(lengths)
    if (odd := np.flatnonzero(frame != steps)).size:
        raise ValueError(f"{folder}: episode {episode[odd[0]]} has no step {steps[odd[0]]}, or has one twice")
    if len(lengths) != total or len(frame) != int(info.get("total_frames", len(frame))):
        expected = f"{total} episodes and {info.get('total_frames')} steps"
        raise ValueError(f"{folder}: holds {len(lengths)} episodes and {len(frame)} steps; info.json says {expected}")
    return ends


def lerobot_folder(root: str) -> Path:
    """The folder of a dataset, downloaded if necessary. ``ValueError`` if it is neither local nor on the hub."""
    folder = Path(root).expanduser()
    if folder.exists():
        return folder
    hint = "give --data.root a folder that contains meta/info.json, or the hub id of a LeRobot dataset"
    if root.count("/") != 1 or root[0] in "./~":
        raise ValueError(f"{root}: there is no such folder; {hint}")
    return call_hub(
        f"{root}: is not a folder",
        root,
        lambda hub: Path(hub.snapshot_download(root, repo_type="dataset", allow_patterns=["meta/*", "data/*"])),
        f"; {hint}",
    )


def lerobot_info(folder: Path) -> dict[str, Any]:
    """``meta/info.json``. ``ValueError`` if it is missing, damaged, or of a format with other files."""
    path = folder / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
        version, _ = str(info["codebase_version"]), (info["features"], int(info["total_episodes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: is missing or damaged ({format_error(e)}); a LeRobot dataset has one") from e
    if not version.startswith(("v2", "v3")):
        raise ValueError(f"{path}: has format {version}; genkit reads v2 and v3: convert it with LeRobot's own tools")
    return info


def import_parquet() -> Any:
    """``pyarrow.parquet``. ``ValueError`` if it is not installed."""
    try:
        import pyarrow.parquet  # lazy: optional
    except ImportError:
        raise ValueError(f"lerobot: reading parquet needs pyarrow; install it: {INSTALL}") from None
    return pyarrow.parquet


def read_parquet(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of all files in ``data/`` as arrays ``[N, ...]``. ``ValueError`` names a damaged file."""
    reader = import_parquet()
    files = sorted((folder / "data").rglob("*.parquet"))
    if not files:
        raise ValueError(f"{folder}: has no data/**/*.parquet; is it a complete LeRobot dataset?")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for file in files:
        try:
            content = reader.ParquetFile(file)
            available = content.schema_arrow.names
            table = content.read(columns=[name for name in names if name in available])
        except Exception as e:  # pyarrow's own, OSError
            raise ValueError(f"{file}: cannot be read (truncated?): {format_error(e)[:160]}") from e
        require_arrays(file, names, available)
        for name in names:
            parts[name].append(column_to_array(table, name, file))
    return {k: np.concatenate([v for v in values if len(v)] or values[:1]) for k, values in parts.items()}


def column_to_array(table: Any, name: str, location: Path) -> np.ndarray:
    """A column of numbers ``[N]``, or of (nested) lists of them, all of one length, ``[N, D, ...]``."""
    import pyarrow as pa  # lazy: optional
    import pyarrow.compute as pc

    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    values, rows, shape = table[name].combine_chunks(), table.num_rows, []
    while True:
        values = getattr(values, "storage", values)  # of the extension types of hf datasets
        missing = values.is_null().to_numpy(zero_copy_only=False)
        nested = any(test(values.type) for test in is_list) and not missing.any()
        lengths: Any = np.zeros(len(values))
        if nested:
            lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)  # pyright: ignore[reportAttributeAccessIssue]
        odd = missing | (lengths != (lengths[0] if len(lengths) else 0))
        if odd.any():
            row = int(np.argmax(odd)) * rows // len(odd)
            step = f"episode {table['episode_index'][row]}, step {table['frame_index'][row]}"
            raise ValueError(f"{location}: {name} has a gap, or another length than before, at {step}")
        if not nested:
            return values.to_numpy(zero_copy_only=False).reshape(rows, *shape)
        shape.append(int(lengths[0]) if len(lengths) else 0)
        values = values.flatten()


def recorded_lengths(folder: Path, counted: np.ndarray) -> Sequence[int]:
    """The length of each episode in ``meta/``: ``episodes.jsonl`` (v2) or parquet files (v3); without, ``counted``."""
    lines = folder / "meta" / "episodes.jsonl"
    files = sorted((folder / "meta" / "episodes").rglob("*.parquet"))
    try:
        if lines.is_file():
            rows = [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
        else:
            tables = (import_parquet().ParquetFile(f).read(columns=["episode_index", "length"]) for f in files)
            rows = [row for table in tables for row in table.to_pylist()]
        lengths = {int(row["episode_index"]): int(row["length"]) for row in rows}
    except Exception as e:  # pyarrow's own, OSError, ValueError, KeyError
        raise ValueError(f"{folder}/meta: the record of episodes is damaged: {format_error(e)[:160]}") from e
    return [lengths.get(i, int(n)) for i, n in enumerate(counted)]
