"""Images in tars, parquet and arrow files: rows by index, classes, captions, splits, local shuffling, and refusals."""

import gzip
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from genkit.cli import main as cli
from genkit.core import seed_of
from genkit.data import DATA, OnDisk, Stream, find_source
from genkit.data.parquet_files import GroupCache
from genkit.data.shard_paths import expand_ranges
from genkit.data.stream import shuffle_locally
from genkit.data.tar_files import PackedTexts, TarShards
from tests.support import sources as contract
from tests.support.data import chw, everything, picture, refuses


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_tar(path, members, end=True):
    """A tar of ``(name, content)``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    if not end:
        content = path.read_bytes().rstrip(b"\0")
        path.write_bytes(content + bytes(-len(content) % 512))
    return path


def sample(i, label=True):
    return [(f"{i:04d}.png", png(picture(i))), *([(f"{i:04d}.cls", b"%d" % (i % 3))] if label else [])]


def shards(folder, num=5, per_shard=6, stem="train"):
    for k in range(num):
        members = [m for i in range(k * per_shard, (k + 1) * per_shard) for m in sample(i)]
        write_tar(folder / f"{stem}-{k:03d}.tar", members)
    return num * per_shard


def webdataset(root, **settings):
    return DATA["webdataset"](root=str(root), **{"held_out": 0.0, "memory": 0, **settings})


# ------------------------------------------------------------------------------------------------------------- tars
def test_rows_of_tars_are_the_pictures_in_order(tmp_path):
    n = shards(tmp_path)
    data = webdataset(tmp_path / "train-{000..004}.tar").load()
    assert isinstance(data, OnDisk)
    batch = everything(data)
    assert batch.x.equal(torch.stack([chw(picture(i)) for i in range(n)]))
    assert batch.cond["label"].equal(torch.arange(n) % 3)
    rows = torch.tensor([29, 3, 3, 17])
    assert data.batch(rows, None).x.equal(batch.x[rows])
    assert everything(webdataset(tmp_path, memory=1).load()).x.equal(batch.x)  # a folder, in memory
    assert find_source(f"{tmp_path}/train-{{000..004}}.tar")[0] == "webdataset"


def test_the_contract_of_a_source(tmp_path):
    shards(tmp_path)
    shards(tmp_path, 1, stem="val")
    contract.check_all(webdataset(tmp_path))
    contract.check_all(webdataset(tmp_path / "train-*.tar", held_out=0.3))


def test_classes_and_captions_from_json_and_txt(tmp_path):
    labels = ["cat", "dog", "ant", "dog"]
    members = []
    for i, label in enumerate(labels):
        members.append((f"a.b/{i}.jpg.png", png(picture(i))))
        members.append((f"a.b/{i}.json", json.dumps({"label": label, "caption": f"a  {label}"}).encode()))
        members += [(f"a.b/{i}.txt", b"another")] if i == 3 else []
        members += [(f"a.b/._{i}.png", b"macOS"), (f".hidden/{i}.png", b"no")]
    write_tar(tmp_path / "a.tar", members)
    data = webdataset(tmp_path / "a.tar").load()
    assert data.spec.cond["label"].names == ("ant", "cat", "dog")
    assert data.cond["label"].tolist() == [1, 2, 0, 2]
    texts = [c.text for c in TarShards([tmp_path / "a.tar"]).captions()]
    assert texts == ["a cat", "a dog", "a ant", "another"]
    data = webdataset(tmp_path / "a.tar", captions=("files",)).load()
    assert set(data.spec.cond) == {"text"}
    write_tar(tmp_path / "test.tar", [("0.png", png(picture(0))), ("0.cls", b"fox")])
    with refuses("class fox"):
        DATA["webdataset"](root=str(tmp_path), held_out=0.0).load("test")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_the_classes_of_a_test_split_are_names_if_those_of_the_training_split_are(tmp_path, kind):
    """A test split may have only such names that are numbers."""

    def write(split, names):
        if kind == "tar":
            members = [
                m for i, c in enumerate(names) for m in ((f"{i}.png", png(picture(i))), (f"{i}.cls", c.encode()))
            ]
            return write_tar(tmp_path / f"{split}.tar", members)
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pa.table({"image": [png(picture(i)) for i in range(len(names))], "label": list(names)})
        return pq.write_table(table, tmp_path / f"{split}.parquet")

    write("train", ["7", "12", "x"])
    write("test", ["12", "7", "7"])
    source = DATA["webdataset" if kind == "tar" else "parquet"](root=str(tmp_path), held_out=0.0)
    assert source.load().spec.cond["label"].names == source.load("test").spec.cond["label"].names == ("7", "12", "x")
    assert source.load("test").cond["label"].tolist() == [1, 0, 0]
    write("test", ["0", "7"])
    with refuses("class 0"):
        source.load("test")


def test_the_split_of_a_file_is_the_first_word_of_its_name(tmp_path, caplog):
    for i, name in enumerate(["valley", "testimonials", "trained"]):
        write_tar(tmp_path / f"{name}-0.tar", sample(i))
    assert len(webdataset(tmp_path).load()) == 3
    write_tar(tmp_path / "train-0.tar", sample(7))
    write_tar(tmp_path / "valid2.tar", sample(4))
    assert len(webdataset(tmp_path).load()) == len(webdataset(tmp_path).load("test")) == 1
    assert "3 files are of no split by their names, and were left out: testimonials-0.tar, ..." in caplog.text


def test_a_class_below_0_is_refused(tmp_path):
    """Hugging Face marks samples without a class by -1, which would be the first of three names."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [png(picture(i)) for i in range(3)]
    pq.write_table(pa.table({"image": images, "label": [0, -1, 1]}), tmp_path / "a.parquet")
    with refuses("a.parquet/1: has the class -1"):
        parquet(tmp_path).load()
    assert len(parquet(tmp_path, labels=False).load()) == 3


