"""How fast the images of recordings are read, in the first pass and later, and how much memory that takes.

    genkit bench recordings [--episodes 10] [--steps 200] [--out FILE.json]

Each format holds the same episodes of two cameras: videos as LeRobot writes them (AV1 or H.264, a key frame in every
second frame, quality 30), or arrays. The first pass reads or decodes all of them into the cache; later passes read all
windows of two observed steps in random order, in batches. Images of 96x96 per CPU second of the whole process, so of
one core; the memory is what the first pass adds to the process beyond files that are mapped (Linux).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.results import ResultsFile, check_ranges, make_console, make_table
from genkit.cli.scripts import ScriptParser
from genkit.core import Draw
from genkit.core.arrays import save_npz
from genkit.data.demonstrations.lerobot import LeRobot
from genkit.data.demonstrations.replay import Recorded, Replay
from genkit.data.demonstrations.video import import_av

CAMERAS = ("top", "wrist")
SIDE, FPS, BATCH = 96, 30, 64
CODECS = {"av1": "libsvtav1", "h264": "libx264"}


# ------------------------------------------------------------------------------------------------ the recordings
def draw_episode(rng: np.random.Generator, steps: int) -> np.ndarray:
    """A noisy picture, uint8 ``[steps, SIDE, SIDE, 3]``, of three squares that move before a smooth background."""
    coarse = torch.from_numpy(rng.uniform(40, 220, (1, 3, 5, 5)))
    background = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic")[0].numpy().transpose(1, 2, 0)
    images = background + rng.normal(0, 3, (steps, SIDE, SIDE, 1))
    for _ in range(3):
        color, size = rng.uniform(0, 255, 3), int(rng.integers(8, 24))
        phase, speed = rng.uniform(0, 6, 2), rng.uniform(0.01, 0.08, 2)
        places = ((1 + np.sin(phase + speed * np.arange(steps)[:, None])) / 2 * (SIDE - size)).astype(int)
        for image, (x, y) in zip(images, places, strict=True):
            image[y : y + size, x : x + size] = color
    return images.clip(0, 255).astype(np.uint8)


def draw_episodes(episodes: int, steps: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each episode: numbers, and the images of each camera."""
    rng = np.random.default_rng(seed)
    for _ in range(episodes):
        obs = rng.normal(size=(steps, 4)).astype(np.float32)
        yield {"obs": obs, "action": obs[:, :2], **{camera: draw_episode(rng, steps) for camera in CAMERAS}}


def write_npz(folder: Path, episodes: int, steps: int, seed: int) -> Recorded:
    """The episodes as an .npz."""
    parts = list(draw_episodes(episodes, steps, seed))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    ends = np.arange(1, episodes + 1) * steps
    return Replay(root=str(save_npz(folder / "a.npz", {**arrays, "episode_ends": ends})), frames=CAMERAS)


def write_zarr(folder: Path, episodes: int, steps: int, seed: int) -> Recorded:
    """The episodes as a compressed zarr, in chunks of 100 steps."""
    import zarr  # lazy: optional

    source = write_npz(folder, episodes, steps, seed)
    group = zarr.open_group(str(folder / "a.zarr"), mode="w")
    with np.load(source.root) as stored:
        for name in stored.files:
            place = f"meta/{name}" if name == "episode_ends" else f"data/{name}"
            values = stored[name]
            group.create_array(place, data=values, chunks=(min(100, len(values)), *values.shape[1:]))
    return Replay(root=str(folder / "a.zarr"), frames=CAMERAS)


def write_videos(codec: str) -> Callable[[Path, int, int, int], Recorded]:
    """A function that writes the episodes as a dataset of LeRobot (v2.1), a video for each camera and episode."""

    def write(folder: Path, episodes: int, steps: int, seed: int) -> Recorded:
        import pyarrow as pa  # lazy: optional
        from pyarrow import parquet

        pattern = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        (folder / "meta").mkdir()
        (folder / "data").mkdir()
        for i, arrays in enumerate(draw_episodes(episodes, steps, seed)):
            columns = {"obs": list(arrays["obs"]), "action": list(arrays["action"]), "frame_index": np.arange(steps)}
            columns |= {"episode_index": np.full(steps, i), "task_index": np.zeros(steps, np.int64)}
            parquet.write_table(pa.table(columns), folder / f"data/episode_{i:06d}.parquet")
            for camera in CAMERAS:
                file = folder / pattern.format(episode_chunk=0, video_key=camera, episode_index=i)
                write_video(file, arrays[camera], codec)
        lengths = [json.dumps({"episode_index": i, "length": steps}) for i in range(episodes)]
        (folder / "meta/episodes.jsonl").write_text("\n".join(lengths))
        numbers = {name: {"dtype": "float32"} for name in ("obs", "action")}
        info = {"codebase_version": "v2.1", "fps": FPS, "video_path": pattern, "total_episodes": episodes,
                "features": numbers | {camera: {"dtype": "video"} for camera in CAMERAS}}  # fmt: skip
        (folder / "meta/info.json").write_text(json.dumps(info))
        return LeRobot(root=str(folder), observed=("obs",), frames=CAMERAS)

    return write


