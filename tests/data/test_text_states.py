"""The states of captions on disk: each is computed once, found again, and never all in memory."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import pytest
import torch

from genkit.data import text_states
from genkit.data.captions import Captions
from genkit.data.text_states import open_texts, text_keys


def encode(texts):
    """States with as many tokens as the longest text has letters, made of the letters, and a pooled state."""
    longest = max(1, *map(len, texts))
    codes = torch.tensor([[ord(c) for c in text.ljust(longest, "\0")] for text in texts])
    states = codes[..., None].float() * torch.tensor([1.0, -1.0])
    return {"text": states, "mask": codes > 0, "pooled": states.sum(1)}


@pytest.mark.parametrize("file_bytes", [1, 200, 1 << 20])
def test_the_states_are_those_of_the_encoder_however_they_are_cut_into_files(tmp_path, monkeypatch, file_bytes):
    monkeypatch.setattr(text_states, "SHARD_BYTES", file_bytes)
    monkeypatch.setattr(text_states, "TEXTS_AT_ONCE", 2)
    texts = ["a", "", "longest of all", "bb", "größer", "c"]
    table = open_texts(tmp_path, texts, encode)
    assert len(list(tmp_path.glob("*"))) == {1: 3, 200: 2, 1 << 20: 1}[file_bytes]
    rows = torch.tensor([5, 2, 0, 0, 3])
    whole = encode(texts)
    for name, value in table.select(rows).items():
        assert torch.equal(value, whole[name][rows]), name
    assert table.find(["bb", "a"]).tolist() == [3, 0]
    assert table.find(["bb", "absent"]) is None
    assert [r for chunk in table.chunks() for r in chunk] == list(range(6))


def test_a_text_is_encoded_once_for_all_that_ask_for_it(tmp_path):
    asked = []

    def counted(texts):
        asked.extend(texts)
        return encode(texts)

    open_texts(tmp_path, ["a", "b", "a"], counted)
    assert asked == ["a", "b"]
    table = open_texts(tmp_path, ["c", "b", "c"], counted)
    assert asked == ["a", "b", "c"]
    assert torch.equal(table.select(torch.tensor([0, 1, 2]))["text"][:, 0, 0], torch.tensor([99.0, 98.0, 99.0]))


def test_different_texts_have_different_keys():
    texts = ["", " ", "a", "A", "ab", "a\0b"]
    assert len({tuple(key) for key in text_keys(texts).tolist()}) == len(texts)


def used_kib() -> int:
    """Memory of this process, without what belongs to mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def measure(folder: Path, count: int, results) -> None:
    """Encode ``count`` captions of half a megabyte, and read 200 batches of them."""
    wide = torch.ones(1, 128, 1024)
    before = peak = used_kib()

    def encode_wide(texts):
        return {"text": wide.repeat(len(texts), 1, 1), "mask": torch.ones(len(texts), 128, dtype=torch.bool)}

    table = open_texts(folder, [str(i) for i in range(count)], encode_wide)
    captions = Captions(torch.arange(count)[:, None], table)
    for step in range(50):
        captions.table.select(torch.randint(count, (4,), generator=torch.Generator().manual_seed(step)))
        peak = max(peak, used_kib())
    results.put(peak - before)


def test_memory_does_not_grow_with_the_number_of_captions(tmp_path, monkeypatch):
    """Ten times as many, 200 MB in place of 20: within a third of the difference, which the allocator may keep."""
    monkeypatch.setattr(text_states, "SHARD_BYTES", 4 << 20)
    monkeypatch.setattr(text_states, "TEXTS_AT_ONCE", 4)
    context = multiprocessing.get_context("fork")
    used = []
    for count in (40, 400):
        results = context.SimpleQueue()
        child = context.Process(target=measure, args=(tmp_path / str(count), count, results))
        child.start()
        child.join()
        used.append(results.get())
    assert used[1] - used[0] < 60 << 10
    assert sum(file.stat().st_size for file in (tmp_path / "400").glob("*")) > 200 << 20
