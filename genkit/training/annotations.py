"""Notes and tags of a run, which a person wrote: ``notes.json`` in its directory.

{"notes": [{"time": "2026-01-31T12:00:00+00:00", "text": "half the learning rate"}], "tags": ["baseline"]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from pydantic import AfterValidator

from genkit.core.files import write_text
from genkit.training.directory import find_run

FILE = "notes.json"
MAX_TAG = 60  # characters
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but tab and line feed


def check_note(text: str) -> str:
    """``text`` without surrounding space. ``ValueError`` if it is empty or holds a control character."""
    if not text.strip() or CONTROL.search(text):
        raise ValueError("a note is not empty and holds no control character")
    return text.strip()


def check_tag(tag: str) -> str:
    """``tag`` if it is one word. ``ValueError`` if it is empty, long, or holds a space, comma or control character."""
    if not tag or len(tag) > MAX_TAG or re.search(r"[\s,=<>]", tag) or CONTROL.search(tag):
        raise ValueError(f"a tag is one word of at most {MAX_TAG} characters, without commas, = and < >")
    return tag


NoteText = Annotated[str, AfterValidator(check_note)]
"""The type of a setting that is a note."""
TagText = Annotated[str, AfterValidator(check_tag)]
"""The type of a setting that is a tag."""


@dataclass(frozen=True)
class Note:
    """One remark about a run."""

    text: str
    time: str = ""
    """when it was written, ISO 8601; empty if that is not known"""


@dataclass(frozen=True)
class Annotations:
    """The notes and tags of a run."""

    notes: tuple[Note, ...] = ()
    """oldest first"""
    tags: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The annotations as ``notes.json`` has them."""
        return {"notes": [{"time": note.time, "text": note.text} for note in self.notes], "tags": list(self.tags)}


def read_annotations(run: Path, damaged: Annotations | None = Annotations()) -> Annotations:
    """The notes and tags of a run directory; none if it has no ``notes.json``, and ``damaged`` if that is unreadable.

    Control characters in the file of somebody else are replaced. Raises ``ValueError`` for an unreadable file if
    ``damaged`` is None.
    """
    file = run / FILE
    if not file.is_file():
        return Annotations()
    try:
        stored = json.loads(file.read_bytes())
        notes = tuple(Note(clean(note["text"]), clean(note.get("time", ""))) for note in stored.get("notes", []))
        return Annotations(notes, tuple(clean(tag) for tag in stored.get("tags", [])))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if damaged is None:
            raise ValueError(f"{file}: cannot be read as notes; repair it, or move it away") from None
        return damaged


def clean(text: object) -> str:
    """``text`` with control characters replaced by a question mark. ``TypeError`` if it is no string."""
    if not isinstance(text, str):
        raise TypeError("needs a string")
    return CONTROL.sub("?", text)


def annotate(
    run: str | Path,
    note: str | None = None,
    *,
    tags: Iterable[str] = (),
    remove_tags: Iterable[str] = (),
    clear_notes: bool = False,
) -> Annotations:
    """Add a ``note`` and ``tags`` to a run, also while it is being trained; returns all that it has.

    ``remove_tags`` are taken away first, and so are all notes with ``clear_notes``. ``ValueError`` for an empty note, a
    tag that is not one word, a tag to remove that the run does not have, or a ``notes.json`` that cannot be read.
    """
    directory = find_run(run)
    added, removed = [check_tag(tag) for tag in tags], list(remove_tags)
    with FileLock(directory / ".notes.lock"):
        current = read_annotations(directory, damaged=None)
        if unknown := [tag for tag in removed if tag not in current.tags]:
            known = ", ".join(current.tags) or "none"
            raise ValueError(f"remove_tags: given {unknown[0]}; {directory.name} has {known}")
        notes = () if clear_notes else current.notes
        if note is not None:
            notes += (Note(check_note(note), datetime.now().astimezone().isoformat(timespec="seconds")),)
        kept = [tag for tag in current.tags if tag not in removed]
        new = Annotations(notes, tuple(dict.fromkeys([*kept, *added])))
        if new != current:
            write_text(directory / FILE, json.dumps(new.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return new
