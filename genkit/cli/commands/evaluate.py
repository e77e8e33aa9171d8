"""`genkit eval`: measure samples of a run, a folder, an npz or a data set, and save the card; or compare two cards."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace

from rich.table import Table
from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import parse
from genkit.config.paths import PathText
from genkit.core.files import refuse_foreign
from genkit.evaluation import Card, EvaluationSettings, compare, evaluate_all, find_card
from genkit.evaluation.cards import version_differences
from genkit.training.distributed import is_main_process

OVERLAP = {True: "overlap", False: "disjoint", None: "unknown"}


@dataclass(frozen=True)
class Evaluate(EvaluationSettings):
    """Measure samples against a reference: of a run, of a folder, zip or npz, or of a data set such as cifar10:test."""

    source: Positional[tuple[PathText, ...]] = ()
    """RUN, or A B: the samples, and the reference; with --compare two cards or runs."""
    compare: bool = False
    """Show two cards side by side; refused if they differ in more than the weights."""
    out: PathText | None = None
    """The card's file; None: in the run's eval folder; the card of stored samples is only printed."""
    json: bool = False
    """Print only JSON."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Evaluate, argv, prog="genkit eval", description=Evaluate.__doc__)
    if command.compare:
        return compare_cards(command)
    source, *reference = command.source or ("",)
    if not source or len(reference) > 1 or (reference and command.reference):
        raise ValueError(f"eval: given {' '.join(command.source) or 'nothing'}; needs RUN, or A B, or A --reference B")
    if reference:
        command = replace(command, reference=reference[0])
    if command.out:
        refuse_foreign(command.out)
    if command.out and command.further_features:
        raise ValueError("out: is one file, and further_features give a card each; leave --out out, they are saved "
                         "in the run's eval folder")  # fmt: skip
    made = evaluate_all(source, command)
    if is_main_process():
        for i, card in enumerate(made):
            save_and_print(card, command if i == 0 else replace(command, save_stats=None))
    return 0


def save_and_print(card: Card, command: Evaluate) -> None:
    """Save the card, and print it with the paths of what was written."""
    path = card.save(command.out) if command.out or card.path else None
    if command.json:
        print(json.dumps(card.to_dict(), allow_nan=False))
        return
    console.print(card.summary(), markup=False)
    for written in (command.save_stats, path):
        if written:
            console.print(written, markup=False)


def compare_cards(command: Evaluate) -> int:
    """Print two cards side by side."""
    read = replace(Evaluate(), source=command.source, compare=True, json=command.json)
    if unread := [f.name for f in fields(command) if getattr(command, f.name) != getattr(read, f.name)]:
        raise ValueError(f"{unread[0]}: given with --compare, which shows two cards as they are; measure with it "
                         "first, or leave it out")  # fmt: skip
    if len(command.source) != 2:
        raise ValueError(f"compare: given {len(command.source)} cards or runs; needs two: genkit eval --compare A B")
    paths = [find_card(name) for name in command.source]
    a, b = (Card.load(path) for path in paths)
    comparisons = compare(a, b)
    if command.json:
        rows = [comparison.to_dict() for comparison in comparisons]
        print(json.dumps({"a": str(paths[0]), "b": str(paths[1]), "metrics": rows}))
        return 0
    table = Table("metric", "A", "B", "B - A", "intervals")
    for c in comparisons:
        table.add_row(a.title(c.metric), str(c.a), str(c.b), f"{c.b.value - c.a.value:+.4g}", OVERLAP[c.overlap])
    for letter, path in zip("AB", paths, strict=True):
        console.print(f"{letter}  {path}", markup=False)
    console.print(table)
    for difference in version_differences(a, b):
        console.print(f"note: {difference}", markup=False)
    return 0
