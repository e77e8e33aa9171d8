"""The networks that training begins or goes on with."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from genkit.backbones import lora
from genkit.backbones.cameras import load_camera_weights
from genkit.backbones.compressed import compress
from genkit.backbones.diffusers import without_weights
from genkit.core import Codec, Data, Draw
from genkit.core.files import format_error
from genkit.data import OnDisk
from genkit.data.text_states import known_texts
from genkit.training.base_weights import read_base
from genkit.training.first_stage import LatentCodec
from genkit.training.init_sources import find_source, init_notes
from genkit.training.pipelines import set_text_nulls
from genkit.training.run import init_from, load_lora_base
from genkit.training.settings import TrainSettings


def initial_networks(
    settings: TrainSettings, device: torch.device, data: Data, resumed: Path | None, notes: list[str]
) -> tuple[dict[str, nn.Module], dict[str, str] | None]:
    """The networks on their device, with the weights of ``--init``, whose origin is returned too.

    Weights that diffusers saved are read into networks that have no memory of their own for weights; under an adapter
    each is compressed as it is read (``settings.weight_format``).
    """
    origin, weights = None, settings.weight_format
    adopts = adopts_weights(settings, resumed)
    torch.manual_seed(settings.seed)
    with without_weights() if adopts else contextlib.nullcontext():
        nets = make_networks(settings, data)
    if adopts and weights.active and not str(settings.init).endswith(".safetensors"):  # a LoRA is added to full weights
        compress(nets, weights)
    elif not adopts:
        nets = {name: net.to(device) for name, net in nets.items()}
    if not resumed:
        set_text_nulls(nets, known_texts(data))
    weights_file = getattr(settings.data, "camera_weights", None)
    if weights_file and not settings.init and not resumed:
        load_camera_weights(nets, weights_file)
    if settings.init and not resumed:
        origin = init_from(
            nets, settings.init, lambda text: notes.append(f"note     {text}"), objective=settings.objective
        )
        notes += [f"note     {text}" for text in init_notes(settings.init, settings.objective)]
    elif settings.lora.active and resumed:
        load_lora_base(nets, resumed)
    if weights.active:
        compress(nets, weights)
    if settings.lora.active:
        lora.adapt(nets, settings.lora)
    nets = {name: net.to(device) for name, net in nets.items()}
    settings.objective.check(nets)
    return nets, origin


def adopts_weights(settings: TrainSettings, resumed: Path | None) -> bool:
    """Whether all weights will come from the files of a foreign model."""
    if settings.objective.starts_from or not settings.init:
        return False
    if resumed and not settings.lora.active:
        return False
    return find_source(read_base(resumed)["run"] if resumed else settings.init)[0] is not None


def make_networks(settings: TrainSettings, data: Data) -> dict[str, nn.Module]:
    """New networks. ``ValueError`` if they cannot serve the data, which may be latents."""
    try:
        settings.objective.setup(data.spec)
        return settings.objective.networks(settings.backbone, data.spec)
    except ValueError as e:
        if not isinstance(data.codec, LatentCodec):
            raise
        stage = data.codec.stage.name
        raise ValueError(f"codec: {stage} gives latents {data.spec.shape}, which do not fit: {e}") from e


@torch.no_grad()
def require_shapes(
    settings: TrainSettings, dataset: Data, codec: Codec, nets: Mapping[str, nn.Module], device: torch.device
) -> None:
    """``ValueError`` for the first shape among the buckets of ``dataset`` that the first stage or the networks cannot
    take: one image of each is tried."""
    if not isinstance(dataset, OnDisk) or dataset.buckets is None:
        return
    buckets = dataset.buckets
    for k, shape in enumerate(buckets.shapes):
        row = (buckets.of == k).nonzero()[0]
        draw = Draw((0,), 0, 1, device)
        try:
            batch = codec.encode(replace(dataset.training_batch(row, Draw((0,), 0, 1)).to(device), draw=draw))
            settings.objective.validate(nets, batch)
        except (RuntimeError, ValueError, AssertionError) as e:
            size = "x".join(map(str, shape))
            raise ValueError(
                f"data.bucket: given {dataset.size} in steps of {settings.data.bucket}, but these networks cannot take "  # type: ignore[attr-defined]
                f"{size}: {format_error(e)[:120]}; take a multiple of 64, and a network for all sizes (unet)"
            ) from e
