"""Training on latents: wraps data so that the model receives the latents of a first stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from genkit.core import Codec, Data, Image
from genkit.data import InLatents
from genkit.training.checkpoint import find_checkpoint
from genkit.training.directory import find_run, read_state
from genkit.training.first_stage import (
    CachedLatentCodec,
    FirstStage,
    LatentCodec,
    LatentData,
    codec_from_dict,
    read_stage,
)
from genkit.training.init_sources import find_source
from genkit.training.latent_statistics import LatentStatistics, measure_latents
from genkit.training.run import open_first_stage
from genkit.training.settings import TrainSettings


def encode_data(settings: TrainSettings, data: Data, accelerator: Accelerator, resumed: Path | None) -> Data:
    """Return ``data`` with a codec to latents if there is a first stage (``--codec`` or cached latents), else ``data``.

    Rank 0 measures the latents' mean and standard deviation and broadcasts them; a resumed run keeps those it has, and
    weights of ``--init`` those that they were trained with.
    Raises ``ValueError`` if the first stage does not fit the data.
    """
    cached = data if isinstance(data, InLatents) else None
    if settings.codec is None and cached is None:
        if settings.codec_posterior != "draw":
            raise ValueError(f"codec_posterior: given {settings.codec_posterior}, but no codec; give --codec RUN too")
        return data
    device = accelerator.device

    # the first stage: that of the resumed run, of --codec or of the cache
    if resumed:
        record = read_state(find_checkpoint(resumed))["codec"]
        codec = codec_from_dict(record, resumed / "codec", device)
        if not isinstance(codec, LatentCodec):
            raise ValueError(f"codec: {resumed.name} was trained without one, and so is resumed; leave --codec out")
        stage = codec.stage
    else:
        stage, codec = open_stage(settings, data, device), None

    # does it fit the data?
    if cached and stage.sha256 != cached.index["stage"]["sha256"]:
        cache_weights, stage_weights = cached.index["stage"]["sha256"][:12], stage.sha256[:12]
        raise ValueError(
            f"codec: the latents in {cached.root} were made with other weights (sha256 {cache_weights}) than those of "
            f"{stage.name} ({stage_weights}); leave --codec out, or encode again"
        )
    spec = replace(data.spec, shape=tuple(stage.latent))
    if images := [k for k, kind in spec.cond.items() if isinstance(kind, Image)]:
        raise ValueError(
            f"codec: the condition {images[0]} is an image of the samples' size, not of the latents'; leave --codec out"
        )

    # the scale of the latents, the same on every rank: that of pretrained weights, or measured
    if codec is None and (known := expected_scaling(settings.init, stage)):
        codec = LatentCodec(stage, *known, settings.codec_posterior, measured=False)
    if codec is None:
        measured: list[Any] = [cached.statistics if cached else None]
        if cached is None and accelerator.is_main_process:
            measured = [measure_latents(stage, data, device).to_dict()]
        statistics = LatentStatistics.from_dict(broadcast_object_list(measured)[0])
        mean, std = statistics.mean, statistics.std(settings.codec_posterior)
        codec = LatentCodec(stage, tuple(mean.tolist()), tuple(std.tolist()), settings.codec_posterior)
    return LatentData(data, spec, encoder_of(data, codec))


def encoder_of(data: Data, codec: Codec) -> Codec:
    """Return what encodes rows of ``data`` for a model with ``codec``: that codec, or its form for cached moments.

    Samples without a first stage are encoded by the codec of the data.
    """
    if not isinstance(codec, LatentCodec):
        return data.codec
    if not isinstance(data, InLatents):
        return codec
    return CachedLatentCodec(codec.stage, codec.scaling.mean, codec.scaling.std, codec.posterior, codec.measured)


def expected_scaling(init: str | None, stage: FirstStage) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of the latents that the weights of ``init`` were trained on; None if unknown.

    Those of a pipeline are its autoencoder's own; those of a run on the latents of the same ``stage`` are in its codec.
    """
    if init is None:
        return None
    source, _ = find_source(init)
    if source:
        return stage.own_scaling
    stored = read_state(find_checkpoint(find_run(init)))["codec"]
    if stored.get("name") != "latent" or stored["stage"]["sha256"] != stage.sha256:
        return None
    return tuple(stored["mean"]), tuple(stored["std"])


def open_stage(settings: TrainSettings, data: Data, device: torch.device) -> FirstStage:
    """Return the first stage of ``--codec``, or the one that is stored with cached latents."""
    if not isinstance(data, InLatents):
        assert settings.codec is not None
        return open_first_stage(settings.codec, data.spec.shape, device)
    stored = read_stage(data.index["stage"], data.root / "codec", device)
    return stored if settings.codec is None else open_first_stage(settings.codec, stored.shape, device)
