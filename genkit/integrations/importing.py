"""Weights of other projects as ordinary runs: :func:`import_run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from genkit import config
from genkit.config.numbers import Width
from genkit.config.paths import PathText
from genkit.core import Codec
from genkit.core.files import atomic_directory
from genkit.core.tensors import load_tensors
from genkit.data.codecs import Identity, Pixels
from genkit.data.local_files import Folder
from genkit.integrations.export import write_run
from genkit.integrations.zoo import KINDS
from genkit.integrations.zoo.foreign import ForeignModel, Hints, read_foreign_tensors
from genkit.training.first_stage import LatentCodec, canonical_first_stage
from genkit.training.run import open_first_stage
from genkit.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What a file of weights does not say."""

    size: Width | None = None
    """Side of the pictures of a U-Net of torchcfm. None: 32, as published."""
    head_size: Width | None = None
    """Channels of an attention head. None: as published for a network of this size."""
    codec: PathText | None = None
    """First stage that decodes the samples of a model of latents: diffusers:DIR. None: samples stay latents."""


@dataclass(frozen=True)
class Imported:
    """A run that was made of foreign weights."""

    path: Path
    notes: tuple[str, ...]


def import_run(
    kind: str, file: str | Path, out: str | Path, settings: ImportSettings | None = None, **changes: object
) -> Imported:
    """Write the new run ``out`` with the network in ``file``, which has the layout ``kind``, an entry of ``KINDS``.

    The network is the same function of its inputs. ``changes`` are settings by name. ``ValueError`` if the file is
    damaged, a pickle, or of another layout, or if ``out`` is not empty.
    """
    settings = config.override(settings or ImportSettings(), **changes)
    if kind not in KINDS:
        raise ValueError(f"kind: given {kind}; allowed: {', '.join(KINDS)}")
    source, path = Path(file).expanduser(), Path(out).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"out: given {path}, which is there already; name a new folder")
    tensors, part = read_foreign_tensors(source)
    model = KINDS[kind](tensors, Hints(settings.size, settings.head_size))
    nets = model.objective.networks(model.backbone, model.spec)
    load_tensors(nets, {f"net.{name}": value for name, value in model.tensors.items()}, source)
    codec, shape = open_codec(model, settings.codec)
    data = Folder(root="unknown", size=shape[-1], labels=bool(model.spec.cond))
    stage = canonical_first_stage(settings.codec) if settings.codec else None
    cfg = TrainSettings(
        objective=model.objective.decide(lambda: 1.0), backbone=model.backbone, data=data, ema=(), codec=stage
    )
    with atomic_directory(path) as folder, torch.no_grad():
        write_run(folder, cfg, nets, model.spec, codec, 0)
        if isinstance(codec, LatentCodec):
            codec.stage.write(folder / "codec")
    taken = (f"of the parts of {source.name}, {part} was taken",) if part else ()
    return Imported(path, (*taken, *model.notes))


def open_codec(model: ForeignModel, codec: str | None) -> tuple[Codec, tuple[int, ...]]:
    """What decodes samples, and the shape of decoded ones. ``ValueError`` if the first stage gives other latents."""
    if not model.latent:
        if codec:
            raise ValueError(f"codec: given {codec}, but this network draws pictures; leave it out")
        return Pixels(), model.spec.shape
    if codec is None:
        return Identity(), model.spec.shape
    for factor in (8, 4, 2, 16, 32):  # pixels of the side of a latent; 8 in those of the published models
        shape = (3, *(factor * n for n in model.spec.shape[1:]))
        stage = open_first_stage(codec, shape, torch.device("cpu"))
        if getattr(stage, "latent", None) == model.spec.shape and stage.own_scaling:
            return LatentCodec(stage, *stage.own_scaling, measured=False), shape
    raise ValueError(f"codec: {codec} does not give latents {model.spec.shape} with a scale of their own")
