"""Caching the latents of a data set: :func:`encode`. ``--data=latents`` (``genkit.data.latents``) reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from genkit import config
from genkit.config import table
from genkit.config.blocks import find_name
from genkit.config.numbers import Count
from genkit.core import Data, Draw, spec_to_dict
from genkit.core.device import DeviceName, pick_device
from genkit.core.files import refuse_foreign
from genkit.core.progress import Progress, reporting
from genkit.core.tensors import sha256
from genkit.data import DATA, DataSource, InLatents
from genkit.data.latents import INDEX, is_shard, read_index, read_shard, write_index, write_shard
from genkit.data.source import Split
from genkit.objectives.autoencoders.autoencoder import Posterior
from genkit.training.directory import find_run
from genkit.training.first_stage import FirstStage, foreign_stage
from genkit.training.latent_statistics import compute_statistics
from genkit.training.run import load_run, open_first_stage


@dataclass(frozen=True, kw_only=True)
class TrainingData(DataSource):
    """The data that the run was trained on."""

    def load(self, split: Split = "train") -> Data:
        raise ValueError("data: stands for those of a run, which are not known here; name them")


SOURCES: dict[str, type[DataSource]] = {"same": TrainingData, **DATA}


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Which latents are cached, and how."""

    data: DataSource = table(
        "genkit.training.latent_cache:SOURCES",
        "same",
        kind="genkit.data:DataSource",
        fallback="genkit.data:find_source",
        adapt="genkit.data.torch_dataset:adapt",
    )
    """Data to encode: same, a NAME, or a path to a folder of images, a .zip or an .npz."""
    split: Literal["train", "test"] = "train"
    """Which samples. Both splits may be in one folder."""
    shard: Count = 4096
    """Samples of a file. Existing files are kept, so an interrupted call can be repeated."""
    batch: Count = 256
    """Samples per batch."""
    device: DeviceName = "auto"
    """Device. auto: the machine's accelerator, or the CPU if it has none."""


@dataclass(frozen=True)
class LatentCache:
    """A split that has been cached completely."""

    path: Path
    """the folder, for ``--data=latents --data.root``"""
    split: str
    num_samples: int
    num_written: int
    """files that were written by this call; others existed"""
    shape: tuple[int, ...]
    """of a latent"""


