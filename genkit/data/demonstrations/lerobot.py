"""Datasets of LeRobot, formats v2 and v3, as demonstrations: numbers in parquet files, images there or in videos.

The layout is that of lerobot 0.1 to 0.4: ``meta/info.json`` has patterns of the files, ``meta/episodes`` the lengths of
the episodes and, in v3, which part of which video belongs to each. Files of code are never run.
"""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genkit.config.paths import PathText
from genkit.core.files import format_error
from genkit.core.hub import call_hub
from genkit.data.demonstrations.frames import cached_frames, require_size, resize, stamps
from genkit.data.demonstrations.replay import Recorded, require_arrays
from genkit.data.demonstrations.video import Clip, clip_frames, first_shape
from genkit.data.source import Split

INSTALL = "pip install 'genkit-torch[data]'"


@dataclass(frozen=True, kw_only=True)
class LeRobot(Recorded):
    """A dataset of LeRobot, format v2 or v3: numbers, and images of the cameras that ``frames`` names.

    Videos are decoded once, in the size that is asked for, into a file of the cache folder that is mapped into memory.
    """

    root: PathText
    """its folder, which contains meta/info.json, or a hub id such as lerobot/pusht_keypoints"""
    observed: tuple[str, ...] = ("observation.state",)
    """observed features, or some of their columns: observation.state[0:2]"""
    reward: str = "next.reward"
    """the feature that holds the rewards, for the condition returns"""
    skill: str = "task_index"
    """a feature of whole numbers, the kind of each step's episode, for the condition skill"""
    task: str = "task_index"
    """the feature that holds the number of each step's task, whose text is in meta/, for the condition text"""

    def folder(self) -> Path:
        """The folder, with its videos if they are observed."""
        return lerobot_folder(self.root, videos=bool(self.frames))

    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        folder = self.folder()
        info = lerobot_info(folder)
        features: Mapping[str, Any] = info["features"]
        numbers = [k for k, v in features.items() if v.get("dtype") not in ("video", "image", "string")]
        for name in names:
            if (dtype := features.get(name, {}).get("dtype")) and name not in numbers:
                raise ValueError(f"{folder}: {name} is a {dtype}, not numbers; it holds {', '.join(numbers)}")
        require_arrays(folder, names, numbers)
        arrays, order, ends = read_steps(folder, info, names)
        return {**{k: arrays[k][order] for k in names}, "episode_ends": ends}

    def camera(self, name: str) -> np.ndarray:
        folder = self.folder()
        info = lerobot_info(folder)
        cameras = [k for k, v in info["features"].items() if v.get("dtype") in ("video", "image")]
        if name not in cameras:
            raise ValueError(f"{folder}: has no images {name!r}; it holds {', '.join(cameras) or 'none'}")
        feature = info["features"][name]
        if any(
            (feature.get(k) or {}).get(d)
            for k in ("info", "video_info")
            for d in ("is_depth_map", "video.is_depth_map")
        ):
            raise ValueError(f"{folder}: {name} is a map of depths, which is no picture; leave it out")
        _, order, ends = read_steps(folder, info, [])
        read = read_videos if feature["dtype"] == "video" else read_image_column
        return read(folder, info, name, order, ends, self.image_size)

    def task_texts(self, split: Split = "train") -> Sequence[Sequence[str]]:
        return [[text] for text in read_tasks(self.folder())]

    def step_tasks(self) -> np.ndarray:
        tasks, num = self.arrays([self.task])[self.task].reshape(-1), len(self.task_texts())
        if tasks.min() < 0 or tasks.max() >= num:
            raise ValueError(f"{self.root}: {self.task} holds {tasks.min()} to {tasks.max()}; there are {num} tasks")
        return tasks


