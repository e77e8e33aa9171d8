"""Files appear whole or not at all."""

import os
from pathlib import Path

import pytest

from genkit.core.files import atomic_write, sweep


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.json"
    with atomic_write(path) as part:
        part.write_text("new")
        assert not path.exists()
        assert part.parent == path.parent  # of one file system: renaming is all or nothing
        assert str(os.getpid()) in part.name
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_what_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("ha")
        raise RuntimeError

    with pytest.raises(RuntimeError), atomic_write(path) as part:
        fail(part)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt), atomic_write(path):
        raise KeyboardInterrupt
    assert path.read_text() == "old"


def test_two_processes_of_one_number_do_not_share_a_temporary_file(tmp_path):
    """As in containers that share a disk; here two calls of one process."""
    path = tmp_path / "a.npy"
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:
            second.write_text("second, longer")
        assert path.read_text() == "second, longer"
        assert first.read_text() == "first"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_are_swept_by_several_processes_at_once(tmp_path, monkeypatch):
    gone = [tmp_path / f".a-{2**22 + 1}{token}.part" for token in ("", "-0123abcd")]  # no process has this number
    for path in gone:
        path.touch()
    mine = tmp_path / f".b-{os.getpid()}-0123abcd.part"
    mine.touch()
    unlink = Path.unlink

    def unlink_twice(path, missing_ok=False):  # another process was faster
        unlink(path)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_twice)
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]