def test_captions_that_are_left_out_are_counted(tmp_path, caplog):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [png(picture(i)) for i in range(2)], "caption": [["a", "b"], ["c"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert len(parquet(tmp_path, captions=("files",)).load()) == 2
    assert "1 of 2 rows have several captions in caption; only the first of each is read" in caplog.text


@given(st.lists(st.text(max_size=6), max_size=20))
@settings(max_examples=40, deadline=None, suppress_health_check=[])
def test_packed_texts_are_the_texts(texts):
    pack = PackedTexts.pack(texts)
    assert list(pack) == texts
    assert pack[1:] == texts[1:]
    both = PackedTexts.join([pack, PackedTexts.pack(["é", ""]), pack])
    assert list(both) == [*texts, "é", "", *texts]


def test_the_index_is_made_once_and_again_after_a_change(tmp_path, cache, monkeypatch):
    from genkit.data import tar_files

    shards(tmp_path, 2)
    built = []
    original = tar_files.build_index
    monkeypatch.setattr(tar_files, "build_index", lambda path: built.append(path.name) or original(path))
    webdataset(tmp_path).load()
    webdataset(tmp_path).load()
    assert sorted(built) == ["train-000.tar", "train-001.tar"]
    write_tar(tmp_path / "train-001.tar", [*sample(7), *sample(8), *sample(9)])
    assert len(webdataset(tmp_path).load()) == 9
    assert built[2:] == ["train-001.tar"]
    for file in cache.rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:50])  # a damaged index is made again
    assert len(webdataset(tmp_path).load()) == 9
    assert not list(tmp_path.glob("*.npz"))


BAD_TARS = {
    "cut off in a member": (lambda p: p.write_bytes(p.read_bytes()[:700]), "unexpected end of data"),
    "cut off in the last member": (lambda p: p.write_bytes(p.read_bytes()[:3584]), "0003.cls: the file is cut off"),
    "cut off between members": (lambda p: write_tar(p, sample(1), end=False), "does not end as a tar does"),
    "two in one": (lambda p: p.write_bytes(p.read_bytes() * 2), "does not end as a tar does"),
    "compressed": (lambda p: p.write_bytes(gzip.compress(p.read_bytes())), "as an uncompressed tar"),
    "empty": (lambda p: p.write_bytes(b""), "as an uncompressed tar"),
    "no samples": (lambda p: write_tar(p, []), "holds no samples"),
    "no image": (lambda p: write_tar(p, [("1.cls", b"0")]), "1: needs one image; holds none of cls"),
    "two images": (lambda p: write_tar(p, [("1.png", b""), ("1.jpg", b"")]), "needs one image; holds png, jpg"),
    "a pickle": (lambda p: write_tar(p, [*sample(1), ("1.pyd", b"")]), "1.pyd: is a pickle"),
    "a nested pickle": (lambda p: write_tar(p, [*sample(1), ("1.latent.PTH", b"")]), "is a pickle"),
    "a member twice": (lambda p: write_tar(p, [*sample(1, False), *sample(1, False)]), "0001.png: comes twice"),
    "a sample twice": (lambda p: write_tar(p, [*sample(1), *sample(2), *sample(1)]), "a sample of this name came"),
    "no class": (lambda p: write_tar(p, [*sample(1), *sample(2, False)]), "0002.png: has no class"),
    "no JSON": (lambda p: write_tar(p, [("1.png", b""), ("1.json", b"{")]), "1.json: is no JSON object"),
    "a list as class": (lambda p: write_tar(p, [("1.png", b""), ("1.json", b'{"cls": [1]}')]), "needs a whole number"),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_a_bad_tar_is_refused_in_one_line(tmp_path, name):
    damage, message = BAD_TARS[name]
    path = write_tar(tmp_path / "a.tar", [*sample(0), *sample(3)])
    damage(path)
    with refuses(path, message):
        webdataset(path).load()


def test_a_link_in_a_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with refuses("1.png", "is a link"):
        webdataset(tmp_path / "a.tar").load()


def test_a_tar_that_is_cut_off_later_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*sample(0), *sample(3)])
    data = webdataset(path).load()
    path.write_bytes(path.read_bytes()[:600])
    with refuses("a.tar/0003.png", "is cut off"):
        data.read([1])