def write_video(path: Path, images: np.ndarray, codec: str) -> None:
    """A video of images ``[N, H, W, 3]``."""
    os.environ.setdefault("SVT_LOG", "0")  # or the encoder prints its settings
    av = import_av()
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"g": "2", "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = images.shape[2], images.shape[1], "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


FORMATS: Mapping[str, Callable[[Path, int, int, int], Recorded]] = {
    **{name: write_videos(codec) for name, codec in CODECS.items()},
    "npz": write_npz,
    "zarr": write_zarr,
}


# ------------------------------------------------------------------------------------------------ the measurement
def anonymous_bytes() -> int:
    """The memory of this process that belongs to no file; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


@contextmanager
def peak_of(measure: Callable[[], int], every: float = 0.02) -> Iterator[list[int]]:
    """A list whose only number is the largest that ``measure`` returns in this block, looked at every so many
    seconds, above that at its beginning."""
    first, done = measure(), threading.Event()
    peak = [0]

    def watch() -> None:
        while not done.wait(every):
            peak[0] = max(peak[0], measure() - first)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """genkit's cache is in ``folder``, and no line says which files it gets."""
    before, logger = os.environ.get("GENKIT_CACHE"), logging.getLogger("genkit")
    level = logger.level
    os.environ["GENKIT_CACHE"] = str(folder)
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        os.environ.pop("GENKIT_CACHE")
        if before is not None:
            os.environ["GENKIT_CACHE"] = before


def measure_format(name: str, episodes: int, steps: int, seed: int) -> dict[str, float]:
    """Images per CPU second in the first pass and in the next, and the bytes that the first adds at most."""
    with tempfile.TemporaryDirectory() as place, cache_in(Path(place) / "cache"):
        folder = Path(place) / "recording"
        folder.mkdir()
        source = FORMATS[name](folder, episodes, steps, seed)
        began = time.process_time()
        with peak_of(anonymous_bytes) as peak:
            source.load()
        first = episodes * steps * len(CAMERAS) / (time.process_time() - began)
        began, num = time.process_time(), 0
        data = source.load()
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        for i, rows in enumerate(order.split(BATCH)):
            frames = data.batch(rows, Draw((seed,), i * BATCH, len(rows))).cond["frames"]
            num += frames.shape[0] * frames.shape[1] * len(CAMERAS)
        later = num / (time.process_time() - began)
    return {"first": first, "later": later, "bytes": float(peak[0])}


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code."""
    parser = ScriptParser(__doc__, "genkit bench recordings")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="of each episode")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=[], metavar="NAME", help=", ".join(FORMATS))
    parser.add_argument("--out", type=Path, help="results, to which a second call adds")
    args: argparse.Namespace = parser.parse_args(argv)
    check_ranges(args, episodes=10**4, steps=10**5, seeds=100)
    torch.set_num_threads(1)
    settings = {"episodes": args.episodes, "steps": args.steps, "seeds": args.seeds, "side": SIDE}
    results = ResultsFile(args.out, settings, ["recordings", *argv])
    table = make_table("format", "images per CPU s, first pass", "later passes", "memory that the first adds, MB")
    for name in args.only or FORMATS:
        if name not in results:
            runs = [measure_format(name, args.episodes, args.steps, seed) for seed in range(args.seeds)]
            results.add(name, {key: [round(run[key]) for run in runs] for key in runs[0]})
        cell = results.cells[name]
        peak = f"{max(cell['bytes']) / 1e6:.0f}"
        table.add_row(name, *[f"{min(v):,} to {max(v):,}" for v in (cell["first"], cell["later"])], peak)
    make_console().print(table)
    if args.out:
        print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
