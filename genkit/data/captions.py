"""Captions: templates that are filled with class names, or text files beside the images.

The caption of an image ``a.png`` is the content of ``a.txt``. Or one file at the top of the folder or zip holds all
captions: ``captions.jsonl`` or ``metadata.jsonl`` with one line ``{"file_name": "a.png", "text": "a handwritten
seven"}`` per image, or ``metadata.csv`` with the columns ``file_name`` and ``text``, as in Hugging Face's imagefolder.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from genkit.core import Batch, Condition, Draw, Label, Text
from genkit.data import text
from genkit.data.text_states import TextsInMemory, TextTable

FILES = "files"  # value of --data.captions that means captions beside the images
NUM_EXAMPLES = 10  # captions that a model keeps as examples


class Caption(NamedTuple):
    """A caption and its location, for messages."""

    text: str
    location: str


CaptionReader = Callable[[], Sequence[Caption]]


@dataclass(frozen=True, eq=False)
class Captions:
    """W captions for each of N samples: ``rows`` Int ``[N, W]`` of ``table``, which has one row per caption.

    With a frozen encoder its last row is the empty text, which is null for some models.
    """

    rows: Tensor
    table: TextTable

    def add(self, batch: Batch, indices: Tensor, draw: Draw) -> Batch:
        """``batch`` with one caption for each sample, chosen among its W by ``draw``."""
        rows = self.rows.index_select(0, indices)
        num = rows.shape[1]
        column = (draw.uniform(1) * num).long().clamp(max=num - 1) if num > 1 else torch.zeros(len(rows), 1).long()
        chosen = rows.gather(1, column)[:, 0]
        return replace(batch, cond={**batch.cond, **self.table.select(chosen)})


def load_captions(
    captions: tuple[str, ...],
    cond: Mapping[str, Tensor],
    kinds: Mapping[str, Condition],
    class_words: tuple[str, ...],
    length: int,
    encoder: str | None,
    read_files: CaptionReader | None,
    num: int,
) -> tuple[Captions, Mapping[str, Condition]] | None:
    """Return the captions of ``--data.captions`` of ``num`` samples and their kinds of condition, or None without.

    Sentences without {label} are captions of all samples. Templates use ``class_words``, or the names of the classes in
    ``kinds``. Without ``encoder`` captions are bytes, at most ``length`` each; with one they are its states.
    ``read_files`` reads the captions beside the images.
    """
    if not captions:
        if encoder is not None:
            raise ValueError(f"encoder: given {encoder}, but no captions to encode; give --data.captions")
        return None
    if FILES in captions and len(captions) > 1:
        raise ValueError(f"captions: given {FILES} and templates; choose one of them")
    if captions == (FILES,):
        unique, rows = captions_from_files(read_files)
        examples = [caption.text for caption in unique if caption.text]
        examples = examples[:: max(1, len(examples) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    elif are_sentences(captions):
        unique = [Caption(caption, f"captions: {caption!r}") for caption in captions]
        rows, examples = torch.arange(len(captions)).expand(num, -1), list(captions[:NUM_EXAMPLES])
    else:
        unique, rows = captions_from_templates(captions, cond, kinds, class_words)
        # one template for each class, in turn
        num, classes = len(captions), min(len(unique) // len(captions), NUM_EXAMPLES)
        examples = [unique[c * num + c % num].text for c in range(classes)]
    table, kinds = caption_table(unique, length, encoder, examples)
    return Captions(rows, table), kinds


def caption_table(
    captions: Sequence[Caption], length: int, encoder: str | None, examples: Sequence[str]
) -> tuple[TextTable, Mapping[str, Condition]]:
    """Captions as a model sees them, one a row, and their kinds of condition, which store some ``examples``.

    Without ``encoder`` they are bytes, at most ``length`` each; with one they are its states, the empty text's last.
    """
    texts = [caption.text for caption in captions]
    if encoder is None:
        for caption in captions:
            if (size := len(caption.text.encode())) > length:
                raise ValueError(f"{caption.location}: this caption has {size} bytes; --data.text-length is {length}")
        return TextsInMemory({"text": text.to_bytes(texts, length)}), {"text": Text(length, tuple(examples))}
    frozen = text.open_encoder(encoder)
    return text.open_states(frozen, [*texts, ""]), frozen.kinds(tuple(examples))


def are_sentences(captions: Sequence[str]) -> bool:
    """Whether these are captions of all samples, as DreamBooth has: of several words, without anything to fill in."""
    return all("{" not in caption and " " in caption.strip() for caption in captions)


def captions_from_templates(
    templates: tuple[str, ...],
    cond: Mapping[str, Tensor],
    kinds: Mapping[str, Condition],
    class_words: tuple[str, ...],
) -> tuple[list[Caption], Tensor]:
    """Every template filled with every class, and the rows Int ``[N, W]`` of each sample's class."""
    for template in templates:
        if "{label}" not in template:
            allowed = f"templates that contain {{label}}, {FILES} for captions beside the images, or sentences alone"
            raise ValueError(f"captions: given {template!r}; allowed: {allowed}")
    name, kind = next(((k, v) for k, v in kinds.items() if isinstance(v, Label)), (None, None))
    if name is None or kind is None:
        raise ValueError(f"captions: given {templates[0]!r}, but these data have no classes; try {FILES}")
    words = class_words or kind.names or tuple(map(str, range(kind.num)))
    every = [Caption(t.replace("{label}", word), f"captions: {t!r} of {word!r}") for word in words for t in templates]
    return every, cond[name][:, None] * len(templates) + torch.arange(len(templates))


