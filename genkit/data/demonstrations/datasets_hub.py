"""Demonstrations that others recorded: datasets of Minari and of LeRobot.

Both become what a replay buffer is, named arrays of all steps, one episode after the other, and are checked alike. Each
is read by its own library, which is imported when it is needed. Nothing in them is run: no pickle, and no environment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genkit.core.files import one_line
from genkit.data.demonstrations.replay import Recorded, require_arrays

INSTALL = "pip install 'genkit[data]'"


# --------------------------------------------------------------------------------------------------------- Minari
@dataclass(frozen=True, kw_only=True)
class Minari(Recorded):
    """A dataset of Minari: episodes of a gymnasium environment, with the observation after the last action left out."""

    root: str
    """its folder, or an id such as D4RL/pointmaze/umaze-v2, which is downloaded where it is not there yet"""
    observed: tuple[str, ...] = ()
    """of observations that are dictionaries, the entries to be seen, in this order; (): all that are no pictures"""
    reward: str = "reward"

    def seen(self) -> tuple[str, ...]:
        if self.observed:
            return self.observed
        space = open_minari(self.root).observation_space
        found = boxes(space, "obs", self.root)
        return tuple(name for name, path in found.items() if len(inner(space, path).shape) < 3)

    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        data = open_minari(self.root)
        obs, actions = (
            boxes(space, name, self.root)
            for space, name in ((data.observation_space, "obs"), (data.action_space, "action"))
        )
        require_arrays(self.root, names, [*obs, *actions, "reward"])
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        ends = [0]
        for i in range(data.total_episodes):
            try:
                episode = next(iter(data.iterate_episodes([i])))
                length = len(episode.rewards)
                at = {k: inner(episode.observations, path) for k, path in obs.items()}
                at |= {k: inner(episode.actions, path) for k, path in actions.items()}
            except Exception as e:  # h5py and pyarrow raise anything over a damaged file
                raise ValueError(f"{self.root}: episode {i} cannot be read (truncated?): {one_line(e)}") from e
            if not length:
                raise ValueError(f"{self.root}: episode {i} is empty")
            for name in names:
                values, extra = (episode.rewards, 0) if name == "reward" else (at[name], int(name in obs))
                if len(values) != length + extra:
                    raise ValueError(
                        f"{self.root}: episode {i} has {length} rewards and {len(values)} of {name}; "
                        f"needs {length + extra}"
                    )
                found[name].append(np.asarray(values)[:length])
            ends.append(ends[-1] + length)
        if ends[-1] != data.total_steps:
            raise ValueError(f"{self.root}: holds {ends[-1]} steps of {data.total_steps}; it is cut off")
        return {**{k: np.concatenate(v) for k, v in found.items()}, "episode_ends": np.array(ends[1:])}


def open_minari(root: str) -> Any:
    """A ``minari.MinariDataset``. ``ValueError`` where Minari, the dataset or the network is missing."""
    try:
        import minari
        from minari.dataset.minari_storage import MinariStorage
        from minari.storage.datasets_root_dir import get_dataset_path
    except ImportError as e:
        raise ValueError(f"{root}: reading it needs Minari ({one_line(e)}); install it: {INSTALL}") from None
    folder = Path(root).expanduser()
    if not folder.is_dir():
        folder = get_dataset_path(root)
        if not folder.is_dir():
            try:
                minari.download_dataset(root)
            except Exception as e:  # its storages raise anything where there is no network
                why = one_line(e)[:160]
                raise ValueError(
                    f"{root}: is neither a folder nor in {folder.parent}, and cannot be downloaded ({why}); "
                    "give --data.root a folder that holds metadata.json, or a Minari id"
                ) from e
    within = folder / "data" if (folder / "data" / "metadata.json").is_file() else folder
    try:
        stored = MinariStorage.read_raw_metadata(within)
        if missing := [k for k in ("observation_space", "action_space") if k not in stored]:
            # Minari would make the environment to see, and so import whatever the dataset names
            raise ValueError(f"metadata.json has no {missing[0]}")
        return minari.MinariDataset(within)
    except Exception as e:
        raise ValueError(f"{root}: is no dataset that Minari {minari.__version__} reads: {one_line(e)[:200]}") from e


def boxes(space: Any, name: str, where: str) -> dict[str, tuple[Any, ...]]:
    """The boxes of a space of gymnasium and the way to each: ``{name: ()}``, or one for each entry of a dictionary,
    named after it (``goal.place`` within a second one)."""
    found = dict(entries(space, (), where))
    return {".".join(map(str, path)) or name: path for path in found}


def entries(space: Any, path: tuple[Any, ...], where: str) -> Iterator[tuple[tuple[Any, ...], Any]]:
    inside = getattr(space, "spaces", None)
    if inside is None:
        if type(space).__name__ != "Box":
            raise ValueError(f"{where}: has {'.'.join(map(str, path)) or 'a space'} {space}; needs boxes of numbers")
        yield path, space
        return
    for key, value in inside.items() if isinstance(inside, Mapping) else enumerate(inside):
        yield from entries(value, (*path, key), where)


def inner(values: Any, path: Sequence[Any]) -> Any:
    for key in path:
        values = values[key]
    return values


# -------------------------------------------------------------------------------------------------------- LeRobot
@dataclass(frozen=True, kw_only=True)
class LeRobot(Recorded):
    """A dataset of LeRobot, format v2 or v3: the numbers in its parquet files. (Videos are not read.)"""

    root: str
    """its folder, which holds meta/info.json, or a hub id such as lerobot/pusht_keypoints"""
    observed: tuple[str, ...] = ("observation.state",)
    reward: str = "next.reward"
    skill: str = "task_index"

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
        episode, frame = (arrays[k].reshape(-1) for k in ("episode_index", "frame_index"))
        order = np.lexsort((frame, episode))
        episode, frame = episode[order], frame[order]
        total = int(info["total_episodes"])
        lengths = np.bincount(episode, minlength=total)
        for i, told in enumerate(told_lengths(folder, lengths)):
            if not lengths[i]:
                raise ValueError(f"{folder}: episode {i} is empty or its file is missing; info.json knows {total}")
            if lengths[i] != told:
                raise ValueError(f"{folder}: episode {i} has {lengths[i]} steps of {told}; its file is cut off")
        ends = lengths.cumsum()
        steps = np.arange(len(frame)) - (ends - lengths).repeat(lengths)
        if (odd := np.flatnonzero(frame != steps)).size:
            raise ValueError(f"{folder}: episode {episode[odd[0]]} has no step {steps[odd[0]]}, or has one twice")
        if len(lengths) != total or len(frame) != int(info.get("total_frames", len(frame))):
            told = f"{total} episodes and {info.get('total_frames')} steps"
            raise ValueError(f"{folder}: holds {len(lengths)} episodes and {len(frame)} steps; info.json says {told}")
        return {**{k: arrays[k][order] for k in names}, "episode_ends": ends}


def lerobot_folder(root: str) -> Path:
    """The folder of a dataset, which may have to be fetched. ``ValueError`` where it is neither here nor on the hub."""
    folder = Path(root).expanduser()
    if folder.exists():
        return folder
    hint = "give --data.root a folder that holds meta/info.json, or the hub id of a LeRobot dataset"
    if root.count("/") != 1 or root[0] in "./~":
        raise ValueError(f"{root}: there is no such folder; {hint}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{root}: is no folder, and fetching it needs huggingface-hub: {INSTALL}") from None
    try:
        return Path(snapshot_download(root, repo_type="dataset", allow_patterns=["meta/*", "data/*"]))
    except Exception as e:  # its errors are requests', httpx's, OSError and its own
        why = one_line(e)[:160]
        raise ValueError(f"{root}: is no folder, and cannot be had from the hub ({why}); {hint}") from e


def lerobot_info(folder: Path) -> dict[str, Any]:
    """``meta/info.json``. ``ValueError`` where it is missing, damaged, or of a format with other files."""
    path = folder / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
        version, _ = str(info["codebase_version"]), (info["features"], int(info["total_episodes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: is missing or damaged ({one_line(e)}); a LeRobot dataset has one") from e
    if not version.startswith(("v2", "v3")):
        raise ValueError(f"{path}: is of format {version}; genkit reads v2 and v3: convert it with LeRobot's own tools")
    return info


def parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"lerobot: reading parquet needs pyarrow; install it: {INSTALL}") from None
    return pyarrow.parquet


def read_parquet(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of all of ``data/`` as arrays ``[N, ...]``. ``ValueError`` names the file that is damaged."""
    reader = parquet()
    files = sorted((folder / "data").rglob("*.parquet"))
    if not files:
        raise ValueError(f"{folder}: has no data/**/*.parquet; is it all of a LeRobot dataset?")
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for file in files:
        try:
            opened = reader.ParquetFile(file)
            there = opened.schema_arrow.names
            table = opened.read(columns=[name for name in names if name in there])
        except Exception as e:  # pyarrow's own, OSError
            raise ValueError(f"{file}: cannot be read (truncated?): {one_line(e)[:160]}") from e
        require_arrays(file, names, there)
        for name in names:
            found[name].append(column(table, name, file))
    return {k: np.concatenate([v for v in values if len(v)] or values[:1]) for k, values in found.items()}


