"""Training on latents: the data as the model of a run sees them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from genkit.core import Data, Image
from genkit.data import InLatents
from genkit.training.checkpoint import find_checkpoint, read_state
from genkit.training.first_stage import (
    CachedLatentCodec,
    FirstStage,
    LatentCodec,
    LatentData,
    codec_from_dict,
    read_stage,
)
from genkit.training.latent_statistics import LatentStatistics, measure_latents
from genkit.training.run import open_first_stage
from genkit.training.settings import TrainSettings


def encode_data(settings: TrainSettings, data: Data, accelerator: Accelerator, resumed: Path | None) -> Data:
    """``data`` as the model sees them: latents if ``--codec`` or cached latents say so, else the samples themselves.

    Rank 0 measures the latents' mean and standard deviation and sends them to the others; a resumed run keeps its own.
    Raises ``ValueError`` if the first stage does not fit the data.
    """
    cached = data if isinstance(data, InLatents) else None
    if settings.codec is None and cached is None:
        if settings.codec_posterior != "draw":
            raise ValueError(f"codec_posterior: given {settings.codec_posterior}, but no codec; give --codec RUN")
        return data
    device = accelerator.device
    if resumed:
        record = read_state(find_checkpoint(resumed))["codec"]
        codec = codec_from_dict(record, resumed / "codec", device)
        if not isinstance(codec, LatentCodec):
            raise ValueError(f"codec: {resumed.name} was trained without one, and goes on without; leave --codec out")
        stage = codec.stage
    else:
        stage, codec = open_stage(settings, data, device), None
    if cached and stage.sha256 != cached.index["stage"]["sha256"]:
        theirs, ours = cached.index["stage"]["sha256"][:12], stage.sha256[:12]
        raise ValueError(f"codec: the latents in {cached.root} are of other weights (sha256 {theirs}) than "
                         f"{stage.name} ({ours}); leave --codec out, or encode again")  # fmt: skip
    spec = replace(data.spec, shape=tuple(stage.latent))
    if images := [k for k, kind in spec.cond.items() if isinstance(kind, Image)]:
        raise ValueError(f"codec: the condition {images[0]} is a picture of the sample's size, not of the latent's")
    if codec is None:
        measured: list[Any] = [cached.statistics if cached else None]
        if cached is None and accelerator.is_main_process:
            measured = [measure_latents(stage, data, device).to_dict()]
        statistics = LatentStatistics.from_dict(broadcast_object_list(measured)[0])
        mean, std = statistics.mean, statistics.std(settings.codec_posterior)
        codec = LatentCodec(stage, tuple(mean.tolist()), tuple(std.tolist()), settings.codec_posterior)
    if cached:
        codec = CachedLatentCodec(stage, codec.scaling.mean, codec.scaling.std, codec.posterior)
    return LatentData(data, spec, codec)


def open_stage(settings: TrainSettings, data: Data, device: torch.device) -> FirstStage:
    """The first stage of ``--codec``, or the one that cached latents keep."""
    if not isinstance(data, InLatents):
        assert settings.codec is not None
        return open_first_stage(settings.codec, data.spec.shape, device)
    kept = read_stage(data.index["stage"], data.root / "codec", device)
    return kept if settings.codec is None else open_first_stage(settings.codec, kept.shape, device)
