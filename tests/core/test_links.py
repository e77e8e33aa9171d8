"""The link `latest`, with symbolic links and on file systems that have none."""

import os
from pathlib import Path

import pytest

from genkit.config.paths import expand_path
from genkit.core.links import follow_links, read_link, set_link


def without_symbolic_links(monkeypatch):
    """What exFAT, some network drives and Windows do."""

    def refuse(*args, **options):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)


@pytest.fixture(params=[True, False], ids=["links", "no-links"])
def links(request, monkeypatch):
    if not request.param:
        without_symbolic_links(monkeypatch)
    return request.param


def test_a_link_leads_to_its_newest_target(tmp_path, links, monkeypatch):
    for name in ("0000-a", "0001-b"):
        (tmp_path / name / "checkpoints" / "step-1").mkdir(parents=True)
        set_link(tmp_path / name / "latest", "checkpoints/step-1")
        set_link(tmp_path / "latest", name)
    assert (tmp_path / "latest").is_symlink() is links
    assert (follow_links(tmp_path / "latest")).samefile(tmp_path / "0001-b")
    end = follow_links(tmp_path / "latest" / "latest" / "nets.safetensors")
    assert end.parent.samefile(tmp_path / "0001-b" / "checkpoints" / "step-1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000-a", "0001-b", "latest"]
    # a setting that is a path is read in the same manner, also from the working directory
    monkeypatch.chdir(tmp_path)
    assert Path(expand_path("latest/latest")).samefile(end.parent)
    assert expand_path("./0000-a/") == "./0000-a/"


def test_a_file_becomes_a_link_where_links_are_possible_again_and_back(tmp_path, monkeypatch):
    (tmp_path / "0000-a").mkdir()
    set_link(tmp_path / "latest", "0000-a")
    with monkeypatch.context() as patch:
        without_symbolic_links(patch)
        set_link(tmp_path / "latest", "0000-a")
        assert read_link(tmp_path / "latest") == "0000-a"
    set_link(tmp_path / "latest", "0000-a")
    assert os.readlink(tmp_path / "latest") == "0000-a"


def users_file(path):
    path.write_text("global_step100")


def users_directory(path):
    path.mkdir()


def link_to_a_users_file(path):
    (path.parent / "notes.txt").write_text("mine")
    path.symlink_to("notes.txt")


def link_elsewhere(path):
    path.symlink_to(path.parent.parent)


@pytest.mark.parametrize("make", [users_file, users_directory, link_to_a_users_file, link_elsewhere])
def test_what_the_user_calls_latest_stays(tmp_path, make):
    folder = tmp_path / "runs"
    folder.mkdir()
    make(folder / "latest")
    before = os.readlink(folder / "latest") if (folder / "latest").is_symlink() else None
    with pytest.raises(ValueError, match="is in the way"):
        set_link(folder / "latest", "0000-a")
    assert (os.readlink(folder / "latest") if before else None) == before
    assert follow_links(folder / "latest") == folder / "latest"


def test_a_link_without_its_target_is_replaced(tmp_path, links):
    set_link(tmp_path / "latest", "0000-gone")
    set_link(tmp_path / "latest", "0001-b")
    assert follow_links(tmp_path / "latest").resolve() == (tmp_path / "0001-b").resolve()
