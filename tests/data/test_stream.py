"""The order in which training sees the samples, and reading ahead from the disk."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genkit.core import Label, Spec
from genkit.data import DATA, InMemory, OnDisk, Stream
from genkit.data.codecs import Pixels
from tests.support.data import picture, refuses, save


def numbered(n: int, flip: bool = True) -> InMemory:
    """Sample i is an image [1, 1, 2] of i and 255 - i: it identifies itself, and shows whether it was mirrored."""
    i = torch.arange(n, dtype=torch.uint8)
    x = torch.stack([i, 255 - i], dim=1).reshape(n, 1, 1, 2)
    return InMemory(x, {"label": torch.arange(n)}, Spec((1, 1, 2), {"label": Label(n)}), Pixels(), flip)


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> OnDisk:
    root = tmp_path_factory.mktemp("pictures")
    for i in range(11):
        save(root / "ab"[i % 2] / f"{i:02}.png", picture(i))
    return DATA["folder"](root=str(root), memory=0, flip=True).load()


@st.composite
def cuts(draw) -> tuple[int, list[int]]:
    size = draw(st.integers(1, 40))
    return size, [0, *sorted(draw(st.sets(st.integers(1, size - 1))) if size > 1 else []), size]


@given(cuts(), st.integers(1, 50), st.integers(0, 2**63), st.integers(0, 10**6), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_batch_is_the_same_however_it_is_cut(cut, n, seed, step, draw):
    size, edges = cut
    data = numbered(n)
    batch = Stream(data, size, seed)(step, draw, 0, size)
    parts = [Stream(data, size, seed)(step, draw, a, b) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat([p.x for p in parts]), batch.x)  # the samples and their flips
    assert torch.equal(torch.cat([p.cond["label"] for p in parts]), batch.cond["label"])
    assert torch.equal(torch.cat([p.draw.normal(3) for p in parts]), batch.draw.normal(3))  # and the loss's numbers,
    assert torch.equal(torch.cat([p.draw.uniform() for p in parts]), batch.draw.uniform())  # one after the other
    assert (batch.x.flatten(1).amin(1) == batch.cond["label"]).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_epoch_shows_every_sample_once(n, size, seed, draw):
    stream = Stream(numbered(n), size, seed)
    steps = -(-3 * n // size)
    order = torch.cat([stream(s, draw, 0, size).cond["label"] for s in range(steps)])
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_orders_differ_between_epochs_draws_and_seeds():
    n = 30
    first = Stream(numbered(n), n, 0)
    batches = [first(0, 0, 0, n), first(1, 0, 0, n), first(0, 1, 0, n), Stream(numbered(n), n, 1)(0, 0, 0, n)]
    orders, noises = (
        [b.cond["label"] for b in batches],
        [b.draw.normal(4) for b in batches],
    )  # a draw advances when used
    for i in range(len(batches)):
        for j in range(i):
            assert not torch.equal(orders[i], orders[j])
            assert not torch.equal(noises[i], noises[j])


def test_augmentation_leaves_the_noise_alone():
    n = 200
    flipping, plain = Stream(numbered(n), n, 0), Stream(numbered(n, flip=False), n, 0)

    def mirrored(step: int, draw: int) -> torch.Tensor:
        return (flipping(step, draw, 0, n).x != plain(step, draw, 0, n).x).flatten(1).any(1)

    flips = [mirrored(3, 0), mirrored(4, 0), mirrored(3, 1)]
    assert all(70 < f.sum() < 130 for f in flips)
    assert not torch.equal(flips[0], flips[1])
    assert not torch.equal(flips[0], flips[2])
    assert torch.equal(flipping(3, 0, 0, n).draw.normal(4), plain(3, 0, 0, n).draw.normal(4))
    from_the_loss = flipping(3, 0, 0, n).draw.uniform() < 0.5
    assert 70 < (from_the_loss == flips[0]).sum() < 130  # else the loss could infer the flips


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1), st.sampled_from([(0, 8), (0, 3), (3, 8)]))))
@settings(max_examples=25, deadline=None)
def test_reading_ahead_changes_nothing(disk, requests):
    plain, ahead = Stream(disk, 8, seed=5, workers=0), Stream(disk, 8, seed=5, workers=2)
    for step, draw, (start, stop) in requests:
        one, other = plain(step, draw, start, stop), ahead(step, draw, start, stop)
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.cond["label"], other.cond["label"])
        assert torch.equal(one.draw.normal(2), other.draw.normal(2))


def test_a_resumed_stream_continues_and_reads_ahead(disk):
    ahead = Stream(disk, 8, seed=5, workers=2)
    steady = [ahead(step, 0, 0, 8).x for step in range(6)]
    resumed = Stream(disk, 8, seed=5, workers=2)
    assert torch.equal(torch.stack([resumed(step, 0, 0, 8).x for step in range(3, 6)]), torch.stack(steady[3:]))
    assert sorted(ahead.ahead.tasks[(0, 0, 8)]) == [6, 7]
    every_third = [ahead(step, 1, 0, 8) for step in (0, 3, 6)]
    assert len(every_third) == 3
    assert sorted(ahead.ahead.tasks[(1, 0, 8)]) == [9, 12]
    in_memory = Stream(DATA["digits"]().load(), 8, seed=5, workers=2)
    assert in_memory.ahead is None


def test_a_corrupt_file_is_named_by_the_threads_too(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", picture(i))
    data = DATA["folder"](root=str(tmp_path), memory=0).load()
    (tmp_path / "2.png").write_bytes(b"\x89PNG no")
    stream = Stream(data, 4, seed=0, workers=2)
    with refuses(tmp_path / "2.png"):
        stream(0, 0, 0, 4)


def test_an_empty_stream_is_refused():
    with refuses("0"):
        Stream(numbered(3), 0, seed=0)
    with refuses("0"):
        Stream(numbered(0), 4, seed=0)
