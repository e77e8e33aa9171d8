"""Buckets of aspect ratios: hardly anything is cropped, nothing is dropped, each batch has one shape."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from genkit.backbones.diffusers_text_to_image import SDXL
from genkit.cli.main import main
from genkit.data import DATA, Stream
from genkit.data.buckets import MAX_RATIO, BucketOrder, Buckets, bucket_shape
from genkit.training.directory import read_log


@given(st.integers(64, 4000), st.integers(64, 4000), st.sampled_from([8, 64]), st.sampled_from([256, 512, 1024]))
def test_no_picture_is_cropped_by_more_than_half_a_step(height, width, step, side):
    h, w = bucket_shape(height, width, side**2, step)
    assert h % step == w % step == 0
    assert (w, h) == bucket_shape(width, height, side**2, step)
    if max(height, width) / min(height, width) > MAX_RATIO:
        assert max(h, w) / min(h, w) == pytest.approx(MAX_RATIO, rel=step / min(h, w))
        return
    scale = max(h / height, w / width)
    assert max(height * scale - h, width * scale - w) <= step / 2 + 1e-9
    assert h * w == pytest.approx(side**2, rel=3 * step / min(h, w))


def buckets_of(counts):
    return Buckets([(8, 8 * (k + 1)) for k in range(len(counts))],
                   torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
                   torch.ones(sum(counts), 2))  # fmt: skip


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 3))
def test_every_batch_is_of_one_bucket_and_every_picture_is_seen_equally_often(counts, batch, draw):
    buckets = buckets_of(counts)
    order, epochs = BucketOrder(buckets, batch, seed=3), 12
    steps = int(order.batches_before(epochs).sum())
    seen = torch.zeros(sum(counts), dtype=torch.int64)
    for step in range(steps):
        rows = order.indices(step, draw)
        assert rows.shape == (batch,)
        assert len(buckets.of[rows].unique()) == 1
        seen += rows.bincount(minlength=sum(counts))
    for k, count in enumerate(counts):
        mine = seen[buckets.of == k]
        assert int(mine.max() - mine.min()) <= 1, "one picture of a bucket came before another"
        assert epochs * count - batch < int(mine.sum()) <= epochs * count, "a bucket is ahead or behind"
    again = BucketOrder(buckets, batch, seed=3)
    for step in (steps - 1, 0, steps // 2):  # in any order
        if steps:
            assert torch.equal(again.indices(step, draw), order.indices(step, draw))


def test_the_order_depends_on_seed_and_draw():
    buckets = buckets_of([40, 24])
    batches = [torch.stack([BucketOrder(buckets, 4, seed).indices(s, draw) for s in range(16)])
               for seed, draw in ((0, 0), (1, 0), (0, 1))]  # fmt: skip
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


SHAPES = [(16, 16), (32, 8), (8, 32), (12, 24)]  # height, width


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(12):
        h, w = SHAPES[i % 4]
        x = np.tile(np.linspace(0, 255, w, dtype=np.uint8), (h, 1))
        Image.fromarray(np.stack([x, x, np.full_like(x, i)], 2)).save(tmp_path / "in" / f"{i:02}.png")
    turned = Image.new("RGB", (32, 8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "in" / "99.png", exif=exif)
    return tmp_path / "in"


def test_training_sees_pictures_in_their_shape_with_their_sizes(folder):
    data = DATA["folder"](root=str(folder), size=16, bucket=4, held_out=0.0).load()
    assert data.spec.shape == (3, 16, 16)
    assert sorted(set(data.buckets.shapes)) == [(8, 32), (12, 24), (16, 16), (32, 8)]
    assert int((data.buckets.of == data.buckets.shapes.index((32, 8))).sum()) == 4, "one is turned by its EXIF"
    stream = Stream(data, 3, seed=0, workers=2)
    seen = set()
    for step in range(8):
        batch = stream(step, 0, 0, 3)
        h, w = batch.x.shape[2:]
        seen.add((h, w))
        assert (h, w) in SHAPES
        assert torch.equal(batch.cond["sizes"][0], torch.tensor([h, w, 0, 0, h, w], dtype=torch.float32))
        parts = [stream(step, 0, i, i + 1) for i in range(3)]
        assert torch.equal(torch.cat([part.x for part in parts]), batch.x)
    assert len(seen) == 4
    plain = data.batch(torch.arange(4), stream(0, 0, 0, 3).draw)
    assert plain.x.shape == (4, 3, 16, 16), "evaluation and validation have one shape"
    assert "sizes" not in plain.cond


def test_sizes_are_those_of_the_stored_picture_the_crop_and_the_bucket():
    buckets = Buckets.build(torch.tensor([[600, 400], [1024, 1024]]), 512**2, 64)
    assert buckets.shapes == [(512, 512), (640, 448)]
    # 600x400 resized to cover 640x448 is 672x448, 16 of which are cropped at the top
    assert buckets.sizes(torch.tensor([0]))[0].tolist() == [600, 400, 16, 0, 640, 448]
    assert buckets.sizes(torch.tensor([1]))[0].tolist() == [1024, 1024, 0, 0, 512, 512]


def test_sdxl_is_told_the_sizes_of_the_data_and_its_own_without_them():
    told = []

    class Net(torch.nn.Module):
        def forward(self, x, time, tokens, class_labels=None, added_cond_kwargs=None):
            told.append(added_cond_kwargs["time_ids"].tolist())
            return SimpleNamespace(sample=x)

    context = {"tokens": torch.zeros(1, 3, 4), "pooled": torch.zeros(1, 4)}
    sizes = torch.tensor([[600.0, 400, 16, 0, 640, 448]])
    for given_sizes in ({}, {"sizes": sizes}):
        SDXL().call(Net(), torch.zeros(1, 4, 80, 56), torch.zeros(1), None, {**context, **given_sizes})
    assert told == [[[640, 448, 0, 0, 640, 448]], sizes.tolist()]


@pytest.mark.slow
def test_runs_on_buckets_train_and_networks_of_one_shape_are_refused(folder, tmp_path, capsys):
    args = ["train", f"--data={folder}", "--data.size=16", "--data.bucket=4", "--data.held-out=0", "--batch=3",
            "--steps=6", "--no-tensorboard", "--device=cpu", "--sample-every=0", "--log-every=1", "--workers=0",
            "--backbone.width=8"]  # fmt: skip
    assert main([*args, f"--out={tmp_path}/a", "--backbone.mults", "1", "2"]) == 0
    assert "buckets  4 shapes from 8x32 to 32x8" in capsys.readouterr().out
    assert all(np.isfinite(r["denoise/loss"]) for r in read_log(tmp_path / "a" / "latest"))
    assert main([*args, f"--out={tmp_path}/b", "--backbone=dit"]) == 2
    assert "data.bucket: given 16 in steps of 4, but these networks cannot take" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
