"""Encoding by several ranks, in threads and in bf16; sampling by several ranks: what one process does, bit for bit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from genkit.cli import main as cli
from genkit.core import Draw
from genkit.data import DATA, OnDisk
from genkit.data.latents import MARKS, Latents
from genkit.training import latent_cache
from genkit.training.latent_cache import FixedFlip, encode, read_ahead, round_moments
from genkit.training.ranks import Ranks
from genkit.training.run import load_run
from tests.support.ranks import on_two_ranks

TINY = ["--backbone=mlp", "--backbone.width=8", "--backbone.depth=1", "--batch=16", "--sample-every=0", "--workers=0",
        "--no-tensorboard", "--precision=fp32", "--data.labels=false"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    stage = ["--objective=vae", "--objective.latent", "3", "2", "2", "--steps=5"]
    for name, argv in {"vae": stage, "flow": ["--objective=flow", "--steps=2"]}.items():
        assert cli.main(["train", f"--out={out / name}", *argv, *TINY]) == 0
    return {name: (out / name / "latest").resolve() for name in ("vae", "flow")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 70 pictures of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(70):
        file = folder / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
    return folder


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != MARKS}


# ------------------------------------------------------------------------------------------------------------- ranks
def test_two_ranks_encode_the_files_of_one_process(runs, tmp_path):
    options = {"data": "digits", "split": "test", "shard": 70, "batch": 40, "device": "cpu"}
    one = encode(str(runs["vae"]), out=tmp_path / "one", **options)
    both = on_two_ranks(lambda a: encode(str(runs["vae"]), out=tmp_path / "two", **options))
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert [replace(cache, path=one.path) for cache in both] == [one, one]
    (tmp_path / "two" / "test-00003-of-00006.safetensors").unlink()
    (tmp_path / "two" / "latents.json").write_text((tmp_path / "one" / "latents.json").read_text())
    again = on_two_ranks(lambda a: encode(str(runs["vae"]), out=tmp_path / "two", **options).num_written)
    assert again == [1, 1]
    assert files(tmp_path / "two") == files(tmp_path / "one")


def refusal(job):
    try:
        job()
    except ValueError as e:
        return str(e)
    return "nothing"


def test_a_damaged_picture_ends_all_ranks_and_leaves_no_split(runs, pictures, tmp_path):
    broken = tmp_path / "pictures"
    for file in pictures.glob("*/*.png"):
        (broken / file.parent.name).mkdir(parents=True, exist_ok=True)
        (broken / file.parent.name / file.name).write_bytes(file.read_bytes())
    (broken / "b" / "69.png").write_bytes(b"no picture")
    data = DATA["folder"](root=str(broken), memory=0, labels=False, held_out=0.0)
    options = {"data": data, "shard": 20, "device": "cpu"}
    errors = on_two_ranks(lambda a: refusal(lambda: encode(str(runs["vae"]), out=tmp_path / "two", **options)))
    assert all("69.png: is not an image" in error for error in errors)
    assert json.loads((tmp_path / "two" / "latents.json").read_text())["splits"] == {}


@pytest.mark.parametrize(("n", "batch"), [(1, 64), (23, 4), (24, 8)])
def test_two_ranks_draw_the_samples_of_one(runs, n, batch):
    run = load_run(runs["flow"], device="cpu")
    one = run.sample(n, batch=batch, steps=2)

    def job(accelerator):
        drawn = {}
        ranks = Ranks.of(accelerator)
        samples = run.sample(n, batch=batch, steps=2, ranks=ranks)
        none = run.sample(n, batch=batch, steps=2, ranks=ranks, consume=drawn.__setitem__)
        return samples.x.numpy(), samples.evaluations, samples.network_rows, len(none), drawn

    (x, *counts, kept, first), (other_x, *other_counts, _, second) = on_two_ranks(job)
    assert np.array_equal(x, one.x.numpy())
    assert (len(other_x), kept) == (0, 0)
    assert counts == other_counts == [one.evaluations, one.network_rows]
    assert not first.keys() & second.keys()
    assert torch.cat([x for _, x in sorted({**first, **second}.items())]).equal(one.x)


@pytest.mark.parametrize("format", ["png", "npz", "grid"])
def test_the_files_of_sample_are_those_of_one_process(runs, tmp_path, format):
    argv = ["sample", str(runs["flow"]), "--n=11", "--batch=3", "--steps=2", f"--format={format}", "--device=cpu"]
    assert cli.main([*argv, f"--out={tmp_path}/one/x"]) == 0
    assert on_two_ranks(lambda a: cli.main([*argv, f"--out={tmp_path}/two/x"])) == [0, 0]
    one, two = ({str(p.relative_to(tmp_path / d)): p for p in (tmp_path / d).rglob("*")} for d in ("one", "two"))
    assert one.keys() == two.keys()
    for name, path in one.items():
        if path.is_file() and path.suffix != ".json":
            assert path.read_bytes() == two[name].read_bytes() or format == "npz", name
    if format == "npz":
        assert np.array_equal(np.load(one["x.npz"])["arr_0"], np.load(two["x.npz"])["arr_0"])


def test_a_rank_that_fails_ends_all(runs):
    run = load_run(runs["flow"], device="cpu")

    def job(accelerator):
        def failing(first, x):
            if first == 4:
                raise ValueError("the disk is full")

        return refusal(lambda: run.sample(16, batch=4, steps=1, ranks=Ranks.of(accelerator), consume=failing))

    assert on_two_ranks(job) == ["the disk is full"] * 2


# ----------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("memory", [0, 1])
def test_both_views_are_those_of_the_data_and_pictures_are_decoded_once(pictures, monkeypatch, workers, memory):
    data = DATA["folder"](root=str(pictures), memory=memory, flip=True, held_out=0.0).load()
    assert isinstance(data, OnDisk) == (memory == 0)
    wanted = [data.batch(torch.arange(70), FixedFlip(range(70), number)) for number in (1.0, 0.0)]
    assert wanted[1].x.equal(wanted[0].x.flip(-1))
    decoded = []
    original = OnDisk.read
    monkeypatch.setattr(OnDisk, "read", lambda self, rows: decoded.extend(rows) or original(self, rows))
    parts = list(read_ahead(data, range(70), 2, 32, workers))
    assert [rows for rows, _ in parts] == [range(32), range(32, 64), range(64, 70)]
    for view in (0, 1):
        assert torch.cat([views[view].x for _, views in parts]).equal(wanted[view].x)
        assert torch.cat([views[view].cond["label"] for _, views in parts]).equal(wanted[view].cond["label"])
    assert sorted(decoded) == ([] if memory else list(range(70)))


# --------------------------------------------------------------------------------------------------------- precision
def moments(offset):
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(50, 1, 2, 3, 3, generator=g) + torch.tensor([0.0, offset]).reshape(1, 1, 2, 1, 1)
    return {"mean": mean, "log_var": torch.full_like(mean, -4.0), "cond.v": torch.rand(50, 3)}


def test_bf16_rounds_by_its_own_precision_and_is_refused_where_that_is_too_much():
    content = moments(0.0)
    rounded = round_moments(content, "stage")
    assert {k: v.dtype for k, v in rounded.items()} == {
        "mean": torch.bfloat16, "log_var": torch.bfloat16, "cond.v": torch.float32}  # fmt: skip
    assert float((rounded["mean"].float() / content["mean"] - 1).abs().max()) <= 2**-8  # half of the last of 8 bits
    with pytest.raises(ValueError, match=r"storage: bf16 changes a channel .* of stage by \d+\.\d%.*--storage fp32"):
        round_moments(moments(100.0), "stage")  # rounds to halves


@pytest.mark.parametrize("option", ["storage", "precision"])
def test_bf16_is_near_and_is_not_mixed_with_what_was_encoded_before(runs, tmp_path, option):
    options = {"data": "digits", "split": "test", "out": tmp_path, "device": "cpu"}
    encode(str(runs["vae"]), **options)
    (exact,) = [load_file(p) for p in tmp_path.glob("test-*.safetensors")]
    assert encode(str(runs["vae"]), **options, **{option: "bf16"}).num_written == 1
    (path,) = tmp_path.glob("test-*.safetensors")
    near = load_file(path)
    assert near["mean"].dtype == (torch.bfloat16 if option == "storage" else torch.float32)
    error = (near["mean"].float() - exact["mean"]).square().mean().sqrt() / exact["mean"].std()
    assert 0 < float(error) < 0.02
    data = Latents(root=str(tmp_path)).load("test")
    x = data.batch(torch.arange(9), Draw((0,), 0, 9)).x
    assert x.equal(torch.cat([near["mean"], near["log_var"]], 2)[:9, 0].float())
    assert np.allclose(data.statistics["mean"], near["mean"].double().mean((0, 1, 3, 4)))


@pytest.mark.parametrize("memory", [0, 1])
def test_samples_that_have_changed_are_encoded_again(runs, tmp_path, memory):
    """Pictures are added before others, so that rows move, and with a class, so that classes are numbered anew."""
    pictures = tmp_path / "in"

    def add(name, count):
        (pictures / name).mkdir(parents=True)
        for i in range(count):
            grey = np.full((8, 8), 20 * i + 10 * len(name), np.uint8)
            Image.fromarray(grey).save(pictures / name / f"{i}.png")

    def encoded(out):
        source = DATA["folder"](root=str(pictures), memory=memory, held_out=0.0)
        written = encode(str(runs["vae"]), data=source, out=tmp_path / out, shard=4, device="cpu").num_written
        data = Latents(root=str(tmp_path / out)).load()
        batch = data.batch(torch.arange(len(data)), Draw((0,), 0, len(data)))
        return written, batch.x, batch.cond["label"]

    add("b", 4), add("cc", 3)
    assert encoded("out")[0] == 2
    assert encoded("out")[0] == 0
    add("aaa", 1)
    written, x, label = encoded("out")
    assert written == 2
    _, fresh_x, fresh_label = encoded("fresh")
    assert label.tolist() == fresh_label.tolist() == [0, 1, 1, 1, 1, 2, 2, 2]
    assert x.equal(fresh_x)
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(pictures / "cc" / "2.png")
    assert encoded("out")[0] == 1


def test_splits_that_are_encoded_at_once_are_both_in_the_index(runs, tmp_path, monkeypatch):
    options = {"data": "digits", "out": tmp_path, "device": "cpu"}
    original, pending = latent_cache.note_digests, ["test"]

    def other_split_first(folder, digests):
        if pending:
            encode(str(runs["vae"]), split=pending.pop(), **options)
        original(folder, digests)

    monkeypatch.setattr(latent_cache, "note_digests", other_split_first)
    encode(str(runs["vae"]), split="train", **options)
    assert {split: len(Latents(root=str(tmp_path)).load(split)) for split in ("train", "test")} == {
        "train": 1438, "test": 359}  # fmt: skip


def test_the_cache_names_its_data_independently_of_the_working_folder(runs, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    encode(str(runs["vae"]), data=pictures.name, out=tmp_path / "out", device="cpu")
    assert Latents(root=str(tmp_path / "out")).decoded_source().root == str(pictures)


def test_a_precision_that_the_device_lacks_is_refused_before_anything_is_written(runs, tmp_path, capsys):
    argv = ["encode", str(runs["vae"]), "--data=digits", f"--out={tmp_path}/x", "--precision=tf32", "--device=cpu"]
    assert cli.main(argv) == 2
    assert "precision: given tf32" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_latents_train_the_same_from_two_readers(runs, tmp_path):
    """With and without threads that read ahead, the weights are equal bit for bit."""
    encode(str(runs["vae"]), out=tmp_path / "cache", data="digits", shard=300, device="cpu")
    weights, tiny = [], [a for a in TINY if "workers" not in a and "labels" not in a]
    for workers in (0, 2):
        argv = ["train", "--objective=flow", "--data=latents", f"--data.root={tmp_path}/cache", "--steps=4",
                f"--out={tmp_path}/{workers}", *tiny]  # fmt: skip
        assert cli.main([*argv, f"--workers={workers}"]) == 0
        weights.append(load_file((tmp_path / str(workers) / "latest").resolve() / "latest" / "nets.safetensors"))
    assert all(weights[0][k].equal(weights[1][k]) for k in weights[0])


def test_weights_of_places_are_cached_on_the_grid_of_the_latents_in_both_views(runs, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8), "RGBA").save(tmp_path / "in" / f"{i}.png")
    source = DATA["folder"](
        root=str(tmp_path / "in"), channels=1, alpha="weight", flip=True, held_out=0.0, labels=False
    )
    encode(str(runs["vae"]), data=source, out=tmp_path / "out", device="cpu")
    data = Latents(root=str(tmp_path / "out")).load()
    assert data.weighted
    alpha = torch.stack(
        [torch.from_numpy(np.asarray(Image.open(p))[..., 3].copy()) for p in sorted((tmp_path / "in").glob("*"))]
    )
    pooled = (alpha / 255).unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2))[:, None]
    seen = set()
    for key in range(8):
        weight = data.batch(torch.arange(3), Draw((key,), 0, 3)).place_weight
        for row in range(3):
            seen.add(bool(torch.allclose(weight[row], pooled[row])))
            assert torch.allclose(weight[row], pooled[row]) or torch.allclose(weight[row], pooled[row].flip(-1))
    assert seen == {True, False}