def column(table: Any, name: str, where: Path) -> np.ndarray:
    """A column of numbers, or of lists of them, all of one length: ``[N]`` or ``[N, D, ...]``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    values, rows, shape = table[name].combine_chunks(), table.num_rows, []
    while True:
        values = getattr(values, "storage", values)  # of the extension types of hf datasets
        missing = values.is_null().to_numpy(zero_copy_only=False)
        nested = any(is_one(values.type) for is_one in lists) and not missing.any()
        lengths: Any = np.zeros(len(values))
        if nested:
            lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)  # pyright: ignore[reportAttributeAccessIssue]
        odd = missing | (lengths != (lengths[0] if len(lengths) else 0))
        if odd.any():
            row = int(np.argmax(odd)) * rows // len(odd)
            at = f"episode {table['episode_index'][row]}, step {table['frame_index'][row]}"
            raise ValueError(f"{where}: {name} has a gap, or another length than before, at {at}")
        if not nested:
            return values.to_numpy(zero_copy_only=False).reshape(rows, *shape)
        shape.append(int(lengths[0]) if len(lengths) else 0)
        values = values.flatten()


def told_lengths(folder: Path, found: np.ndarray) -> Sequence[int]:
    """The length of each episode as ``meta/`` has it: ``episodes.jsonl`` of v2, parquet files of v3; what was
    ``found`` where there is neither."""
    lines = folder / "meta" / "episodes.jsonl"
    files = sorted((folder / "meta" / "episodes").rglob("*.parquet"))
    try:
        if lines.is_file():
            rows = [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
        else:
            tables = (parquet().ParquetFile(f).read(columns=["episode_index", "length"]) for f in files)
            rows = [row for table in tables for row in table.to_pylist()]
        told = {int(row["episode_index"]): int(row["length"]) for row in rows}
    except Exception as e:  # pyarrow's own, OSError, ValueError, KeyError
        raise ValueError(f"{folder}/meta: what it says of episodes is damaged: {one_line(e)[:160]}") from e
    return [told.get(i, int(n)) for i, n in enumerate(found)]
