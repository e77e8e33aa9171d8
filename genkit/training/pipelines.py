"""The pipeline that a run began from, of which its directory keeps the scheduler: ``pipeline.json``.

With it ``genkit sample`` draws as the pipeline does: by its solver, on its grid, from the noise z itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit.backbones.encoded_text import EncodedText
from genkit.core import Objective
from genkit.core.files import write_text
from genkit.data.text import read_states
from genkit.data.text_states import TextTable
from genkit.objectives import DDPM, Flow
from genkit.training.directory import find_run
from genkit.training.init_sources import find_source, source_module
from genkit.training.settings import stored_settings

FILE = "pipeline.json"
SAMPLED_AS_PIPELINES = (DDPM, Flow)  # other objectives have steps and grids of their own


@dataclass(frozen=True)
class Pipeline:
    """The scheduler of a pretrained pipeline, and the sampler that draws as it does."""

    kind: str
    """entry of ``INIT_SOURCES``"""
    name: str
    """where the pipeline is, for people"""
    sampler: str
    scheduler: Mapping[str, Any]
    """its settings, as the pipeline has them"""
    explicit: bool = False
    """whether the pipeline gives the scheduler n equal levels from 1 to 1 / n"""
    note: str = ""
    """how the sampler differs from the scheduler, if it does"""

    def times(self, num_steps: int, shape: tuple[int, ...]) -> Tensor:
        """The scheduler's grid for samples of ``shape``, ``[num_steps + 1]``. ``ValueError`` if it has none."""
        return source_module(self.kind).scheduler_times(self, num_steps, shape)

    @property
    def clips(self) -> bool:
        """Whether the scheduler clips predicted data."""
        return bool(self.scheduler.get("clip_sample", self.scheduler["_class_name"] == "DDIMScheduler"))


def read_pipeline(run: Path) -> Pipeline | None:
    """The pipeline that a run began from; None for any other run. ``ValueError`` if the file is damaged."""
    path = run / FILE
    if not path.is_file():
        return None
    try:
        return Pipeline(**json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: is damaged: {e}; restore it, or remove it to sample on other grids") from e


def write_pipeline(run: Path, pipeline: Pipeline | None) -> None:
    """Keep a pipeline in a run directory."""
    if pipeline is not None:
        write_text(run / FILE, json.dumps(asdict(pipeline), indent=1) + "\n")


def pipeline_of_init(init: str | None, objective: Objective) -> Pipeline | None:
    """The pipeline at ``--init``, or the one that the run there began from.

    None without one, and for an ``objective`` on another path than the scheduler's: its times would mean other levels.
    """
    if init is None or type(objective) not in SAMPLED_AS_PIPELINES:
        return None
    source, where = find_source(init)
    if source:
        return source.pipeline(where, objective)
    run = find_run(init)
    theirs = stored_settings(run).objective
    same = type(theirs) in SAMPLED_AS_PIPELINES and getattr(theirs, "path", None) == getattr(objective, "path", None)
    return read_pipeline(run) if same else None


@torch.no_grad()
def set_text_nulls(nets: Mapping[str, nn.Module], known: TextTable | None = None) -> None:
    """Give networks that read words by a pipeline's encoders what these return for no words.

    The encoders are opened unless their states are ``known`` or in the cache. ``ValueError`` if they differ from those
    that read the data.
    """
    for net in nets.values():
        for module in net.modules():
            if isinstance(module, EncodedText):
                module.set_null(read_states(module.encoder, module.sha256, [""], known))
