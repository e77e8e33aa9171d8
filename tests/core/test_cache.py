"""genkit cache lists every file of the cache, and removes what was asked for and nothing else."""

import os
import re
import time
from pathlib import Path

import pytest

from genkit.cli.main import main
from genkit.core.cache import KINDS, NETWORKS, cached_files, clear_cache, list_cache

HOUR = 3600.0
SIZES = {"frames/a.npy": 3000, "frames/b.npy": 500, "text/e/1.safetensors": 70, "statistics/mine.npz": 11,
         "future/x": 5, "weights.pt": 2, "reference/.r.npz-1.part": 1}  # fmt: skip


def set_age(path, hours):
    moment = time.time() - hours * HOUR
    os.utime(path, (moment, moment))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    for name, size in SIZES.items():
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
        set_age(path, 10 if name == "frames/a.npy" else 1)
    return tmp_path / "cache"


def present(cache):
    return {name for name in SIZES if (cache / name).exists()}


def test_every_file_is_listed_once_with_size_and_age(cache):
    found = {files.kind: files for files in list_cache()}
    assert next(iter(found)) == "frames"  # the largest first
    assert sum(f.size for f in found.values()) == sum(SIZES.values())
    assert (found["frames"].files, found["frames"].size) == (2, 3500)
    assert found[NETWORKS].files == found["future"].files == 1
    assert time.time() - found["frames"].used == pytest.approx(HOUR, abs=60)  # of the one used last


@pytest.mark.parametrize(("kinds", "removed"), [
    (["frames"], {"frames/a.npy", "frames/b.npy"}),
    (["text", NETWORKS], {"text/e/1.safetensors", "weights.pt"}),
    (["future"], {"future/x"}),  # a kind of a later version
    (["statistics"], {"statistics/mine.npz"}),
    (["all"], SIZES.keys() - {"statistics/mine.npz"}),
    (["all", "statistics", "frames"], SIZES.keys()),
])  # fmt: skip
def test_what_is_named_goes_and_all_keeps_statistics(cache, kinds, removed):
    cleared = clear_cache(kinds)
    assert present(cache) == SIZES.keys() - removed
    assert (cleared.files, cleared.kept) == (len(removed), 0)
    assert cleared.size == sum(SIZES[name] for name in removed)


def test_files_in_use_and_younger_ones_stay(cache):
    assert clear_cache(["frames"], unused=5 * HOUR).kept == 1
    assert present(cache) == SIZES.keys() - {"frames/a.npy"}
    os.utime(cache / "frames/b.npy")  # written just now
    assert clear_cache(["frames"]).files == 0
    os.utime(cache / "text/e/1.safetensors", (time.time(), time.time() - 9 * HOUR))  # read just now
    assert clear_cache(["text"], unused=HOUR / 2).kept == 1
    assert clear_cache(["text"]).files == 1


def test_a_run_from_the_hub_goes_or_stays_as_a_whole(cache):
    copies = [cache / f"hub/me--digits/{commit}" for commit in ("a1", "b2")]
    for copy in copies:
        (copy / "checkpoints").mkdir(parents=True)
        for name in ("config.yaml", "checkpoints/nets.safetensors"):
            (copy / name).write_bytes(b"xx")
            set_age(copy / name, 50)
    os.utime(copies[0] / "config.yaml", (time.time(), time.time() - 50 * HOUR))  # read just now
    cleared = clear_cache(["hub"], unused=HOUR)
    assert (cleared.files, cleared.size, cleared.kept) == (2, 4, 2)
    assert len(list(copies[0].rglob("*"))) == 3
    assert [p.name for p in copies[0].parent.iterdir()] == ["a1"]


def test_links_and_what_they_point_to_stay(cache, tmp_path):
    (tmp_path / "mine").write_bytes(b"precious")
    set_age(tmp_path / "mine", 50)
    (cache / "hub").mkdir()
    (cache / "hub/link").symlink_to(tmp_path / "mine")
    assert clear_cache(["hub"]).files == 0
    assert (tmp_path / "mine").read_bytes() == b"precious"


def test_files_that_another_process_removes_meanwhile_are_left_out(cache):
    files = cached_files("frames")
    first, _ = next(files)
    for path in (cache / "frames").iterdir():
        path.unlink()
    assert first.name in ("a.npy", "b.npy")
    assert list(files) == []


def test_commands(cache, capsys):
    assert main(["cache"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("frames", "3.5 kB", KINDS["frames"], str(cache), "future"))
    assert main(["cache", "--clear", "frames", "--unused", "5h"]) == 0
    assert "removed 1 files, 3 kB; 1 that were used since then" in capsys.readouterr().out
    assert main(["cache", "--clear", "pictures"]) == 2
    assert "clear: given pictures; allowed: all, frames, text" in capsys.readouterr().err
    assert main(["cache", "--unused", "3d"]) == 2
    assert "unused: given without --clear" in capsys.readouterr().err
    assert len(present(cache)) == len(SIZES) - 1


def test_the_guide_has_every_kind():
    page = (Path(__file__).parents[2] / "docs/guide/disk.md").read_text()
    assert re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE) == list(KINDS)


def test_no_cache_is_an_empty_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "none"))
    assert list_cache() == []
    assert clear_cache(["all"]).files == 0
    assert main(["cache"]) == 0
    assert "0 B in" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
