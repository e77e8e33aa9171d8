"""Defaults of a training run that follow from its other settings: from ``--init``, ``--codec`` and the data's size.

An explicit setting always wins. What is chosen by the size of the data is said in the first line of the training.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from genkit import config
from genkit.backbones import UNet
from genkit.config.command import merge_trees
from genkit.config.trust import require_trust
from genkit.core.device import pick_device
from genkit.data import DataSource
from genkit.training.directory import find_run
from genkit.training.first_stage import foreign_stage
from genkit.training.init_sources import find_source, init_defaults
from genkit.training.settings import TrainSettings

CONDITION_FIELDS = ("labels", "captions", "encoder", "text_length")  # of the data: a first stage is trained without
LARGE_SIDE = 16  # up to this side the defaults of the settings hold, which were measured on 8x8
CPU_SETTINGS = {32: (32, 32), 64: (16, 16), 128: (16, 8)}  # side -> width and batch that train in 10 to 20 minutes
LARGEST = (16, 4)  # width and batch beyond
MIN_STEPS, EPOCHS = 500, 400  # a handful of images is repeated this often, no more
logger = logging.getLogger("genkit")


def read_with_defaults(
    read: Callable[[Mapping[str, Any]], TrainSettings], init: str | None, codec: str | None
) -> TrainSettings:
    """The settings that ``read(defaults)`` returns, with the defaults that follow from what was given.

    ``init`` and ``codec`` are those settings as far as they are given.
    """
    defaults = {**(codec_defaults(codec) if codec else {}), **(init_defaults(init) if init else {})}
    settings = with_text_encoder(read(defaults))
    if init and settings.objective.starts_from:
        settings = with_text_encoder(read({**defaults, **teacher_data(init)}))
        return replace(settings, objective=with_teacher(settings.objective, defaults.get("objective")))
    chosen = {} if init or codec else size_defaults(settings)
    if not chosen:
        return settings
    settings = read(merge_trees(defaults, chosen))
    describe_choice(settings, chosen)
    return settings


def with_text_encoder(settings: TrainSettings) -> TrainSettings:
    """``settings`` with captions read as the weights of ``init`` expect, unless they name an encoder."""
    source, where = find_source(settings.init) if settings.init else (None, "")
    encoder = source.text_encoder(where) if source else None
    if encoder is None:
        return settings

    def with_encoder(data: DataSource) -> DataSource:
        reads_own = getattr(data, "captions", ()) and getattr(data, "encoder", None) is None
        return data.with_fields(encoder=encoder) if reads_own else data

    prior = replace(settings.prior, data=with_encoder(settings.prior.data))
    return replace(settings, data=with_encoder(settings.data), prior=prior)


def teacher_data(init: str) -> dict[str, Any]:
    """The data and the codec that the run ``init`` was trained on; a foreign ``init`` knows none."""
    if find_source(init)[0] is not None:
        return {}
    stored = config.load_yaml(find_run(init) / "config.yaml")
    blocks = {k: stored[k] for k in ("data", "codec", "codec_posterior") if stored.get(k) is not None}
    require_trust(TrainSettings, blocks, init)
    return blocks


def with_teacher(objective: Any, teacher: Mapping[str, Any] | None) -> Any:
    """``objective``, which learns from a run of the block ``teacher``, with that as its ``of``, unless it has another.

    Another one is refused when the weights are loaded.
    """
    default = type(objective)().of
    return config.override(objective, of=teacher) if teacher and objective.of == default else objective


def codec_defaults(codec: str) -> dict[str, Any]:
    """The data that the first stage ``codec`` was trained on, with the conditions that they have by default.

    Empty for a foreign first stage, which does not know its data.
    """
    kind, _ = foreign_stage(codec)
    if kind:
        return {}
    run = find_run(codec)
    data = config.load_yaml(run / "config.yaml").get("data")
    if not isinstance(data, Mapping):
        return {}
    require_trust(TrainSettings, {"data": data}, run)
    return {"data": {k: v for k, v in data.items() if k not in CONDITION_FIELDS}}


def size_defaults(settings: TrainSettings) -> dict[str, Any]:
    """Width, batch and steps for a person's own images that are larger, or fewer, than the digits, and an MLP for
    vectors; else empty.

    On a CPU, such that training takes 10 to 20 minutes; on an accelerator, what such images usually need.
    """
    preview = settings.data.preview()
    if preview is not None and len(preview[0]) == 1 and type(settings.backbone) is UNet:
        return {"backbone": {"name": "mlp"}}
    if preview is None or len(preview[0]) != 3:
        return {}
    (_, height, width), n = preview
    side = math.sqrt(height * width)
    chosen: dict[str, Any] = {}
    if side > LARGE_SIDE and pick_device(settings.device).type == "cpu":
        channels, chosen["batch"] = next((v for limit, v in CPU_SETTINGS.items() if side <= limit), LARGEST)
        if type(settings.backbone) is UNet and settings.backbone.preset is None:
            chosen["backbone"] = {"width": channels}
    steps = TrainSettings.__dataclass_fields__["steps"].default
    enough = max(MIN_STEPS, math.ceil(EPOCHS * n / chosen.get("batch", settings.batch) / 100) * 100)
    if enough < steps:
        chosen["steps"] = enough
    return chosen


def describe_choice(settings: TrainSettings, chosen: Mapping[str, Any]) -> None:
    """Say which settings were chosen and not given otherwise, on the first rank."""
    preview = settings.data.preview()
    width = getattr(settings.backbone, "width", None)
    values = {"--batch": (chosen.get("batch"), settings.batch), "--steps": (chosen.get("steps"), settings.steps),
              "--backbone.width": (chosen.get("backbone", {}).get("width"), width)}  # fmt: skip
    text = " ".join(
        f"{flag} {given}" for flag, (value, given) in values.items() if value is not None and value == given
    )
    if preview and text and os.environ.get("RANK", "0") == "0":
        shape, n = preview
        logger.info("defaults for %d images of %s: %s", n, "x".join(map(str, shape)), text)
