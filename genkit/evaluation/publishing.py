"""``genkit push`` and ``genkit pull``: runs on the Hugging Face Hub, with a model card."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genkit import config
from genkit.config.numbers import CheckpointStep
from genkit.core.files import write_text
from genkit.evaluation.model_card import write_model_card
from genkit.evaluation.run_records import read_run
from genkit.integrations.export import StandaloneRun, export
from genkit.integrations.hub import download_run, parse_name, upload_run

logger = logging.getLogger("genkit")


@dataclass(frozen=True, kw_only=True)
class PushSettings:
    """Which weights of a run are uploaded, and to whom they are shown."""

    ema: str | None = None
    """Averaged weights, by decay. None: the slowest average; "none": the raw weights."""
    step: CheckpointStep | None = None
    """Checkpoint, by its step or "best" (of train --keep-best). None: the newest."""
    private: bool = False
    """Only you see it, if it is new on the hub."""
    message: str = ""
    """Of the commit; empty: run and step."""


@dataclass(frozen=True)
class Pushed:
    """A run that was uploaded."""

    url: str
    files: tuple[str, ...]
    """names of the uploaded files"""
    local_paths: tuple[str, ...]
    """settings of config.yaml that name folders of this machine: ``data.root=/home/me/photos``"""


def push(run: str | Path, name: str, settings: PushSettings | None = None, **changes: Any) -> Pushed:
    """Upload a run to the hub as OWNER/NAME: one checkpoint of the exported weights, the newest picture of its samples,
    its evaluations and a model card that is written from them.

    ``changes`` are settings by name. ``ValueError`` if the run cannot be loaded, or the hub does not take it.
    """
    settings = config.override(settings or PushSettings(), **changes)
    repo, _ = parse_name(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        exported = export(run, folder, to=StandaloneRun(), ema=settings.ema, step=settings.step)
        record, directory = read_run(exported.run.directory), exported.run.directory
        for card in record.cards:
            if card.path:
                (folder / "eval").mkdir(exist_ok=True)
                shutil.copyfile(card.path, folder / "eval" / card.path.name)
        if pictures := sorted(directory.glob("samples/step-*.png")):
            shutil.copyfile(pictures[-1], folder / "samples.png")
        write_text(folder / "README.md", write_model_card(record, repo, exported.run.weights, picture=bool(pictures)))
        files = tuple(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
        url = upload_run(
            folder, name, settings.message or f"{directory.name}, {exported.run.weights}", settings.private
        )
    return Pushed(url, files, local_paths(record.settings))


def local_paths(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings whose values are absolute paths, as ``name=value``."""
    texts = {k: v for k, v in settings.items() if isinstance(v, str)}
    return tuple(f"{k}={v}" for k, v in texts.items() if Path(v.rpartition(":")[2]).is_absolute())


def pull(name: str, out: str | Path | None = None) -> Path:
    """Download the run OWNER/NAME, or OWNER/NAME@REVISION, of the hub into the new directory ``out`` (None:
    ``runs/NAME``), completely or not at all, and return it.

    Only what a run consists of is downloaded: YAML, JSON, safetensors, a picture and the card. Classes of other
    packages that its configuration names are imported only with trust, as for any run. ``ValueError`` if ``out`` is
    there already, or the hub has no such run.
    """
    repo, _ = parse_name(name)
    target = Path(out).expanduser() if out else Path("runs") / repo.partition("/")[2]
    if target.exists():
        raise ValueError(f"out: given {target}, which is there already; name a new directory")
    return download_run(name, target)
