"""Where training may start from (``--init``): another run, or KIND:WHERE of a registered foreign format."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor, nn

from genkit import config
from genkit.config.trust import require_trust
from genkit.core import Objective
from genkit.objectives.matching.matching import Matching
from genkit.training.directory import find_run
from genkit.training.settings import TrainSettings, stored_settings

if TYPE_CHECKING:
    from genkit.training.pipelines import Pipeline


class InitSource(Protocol):
    """A module that serves ``--init KIND:WHERE``."""

    def init_from(self, nets: Mapping[str, nn.Module], where: str, note: Callable[[str], None] = ...) -> dict[str, str]:
        """Load the weights at ``where`` into ``nets`` and return ``{"run": ..., "weights": ...}``, their origin."""
        ...

    def init_defaults(self, where: str) -> dict[str, Any]:
        """Entries of ``config.yaml`` (objective, backbone, codec) that fit these weights."""
        ...

    def canonical_name(self, where: str) -> str:
        """``where`` as it is stored in a configuration: independent of the working directory."""
        ...

    def text_encoder(self, where: str) -> str | None:
        """The text encoder that reads captions for these weights, as ``--data.encoder`` names it; None: it has none."""
        ...

    def pipeline(self, where: str, objective: Objective) -> Pipeline | None:
        """The scheduler at ``where``; None if there is none, or it does not go with the path of ``objective``."""
        ...

    def scheduler_times(self, pipeline: Pipeline, num_steps: int, shape: tuple[int, ...]) -> Tensor:
        """The grid ``[num_steps + 1]`` of a pipeline's scheduler, for samples of ``shape``."""
        ...

    def init_note(self, where: str, objective: Objective) -> str | None:
        """A remark for the user if ``objective`` differs from the one these weights were trained by."""
        ...


INIT_SOURCES = {
    "diffusers": "genkit.integrations.diffusers_weights"
}  # modules of a higher room, imported when they are named


def source_module(kind: str) -> InitSource:
    """The source of a kind, an entry of ``INIT_SOURCES``."""
    return cast(InitSource, importlib.import_module(INIT_SOURCES[kind]))


def find_source(init: str) -> tuple[InitSource | None, str]:
    """The source that serves ``init``, and its argument; ``(None, init)`` for a run directory."""
    kind, colon, where = init.partition(":")
    if colon and kind in INIT_SOURCES:
        return source_module(kind), where
    return None, init


def init_defaults(init: str) -> dict[str, Any]:
    """The objective and backbone blocks that training with ``--init`` uses unless the user names others."""
    source, where = find_source(init)
    if source:
        return source.init_defaults(where)
    stored = config.load_yaml(find_run(init) / "config.yaml")
    blocks = {k: stored[k] for k in ("objective", "backbone") if k in stored}
    require_trust(TrainSettings, blocks, init)
    return blocks


def require_start(settings: TrainSettings) -> None:
    """``ValueError`` if the objective learns from a run and none is named, or if an adapter would stand in its way."""
    if not settings.objective.starts_from:
        return
    kind = type(settings.objective).__name__
    if not settings.init:
        raise ValueError(f"init: {kind} learns from a trained run; name it with --init RUN")
    if settings.lora.active:
        raise ValueError(f"lora: given with {kind}, which copies whole networks; leave it out")


def canonical_init(init: str) -> str:
    """``--init`` as config.yaml stores it: independent of the working directory."""
    source, where = find_source(init)
    return init.removesuffix(where) + source.canonical_name(where) if source else str(find_run(init))


def init_notes(init: str, objective: Objective) -> list[str]:
    """Remarks for the user about training these weights by another objective than their own."""
    source, where = find_source(init)
    note = source.init_note(where, objective) if source else change_of_meaning(init, objective)
    return [note] if note else []


def change_of_meaning(init: str, objective: Objective) -> str | None:
    """A remark if the network of the run ``init`` predicts something else, or on another path, than ``objective``
    takes its output for."""
    theirs = stored_settings(find_run(init)).objective
    if not isinstance(theirs, Matching) or not isinstance(objective, Matching):
        return None
    before, after = ((m.parametrization, m.path) for m in (theirs, objective))
    if before == after:
        return None
    trained, taken = (f"{type(prediction).__name__} on the path {path}" for prediction, path in (before, after))
    return f"{init} was trained to predict {trained}; continuing with {taken}: at first its output means something else"
