"""What a reader of foreign weights gets, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from genkit.core import Backbone, Objective, Spec
from genkit.core.files import format_error

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
AVERAGES = ("ema", "ema_model", "model_ema")  # parts of a training checkpoint, taken first
PARTS = (*AVERAGES, "model", "net_model", "state_dict")


@dataclass(frozen=True)
class Hints:
    """What a file of weights does not say. None: as in the layout's published models."""

    size: int | None = None
    """side of the pictures"""
    head_size: int | None = None
    """channels of an attention head"""


@dataclass(frozen=True)
class ForeignModel:
    """A network of another project, as genkit's."""

    objective: Objective
    backbone: Backbone
    spec: Spec
    tensors: Mapping[str, Tensor]
    """of the denoiser, by genkit's names"""
    latent: bool
    """whether samples are latents of a first stage"""
    notes: tuple[str, ...] = field(default=())


Reader = Callable[[dict[str, Tensor], Hints], ForeignModel]


def read_foreign_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors in a file, float32 on the CPU, and the part of a training checkpoint that they are (None: the whole).

    Safetensors, or torch's format read with ``weights_only``, which runs no code. ``ValueError`` for anything else.
    """
    if path.suffix == ".pkl":
        raise ValueError(
            f"file: {path} is a pickle of Python objects, which runs code when it is loaded, and genkit loads none; "
            "save its state_dict as safetensors, where you trust it"
        )
    if path.suffix not in (".safetensors", *SUFFIXES):
        raise ValueError(f"file: given {path}; allowed: .safetensors, {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"file: there is no {path}")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else load_plain(path)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as e:
        raise ValueError(f"file: {path} cannot be read: {format_error(e)[:150]}") from e
    part = next((name for name in PARTS if isinstance(content, dict) and isinstance(content.get(name), dict)), None)
    content = content[part] if part else content
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"file: {path} holds no state_dict; save the one of the network alone")
    return {k.removeprefix("module."): v.float() for k, v in content.items()}, part


def load_plain(path: Path) -> Any:
    """The content of a file of ``torch.save``. ``ValueError`` if it holds more than tensors and numbers."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # UnpicklingError and whatever a damaged file leads to
        if "weights_only" in str(e):
            raise ValueError("it holds Python objects, which genkit does not load; save its state_dict alone") from e
        raise ValueError(format_error(e)) from e


def take(tensors: dict[str, Tensor], name: str, kind: str) -> Tensor:
    """The tensor ``name``, removed from ``tensors``. ``ValueError`` if there is none."""
    if name not in tensors:
        present = ", ".join(sorted(tensors)[:3]) or "nothing more"
        raise ValueError(f"file: has no {name}, which {kind} has; it holds {present} ...; is it of another kind?")
    return tensors.pop(name)


def reflect_time(weight: Tensor, rates: Tensor) -> Tensor:
    """The layer after ``[cos(w s), sin(w s)]``, for ``s = 1 - t``, as one after those of t: ``[E, 2 H]``."""
    cosine, sine = weight.double().chunk(2, 1)
    c, s = rates.double().cos(), rates.double().sin()
    return torch.cat([cosine * c + sine * s, cosine * s - sine * c], 1).float()


def wave_rates(count: int) -> Tensor:
    """``10000^(-i / count)`` ``[count]``, of the sinusoids (Vaswani et al. 2017, section 3.5)."""
    return torch.exp(-math.log(10_000) * torch.arange(count, dtype=torch.float64) / count)
