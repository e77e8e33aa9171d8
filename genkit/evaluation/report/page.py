"""The page of a run, of several runs or of cards, in one HTML file.

It is made from ``config.yaml``, ``log.jsonl``, ``samples/*.png``, ``eval/*.json``, ``rollouts/``, ``notes.json`` and
``env.json`` of a run, of which only the first is required. The page says what is missing or damaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from genkit import __version__
from genkit.core import pictures
from genkit.core.files import refuse_foreign, write_text
from genkit.core.links import follow_links
from genkit.evaluation.cards import Card
from genkit.evaluation.listing import find_runs
from genkit.evaluation.report import latent_space
from genkit.evaluation.report.comparison import card_sections, comparison_sections
from genkit.evaluation.report.curves import finetuning_keys, finetuning_parts, training_parts
from genkit.evaluation.report.html import embed_pictures, render, render_gallery, render_note, render_page
from genkit.evaluation.report.quality import quality_parts
from genkit.evaluation.report.records import read_log
from genkit.evaluation.report.rollouts import rollout_parts
from genkit.evaluation.report.samples import other_sample_parts, training_sample_parts
from genkit.evaluation.report.summary import annotation_parts, environment_parts, summary_tiles
from genkit.evaluation.report.tuning import is_study, render_study
from genkit.evaluation.run_records import RunRecord, read_cards, read_run
from genkit.objectives.autoencoders.autoencoder import EncoderDecoder
from genkit.training.checkpoint import find_checkpoint
from genkit.training.directory import find_run
from genkit.training.run import load_run
from genkit.training.settings import stored_settings

MAX_NAMES = 3  # runs whose names are in the name of a page
LATENT_SPACE_NOTE = (
    "Principal directions of the codes of held-out samples (of training samples if none are held out). Traversals: the "
    "most typical sample in each row, moved along one direction from 2.5 standard deviations below the mean to 2.5 "
    "above, largest direction first. Map: the codes of all samples along the first two directions, coloured by class; "
    "a model that is conditioned on the class need not encode it."
)


@dataclass
class Sources:
    """What a page is about."""

    runs: list[RunRecord] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    """of files and folders that are no runs"""
    errors: list[str] = field(default_factory=list)
    """a line for each file in these folders that is no card"""


def write_report(*sources: str | Path, out: str | Path | None = None) -> Path:
    """Write the HTML page of a run, of several runs side by side, or of cards, and return its path.

    Each of the ``sources`` is a run's directory, a directory of runs, a card or a folder of cards; an only one may be
    the directory of a study of genkit tune. ``out`` defaults to
    ``report.html`` in the only source, or to a file named after the runs in the parent directory of the first. If an
    only run has a latent code, its pictures are drawn and kept in ``space/``. ``ValueError`` if a source does not
    exist, or ``out`` is not an HTML file's name.
    """
    folder = follow_links(Path(sources[0]).expanduser()) if len(sources) == 1 else Path()
    if is_study(folder):
        path = Path(out).expanduser() if out else folder / "report.html"
        require_page_name(path, out)
        return write_text(path, render_study(folder))
    opened = open_sources(sources)
    path = Path(out).expanduser() if out else default_page(sources, opened)
    require_page_name(path, out)
    if len(opened.runs) == 1 and not opened.cards:
        run = opened.runs[0]
        return write_text(path, render_run(run.path, {"Latent space": latent_space_parts(run.path)}))
    return write_text(path, render_sources(opened))


def require_page_name(path: Path, out: str | Path | None) -> None:
    """``ValueError`` if a page cannot be written to ``path``."""
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise ValueError(f"out: given {out}; allowed: a file that ends in .html")
    refuse_foreign(path)


def open_sources(sources: Sequence[str | Path]) -> Sources:
    """Read runs and cards. ``ValueError`` for a source that is neither, or a run whose configuration is damaged."""
    opened = Sources()
    for source in sources:
        path = follow_links(Path(source).expanduser())
        if path.is_file():
            opened.cards.append(Card.load(path))
        elif path.is_dir() and not (path / "config.yaml").is_file():
            runs = find_runs([path])
            opened.runs += map(read_run, runs)
            if not runs:
                cards, errors = read_cards(path)
                opened.cards, opened.errors = opened.cards + cards, opened.errors + errors
                if not cards:
                    raise ValueError(f"report: given {source}, which holds neither runs nor cards of genkit eval")
        else:
            opened.runs.append(read_run(find_run(source)))
    if not opened.runs and not opened.cards:
        raise ValueError("report: given nothing; needs a run, such as runs/latest")
    return opened


def default_page(sources: Sequence[str | Path], opened: Sources) -> Path:
    """Where a page is written if no file is named."""
    if len(sources) == 1:
        path = opened.runs[0].path if len(opened.runs) == 1 else follow_links(Path(sources[0]).expanduser())
        return path.with_suffix(".html") if path.is_file() else path / "report.html"
    names = [run.name for run in opened.runs]
    parent = opened.runs[0].path.parent if opened.runs else Path(sources[0]).expanduser().parent
    label = "-".join(names) if 0 < len(names) <= MAX_NAMES else f"{len(names) or len(opened.cards)}"
    return parent / f"report-{label}.html"


def render_run(run: str | Path, extra_sections: Mapping[str, Sequence[Markup]] | None = None) -> str:
    """The page of a run, with ``extra_sections`` after the samples. ``ValueError`` if there is no such run, or its
    configuration is damaged."""
    record = read_run(run)
    if record.problem:
        raise ValueError(f"run: {record.path}: {record.problem}")
    directory, log = record.path, read_log(record.path / "log.jsonl")
    lead = f"{record.objective} on {record.data}, network {record.backbone}; report by genkit {__version__}"
    tuning = finetuning_parts(record, log)
    settings = [name for name in ("config.yaml", "finetune.yaml") if (directory / name).is_file()]
    sections = [
        ("", [*annotation_parts(record), summary_tiles(record, log)]),
        ("Quality", quality_parts(record.cards, record.card_files[1])),
        ("Rollouts", rollout_parts(record)),
        ("Fine-tuning", tuning),
        ("Samples over time", training_sample_parts(directory)),
        ("Further samples", other_sample_parts(directory)),
        *(extra_sections or {}).items(),
        ("Training", training_parts(log, record.cards, finetuning_keys() if tuning else ())),
        ("Configuration", [fold_file(directory / name) for name in settings]),
        ("Environment", environment_parts(record)),
    ]
    return render_page(directory.name, lead, sections)


def render_sources(opened: Sources) -> str:
    """The page of several runs, or of cards."""
    if not opened.runs:
        lead = f"Results of genkit eval; report by genkit {__version__}"
        return render_page(f"{len(opened.cards)} cards", lead, card_sections(opened.cards, opened.errors))
    logs = [read_log(run.path / "log.jsonl") for run in opened.runs]
    names = [run.name for run in opened.runs]
    title = " and ".join(names) if len(names) == 2 else f"{len(names)} runs" if len(names) > 1 else names[0]
    lead = f"Side by side; report by genkit {__version__}"
    return render_page(title, lead, comparison_sections(opened.runs, logs, opened.cards, opened.errors))


def fold_file(path: Path) -> Markup:
    """The text of a file, shown when it is asked for."""
    return render("fold", name=path.name, inner=render("code", name=path.name, text=path.read_text("utf-8")))


# --------------------------------------------------------------------------------------------------- latent space
def latent_space_parts(run: Path) -> list[Markup]:
    """Pictures of the latent space, if the run has a code; a note if they cannot be drawn."""
    if not has_code(run):
        return []
    try:
        paths = draw_latent_space(run)
    except ValueError as e:
        return [render_note(f"Not drawn: {e}")]
    images, _ = embed_pictures((path, name) for name, path in paths.items())
    return [render_gallery(images, "Latent space"), render_note(LATENT_SPACE_NOTE)]


def has_code(run: Path) -> bool:
    """Whether the run's objective is an autoencoder; False if its configuration is of another version."""
    try:
        return isinstance(stored_settings(run).objective, EncoderDecoder)
    except ValueError:
        return False


def draw_latent_space(run: Path) -> dict[str, Path]:
    """The pictures of the newest checkpoint's latent space, drawn on the first call and kept in ``space/``."""
    step = find_checkpoint(run).name
    paths = {name: run / "space" / f"{step}-{name}.png" for name in ("traversals", "map")}
    if not all(path.is_file() for path in paths.values()):
        for name, image in latent_space.latent_figures(load_run(run)).items():
            pictures.save_image(image, paths[name])
    return paths
