"""Recordings with cameras and tasks: LeRobot's videos and columns of images, robomimic's HDF5."""

import io
import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.core import Draw, Frames, Text
from genkit.data.demonstrations.lerobot import LeRobot
from genkit.data.demonstrations.replay import Replay
from genkit.data.demonstrations.robomimic import Robomimic
from genkit.data.demonstrations.video import Clip, clip_frames, video_frames
from genkit.data.text import to_texts
from tests.data.test_recordings import LENGTHS, lerobot, recorded
from tests.support.refusals import refuses

FPS = 10
TOP, WRIST = "observation.images.top", "observation.images.wrist"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def level(episode, step):
    """The grey of a frame, which says where it is from."""
    return 20 + 60 * episode + 5 * step // 2


def make_video(path, levels, size=(48, 64), rate=FPS):
    """A video of plain frames with a white bar at the left."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = size[1], size[0], "yuv420p", 4_000_000
        stream.time_base = Fraction(1, rate)
        for grey in levels:
            image = np.full((*size, 3), grey, np.uint8)
            image[:, : size[1] // 4] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def lerobot_with_videos(folder, version):
    """Two cameras of different sizes and two tasks. In v3 one file holds all episodes, the second episode first."""
    pytest.importorskip("av")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    lerobot(folder, version)
    info = json.loads((folder / "meta/info.json").read_text())
    features = {
        **info["features"],
        TOP: {"dtype": "video"},
        WRIST: {"dtype": "video"},
        "task_index": {"dtype": "int64"},
    }
    tasks = [{"task_index": 0, "task": "push the T"}, {"task_index": 1, "task": "lift it"}]
    levels = [[level(e, t) for t in range(n)] for e, n in enumerate(LENGTHS)]
    sizes = {TOP: (48, 64), WRIST: (32, 32)}
    if version.startswith("v2"):
        pattern = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        for name, size in sizes.items():
            for e, of_episode in enumerate(levels):
                make_video(folder / pattern.format(episode_chunk=0, video_key=name, episode_index=e), of_episode, size)
        (folder / "meta/tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in reversed(tasks)))
    else:
        pattern = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        order = [1, 0, 2]
        starts = dict(zip(order, np.cumsum([0, *[LENGTHS[e] for e in order[:-1]]]) / FPS, strict=True))
        rows = []
        for e, n in enumerate(LENGTHS):
            row = {"episode_index": e, "length": n}
            for name in sizes:
                place = {"chunk_index": 0, "file_index": 7, "from_timestamp": float(starts[e])}
                row |= {f"videos/{name}/{k}": v for k, v in place.items()}
            rows.append(row)
        parquet.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
        for name, size in sizes.items():
            path = folder / pattern.format(video_key=name, chunk_index=0, file_index=7)
            make_video(path, [v for e in order for v in levels[e]], size)
        named = {"task_index": [t["task_index"] for t in tasks], "__index_level_0__": [t["task"] for t in tasks]}
        parquet.write_table(pa.table(named), folder / "meta/tasks.parquet")
    changed = {**info, "features": features, "video_path": pattern, "chunks_size": 1000}
    (folder / "meta/info.json").write_text(json.dumps(changed))
    return folder


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_each_step_has_the_frame_of_its_own_time(tmp_path, cache, version):
    """Two cameras in one size; and a second time from the cached file, without the videos."""
    root = lerobot_with_videos(tmp_path / "set", version)
    source = LeRobot(root=str(root), frames=(TOP, WRIST), image_size=(24, 32), obs_steps=1, pred_steps=4, act_steps=4)
    data = source.load()
    kind = data.spec.cond["frames"]
    assert kind == Frames((1, 6, 24, 32), cameras=(3, 3))
    frames = data.batch(torch.arange(len(data)), Draw((0,), 0, len(data))).cond["frames"][:, 0].float()
    steps = [(e, t) for e, n in enumerate(LENGTHS) for t in range(n)]
    expected = torch.tensor([float(level(e, t)) for e, t in steps])
    for camera in frames.split(3, 1):
        assert (camera[:, :, :, 16:].mean((1, 2, 3)) - expected).abs().max() < 2  # next frame: 2.5 away
        assert camera[:, :, :, :5].mean() > 240  # the bar is at the left
    written = {p: p.stat().st_mtime_ns for p in cache.rglob("*.npy")}
    assert len(written) == 2
    again = source.load().batch(torch.arange(len(data)), Draw((0,), 0, len(data))).cond["frames"]
    assert torch.equal(again[:, 0].float(), frames)
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.npy")} == written
    refuses(lambda: replace(source, image_size=None).load(), "32x32", "48x64", "--data.image-size")
    refuses(lambda: replace(source, frames=("observation.image.top",)).load(), "has no images", TOP)


def test_a_video_without_all_frames_is_refused_and_leaves_no_cache(tmp_path, cache):
    root = lerobot_with_videos(tmp_path / "set", "v2.1")
    video = root / f"videos/chunk-000/{WRIST}/episode_000002.mp4"
    make_video(video, [30] * (LENGTHS[2] - 2), (32, 32))
    source = LeRobot(root=str(root), frames=(WRIST,))
    refuses(source.load, "episode_000002.mp4", f"{LENGTHS[2] - 2} of {LENGTHS[2]} frames", f"number {LENGTHS[2] - 2}")
    video.write_bytes(video.read_bytes()[:200])
    refuses(source.load, "episode_000002.mp4: cannot be decoded")
    video.unlink()
    refuses(source.load, "is missing", "download the dataset with its videos")
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_videos_of_several_sizes_are_resized_only_if_a_size_is_asked_for(tmp_path, cache):
    folder = lerobot_with_videos(tmp_path / "set", "v2.1")
    other = folder / f"videos/chunk-000/{WRIST}/episode_000002.mp4"
    make_video(other, [level(2, step) for step in range(LENGTHS[2])], (64, 16))
    sized = LeRobot(root=str(folder), frames=(WRIST,), image_size=(16, 16))
    assert {episode.frames[0].shape[2:] for episode in sized.episodes("train")} == {(16, 16)}
    recorded_sizes = LeRobot(root=str(folder), frames=(WRIST,))
    refuses(lambda: recorded_sizes.episodes("train"), "episode_000002.mp4", "--data.image-size")


def test_a_frame_belongs_to_the_nearest_step_even_if_times_are_inexact(tmp_path):
    """Three clips in a file, whose recorded starts are too late or too early by a third of a step."""
    path = tmp_path / "v.mp4"
    make_video(path, [10 * i for i in range(10)])
    clips = [Clip(path, 0.03, 4, 100), Clip(path, 0.37, 3, 200), Clip(path, 0.73, 3, 300)]
    rows = dict(clip_frames(path, clips, FPS))
    assert list(rows) == [*range(100, 104), *range(200, 203), *range(300, 303)]
    assert all(abs(float(v[:, 40:].mean()) - 10 * i) < 3 for i, v in enumerate(rows.values()))


def test_of_a_video_with_twice_as_many_frames_each_step_has_that_of_its_own_time(tmp_path):
    make_video(tmp_path / "v.mp4", [10 * i for i in range(20)], rate=2 * FPS)
    rows = dict(clip_frames(tmp_path / "v.mp4", [Clip(tmp_path / "v.mp4", 0.0, 10, 0)], FPS))
    levels = [float(rows[i][:, 40:].mean()) for i in range(10)]
    assert levels == pytest.approx([20 * i for i in range(10)], abs=4)


def test_a_damaged_frame_is_not_filled_from_its_neighbours(tmp_path):
    """The decoder goes on over damaged bytes and gives all frames, some of them wrong."""
    make_video(tmp_path / "v.mp4", [8 * i for i in range(30)])
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    start = content.find(b"mdat") + 1000
    content[start : start + 30] = np.random.default_rng(0).bytes(30)
    (tmp_path / "v.mp4").write_bytes(content)
    refuses(lambda: list(video_frames(tmp_path / "v.mp4")), "v.mp4: cannot be decoded", "the frame at ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fps": 0}, ("fps is 0", "above 0")),
        ({"fps": None}, ("fps is None",)),
        ({"video_path": None}, ("no video_path",)),
        ({"video_path": "{nothing}.mp4"}, ("names no file",)),
        ({"video_path": "{}.mp4"}, ("names no file",)),
        ({"features": []}, ("info.json", "damaged")),
        ({"features": {TOP: "video"}}, ("info.json", "damaged")),
    ],
)
def test_damaged_facts_about_videos_are_refused(tmp_path, changes, words):
    root = lerobot(tmp_path / "set", "v2.1")
    info = json.loads((root / "meta/info.json").read_text())
    info |= {"fps": FPS, "video_path": "{episode_index}.mp4", "features": {**info["features"], TOP: {"dtype": "video"}}}
    (root / "meta/info.json").write_text(json.dumps(info | changes))
    refuses(LeRobot(root=str(root), frames=(TOP,)).load, *words)


def test_images_in_columns_of_lerobot_are_read_too(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    root = lerobot(tmp_path / "set", "v3.0")
    for file in (root / "data").rglob("*.parquet"):
        table = parquet.read_table(file)
        cells = []
        for e, t in zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist(), strict=True):
            content = io.BytesIO()
            Image.fromarray(np.full((6, 8, 3), level(e, t), np.uint8)).save(content, "png")
            cells.append({"bytes": content.getvalue(), "path": None})
        parquet.write_table(table.append_column(TOP, pa.array(cells)), file)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][TOP] = {"dtype": "image"}
    (root / "meta/info.json").write_text(json.dumps(info))
    episodes = LeRobot(root=str(root), frames=(TOP,)).episodes("train")
    for e, episode in enumerate(episodes):
        assert episode.frames is not None
        assert episode.frames[0].shape == (LENGTHS[e], 3, 6, 8)
        assert episode.frames[0][:, 0, 0, 0].tolist() == [level(e, t) for t in range(LENGTHS[e])]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_the_text_of_a_task_is_a_condition(tmp_path, version):
    source = LeRobot(root=str(lerobot_with_videos(tmp_path / "set", version)), conditions=("text",))
    data = source.load()
    assert data.spec.cond["text"] == Text(128, ("push the T", "lift it"))
    batch = data.batch(torch.arange(3), Draw((0,), 0, 3))
    data.spec.check(batch.cond, 3)
    assert to_texts(batch.cond["text"]) == ["push the T"] * 3
    refuses(lambda: replace(source, text_length=5).load(), "task 0", "10 bytes")
    refuses(lambda: Replay(root=truth_file(tmp_path), conditions=("text",)).load(), "no text", "--data.task")


def truth_file(folder):
    episodes = recorded()
    obs, action = np.concatenate([o[:-1] for o, _, _ in episodes]), np.concatenate([a for _, a, _ in episodes])
    np.savez(folder / "truth.npz", obs=obs, action=action, episode_ends=np.cumsum(LENGTHS))
    return str(folder / "truth.npz")


# ------------------------------------------------------------------------------------------------------ robomimic
def robomimic(path, episodes=None):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(5)
    with h5py.File(path, "w") as file:
        for i, (obs, actions, rewards) in enumerate(recorded() if episodes is None else episodes):
            n = len(actions)
            group = file.create_group(f"data/demo_{(2, 10, 9)[i]}")
            group["actions"], group["rewards"], group["obs/eef"], group["obs/rest"] = (
                actions,
                rewards,
                obs[:n, :1],
                obs[:n, 1:],
            )
            group["obs/agentview_image"] = rng.integers(0, 256, (n, 12, 10, 3), np.uint8)
            group["next_obs/eef"] = obs[1:, :1]
        file["mask/train"] = np.array([b"demo_9", b"demo_2"])
    return str(path)


def test_robomimic_gives_the_same_windows_as_a_replay_buffer(tmp_path):
    h5py = pytest.importorskip("h5py")
    order = [0, 2, 1]  # by the numbers in their names
    episodes = [recorded()[i] for i in (0, 1, 2)]
    root = robomimic(tmp_path / "low_dim.hdf5", episodes)
    np.savez(tmp_path / "t.npz", obs=np.concatenate([episodes[i][0][:-1] for i in order]),
             action=np.concatenate([episodes[i][1] for i in order]),
             reward=np.concatenate([episodes[i][2] for i in order]),
             episode_ends=np.cumsum([LENGTHS[i] for i in order]))  # fmt: skip
    source = Robomimic(root=root, observed=("eef", "rest"), conditions=("returns",))
    data, truth = source.load(), Replay(root=str(tmp_path / "t.npz"), reward="reward", conditions=("returns",)).load()
    assert torch.equal(data.x, truth.x)
    for name in ("obs", "returns"):
        assert torch.allclose(data.cond[name], truth.cond[name])
    seen = replace(source, conditions=(), frames=("agentview_image",), image_size=(6, 5), mask="train")
    some = seen.episodes("train")
    assert [len(e.actions) for e in some] == [LENGTHS[0], LENGTHS[2]]
    assert some[1].frames is not None
    assert some[1].frames[0].shape == (LENGTHS[2], 3, 6, 5)
    with h5py.File(root) as file:
        image = Image.fromarray(file["data/demo_9/obs/agentview_image"][3]).resize((5, 6))
        assert np.array_equal(some[1].frames[0][3].transpose(1, 2, 0), np.asarray(image))


def test_damaged_robomimic_files_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    root = robomimic(tmp_path / "d.hdf5")
    source = Robomimic(root=root, observed=("eef",))
    refuses(lambda: replace(source, observed=("eye",)).load(), "demo_2", "no array 'eye'", "eef")
    refuses(lambda: replace(source, mask="valid").load(), "mask: given 'valid'", "train")
    cut = [(o, a[:-1] if i == 1 else a, r) for i, (o, a, r) in enumerate(recorded())]
    short = replace(source, root=robomimic(tmp_path / "c.hdf5", cut), conditions=("returns",))
    refuses(short.load, "demo_10", "is cut off")
    with h5py.File(tmp_path / "c.hdf5", "a") as file:
        camera = file["data/demo_10/obs/agentview_image"]
        more = np.concatenate([camera[:], camera[:1]])
        del file["data/demo_10/obs/agentview_image"]
        file["data/demo_10/obs/agentview_image"] = more
        file["mask/none"] = np.zeros(0, "S8")
    seen = replace(short, frames=("agentview_image",), conditions=())
    refuses(seen.load, "demo_10", "of agentview_image", "cut off")
    refuses(replace(seen, mask="none").load, "no episodes", "none")
    (tmp_path / "no.hdf5").write_bytes(b"nothing")
    refuses(lambda: replace(source, root=str(tmp_path / "no.hdf5")).load(), "cannot be read as HDF5")
    half = (tmp_path / "d.hdf5").read_bytes()
    (tmp_path / "half.hdf5").write_bytes(half[: len(half) // 2])
    refuses(lambda: replace(source, root=str(tmp_path / "half.hdf5")).load(), "half.hdf5")
