"""genkit bench recordings: every format holds the same episodes, and memory and speed are those of reading them."""

import json
import mmap
import time

import numpy as np
import pytest

from benchmarks import recordings
from genkit.cli.main import main

SIZE = 40_000_000
PACKAGES = {"av1": ["av", "pyarrow"], "h264": ["av", "pyarrow"], "npz": [], "zarr": ["zarr"]}


@pytest.mark.parametrize("name", recordings.FORMATS)
def test_every_format_holds_the_drawn_episodes(name, tmp_path):
    for package in PACKAGES[name]:
        pytest.importorskip(package)
    (tmp_path / "recording").mkdir()
    with recordings.cache_in(tmp_path / "cache"):
        source = recordings.FORMATS[name](tmp_path / "recording", 2, 12, 1)
        read = source.episodes("train")
    for episode, drawn in zip(read, recordings.draw_episodes(2, 12, 1), strict=True):
        assert np.array_equal(episode.obs, drawn["obs"])
        assert episode.frames is not None
        for frames, camera in zip(episode.frames, recordings.CAMERAS, strict=True):
            wrong = np.abs(frames.transpose(0, 2, 3, 1).astype(int) - drawn[camera]).mean((1, 2, 3))
            assert wrong.max() <= (8 if name in recordings.CODECS else 0)  # lossy; another episode: 60 and more


def test_the_peak_is_the_most_above_the_beginning():
    values, seen = iter([5, 7, 11, 6, *[6] * 10_000]), []
    with recordings.peak_of(lambda: seen.append(next(values)) or seen[-1], every=0.001) as peak:
        while len(seen) < 5:
            time.sleep(0.001)
    assert peak == [6]
    before = recordings.anonymous_bytes()
    if before:  # Linux
        # pages of its own: a tensor may take memory that the process holds already
        with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            for place in range(0, SIZE, mmap.PAGESIZE):
                held[place] = 1
            assert 0.9 < (recordings.anonymous_bytes() - before) / SIZE < 1.5


def test_images_are_counted_in_both_passes(tmp_path, monkeypatch, capsys):
    """A clock that counts its own calls: each pass takes one unit of time."""
    out, calls = tmp_path / "a.json", iter(range(100))
    (tmp_path / "recording").mkdir()
    with recordings.cache_in(tmp_path / "cache"):
        windows = len(recordings.FORMATS["npz"](tmp_path / "recording", 2, 10, 0).load())
    monkeypatch.setattr(recordings.time, "process_time", lambda: next(calls))
    quick = ["bench", "recordings", "--episodes", "2", "--steps", "10", "--seeds", "1", "--out", str(out)]
    assert main([*quick, "--only", "npz"]) == 0
    cell = json.loads(out.read_text())["cells"]["npz"]
    assert (cell["first"], cell["later"]) == ([2 * 10 * 2], [windows * 2 * 2])
    assert "npz" in capsys.readouterr().out