def read_steps(
    folder: Path, info: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Columns ``[N, ...]`` of all steps as the files have them, the order ``[N]`` in which they follow each other, and
    ``episode_ends``."""
    arrays = read_parquet(folder, list(dict.fromkeys(["episode_index", "frame_index", *names])))
    # files may hold the steps in any order
    episode, frame = (arrays[k].reshape(-1) for k in ("episode_index", "frame_index"))
    order = np.lexsort((frame, episode))
    return arrays, order, check_steps(folder, info, episode[order], frame[order])


# ------------------------------------------------------------------------------------------------ videos, images
def read_videos(
    folder: Path, info: Mapping[str, Any], name: str, order: np.ndarray, ends: np.ndarray, size: tuple[int, int] | None
) -> np.ndarray:
    """The frames of a camera's videos, decoded once."""
    fps = frame_rate(folder, info)
    clips = find_clips(folder, info, name, ends)
    by_file: dict[Path, list[Clip]] = defaultdict(list)
    for clip in clips:
        if not clip.path.is_file():
            raise ValueError(f"{clip.path}: is missing; download the dataset with its videos")
        by_file[clip.path].append(clip)
    h, w = size or first_shape(clips[0].path)

    def write(frames: np.ndarray) -> None:
        for path, of_file in by_file.items():
            for row, image in clip_frames(path, of_file, fps):
                require_size(image.shape[:2], (h, w), size, f"{path}: {name}")
                frames[row] = resize(image, (h, w))

    key = {"files": stamps(list(by_file)), "clips": [[str(c.path), c.start, c.length] for c in clips], "fps": fps,
           "resized": size is not None}  # fmt: skip
    return cached_frames(key, (int(ends[-1]), 3, h, w), write, name)


def frame_rate(folder: Path, info: Mapping[str, Any]) -> float:
    """Steps in a second. ``ValueError`` unless ``info.json`` has this number."""
    try:
        fps = float(info["fps"])
    except (KeyError, TypeError, ValueError):
        fps = 0.0
    if not 0 < fps < math.inf:
        raise ValueError(f"{folder}/meta/info.json: fps is {info.get('fps')}; videos need a rate above 0")
    return fps


def find_clips(folder: Path, info: Mapping[str, Any], name: str, ends: np.ndarray) -> list[Clip]:
    """Which part of which video each episode is: a file of its own (v2), or from a time on (v3)."""
    starts = [0, *ends[:-1].tolist()]
    lengths = np.diff(ends, prepend=0).tolist()
    pattern = info.get("video_path")
    if not isinstance(pattern, str):
        raise ValueError(f"{folder}/meta/info.json: has no video_path, the pattern of the files of videos")
    if str(info["codebase_version"]).startswith("v2"):
        try:
            chunk = int(info.get("chunks_size", 1000))
            paths = [
                pattern.format(episode_chunk=i // chunk, video_key=name, episode_index=i) for i in range(len(lengths))
            ]
        except (LookupError, TypeError, ValueError, ZeroDivisionError) as e:
            raise ValueError(f"{folder}/meta/info.json: video_path {pattern!r} names no file: {format_error(e)}") from e
        return [Clip(folder / p, 0.0, n, row) for p, n, row in zip(paths, lengths, starts, strict=True)]
    keys = {k: f"videos/{name}/{k}" for k in ("chunk_index", "file_index", "from_timestamp")}
    rows = {int(row["episode_index"]): row for row in read_episode_table(folder, list(keys.values()))}
    clips = []
    for i, (n, first) in enumerate(zip(lengths, starts, strict=True)):
        try:
            part = {k: rows[i][column] for k, column in keys.items()}
            path = pattern.format(video_key=name, chunk_index=part["chunk_index"], file_index=part["file_index"])
            clips.append(Clip(folder / path, float(part["from_timestamp"]), n, first))
        except (LookupError, TypeError, ValueError) as e:
            raise ValueError(f"{folder}/meta/episodes: says not where the video of {name}, episode {i} is") from e
    return clips


def read_image_column(
    folder: Path, info: Mapping[str, Any], name: str, order: np.ndarray, ends: np.ndarray, size: tuple[int, int] | None
) -> np.ndarray:
    """The images in a column of the parquet files, decoded once."""
    files = data_files(folder)
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))  # of each step in the files
    first = next(stored_images(files, name))
    h, w = size or first.shape[:2]

    def write(frames: np.ndarray) -> None:
        for row, image in zip(rows, stored_images(files, name), strict=True):
            require_size(image.shape[:2], (h, w), size, f"{files[0].parent}: {name}")
            frames[row] = resize(image, (h, w))

    key = {"files": stamps(files), "column": name, "resized": size is not None}
    return cached_frames(key, (len(order), 3, h, w), write, name)


