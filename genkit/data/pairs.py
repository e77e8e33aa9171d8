"""Pairs (source, sample) that a model has made, the data of reflow and distillation: an ``.npz`` without pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.core import Batch, Codec, Draw, Spec, spec_from_dict, spec_to_dict
from genkit.core.files import atomic_write
from genkit.data import codecs
from genkit.data.images import InMemory
from genkit.data.source import DataSource, Split, check_split


@dataclass(eq=False)
class InPairs:
    """Samples in memory, each with its source ``x1``, in the model's own numbers."""

    samples: InMemory
    x1: Tensor

    def __post_init__(self) -> None:
        self.spec, self.codec = self.samples.spec, self.samples.codec

    def __len__(self) -> int:
        return len(self.x1)

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        return replace(self.samples.batch(indices, draw), x1=self.x1.index_select(0, indices))


def save_pairs(
    path: Path, x: Tensor, x1: Tensor, cond: Mapping[str, Tensor], spec: Spec, codec: Codec, made: Mapping[str, Any]
) -> Path:
    """Write pairs in the model's own numbers, with all that training on them has to know; ``made`` says how."""
    about = {
        **spec_to_dict(spec),
        "codec": codecs.to_dict(codec),
        "made": dict(made),
    }
    arrays = {"x": x, "x1": x1, **{f"cond.{k}": v for k, v in cond.items()}}
    with atomic_write(path) as part, open(part, "wb") as f:
        np.savez(f, about=np.array(json.dumps(about)), **{k: v.cpu().numpy() for k, v in arrays.items()})  # type: ignore[arg-type]
    return path


@dataclass(frozen=True, kw_only=True)
class Pairs(DataSource):
    """Pairs made by `genkit reflow RUN`, for ``--objective.coupling=given``."""

    root: str
    """the .npz file"""

    def load(self, split: Split = "train") -> InPairs:
        check_split(split)
        path = Path(self.root).expanduser()
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; make it with: genkit reflow RUN")
        with np.load(path, allow_pickle=False) as stored:
            if not {"about", "x", "x1"} <= set(stored.files):
                raise ValueError(f"{path}: holds {', '.join(stored.files)}; pairs of genkit reflow hold about, x, x1")
            about = json.loads(str(stored["about"]))
            x, x1 = torch.from_numpy(stored["x"]), torch.from_numpy(stored["x1"])
            cond = {k[5:]: torch.from_numpy(stored[k]) for k in stored.files if k.startswith("cond.")}
        codec = codecs.from_dict(about["codec"])
        spec = spec_from_dict(about)
        if x.shape != x1.shape:
            raise ValueError(f"{path}: holds x {list(x.shape)} and x1 {list(x1.shape)}, which are no pairs")
        return InPairs(InMemory(outside(x, codec), cond, spec, codec), x1)


def outside(x: Tensor, codec: Codec) -> Tensor:
    """What ``codec.encode`` turns into ``x``, unrounded: ``encode`` is affine, so it is known from its answers to 0, 1.

    (``decode`` would round pictures to 256 levels, and cut off what a model draws beyond them.)
    """
    encode = lambda v: codec.encode(Batch(v)).x  # noqa: E731
    low = encode(torch.zeros_like(x[:1]))
    world = (x - low) / (encode(torch.ones_like(x[:1])) - low)
    if not torch.allclose(encode(world[:64]), x[:64], atol=1e-4):
        raise ValueError(f"pairs of a model with the codec {type(codec).__name__}, which is not affine, cannot be used")
    return world
