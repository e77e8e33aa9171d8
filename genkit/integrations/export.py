"""Writing a run for use elsewhere: :func:`export`. The formats are in ``genkit.integrations.FORMATS``."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from genkit import config
from genkit.backbones.lora import GuidanceLoRA, LoRA
from genkit.config import table, to_yaml
from genkit.config.numbers import CheckpointStep
from genkit.config.paths import PathText
from genkit.core import Codec, Spec
from genkit.core.files import atomic_directory, atomic_write
from genkit.data.codecs import LearnedCodec
from genkit.training.checkpoint import save_checkpoint
from genkit.training.directory import USED_WITH
from genkit.training.loop import initial_state
from genkit.training.run import Run, load_run
from genkit.training.settings import TrainSettings


class ExportFormat(ABC):
    """A way to write a run into a folder: an entry of ``FORMATS``, a frozen dataclass of settings."""

    single_file: ClassVar[str | None] = None
    """the only file that it writes, for formats that may be written as a file of another name"""

    @abstractmethod
    def write(self, run: Run, folder: Path) -> list[str]:
        """Fill an empty folder, and return lines that say how to use it, in which ``{out}`` stands for the folder.

        Raise ``ValueError`` if the format cannot hold the run.
        """


@dataclass(frozen=True)
class StandaloneRun(ExportFormat):
    """A run with one checkpoint of the exported weights only; a LoRA is merged into its base, and an adapter of
    guidance, which cannot be, is stored beside it."""

    def write(self, run: Run, folder: Path) -> list[str]:
        lora = LoRA()
        if isinstance(run.config.lora, GuidanceLoRA):
            lora = scaled_adapter(run.config.lora, run.adapter_scale)
        cfg = replace(run.config, ema=(), power_ema=(), lora=lora, base_dtype="fp32", quantize=None, init=None)
        write_run(folder, cfg, run.nets, run.spec, run.codec, run.step)
        for name in USED_WITH:
            if file := run.file_used_with(name):
                shutil.copyfile(file, folder / name)
        if isinstance(run.codec, LearnedCodec):
            shutil.copytree(run.directory / "codec", folder / "codec")
        return ["genkit sample {out}", "python -c \"import genkit; run = genkit.load('{out}')\""]


def scaled_adapter(lora: GuidanceLoRA, scale: float) -> GuidanceLoRA:
    """The settings of an adapter of guidance whose change is ``scale`` times as large. ``ValueError`` unless it is
    positive."""
    if not scale > 0:
        raise ValueError(f"lora_scale: given {scale:g}; an adapter of guidance needs a scale above 0, or export the "
                         "run that it adapts")  # fmt: skip
    assert lora.rank is not None
    return lora if scale == 1 else replace(lora, alpha=(lora.alpha or lora.rank) * scale)


def write_run(
    folder: Path, settings: TrainSettings, nets: Mapping[str, nn.Module], spec: Spec, codec: Codec, step: int
) -> None:
    """Fill ``folder`` with the settings of a run and one checkpoint, the networks ``nets``."""
    state = initial_state(settings.objective, dict(nets), settings)
    state.step = step
    (folder / "config.yaml").write_text(to_yaml(settings))
    save_checkpoint(folder, state, settings.objective, spec, codec, seed=settings.seed, keep=1, announce=False)


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Which weights of a run are written, and in which format."""

    to: ExportFormat = table("genkit.integrations:FORMATS", "diffusers", kind="genkit.integrations.export:ExportFormat")
    """Format: diffusers, a pipeline; run, a run of the exported weights only; lora, the adapter of a LoRA run;
    torchscript, torch.export or onnx, a policy as one graph."""
    ema: str | None = None
    """Averaged weights, by decay, or power-WIDTH of a run with --power-ema. None: the slowest average; "none": the raw
    weights."""
    step: CheckpointStep | None = None
    """Checkpoint, by its step or "best" (of train --keep-best). None: the newest."""
    lora: PathText | None = None
    """Merge the adapter of this run of --lora.rank, or of a LoRA file (.safetensors), into the weights."""
    lora_scale: float | None = None
    """Scale of that adapter, or of a LoRA run's own; None: 1."""


@dataclass(frozen=True)
class Exported:
    """A run that was exported."""

    path: Path
    run: Run
    instructions: tuple[str, ...]
    """lines that say how to use it"""


def write_to(path: Path, form: ExportFormat, run: Run) -> list[str]:
    """Write a run to ``path``, completely or not at all: a folder, or a file if the format has its suffix."""
    if not (form.single_file and path.suffix == Path(form.single_file).suffix):
        with atomic_directory(path) as part:
            return form.write(run, part)
    with atomic_write(path) as part, tempfile.TemporaryDirectory() as folder:
        lines = form.write(run, Path(folder))
        shutil.copyfile(Path(folder) / form.single_file, part)
        return lines


def export(run: str | Path | Run, out: str | Path, settings: ExportSettings | None = None, **changes: Any) -> Exported:
    """Write a run into the new folder ``out``, completely or not at all.

    ``changes`` are settings by name: ``export(run, out, to="run")``; those of loading have no effect on an opened
    ``run``. ``ValueError`` if ``out`` is not empty, or the format cannot hold the run.
    """
    settings = config.override(settings or ExportSettings(), **changes)
    path = Path(out).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"out: given {path}, which is there already; name a new folder")
    if not isinstance(run, Run):
        options = {"adapter": settings.lora, "adapter_scale": settings.lora_scale}
        run = load_run(run, ema=settings.ema, step=settings.step, device="cpu", **options)  # type: ignore[arg-type]
    with torch.no_grad():
        lines = write_to(path, settings.to, run)
    return Exported(path, run, tuple(line.replace("{out}", str(path)) for line in lines))