def encode(
    stage: str,
    settings: EncodeSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> LatentCache:
    """Encode a data set by a first stage, and cache its latents.

    ``stage`` is a run with a code (of vae, ae, vq or autoencoder), or KIND:WHERE such as ``diffusers:DIR``. ``out`` is
    the folder; None: latents in the run's folder. ``changes`` are settings by name: ``encode(run, split="test")``.
    ``ValueError`` if the stage does not fit the data, or the folder holds latents of others.
    """
    settings = config.override(settings or EncodeSettings(), **changes)
    source = settings.data
    if foreign_stage(stage)[0] and (isinstance(source, TrainingData) or not out):
        raise ValueError(f"encode: {stage} is no run, and has no data or folder of its own; give --data and --out")
    if isinstance(source, TrainingData):
        source = load_run(stage, device="cpu").config.data
    folder = Path(out) if out else find_run(stage) / "latents"
    device = pick_device(settings.device)
    data = source.load(settings.split)
    if isinstance(data, InLatents):
        raise ValueError(f"data: {folder} would be latents of latents; name the samples themselves")
    first_stage = open_first_stage(stage, data.spec.shape, device)
    with reporting(progress) as report:
        return write_split(folder, first_stage, source, data, settings, device, report)


def write_split(
    folder: Path,
    stage: FirstStage,
    source: DataSource,
    data: Data,
    settings: EncodeSettings,
    device: torch.device,
    progress: Progress,
) -> LatentCache:
    """Write the shards of a split that are missing, then its entry in the index."""
    index = open_index(folder, stage, source)
    views = 1 + int(source.random_flip)
    starts, written, shards = range(0, len(data), settings.shard), 0, {}
    progress("encoding", 0, len(data))
    for k, first in enumerate(starts):
        last = min(first + settings.shard, len(data))
        path = folder / f"{settings.split}-{k:05d}-of-{len(starts):05d}.safetensors"
        origin = {"rows": f"{first}-{last}", "views": str(views), "sha256": stage.sha256}
        if not is_shard(path, origin):
            refuse_foreign(path)
            content = encode_rows(stage, data, range(first, last), views, settings.batch, device)
            write_shard(path, content, origin)
            written += 1
        shards[path.name] = sha256(path)
        progress("encoding", last, len(data))
    statistics = compute_statistics(shard_posterior(read_shard(folder / name)) for name in shards)
    index["splits"][settings.split] = {
        "n": len(data),
        "views": views,
        "spec": spec_to_dict(replace(data.spec, shape=tuple(stage.latent))),
        "shards": shards,
        "statistics": statistics.to_dict(),
    }
    write_index(folder, index)
    return LatentCache(folder, settings.split, len(data), written, tuple(stage.latent))


def open_index(folder: Path, stage: FirstStage, source: DataSource) -> dict[str, Any]:
    """The index of ``folder``, begun if there is none. ``ValueError`` if it is of another stage or other data."""
    data = {"name": find_name({"table": "genkit.data:DATA"}, type(source)), **config.dump(source)}
    index: dict[str, Any] = {"stage": {**stage.to_dict(), "sha256": stage.sha256}, "data": data, "splits": {}}
    if not (folder / INDEX).is_file():
        stage.write(folder / "codec")
        write_index(folder, index)
        return index
    stored = read_index(folder)
    for part, given in json.loads(json.dumps(index)).items():
        if part != "splits" and {**stored[part], "run": None} != {**given, "run": None}:
            raise ValueError(f"{folder}: holds latents of another {part}; name another folder with --out")
    stage.write(folder / "codec")  # unless it is there already
    return stored


def shard_posterior(shard: Mapping[str, Tensor]) -> Posterior:
    """The posterior of all samples and views of a shard."""
    mean = shard["mean"].flatten(0, 1)
    log_var = shard["log_var"].flatten(0, 1) if "log_var" in shard else torch.full_like(mean, -torch.inf)
    return Posterior(mean, log_var)


class FixedFlip(Draw):
    """Random numbers for which an augmentation mirrors every image (``number`` 1), or none (0)."""

    def __init__(self, rows: range, number: float):
        super().__init__((0,), rows.start, rows.stop)
        self.number = number

    def uniform(self, *shape: int) -> Tensor:
        return super().uniform(*shape) if shape else torch.full((self.stop - self.start,), self.number)


def encode_rows(
    stage: FirstStage, data: Data, rows: range, views: int, batch: int, device: torch.device
) -> dict[str, Tensor]:
    """The content of one shard: ``mean`` and ``log_var`` ``[rows, views, C, ...]``, and the conditions.

    ``log_var`` is left out if all posteriors are deterministic. ``ValueError`` if the stage yields NaN.
    """
    parts: list[dict[str, Tensor]] = []
    for first in range(rows.start, rows.stop, batch):
        chunk = range(first, min(first + batch, rows.stop))
        batches = [data.batch(torch.tensor(chunk), FixedFlip(chunk, number)) for number in (1.0, 0.0)[:views]]
        draw = [Draw((0,), chunk.start, chunk.stop, device) for _ in batches]
        with torch.no_grad():
            posteriors = [stage.posterior(replace(b.to(device), draw=d)) for b, d in zip(batches, draw, strict=True)]
        part = {
            "mean": torch.stack([q.mean for q in posteriors], 1).float().cpu(),
            "log_var": torch.stack([q.log_var for q in posteriors], 1).float().cpu(),
        }
        parts.append({**part, **{f"cond.{k}": v for k, v in batches[0].cond.items()}})
    content = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    if bool((content["log_var"] == -torch.inf).all()):
        del content["log_var"]
    for name, value in content.items():
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise ValueError(f"codec: {stage.name} gives a {name} that is not a number; the run has diverged")
    return content