BAD_ROOTS = {
    "{tmp}/train-{{000..007}}.tar": "train-005.tar: there is no such file",
    "{tmp}/train-{{7..3}}.tar": "goes from a number A up to B",
    "{tmp}/x-*.tar": "matches no .tar files",
    "https://a.b/train.tar": "download them",
    "pipe:cat a.tar": "download them",
    "hf://user/name/data": "hf://datasets/OWNER/NAME[@REVISION][/FILES]",
    "hf://datasets/user/nobody": "cannot be reached for user/nobody",
    "{tmp}/a.txt": "is no .tar file",
}


@pytest.mark.parametrize("root", BAD_ROOTS)
def test_what_names_no_shards_is_refused_in_one_line(tmp_path, root):
    shards(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with refuses(BAD_ROOTS[root]):
        webdataset(root.format(tmp=tmp_path)).load()


def test_ranges():
    assert expand_ranges("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_ranges("{0..1}{0..1}") == ["00", "01", "10", "11"]


# -------------------------------------------------------------------------------------------------------- shuffling
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_local_shuffling_takes_every_row_once_and_window_shards_at_a_time(sizes, window, seed):
    starts = torch.tensor([0, *np.cumsum(sizes)])
    order = shuffle_locally(starts, window, torch.Generator().manual_seed(seed))
    assert sorted(order.tolist()) == list(range(int(starts[-1])))
    shard = torch.searchsorted(starts, order, right=True) - 1
    changes = {int(s): [i for i, other in enumerate(shard) if other == s] for s in shard.unique()}
    for rows in changes.values():  # between the first and the last row of a shard lie at most `window` shards
        assert len(shard[rows[0] : rows[-1] + 1].unique()) <= window
    assert order.equal(shuffle_locally(starts, window, torch.Generator().manual_seed(seed)))


def test_an_epoch_of_shards_mixes_and_depends_on_seed_and_epoch_only(tmp_path):
    n = shards(tmp_path, 5, 6)
    data = webdataset(tmp_path, window=2, held_out=0.2).load()
    stream = Stream(data, 4, seed=3, workers=0)
    n = len(data)
    epochs = [stream.order(0, epoch) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(n)) for order in epochs)
    assert not epochs[0].equal(epochs[1])
    assert not epochs[0].equal(Stream(data, 4, seed=4, workers=0).order(0, 0))
    file = [data.files.location(int(i)).split("/")[-2] for i in epochs[0]]
    assert 1 < len(set(file[: n // 5])) <= 2
    resumed, halves = Stream(data, 4, seed=3, workers=2), Stream(data, 4, seed=3, workers=0)
    for step in (5, 6, 9):
        whole = stream(step, 0, 0, 4)
        assert resumed(step, 0, 0, 4).x.equal(whole.x)
        assert torch.cat([halves(step, 0, 0, 2).x, halves(step, 0, 2, 4).x]).equal(whole.x)
    assert len(webdataset(tmp_path, window=None).load().shard_starts) == 6
    far = Stream(webdataset(tmp_path, window=None).load(), 4, seed=3, workers=0).order(0, 0)
    assert far.equal(torch.randperm(30, generator=torch.Generator().manual_seed(seed_of(3, 0, 0))))


# ------------------------------------------------------------------------------------------------ parquet and arrow
def write_tables(folder, kind, num=3, per_file=7, column="image", struct=True, names=("a", "b", "c")):
    """Files as Hugging Face datasets writes them: pictures as {bytes, path}, and ClassLabel in the metadata."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    features = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
    for k in range(num):
        rows = range(k * per_file, (k + 1) * per_file)
        images = [{"bytes": png(picture(i)), "path": f"{i}.png"} if struct else png(picture(i)) for i in rows]
        table = pa.table({column: images, "label": [i % 3 for i in rows], "text": [f"row {i}" for i in rows]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        path = folder / f"train-{k:05d}-of-{num:05d}.{kind}"
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=3)
            continue
        new = pa.ipc.new_stream if k % 2 else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return num * per_file


def parquet(root, **settings):
    return DATA["parquet"](root=str(root), **{"held_out": 0.0, "memory": 0, **settings})


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_of_tables_are_the_pictures_in_order(tmp_path, kind, struct):
    n = write_tables(tmp_path / "data", kind, struct=struct)
    data = parquet(tmp_path).load()  # as a downloaded repository, in its folder data
    batch = everything(data)
    assert batch.x.equal(torch.stack([chw(picture(i)) for i in range(n)]))
    assert batch.cond["label"].equal(torch.arange(n) % 3)
    assert data.spec.cond["label"].names == ("a", "b", "c")
    assert len(data.shard_starts) == 10  # 3 groups in each of 3 files
    data = parquet(tmp_path, captions=("files",), labels=False).load()
    assert data.captions is not None
    assert len(data.captions.table) == n
    contract.check_all(parquet(tmp_path, held_out=0.3))


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_read_each_group_of_rows_once(tmp_path, monkeypatch, workers):
    n = write_tables(tmp_path, "parquet")
    data = parquet(tmp_path, window=2).load()
    read = []
    original = data.files.cache.read
    monkeypatch.setattr(data.files.cache, "read", lambda *key: read.append(key) or original(*key))
    stream = Stream(data, 7, seed=0, workers=workers)
    x = torch.cat([stream(step, 0, 0, 7).x for step in range(n // 7)])
    assert x.equal(everything(data).x[stream.order(0, 0)])
    assert len(set(read)) == len(read) == 8  # and the first, by which the shape is known


def test_the_cache_of_groups_forgets_the_oldest_and_an_error_is_raised_again(monkeypatch):
    monkeypatch.setattr("genkit.data.parquet_files.CACHED_BYTES", 25)
    read = []

    def read_group(t, g):
        read.append(g)
        if g == 9:
            raise ValueError("damaged")
        return np.zeros(10, np.uint8)

    cache = GroupCache(read_group)
    for g in (0, 1, 0, 2, 0, 1):
        assert cache.get((0, g)).nbytes == 10
    assert read == [0, 1, 2, 1]  # of 0, 1 and 2, 1 was used longest ago
    for _ in range(2):
        with refuses("damaged"):
            cache.get((0, 9))


def test_bad_tables_are_refused_in_one_line(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_tables(tmp_path / "a", "parquet", column="photo")
    with refuses("photo, label, text", "which holds the image? give --data.image-column"):
        parquet(tmp_path / "a").load()
    assert len(parquet(tmp_path / "a", image_column="photo").load()) == 21
    path = tmp_path / "a" / "train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with refuses(path, "cannot be read (parquet)"):
        parquet(tmp_path / "a", image_column="photo").load()
    for value, message in (({"bytes": None, "path": "x.png"}, "image is a path"), (None, "image is NoneType")):
        image = pa.array([{"bytes": png(picture(0)), "path": ""}, value])
        pq.write_table(pa.table({"image": image, "label": [0, 1]}), tmp_path / "b.parquet")
        data = parquet(tmp_path / "b.parquet").load()
        with refuses("b.parquet/1", message):
            data.read([1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refuses("needs pyarrow", "pip install 'genkit-torch[data]'"):
        parquet(tmp_path / "b.parquet").load()


@pytest.mark.parametrize("name", ["webdataset", pytest.param("parquet", marks=pytest.mark.slow)])
def test_training_resumes_bit_for_bit_on_shards(tmp_path, name):
    """Two steps and two more are four: a batch depends on seed, step and row only."""
    if name == "parquet":
        write_tables(tmp_path / "data", "parquet")
    else:
        shards(tmp_path / "data")
    from safetensors.torch import load_file

    tiny = ["--objective=flow", f"--data={name}", f"--data.root={tmp_path}/data", "--data.memory=0", "--backbone=mlp",
            "--backbone.width=8", "--batch=8", "--sample-every=0", "--no-tensorboard", "--schedule=constant",
            "--data.window=2", "--precision=fp32"]  # fmt: skip
    assert cli.main(["train", *tiny, f"--out={tmp_path}/one", "--steps=4"]) == 0
    assert cli.main(["train", *tiny, f"--out={tmp_path}/two", "--steps=2"]) == 0
    assert cli.main(["train", f"--resume={tmp_path}/two/latest", "--steps=4", "--workers=0"]) == 0
    one, two = (load_file((tmp_path / d / "latest").resolve() / "latest" / "nets.safetensors") for d in ("one", "two"))
    assert all(one[k].equal(two[k]) for k in one)
