"""Files appear whole or not at all."""

import os
from pathlib import Path

import pytest

from genkit.core.files import atomic_write


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
