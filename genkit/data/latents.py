"""Latents that ``genkit encode`` has cached: the moments of each sample's posterior, in shards without pickles.

    DIR/latents.json                       the first stage, the data, and each split that is complete
    DIR/train-00000-of-00007.safetensors   mean, log_var (unless all are deterministic) [rows, views, C, ...], cond.NAME
                                           and captions [rows, W], which of the texts are those of a sample
    DIR/texts/train-00000.safetensors      the texts, each once, as the model sees them
    DIR/checked.json                       which shards were compared with their sha256, so that it is done once
    DIR/codec/first-stage.safetensors      the weights, so that the folder is self-contained

A sample has two views if the data are mirrored at random: training then draws either, as it would with the images; and
one of its captions if it has several.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from genkit import __version__
from genkit.config import load_object
from genkit.config.paths import PathText
from genkit.core import Batch, Codec, Draw, Spec, spec_from_dict
from genkit.core.files import atomic_write, file_stamp, format_error, refuse_foreign, write_text
from genkit.core.tensors import sha256
from genkit.data.captions import Captions
from genkit.data.codecs import Identity
from genkit.data.mapped_shards import MappedShards
from genkit.data.source import DataSource, Split, check_split
from genkit.data.text_states import PADDED, MappedTexts

INDEX = "latents.json"
MARKS = "checked.json"
CONDITION = "cond."  # begins the name of a condition's tensor
CAPTIONS = "captions"  # the tensor of each sample's rows of the texts
TEXTS = "texts"  # the folder of the texts
PLACE_WEIGHT = "place_weight"  # the tensor of the weights of places [rows, views, 1, ...], if there are any


@dataclass(eq=False)
class InLatents:
    """Moments of N posteriors, mean and log variance, with their conditions; ``spec`` is that of one latent.

    They stay in the files, which are mapped into memory. ``index`` (the content of latents.json) and ``root`` identify
    the first stage, which decodes draws of them; the ``codec`` is the identity. ``statistics`` are those of the
    latents' channels.
    """

    rows_per_task: ClassVar[int] = 256

    shards: MappedShards
    spec: Spec
    root: Path
    index: Mapping[str, Any]
    statistics: Mapping[str, Any]
    captions: Captions | None = None
    codec: Codec = Identity()  # noqa: RUF009  (frozen)

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def weighted(self) -> bool:
        """Whether places have weights in the loss."""
        return PLACE_WEIGHT in self.shards

    @cached_property
    def cond(self) -> dict[str, Tensor]:
        """The conditions of one number a sample ``[N]``, in memory; batches hold the others too."""
        names = [name for name in self.shards.names if name.startswith(CONDITION)]
        rows = torch.arange(len(self))
        return {
            name.removeprefix(CONDITION): self.shards.gather(name, rows)
            for name in names
            if not self.shards.row_shape(name)
        }

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        """The moments float32 ``[B, 2 C, ...]`` at ``indices`` ``[B]``, of a random view."""
        views = self.shards.row_shape("mean")[0]
        view = torch.zeros(len(indices), dtype=torch.int64)
        if views > 1:
            view = (draw.uniform() < 0.5).long()
        mean = self.shards.gather("mean", indices, view).float()
        if "log_var" in self.shards:
            log_var = self.shards.gather("log_var", indices, view).float()
        else:
            log_var = torch.full_like(mean, -torch.inf)
        cond = {k: v.index_select(0, indices) for k, v in self.cond.items()}
        for name in self.spec.cond:
            if name not in cond and CONDITION + name in self.shards:
                cond[name] = self.shards.gather(CONDITION + name, indices)
        weight = self.shards.gather(PLACE_WEIGHT, indices, view) if self.weighted else None
        batch = Batch(torch.cat([mean, log_var], 1), cond, place_weight=weight)
        return batch if self.captions is None else self.captions.add(batch, indices, draw)


@dataclass(frozen=True, kw_only=True)
class Latents(DataSource):
    """Latents that ``genkit encode RUN`` has cached."""

    default_backbone: ClassVar[str] = "dit"

    root: PathText = "latents"
    """the folder"""

    def load(self, split: Split = "train") -> InLatents:
        check_split(split)
        root = Path(self.root).expanduser()
        index = read_index(root)
        if split not in index["splits"]:
            run = shlex.quote(str(root.parent)) if (root.parent / "config.yaml").is_file() else "RUN"
            raise ValueError(f"{root}: holds no complete {split} split; make it: genkit encode {run} --split {split}")
        record = index["splits"][split]
        texts = record.get("texts", {})
        require_intact(root, {**record["shards"], **texts})
        shards = MappedShards([root / name for name in record["shards"]])
        captions = None
        if texts:
            table = MappedShards([root / name for name in texts], padded=PADDED)
            rows = shards.gather(CAPTIONS, torch.arange(len(shards)))
            captions = Captions(rows, MappedTexts(table, torch.arange(len(table))))
        return InLatents(shards, spec_from_dict(record["spec"]), root, index, record["statistics"], captions)

    def decoded_source(self) -> DataSource:
        """The data that were encoded. ``ValueError`` if they are of a class that is not in ``DATA``."""
        registry = load_object("genkit.data:DATA")  # by name: the registry imports this module
        settings = dict(read_index(Path(self.root).expanduser())["data"])
        name = settings.pop("name")
        if name not in registry:
            raise ValueError(f"{self.root}: was encoded from {name}, which is not in DATA; name a reference yourself")
        kind: type[DataSource] = registry[name]
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return kind(**kind.applicable(settings))


def read_index(root: Path) -> dict[str, Any]:
    """The content of ``latents.json``. ``ValueError`` if the folder is not a cache of latents."""
    path = root / INDEX
    if not path.is_file():
        raise ValueError(f"{root}: holds no {INDEX}; make a cache of latents with: genkit encode RUN --out {root}")
    try:
        index = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path}: is not JSON: {format_error(e)}") from e
    if not isinstance(index, dict) or not {"stage", "data", "splits"} <= set(index):
        raise ValueError(f"{path}: is not what genkit encode writes; it needs stage, data and splits")
    return index


def write_index(root: Path, index: Mapping[str, Any]) -> None:
    """Write ``latents.json``."""
    write_text(root / INDEX, json.dumps(index, indent=1))


def write_shard(path: Path, content: Mapping[str, Tensor], origin: Mapping[str, str]) -> None:
    """Write a shard; ``origin`` records what it was made from, for :func:`is_shard`."""
    with atomic_write(path) as part:
        save_file({k: v.cpu().contiguous() for k, v in content.items()}, part, metadata=shard_metadata(origin))


def shard_metadata(origin: Mapping[str, str]) -> dict[str, str]:
    """``origin`` as one entry: safetensors writes several in any order, and equal shards must be equal files."""
    return {"made": json.dumps(origin, sort_keys=True)}


def write_captions(root: Path, split: str, captions: Captions) -> dict[str, str]:
    """Write the texts of a split, and return the files with their sha256."""
    digests = {}
    for k, rows in enumerate(captions.table.chunks()):
        name = f"{TEXTS}/{split}-{k:05d}.safetensors"
        refuse_foreign(root / name)
        write_shard(root / name, captions.table.stored(torch.tensor(rows)), {"texts": f"{rows.start}-{rows.stop}"})
        digests[name] = sha256(root / name)
    return digests


def is_shard(path: Path, origin: Mapping[str, str]) -> bool:
    """Whether this shard exists and was made from ``origin``."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as f:
            return f.metadata() == shard_metadata(origin)
    except (SafetensorError, OSError):
        return False


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard."""
    return load(path.read_bytes())


# ------------------------------------------------------------------------------------------------------- checksums
def require_intact(root: Path, recorded: Mapping[str, str]) -> None:
    """``ValueError`` if a shard is missing, or its sha256 is not the ``recorded`` one.

    A shard is read once: its size and time of change, by which it is known again, are then noted in checked.json.
    """
    for name in recorded:
        if not (root / name).is_file():
            raise ValueError(f"{root / name}: there is no such file; run the same genkit encode again to make it")
    for name, digest in find_digests(root, list(recorded)).items():
        if digest != recorded[name]:
            raise ValueError(
                f"{root / name}: is damaged (another sha256 than recorded); remove it and run genkit encode again"
            )


def find_digests(root: Path, names: Sequence[str]) -> dict[str, str]:
    """The sha256 of each shard: as noted if it has not changed since, else computed by threads and noted."""
    known = read_marks(root)
    stamps = {name: file_stamp(root / name) for name in names}
    digests = {name: known[name][1] for name in names if name in known and known[name][0] == stamps[name]}
    unknown = [name for name in names if name not in digests]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests |= zip(unknown, pool.map(lambda name: sha256(root / name), unknown), strict=True)
    if unknown:
        note_digests(root, digests)
    return {name: digests[name] for name in names}


def note_digests(root: Path, digests: Mapping[str, str]) -> None:
    """Note the sha256 of shards in checked.json, which is left out where the folder cannot be written to, or has such a
    file of somebody else's."""
    marks = {**read_marks(root), **{name: [file_stamp(root / name), digest] for name, digest in digests.items()}}
    with contextlib.suppress(OSError, ValueError):
        refuse_foreign(root / MARKS)
        write_text(root / MARKS, json.dumps({"genkit": __version__, "shards": marks}, indent=1))


def read_marks(root: Path) -> dict[str, Any]:
    """The content of checked.json: ``[stamp, sha256]`` of shards; empty if it is missing or damaged."""
    try:
        marks = json.loads((root / MARKS).read_text(encoding="utf-8"))
        return {name: [stamp, str(digest)] for name, (stamp, digest) in marks["shards"].items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}
