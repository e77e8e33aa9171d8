"""Rows of mapped safetensors files are those of the files; damage is refused; memory does not grow with the data."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks.scale.files import MEMORY
from genkit.core import Draw, Label, Spec, spec_to_dict
from genkit.data import Stream
from genkit.data.latents import MARKS, Latents
from genkit.data.mapped_shards import MappedShards, mapped_bytes
from tests.support.data import refuses


def write(folder, sizes, views=2, dtype=torch.float32, log_var=True, shape=(3, 2, 2)):
    """Shards of random moments with a label and a vector as conditions; the content of each."""
    g = torch.Generator().manual_seed(len(sizes))
    contents = []
    for k, n in enumerate(sizes):
        content = {"mean": torch.randn(n, views, *shape, generator=g).to(dtype),
                   "log_var": torch.randn(n, views, *shape, generator=g).to(dtype),
                   "cond.label": torch.randint(0, 9, (n,), generator=g),
                   "cond.v": torch.randn(n, 5, generator=g)}  # fmt: skip
        if not log_var:
            del content["log_var"]
        save_file(content, folder / f"{k}.safetensors")
        contents.append(content)
    return contents


def index(folder, num, shape=(3, 2, 2)):
    """The entry in latents.json, as ``genkit encode`` writes it, with true checksums."""
    from genkit.core import Vector
    from genkit.core.tensors import sha256

    names = [f"{k}.safetensors" for k in range(num)]
    spec = Spec(shape, {"label": Label(9), "v": Vector(5)})
    split = {"spec": spec_to_dict(spec), "shards": {n: sha256(folder / n) for n in names}, "statistics": {}}
    (folder / "latents.json").write_text(json.dumps({"stage": {}, "data": {}, "splits": {"train": split}}))
    return Latents(root=str(folder))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return folder, write(folder, [5, 1, 7])


@given(st.lists(st.integers(0, 12), max_size=30))
@settings(max_examples=30, deadline=None)
def test_gathered_rows_are_those_of_the_files(three, rows):
    folder, contents = three
    shards, rows = MappedShards([folder / f"{k}.safetensors" for k in range(3)]), torch.tensor(rows, dtype=torch.int64)
    assert len(shards) == 13
    for name in ("mean", "cond.label", "cond.v"):
        assert shards.gather(name, rows).equal(torch.cat([c[name] for c in contents])[rows])
    column = rows % 2
    assert shards.gather("mean", rows, column).equal(torch.cat([c["mean"] for c in contents])[rows, column])


@pytest.mark.parametrize("log_var", [True, False])
@pytest.mark.parametrize(("views", "dtype"), [(1, torch.float32), (2, torch.float32), (2, torch.bfloat16)])
def test_a_batch_is_the_chosen_view_of_all_moments_bit_for_bit(tmp_path, views, dtype, log_var):
    contents = write(tmp_path, [40, 3, 21], views, dtype, log_var)
    data = index(tmp_path, 3).load()
    rows = torch.tensor([63, 0, 41, 5, 5, 40, 39, 62])
    batch = data.batch(rows, Draw((7,), 0, 8))
    mean = torch.cat([c["mean"] for c in contents]).float()
    log = torch.cat([c["log_var"] for c in contents]).float() if log_var else torch.full_like(mean, -torch.inf)
    view = (Draw((7,), 0, 8).uniform() < 0.5).long() if views == 2 else torch.zeros(8).long()
    assert batch.x.equal(torch.cat([mean, log], 2)[rows, view])
    assert batch.x.dtype == torch.float32
    assert batch.cond["label"].equal(torch.cat([c["cond.label"] for c in contents])[rows])
    assert batch.cond["v"].equal(torch.cat([c["cond.v"] for c in contents])[rows])
    assert set(data.cond) == {"label"}, "other conditions stay in the files"


def test_reading_ahead_in_threads_changes_no_batch(tmp_path):
    write(tmp_path, [300, 301])
    data = index(tmp_path, 2).load()
    plain, ahead = Stream(data, 520, seed=5, workers=0), Stream(data, 520, seed=5, workers=2)
    assert ahead.ahead is not None
    for step in (0, 1, 2, 7):
        one, other = plain(step, 0, 3, 520), ahead(step, 0, 3, 520)
        assert one.x.equal(other.x)
        assert one.cond["v"].equal(other.cond["v"])


def test_a_checksum_is_computed_once_and_again_after_a_change(tmp_path, monkeypatch):
    write(tmp_path, [4, 4])
    source = index(tmp_path, 2)
    read = []
    from genkit.data import latents

    original = latents.sha256
    monkeypatch.setattr(latents, "sha256", lambda path: read.append(path.name) or original(path))
    source.load()
    assert sorted(read) == ["0.safetensors", "1.safetensors"]
    source.load()
    assert len(read) == 2
    path = tmp_path / "1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with refuses("1.safetensors", "is damaged"):
        source.load()
    with refuses("1.safetensors", "is damaged"):  # not forgotten
        source.load()
    (tmp_path / MARKS).write_text("[1]")  # a mark that means nothing
    with refuses("1.safetensors", "is damaged"):
        source.load()


def test_a_truncated_or_foreign_file_is_refused_in_one_line(tmp_path):
    write(tmp_path, [4, 4])
    (tmp_path / "1.safetensors").write_bytes((tmp_path / "1.safetensors").read_bytes()[:-4])
    with refuses("1.safetensors", "cannot be read as safetensors"):
        MappedShards([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    write(tmp_path, [4], views=1)
    save_file({"mean": torch.zeros(4, 1, 3, 2, 2)}, tmp_path / "1.safetensors")
    with refuses("1.safetensors", "holds other tensors than 0.safetensors"):
        MappedShards([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    save_file({"mean": torch.zeros(4, 1), "log_var": torch.zeros(3, 1)}, tmp_path / "1.safetensors")
    with refuses("equal numbers of rows"):
        MappedShards([tmp_path / "1.safetensors"])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_latents(tmp_path):
    """Two processes draw a whole epoch of 0.1 and of 1 GB: all memory but the shared pages is the same to 30 MB."""
    own = []
    for num in (2, 20):
        folder = tmp_path / str(num)
        folder.mkdir()
        write(folder, [800] * num, shape=(4, 32, 32))  # 52 MB each
        index(folder, num, (4, 32, 32))
        both = [subprocess.Popen([sys.executable, "-c", MEMORY, str(folder), str(rank)], stdout=subprocess.PIPE)
                for rank in range(2)]  # fmt: skip
        own.append(max(int(process.communicate()[0]) for process in both))
    assert own[1] - own[0] < 30e6, own


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc")
def test_pages_are_given_back_and_rows_stay_the_same(tmp_path, monkeypatch):
    contents = write(tmp_path, [1500, 1500], shape=(4, 16, 16))
    shards = MappedShards([tmp_path / f"{k}.safetensors" for k in range(2)])
    monkeypatch.setattr("genkit.data.mapped_shards.KEPT_BYTES", 4 << 20)
    rows = torch.randperm(3000)
    assert shards.gather("mean", rows).equal(torch.cat([c["mean"] for c in contents])[rows])
    assert mapped_bytes() - shards.resident < 4 << 20
    assert shards.gather("mean", rows).equal(torch.cat([c["mean"] for c in contents])[rows])
