"""Latents that ``genkit encode`` has cached: the moments of each sample's posterior, in shards without pickles.

    DIR/latents.json                       the first stage, the data, and each split that is complete
    DIR/train-00000-of-00007.safetensors   mean, log_var (unless all are deterministic) [rows, views, C, ...], cond.NAME
    DIR/codec/first-stage.safetensors      the weights, so that the folder is self-contained

A sample has two views if the data are mirrored at random: training then draws either, as it would with the images.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from genkit.config import load_object
from genkit.config.paths import PathText
from genkit.core import Batch, Codec, Draw, Spec, spec_from_dict
from genkit.core.files import atomic_write, format_error, write_text
from genkit.data.codecs import Identity
from genkit.data.source import DataSource, Split, check_split

INDEX = "latents.json"


@dataclass(eq=False)
class InLatents:
    """Moments ``[N, views, 2 C, ...]``, mean and log variance, with their conditions; ``spec`` is that of one latent.

    ``index`` (the content of latents.json) and ``root`` identify the first stage, which decodes draws of them; the
    ``codec`` is the identity. ``statistics`` are those of the latents' channels.
    """

    moments: Tensor
    cond: Mapping[str, Tensor]
    spec: Spec
    root: Path
    index: Mapping[str, Any]
    statistics: Mapping[str, Any]
    codec: Codec = Identity()  # noqa: RUF009  (frozen)

    def __len__(self) -> int:
        return len(self.moments)

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        """The moments ``[B, 2 C, ...]`` at ``indices`` ``[B]``, of a random view."""
        cond = {k: v.index_select(0, indices) for k, v in self.cond.items()}
        chosen = self.moments.index_select(0, indices)
        if chosen.shape[1] == 1:
            return Batch(chosen[:, 0], cond)
        mirrored = draw.uniform() < 0.5
        return Batch(chosen[torch.arange(len(chosen)), mirrored.long()], cond)


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
        shards = [read_shard(root / name, sha256) for name, sha256 in record["shards"].items()]
        mean = torch.cat([shard["mean"] for shard in shards])
        has_variance = "log_var" in shards[0]
        log_var = torch.cat([s["log_var"] for s in shards]) if has_variance else torch.full_like(mean, -torch.inf)
        cond = {
            key.removeprefix("cond."): torch.cat([shard[key] for shard in shards])
            for key in shards[0]
            if key.startswith("cond.")
        }
        spec = spec_from_dict(record["spec"])
        return InLatents(torch.cat([mean, log_var], 2), cond, spec, root, index, record["statistics"])

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


def is_shard(path: Path, origin: Mapping[str, str]) -> bool:
    """Whether this shard exists and was made from ``origin``."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as f:
            return f.metadata() == shard_metadata(origin)
    except (SafetensorError, OSError):
        return False


def read_shard(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a shard. ``ValueError`` if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; run the same genkit encode again to make it")
    content = path.read_bytes()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path}: is damaged (another sha256 than recorded); remove it and run genkit encode again")
    return load(content)
