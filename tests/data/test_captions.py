"""Captions: templates filled with class names, and texts beside the images."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as pil

from genkit.core import (
    Text,
)
from genkit.data import DATA, Stream, text
from tests.support.data import batch_of

TEMPLATES = ("a handwritten {label}", "the digit {label}", "{label}")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_templates_are_filled_with_the_class_of_each_digit():
    data = DATA["digits"](captions=TEMPLATES, labels=True).load()
    batch = batch_of(data, 400)
    captions = text.to_texts(batch.cond["text"])
    allowed = [{w.replace("{label}", DIGITS[c]) for w in TEMPLATES} for c in batch.cond["label"].tolist()]
    assert all(s in a for s, a in zip(captions, allowed, strict=True))
    shares = [sum(s in {w.replace("{label}", d) for d in DIGITS} for s in captions) / 400 for w in TEMPLATES]
    assert all(abs(s - 1 / 3) < 0.1 for s in shares)
    assert text.to_texts(batch_of(data, 400, key=1).cond["text"]) != captions  # other templates are drawn
    assert data.spec.cond["text"].examples == (
        "a handwritten zero", "the digit one", "two", "a handwritten three", "the digit four", "five",
        "a handwritten six", "the digit seven", "eight", "a handwritten nine",
    )  # fmt: skip


def test_templates_are_the_same_for_any_ranks_and_micro_batches():
    stream = Stream(DATA["digits"](captions=TEMPLATES).load(), 40, seed=3)
    batch = stream(5, 0, 0, 40).cond["text"]
    parts = [stream(5, 0, *rows).cond["text"] for rows in ((0, 7), (7, 20), (20, 40))]
    assert torch.equal(torch.cat(parts), batch)


def test_captions_replace_classes_unless_both_are_requested():
    of = lambda **settings: list(DATA["digits"](**settings).load().spec.cond)  # noqa: E731
    assert of() == ["label"]
    assert of(captions=TEMPLATES) == ["text"]
    assert of(captions=TEMPLATES, labels=True) == ["label", "text"]
    assert of(captions=TEMPLATES, labels=False) == ["text"]
    assert of(labels=False) == []


def test_a_sentence_is_the_caption_of_all_images(tmp_path):
    for i in range(3):
        picture_at(tmp_path / f"{i}.png", i)
    source = DATA["folder"](root=str(tmp_path), captions=("a photo of our dog", "our dog"))
    words = [text.to_texts(batch_of(source.load(), 3, key=key).cond["text"]) for key in range(20)]
    assert {w for batch in words for w in batch} == {"a photo of our dog", "our dog"}
    assert not source.captions_from_labels


def picture_at(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pil.fromarray(np.full((4, 4), value, np.uint8)).save(path)


NAMES = ("a.png", "b.png", "sub/c.png")
SAID = ("an A", "ein größeres B", "C")


def layout(root: Path, kind: str) -> None:
    for i, name in enumerate(NAMES):
        picture_at(root / name, 10 * i)
        if kind == "txt":
            (root / name).with_suffix(".txt").write_text(f"  {SAID[i]}\n", encoding="utf-8")
    rows = list(zip(NAMES, SAID, strict=True))[::-1]
    if kind in ("captions.jsonl", "metadata.jsonl"):
        lines = [json.dumps({"file_name": n, "text": s}) for n, s in rows]
        (root / kind).write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    if kind == "metadata.csv":
        body = "".join(f'{n},"{s}"\r\n' for n, s in rows)
        (root / kind).write_bytes(b"\xef\xbb\xbf" + f"file_name,text\r\n{body}".encode())


def zipped(root: Path) -> Path:
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root).as_posix())
    return path


@pytest.mark.parametrize("kind", ["txt", "captions.jsonl", "metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("memory", [0.0, 2.0])
def test_captions_are_read_beside_the_images(tmp_path, kind, memory):
    layout(tmp_path / "in", kind)
    for source in (DATA["folder"](root=str(tmp_path / "in"), captions=("files",), memory=memory),
                   DATA["zip"](root=str(zipped(tmp_path / "in")), captions=("files",), memory=memory)):  # fmt: skip
        data = source.load()
        batch = batch_of(data, 3)
        assert batch.x[:, 0, 0, 0].tolist() == [0, 10, 20]
        assert text.to_texts(batch.cond["text"]) == list(SAID)
        assert data.spec.cond == {"text": Text(256, SAID)}


def test_class_folders_may_have_captions_too(tmp_path):
    for c in ("cat", "dog"):
        for i in range(2):
            picture_at(tmp_path / c / f"{i}.png", i)
            (tmp_path / c / f"{i}.txt").write_text(f"{c} number {i}")
    batch = batch_of(DATA["folder"](root=str(tmp_path), captions=("files",), labels=True).load(), 4)
    assert text.to_texts(batch.cond["text"]) == ["cat number 0", "cat number 1", "dog number 0", "dog number 1"]
    assert batch.cond["label"].tolist() == [0, 0, 1, 1]
    worded = DATA["folder"](root=str(tmp_path), captions=("a {label}",)).load()
    assert text.to_texts(batch_of(worded, 4).cond["text"]) == ["a cat", "a cat", "a dog", "a dog"]


def ruin(root: Path, fault: str) -> None:
    {
        "missing": lambda: (root / "b.txt").unlink(),
        "of nothing": lambda: (root / "README.txt").write_text("hello"),
        "latin": lambda: (root / "b.txt").write_bytes("größer".encode("latin-1")),
        "double": lambda: picture_at(root / "a.bmp", 1),
        "long": lambda: (root / "b.txt").write_text("x" * 257),
        "two tables": lambda: [(root / n).write_text("") for n in ("captions.jsonl", "metadata.csv")],
        "no json": lambda: (root / "captions.jsonl").write_text('{"file_name": "a.png", "text": "A"}\n{"file_na'),
        "no words": lambda: (root / "captions.jsonl").write_text('{"file_name": "a.png", "text": 7}'),
        "twice": lambda: (root / "captions.jsonl").write_text('{"file_name": "a.png", "text": "A"}\n' * 2),
        "absent": lambda: (root / "captions.jsonl").write_text('{"file_name": "z.png", "text": "A"}\n'),
        "not all": lambda: (root / "captions.jsonl").write_text('{"file_name": "a.png", "text": "A"}\n'),
        "no column": lambda: (root / "metadata.csv").write_text("file_name,caption\na.png,A\n"),
        "short": lambda: (root / "metadata.csv").write_text("file_name,text\na.png\n"),
    }[fault]()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"b.png: has no caption beside it, in b.txt"),
        ("of nothing", r"README.txt: captions README.\*, but there is no such image in "),
        ("latin", r"b.txt: is not UTF-8, at byte 2"),
        ("double", r"a.txt: would caption both a.bmp and a.png"),
        ("long", r"b.txt: this caption has 257 bytes; --data.text-length is 256"),
        ("two tables", r"captions.jsonl: lies beside metadata.csv; keep one"),
        ("no json", r"captions.jsonl:2: needs \{\"file_name\": "),
        ("no words", r"captions.jsonl:1: needs file_name and text, both strings"),
        ("twice", r"captions.jsonl:2: captions a.png a second time, after .*captions.jsonl:1"),
        ("absent", r"captions.jsonl:1: captions z.png, but there is no such image"),
        ("not all", r"b.png: has no caption in captions.jsonl"),
        ("no column", r"metadata.csv: has no column text; needs file_name and text"),
        ("short", r"metadata.csv:2: needs file_name and text, both strings"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_bad_captions_are_refused_in_one_line_that_names_the_file(tmp_path, kind, fault, message):
    root = tmp_path / "in"
    layout(root, "txt")
    ruin(root, fault)
    location = root if kind == "folder" else zipped(root)
    with pytest.raises(ValueError, match=message) as e:
        DATA[kind](root=str(location), captions=("files",)).load()
    assert "\n" not in str(e.value)
    assert str(location) in str(e.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"captions": ("a {lab}",)},
            r"given 'a \{lab\}'; allowed: templates that contain \{label\}, files",
        ),
        ({"captions": ("files",)}, "given files, but these data are not files"),
        ({"captions": ("files", "a {label}")}, "given files and templates"),
        ({"captions": ("a {label}",), "text_length": 5}, r"'a \{label\}' of 'zero': this caption has 6 bytes"),
        ({"encoder": "x/y"}, "given x/y, but no captions to encode"),
    ],
)
def test_bad_templates_are_refused(fault, message):
    with pytest.raises(ValueError, match=message):
        DATA["digits"](**fault).load()


def test_images_without_classes_take_no_templates(tmp_path):
    picture_at(tmp_path / "a.png", 1)
    with pytest.raises(ValueError, match=r"given 'a \{label\}', but these data have no classes; try files"):
        DATA["folder"](root=str(tmp_path), captions=("a {label}",)).load()


def test_a_line_of_a_jsonl_ends_where_json_ends_it(tmp_path):
    """A text may hold what Unicode calls the end of a line."""
    pil.new("L", (4, 4)).save(tmp_path / "a.png")
    line = json.dumps({"file_name": "a.png", "text": "one\u2028two\x85three"}, ensure_ascii=False)
    (tmp_path / "captions.jsonl").write_text(f"{line}\r\n\n", encoding="utf-8", newline="")
    data = DATA["folder"](root=str(tmp_path), captions=("files",), held_out=0.0).load()
    assert text.to_texts(batch_of(data, 1).cond["text"]) == ["one two three"]