def stored_images(files: Sequence[Path], name: str) -> Iterator[np.ndarray]:
    """The images of a column, RGB ``[H, W, 3]``, of which it holds the bytes of files of images."""
    from PIL import Image  # lazy: speed

    for file in files:
        try:
            for batch in import_parquet().ParquetFile(file).iter_batches(batch_size=64, columns=[name]):
                for entry in batch.column(0).to_pylist():
                    with Image.open(io.BytesIO(entry["bytes"])) as image:
                        yield np.asarray(image.convert("RGB"))
        except Exception as e:  # pyarrow's own, Pillow's, TypeError
            raise ValueError(f"{file}: {name} has an image that cannot be decoded: {format_error(e)[:120]}") from e


def read_tasks(folder: Path) -> list[str]:
    """The texts of the tasks: ``tasks.jsonl`` (v2) or ``tasks.parquet`` (v3)."""
    lines, table = folder / "meta" / "tasks.jsonl", folder / "meta" / "tasks.parquet"
    try:
        if lines.is_file():
            rows = [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
        else:
            rows = import_parquet().ParquetFile(table).read().to_pylist()
        by_index = {int(row["task_index"]): row.get("task") or row["__index_level_0__"] for row in rows}
        return [str(by_index[i]) for i in range(len(by_index))]
    except Exception as e:  # pyarrow's own, OSError, ValueError, KeyError
        raise ValueError(f"{folder}/meta: the record of tasks is missing or damaged: {format_error(e)[:120]}") from e


# ------------------------------------------------------------------------------------------------------- numbers
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


def lerobot_folder(root: str, videos: bool = False) -> Path:
    """The folder of a dataset, downloaded if necessary, with its ``videos`` or without.

    ``ValueError`` if it is neither local nor on the hub.
    """
    folder = Path(root).expanduser()
    if folder.exists():
        return folder
    hint = "give --data.root a folder that contains meta/info.json, or the hub id of a LeRobot dataset"
    if root.count("/") != 1 or root[0] in "./~":
        raise ValueError(f"{root}: there is no such folder; {hint}")
    patterns = ["meta/*", "data/*", *(["videos/*"] if videos else [])]
    return call_hub(
        f"{root}: is not a folder",
        root,
        lambda hub: Path(hub.snapshot_download(root, repo_type="dataset", allow_patterns=patterns)),
        f"; {hint}",
    )


def lerobot_info(folder: Path) -> dict[str, Any]:
    """``meta/info.json``. ``ValueError`` if it is missing, damaged, or of a format with other files."""
    path = folder / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
        version, _ = str(info["codebase_version"]), int(info["total_episodes"])
        if not all(isinstance(feature, Mapping) for feature in info["features"].values()):
            raise ValueError("features are not described")
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


def data_files(folder: Path) -> list[Path]:
    """All files in ``data/``. ``ValueError`` if there are none."""
    files = sorted((folder / "data").rglob("*.parquet"))
    if not files:
        raise ValueError(f"{folder}: has no data/**/*.parquet; is it a complete LeRobot dataset?")
    return files


def read_parquet(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of all files in ``data/`` as arrays ``[N, ...]``. ``ValueError`` names a damaged file."""
    reader, files = import_parquet(), data_files(folder)
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
    try:
        if lines.is_file():
            rows = [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
        else:
            rows = read_episode_table(folder, ["length"])
        lengths = {int(row["episode_index"]): int(row["length"]) for row in rows}
    except Exception as e:  # pyarrow's own, OSError, ValueError, KeyError
        raise ValueError(f"{folder}/meta: the record of episodes is damaged: {format_error(e)[:160]}") from e
    return [lengths.get(i, int(n)) for i, n in enumerate(counted)]


def read_episode_table(folder: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """``episode_index`` and these columns of the parquet files of ``meta/episodes`` (v3), those that there are."""
    rows = []
    for file in sorted((folder / "meta" / "episodes").rglob("*.parquet")):
        content = import_parquet().ParquetFile(file)
        known = [name for name in ("episode_index", *columns) if name in content.schema_arrow.names]
        rows += content.read(columns=known).to_pylist()
    return rows
