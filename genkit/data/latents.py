"""Latents that `genkit encode` has cached: the moments of every sample's posterior, in shards without pickles.

    DIR/latents.json                       what encoded what; a split is named there when it is complete
    DIR/train-00000-of-00007.safetensors   mean, log_var (unless all are certain) [rows, views, C, ...], cond.NAME
    DIR/codec/first-stage.safetensors      the weights, so that the folder needs nothing else

A sample has two views where the data are mirrored at random: training then takes either, as it would of the pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from genkit.config.blocks import load as load_object
from genkit.core import Batch, Codec, Draw, Spec, spec_from_dict
from genkit.core.files import atomic_write, one_line, write_text
from genkit.data.codecs import Identity
from genkit.data.source import DataSource, Split, check_split

ABOUT = "latents.json"


@dataclass(eq=False)
class InLatents:
    """Moments ``[N, views, 2 C, ...]``, mean and log variance, with their conditions; ``spec`` is that of one latent.

    What encoded them, and turns draws of them into samples, is in ``about`` and ``root``; the codec here does nothing.
    """

    moments: Tensor
    cond: Mapping[str, Tensor]
    spec: Spec
    root: Path
    about: Mapping[str, Any]
    statistics: Mapping[str, Any]
    codec: Codec = Identity()  # noqa: RUF009  (frozen)

    def __len__(self) -> int:
        return len(self.moments)

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        cond = {k: v.index_select(0, indices) for k, v in self.cond.items()}
        chosen = self.moments.index_select(0, indices)
        if chosen.shape[1] == 1:
            return Batch(chosen[:, 0], cond)
        mirrored = draw.uniform() < 0.5
        return Batch(chosen[torch.arange(len(chosen)), mirrored.long()], cond)


@dataclass(frozen=True, kw_only=True)
class Latents(DataSource):
    """Latents that `genkit encode RUN` has cached."""

    default_backbone: ClassVar[str] = "dit"

    root: str = "latents"
    """the folder"""

    def load(self, split: Split = "train") -> InLatents:
        check_split(split)
        root = Path(self.root).expanduser()
        about = read_about(root)
        if split not in about["splits"]:
            raise ValueError(f"{root}: holds no complete {split} split; make it: genkit encode RUN --split {split}")
        found = about["splits"][split]
        parts = [read_shard(root / name, digest) for name, digest in found["shards"].items()]
        mean = torch.cat([p["mean"] for p in parts])
        spread = "log_var" in parts[0]
        log_var = torch.cat([p["log_var"] for p in parts]) if spread else torch.full_like(mean, -torch.inf)
        cond = {k: torch.cat([p[k] for p in parts]) for k in parts[0] if k.startswith("cond.")}
        spec = spec_from_dict(found["spec"])
        return InLatents(torch.cat([mean, log_var], 2), {k[5:]: v for k, v in cond.items()}, spec, root, about,
                         found["statistics"])  # fmt: skip

    def decoded_source(self) -> DataSource:
        """The data that were encoded. ``ValueError`` if they are of a class that is not in ``DATA``."""
        registry = load_object("genkit.data:DATA")  # by name: the registry imports this module
        block = dict(read_about(Path(self.root).expanduser())["data"])
        name = block.pop("name")
        if name not in registry:
            raise ValueError(
                f"{self.root}: was encoded from {name}, which is not in DATA; name what to measure against"
            )
        known: type[DataSource] = registry[name]
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in block.items()}
        return known(**known.applicable(settings))


def read_about(root: Path) -> dict[str, Any]:
    """``latents.json``. ``ValueError`` where the folder is no cache."""
    path = root / ABOUT
    if not path.is_file():
        raise ValueError(f"{root}: holds no {ABOUT}; make a cache of latents with: genkit encode RUN --out {root}")
    try:
        about = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path}: is no JSON: {one_line(e)}") from e
    if not isinstance(about, dict) or not {"stage", "data", "splits"} <= set(about):
        raise ValueError(f"{path}: is not what genkit encode writes; it needs stage, data and splits")
    return about


def write_about(root: Path, about: Mapping[str, Any]) -> None:
    write_text(root / ABOUT, json.dumps(about, indent=1))


def write_shard(path: Path, content: Mapping[str, Tensor], made: Mapping[str, str]) -> None:
    """``made`` says what of, for :func:`is_shard`."""
    with atomic_write(path) as part:
        save_file({k: v.cpu().contiguous() for k, v in content.items()}, part, metadata=as_metadata(made))


def as_metadata(made: Mapping[str, str]) -> dict[str, str]:
    """One entry: safetensors writes several in any order, and equal shards shall be equal files."""
    return {"made": json.dumps(made, sort_keys=True)}


def is_shard(path: Path, made: Mapping[str, str]) -> bool:
    """Whether this shard is there already, and made of the same."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as f:
            return f.metadata() == as_metadata(made)
    except (SafetensorError, OSError):
        return False


def read_shard(path: Path, digest: str | None = None) -> dict[str, Tensor]:
    """``ValueError`` where it is absent or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; run the same genkit encode again, it makes what is missing")
    stored = path.read_bytes()
    if digest is not None and hashlib.sha256(stored).hexdigest() != digest:
        raise ValueError(f"{path}: is damaged (another sha256 than recorded); remove it and run genkit encode again")
    return load(stored)
