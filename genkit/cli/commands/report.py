"""`genkit report RUN`: one page that shows what a run did."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from markupsafe import Markup
from rich.console import Console

from genkit import config
from genkit.config import parse
from genkit.core import pictures
from genkit.evaluation.report import page as report
from genkit.objectives.autoencoders.autoencoder import EncoderDecoder
from genkit.training.checkpoint import find_checkpoint
from genkit.training.directory import find_run
from genkit.training.run import load_run
from genkit.training.settings import TrainSettings

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Report:
    """One HTML page of a run: curves, samples, quality, settings; of a code its latent space, drawn on the way. It
    needs no network and no other file."""

    run: Annotated[str, tyro.conf.Positional]
    """A run directory, such as runs/latest."""
    out: str | None = None
    """The page, FILE.html; None: report.html in the run's folder."""
    open: Literal["no", "yes"] = "no"
    """Show it in a browser."""


def main(argv: list[str]) -> int:
    asked = parse(Report, argv, prog="genkit report")
    out = Path(asked.out) if asked.out else find_run(asked.run) / "report.html"
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ValueError(f"out: given {asked.out}; allowed: a file that ends in .html")
    run = find_run(asked.run)
    report.write(report.run_page(run, {"Latent space": latent_space(run)}), out)
    console.print(out, markup=False)
    if asked.open == "yes":
        webbrowser.open(out.resolve().as_uri())
    return 0


# ------------------------------------------------------------------------------------------------- the latent space
def has_code(run: Path) -> bool:
    try:
        return isinstance(
            config.from_dict(TrainSettings, config.load_yaml(run / "config.yaml")).objective, EncoderDecoder
        )
    except ValueError:  # another version's: the page can do without
        return False


def latent_space(run: Path) -> Sequence[Markup]:
    """Of a run with a code: pictures of the newest checkpoint's, which stay in ``space``; a line where there are
    none."""
    if not has_code(run):
        return []
    try:
        paths = drawn(run)
    except ValueError as e:
        return [report.note(f"Not drawn: {e}")]
    shown, _ = report.embed_all((path, name) for name, path in paths.items())
    return [report.frames(shown, "Latent space"), report.note(EXPLAINED)]


EXPLAINED = (
    "Principal directions of the codes of held-out samples, where there are such. Traversals: the most typical sample "
    "in each row moved along one direction, from 2.5 deviations below the mean to 2.5 above, the largest direction "
    "first. Map: every sample's code along the first two, coloured by class; where a model is told the class, its code "
    "need not hold it."
)


def drawn(run: Path) -> dict[str, Path]:
    step = find_checkpoint(run).name
    paths = {name: run / "space" / f"{step}-{name}.png" for name in ("traversals", "map")}
    if not all(path.is_file() for path in paths.values()):
        from genkit.evaluation.report import latent_space as space

        for name, image in space.views(load_run(run)).items():
            pictures.save(image, paths[name])
    return paths