def captions_from_files(read_files: CaptionReader | None) -> tuple[list[Caption], Tensor]:
    """The distinct captions, and the row Int ``[N, 1]`` of each sample's caption."""
    if read_files is None:
        raise ValueError(f'captions: given {FILES}, but these data are not files; give a template: "a {{label}}"')
    every = read_files()
    unique = list({caption.text: caption for caption in reversed(every)}.values())[::-1]
    row_of = {caption.text: i for i, caption in enumerate(unique)}
    return unique, torch.tensor([[row_of[caption.text]] for caption in every])


# --------------------------------------------------------------------------------------------- beside the images
def read_captions(
    images: Sequence[str], others: Sequence[str], read: Callable[[str], bytes], root: str
) -> list[Caption]:
    """Return the caption of each image. ``ValueError`` names a caption that is missing, double or without image.

    ``images`` and ``others`` are file names below ``root``; ``read`` returns the content of one of ``others``.
    """
    tables = [name for name in TABLES if name in others]
    if len(tables) > 1:
        raise ValueError(f"{root}/{tables[0]}: lies beside {tables[1]}; keep one of them")
    captions = read_table(tables[0], read, root) if tables else read_texts(images, others, read, root)
    expected_images = set(images)
    for name, caption in captions.items():
        if name not in expected_images:
            raise ValueError(f"{caption.location}: captions {name}, but there is no such image in {root}")
    for name in images:
        if name not in captions:
            expected = f"in {tables[0]}" if tables else f"beside it, in {PurePosixPath(name).stem}.txt"
            raise ValueError(f"{root}/{name}: has no caption {expected}")
    return [captions[name] for name in images]


def read_texts(
    images: Sequence[str], others: Sequence[str], read: Callable[[str], bytes], root: str
) -> dict[str, Caption]:
    """The captions in ``NAME.txt`` beside ``NAME.png``, by image."""
    image_of: dict[str, str] = {}
    for name in images:
        stem = str(PurePosixPath(name).with_suffix(""))
        if stem in image_of:
            raise ValueError(f"{root}/{stem}.txt: would caption both {image_of[stem]} and {name}")
        image_of[stem] = name
    captions = {}
    for name in others:
        path = PurePosixPath(name)
        if path.suffix.lower() == ".txt":
            stem, location = str(path.with_suffix("")), f"{root}/{name}"
            content = decode_utf8(read(name), location)
            captions[image_of.get(stem, f"{stem}.*")] = Caption(collapse_space(content), location)
    return captions


def read_table(table: str, read: Callable[[str], bytes], root: str) -> dict[str, Caption]:
    """The captions of a file of names and captions, by image."""
    captions: dict[str, Caption] = {}
    for line, name, content in TABLES[table](decode_utf8(read(table), f"{root}/{table}"), f"{root}/{table}"):
        location = f"{root}/{table}:{line}"
        if not isinstance(name, str) or not isinstance(content, str):
            raise ValueError(f"{location}: needs file_name and text, both strings")
        name = str(PurePosixPath(name.replace("\\", "/")))
        if name in captions:
            raise ValueError(f"{location}: captions {name} a second time, after {captions[name].location}")
        captions[name] = Caption(collapse_space(content), location)
    return captions


def parse_jsonl(content: str, location: str) -> list[tuple[int, object, object]]:
    """``(line, file name, caption)`` of each line."""
    rows = []
    for number, line in enumerate(content.split("\n"), 1):  # a text may hold what else Python takes for an end of line
        if line.strip():
            try:
                item = json.loads(line)
                rows.append((number, item["file_name"], item["text"]))
            except (ValueError, KeyError, TypeError) as e:
                needs = '{"file_name": "a.png", "text": "..."}'
                raise ValueError(f"{location}:{number}: needs {needs}: {' '.join(str(e).split())}") from e
    return rows


def parse_csv(content: str, location: str) -> list[tuple[int, object, object]]:
    """``(line, file name, caption)`` of each row."""
    rows = csv.DictReader(io.StringIO(content, newline=""))
    if missing := {"file_name", "text"} - set(rows.fieldnames or ()):
        raise ValueError(f"{location}: has no column {min(missing)}; needs file_name and text")
    return [(rows.line_num, row["file_name"], row["text"]) for row in rows]


TABLES: Mapping[str, Callable[[str, str], list[tuple[int, object, object]]]] = {
    "captions.jsonl": parse_jsonl,
    "metadata.jsonl": parse_jsonl,
    "metadata.csv": parse_csv,
}


def decode_utf8(content: bytes, location: str) -> str:
    """``content`` as text. Raise ``ValueError`` if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{location}: is not UTF-8, at byte {e.start}") from e


def collapse_space(caption: str) -> str:
    """``caption`` in one line, without space around it or doubled within."""
    return " ".join(caption.split())
