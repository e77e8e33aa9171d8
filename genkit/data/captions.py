"""Captions: wordings over the names of classes, or texts that lie beside the pictures.

A picture ``a.png`` has its caption in ``a.txt``; or one file at the top of the folder, or zip, has them all:
``captions.jsonl`` or ``metadata.jsonl``, with a line ``{"file_name": "a.png", "text": "a handwritten seven"}`` for
each, or ``metadata.csv`` with columns ``file_name`` and ``text``, as Hugging Face's imagefolder has it.
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

from genkit.core import Batch, Condition, Draw, Label, Text, Tokens
from genkit.data import text

FILES = "files"  # the word of --data.captions for captions beside the pictures
SHOWN = 10  # captions that a model keeps as examples


class Said(NamedTuple):
    """A caption, and where it stands."""

    text: str
    where: str


Texts = Callable[[], Sequence[Said]]


@dataclass(frozen=True, eq=False)
class Captions:
    """What can be said of each sample: ``rows`` Int ``[N, W]`` of ``table``, whose tensors have a row a caption."""

    rows: Tensor
    table: Mapping[str, Tensor]

    def add(self, batch: Batch, indices: Tensor, draw: Draw) -> Batch:
        """``batch`` with a caption of each sample, one of the W by ``draw``."""
        rows = self.rows.index_select(0, indices)
        num = rows.shape[1]
        pick = (draw.uniform(1) * num).long().clamp(max=num - 1) if num > 1 else torch.zeros(len(rows), 1).long()
        chosen = rows.gather(1, pick)[:, 0]
        return replace(batch, cond={**batch.cond, **{k: v.index_select(0, chosen) for k, v in self.table.items()}})


def captioned(
    asked: tuple[str, ...],
    cond: Mapping[str, Tensor],
    kinds: Mapping[str, Condition],
    words: tuple[str, ...],
    length: int,
    encoder: str | None,
    texts: Texts | None,
) -> tuple[Captions, Condition] | None:
    """The captions of ``--data.captions``, and their kind of condition; None where none are asked for."""
    if not asked:
        if encoder is not None:
            raise ValueError(f"encoder: given {encoder}, but no captions to encode; give --data.captions")
        return None
    if FILES in asked and len(asked) > 1:
        raise ValueError(f"captions: given {FILES} and wordings; choose one of them")
    if asked == (FILES,):
        found, rows = of_files(texts)
        shown = [said.text for said in found if said.text]
        shown = shown[:: max(1, len(shown) // SHOWN)][:SHOWN]
    else:
        found, rows = of_wordings(asked, cond, kinds, words)
        shown = [found[c * len(asked) + c % len(asked)].text for c in range(min(len(found) // len(asked), SHOWN))]
    unique = [said.text for said in found]
    if encoder is None:
        for said in found:
            if (size := len(said.text.encode())) > length:
                raise ValueError(f"{said.where}: this caption has {size} bytes; --data.text-length is {length}")
        return Captions(rows, {"text": text.to_bytes(unique, length)}), Text(length, tuple(shown))
    frozen = text.open_encoder(encoder)
    kind = Tokens(frozen.dim, text.place(encoder), frozen.sha256, frozen.length, tuple(shown))
    return Captions(rows, text.encoded(frozen, unique)), kind


def of_wordings(
    wordings: tuple[str, ...], cond: Mapping[str, Tensor], kinds: Mapping[str, Condition], words: tuple[str, ...]
) -> tuple[list[Said], Tensor]:
    """Every wording of every class, and which belong to each sample."""
    for wording in wordings:
        if "{label}" not in wording:
            allowed = f"wordings that hold {{label}}, or the word {FILES}"
            raise ValueError(f"captions: given {wording!r}; allowed: {allowed}, for captions beside the pictures")
    name, kind = next(((k, v) for k, v in kinds.items() if isinstance(v, Label)), (None, None))
    if name is None or kind is None:
        raise ValueError(f"captions: given {wordings[0]!r}, but these data have no classes; try {FILES}")
    named = words or kind.names or tuple(map(str, range(kind.num)))
    found = [Said(w.replace("{label}", c), f"captions: {w!r} of {c!r}") for c in named for w in wordings]
    return found, cond[name][:, None] * len(wordings) + torch.arange(len(wordings))


def of_files(texts: Texts | None) -> tuple[list[Said], Tensor]:
    """The captions without repetitions, and which is that of each sample."""
    if texts is None:
        raise ValueError(f'captions: given {FILES}, but these data are no files; give a wording: "a {{label}}"')
    every = texts()
    unique = list({said.text: said for said in reversed(every)}.values())[::-1]
    place = {said.text: i for i, said in enumerate(unique)}
    return unique, torch.tensor([[place[said.text]] for said in every])


# --------------------------------------------------------------------------------------------- beside the pictures
def beside(pictures: Sequence[str], others: Sequence[str], read: Callable[[str], bytes], root: str) -> list[Said]:
    """The caption of each picture. ``ValueError`` names the file where one is missing, double, or of no picture.

    ``pictures`` and ``others`` are the names below ``root``, ``read`` gives the bytes of one of the latter.
    """
    tables = [name for name in TABLES if name in others]
    if len(tables) > 1:
        raise ValueError(f"{root}/{tables[0]}: lies beside {tables[1]}; keep one of them")
    listed = in_table(tables[0], read, root) if tables else in_texts(pictures, others, read, root)
    known = set(pictures)
    for name, said in listed.items():
        if name not in known:
            raise ValueError(f"{said.where}: captions {name}, and there is no such picture in {root}")
    for name in pictures:
        if name not in listed:
            stands = f"in {tables[0]}" if tables else f"beside it, {PurePosixPath(name).stem}.txt"
            raise ValueError(f"{root}/{name}: has no caption {stands}")
    return [listed[name] for name in pictures]


def in_texts(
    pictures: Sequence[str], others: Sequence[str], read: Callable[[str], bytes], root: str
) -> dict[str, Said]:
    """``NAME.txt`` beside ``NAME.png``."""
    of: dict[str, str] = {}
    for name in pictures:
        stem = str(PurePosixPath(name).with_suffix(""))
        if stem in of:
            raise ValueError(f"{root}/{stem}.txt: would caption both {of[stem]} and {name}")
        of[stem] = name
    out = {}
    for name in others:
        path = PurePosixPath(name)
        if path.suffix.lower() == ".txt":
            stem, where = str(path.with_suffix("")), f"{root}/{name}"
            out[of.get(stem, f"{stem}.*")] = Said(clean(utf8(read(name), where)), where)
    return out


def in_table(table: str, read: Callable[[str], bytes], root: str) -> dict[str, Said]:
    """A file of names and captions."""
    out: dict[str, Said] = {}
    for line, name, said in TABLES[table](utf8(read(table), f"{root}/{table}"), f"{root}/{table}"):
        where = f"{root}/{table}:{line}"
        if not isinstance(name, str) or not isinstance(said, str):
            raise ValueError(f"{where}: needs file_name and text, both words")
        name = str(PurePosixPath(name.replace("\\", "/")))
        if name in out:
            raise ValueError(f"{where}: captions {name} a second time, after {out[name].where}")
        out[name] = Said(clean(said), where)
    return out


def of_jsonl(content: str, where: str) -> list[tuple[int, object, object]]:
    out = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                item = json.loads(line)
                out.append((number, item["file_name"], item["text"]))
            except (ValueError, KeyError, TypeError) as e:
                needs = '{"file_name": "a.png", "text": "..."}'
                raise ValueError(f"{where}:{number}: needs {needs}: {' '.join(str(e).split())}") from e
    return out


def of_csv(content: str, where: str) -> list[tuple[int, object, object]]:
    rows = csv.DictReader(io.StringIO(content, newline=""))
    if missing := {"file_name", "text"} - set(rows.fieldnames or ()):
        raise ValueError(f"{where}: has no column {min(missing)}; needs file_name and text")
    return [(rows.line_num, row["file_name"], row["text"]) for row in rows]


TABLES: Mapping[str, Callable[[str, str], list[tuple[int, object, object]]]] = {
    "captions.jsonl": of_jsonl,
    "metadata.jsonl": of_jsonl,
    "metadata.csv": of_csv,
}


def utf8(blob: bytes, where: str) -> str:
    try:
        return blob.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{where}: is not UTF-8, at byte {e.start}") from e


def clean(said: str) -> str:
    """One line, without space around."""
    return " ".join(said.split())
