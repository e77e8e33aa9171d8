"""Pairs (source, sample) of a model, the data of reflow and distillation: an ``.npz`` without pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.config.paths import PathText
from genkit.core import Batch, Codec, Draw, Spec, spec_from_dict, spec_to_dict
from genkit.core.arrays import open_npz, save_npz
from genkit.data import codecs
from genkit.data.in_memory import InMemory
from genkit.data.source import DataSource, Split, check_split


@dataclass(eq=False)
class InPairs:
    """Samples in memory, each with its source ``x1`` ``[N, *S]`` in the model's units."""

    samples: InMemory
    x1: Tensor

    def __post_init__(self) -> None:
        self.spec, self.codec = self.samples.spec, self.samples.codec

    def __len__(self) -> int:
        return len(self.x1)

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        """The samples at ``indices`` ``[B]`` with their sources."""
        return replace(self.samples.batch(indices, draw), x1=self.x1.index_select(0, indices))


def save_pairs(
    path: Path,
    x: Tensor,
    x1: Tensor,
    cond: Mapping[str, Tensor],
    spec: Spec,
    codec: Codec,
    provenance: Mapping[str, Any],
) -> Path:
    """Write pairs ``x``, ``x1`` ``[N, *S]`` in the model's units, with all that training needs.

    ``provenance`` records how they were drawn.
    """
    about = {**spec_to_dict(spec), "codec": codecs.to_dict(codec), "made": dict(provenance)}
    arrays = {"x": x, "x1": x1, **{f"cond.{k}": v for k, v in cond.items()}}
    return save_npz(path, {"about": np.array(json.dumps(about)), **{k: v.cpu().numpy() for k, v in arrays.items()}})


@dataclass(frozen=True, kw_only=True)
class Pairs(DataSource):
    """Pairs that ``genkit reflow RUN`` made, for ``--objective.coupling=given``."""

    root: PathText
    """the .npz file"""

    def load(self, split: Split = "train") -> InPairs:
        check_split(split)
        path = Path(self.root).expanduser()
        if split == "test":
            raise ValueError(f"{path}: has no test split; all pairs are trained on")
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; make it with: genkit reflow RUN")
        try:
            with open_npz(path) as stored:
                arrays = dict(stored)
        except ValueError as e:
            raise ValueError(f"{path}: cannot be read: {e}") from e
        if not {"about", "x", "x1"} <= arrays.keys():
            raise ValueError(f"{path}: holds {', '.join(arrays)}; pairs of genkit reflow hold about, x, x1")
        about = json.loads(str(arrays["about"]))
        x, x1 = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["x1"])
        cond = {k[5:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("cond.")}
        codec = codecs.from_dict(about["codec"])
        spec = spec_from_dict(about)
        if x.shape != x1.shape:
            raise ValueError(f"{path}: holds x {list(x.shape)} and x1 {list(x1.shape)}, which are not pairs")
        return InPairs(InMemory(decode_exactly(x, codec), cond, spec, codec), x1)


def decode_exactly(x: Tensor, codec: Codec) -> Tensor:
    """Samples that ``codec.encode`` maps to ``x``, unrounded: ``encode`` is affine, so its values at 0 and 1 suffice.

    ``codec.decode`` would round images to 256 levels, and clip what a model draws beyond them.
    """

    def encode(v: Tensor) -> Tensor:
        return codec.encode(Batch(v)).x

    low = encode(torch.zeros_like(x[:1]))
    decoded = (x - low) / (encode(torch.ones_like(x[:1])) - low)
    if not torch.allclose(encode(decoded[:64]), x[:64], atol=1e-4):
        raise ValueError(f"pairs of a model with the codec {type(codec).__name__}, which is not affine, cannot be used")
    return decoded
