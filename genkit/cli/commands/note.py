"""`genkit note RUN`: write or show the notes and tags of a run."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from genkit.cli.escape import printable
from genkit.cli.output import console
from genkit.config import parse
from genkit.config.paths import PathText
from genkit.training.annotations import Annotations, NoteText, TagText, annotate


@dataclass(frozen=True)
class Note:
    """Add a note or tags to a run, also while it is being trained; without either, show them. They are kept in
    notes.json of its directory, and genkit info, list and report show them."""

    run: Positional[PathText]
    """The run's directory, such as runs/latest."""
    text: Positional[NoteText | None] = None
    """The note, in quotes."""
    tag: tuple[TagText, ...] = ()
    """Tags to add."""
    remove_tag: tuple[str, ...] = ()
    """Tags to take away."""
    clear: bool = False
    """Take all earlier notes away."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Note, argv, prog="genkit note", description=Note.__doc__)
    annotations = annotate(
        command.run, command.text, tags=command.tag, remove_tags=command.remove_tag, clear_notes=command.clear
    )
    lines = list_annotations(annotations)
    for name, value in lines:
        console.print(f"{name:<6} {value}", markup=False)
    if not lines:
        console.print("no notes and no tags", markup=False)
    return 0


def list_annotations(annotations: Annotations) -> list[tuple[str, str]]:
    """``("tags", "a b"), ("note", "TIME  TEXT"), ...``: what there is, for a terminal."""
    lines = [("tags", " ".join(annotations.tags))] if annotations.tags else []
    for note in annotations.notes:
        lines.append(("note", f"{note.time[:16].replace('T', ' ')}  {printable(note.text)}".strip()))
    return lines
