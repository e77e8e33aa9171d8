"""Codecs convert between stored samples (uint8 pixels, actions in metres) and the model's units, of order one.

A codec is a small frozen dataclass of numbers, stored as JSON beside the weights:
``from_dict(json.loads(json.dumps(to_dict(codec)))) == codec``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from genkit.core import Batch, Codec

LARGEST_SHIFT = 2.0**15  # in units of the spread, of which float32 (24 bits) keeps less than 9 bits beyond this


@dataclass(frozen=True)
class Pixels:
    """uint8 in 0..255 as stored, float in [-1, 1] for the model. ``decode(encode(x)) == x`` for all 256 values."""

    def encode(self, batch: Batch) -> Batch:
        return replace(batch, x=batch.x.to(torch.float32) / 127.5 - 1)

    def decode(self, x: Tensor) -> Tensor:
        return ((x.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Identity:
    """For numbers that are of order one already."""

    def encode(self, batch: Batch) -> Batch:
        return batch

    def decode(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Affine(ABC):
    """``(x - shift) / scale``, with one number for each of the C dimensions of ``[B, C]`` or ``[B, C, ...]``.

    A dimension that is constant in the data (scale 0) is only shifted, and always decodes to its constant.
    """

    @abstractmethod
    def shift_scale(self) -> tuple[Tensor, Tensor]:
        """Two float64 tensors ``[C]``."""

    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = constants(self, x.dtype, x.device)
        if x.ndim < 2 or x.shape[1] != len(shift):
            raise ValueError(f"this codec has {len(shift)} dimensions; given shape {tuple(x.shape)}")
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return shift.reshape(shape), scale.reshape(shape)

    @property
    def needs_float64(self) -> bool:
        """Whether float32 cannot hold decoded numbers: their shift is too large for their spread."""
        shift, scale = self.shift_scale()
        return bool(((shift.abs() > LARGEST_SHIFT * scale) & (scale > 0)).any())

    def encode(self, batch: Batch) -> Batch:
        """Samples in the model's units, float32; float64 samples are cast after centring."""
        shift, scale = self._broadcast(batch.x)
        x = (batch.x - shift) / torch.where(scale > 0, scale, 1)
        return replace(batch, x=x.float() if x.dtype == torch.float64 else x)

    def decode(self, x: Tensor) -> Tensor:
        """Samples in the data's units, float64 if :attr:`needs_float64`."""
        x = x.double() if self.needs_float64 else x
        shift, scale = self._broadcast(x)
        return x * scale + shift


@lru_cache(maxsize=64)
def constants(codec: Affine, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """``codec.shift_scale()`` in a dtype, on a device: copied there once, not for every batch."""
    shift, scale = codec.shift_scale()
    return shift.to(device, dtype), scale.to(device, dtype)


@dataclass(frozen=True)
class MinMax(Affine):
    """Maps ``low``..``high`` of each dimension to -1..1 (the usual scaling of actions)."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def fit(cls, x: Tensor) -> MinMax:
        """The codec of the data ``[N, C, ...]``."""
        x = _per_dimension(x)
        return cls(tuple(x.amin(1).tolist()), tuple(x.amax(1).tolist()))

    def shift_scale(self) -> tuple[Tensor, Tensor]:
        low, high = torch.tensor(self.low, dtype=torch.float64), torch.tensor(self.high, dtype=torch.float64)
        return (high + low) / 2, (high - low) / 2


@dataclass(frozen=True)
class Standardize(Affine):
    """Gives each dimension mean 0 and standard deviation 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, x: Tensor) -> Standardize:
        """The codec of the data ``[N, C, ...]``."""
        x = _per_dimension(x)
        constant = x.amin(1) == x.amax(1)  # exactly: rounding would give it a tiny deviation
        std = torch.where(constant, 0, x.std(1, correction=0))
        mean = torch.where(constant, x[:, 0], x.mean(1))
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def shift_scale(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)


@dataclass(frozen=True)
class Actions(Affine):
    """Action chunks ``[B, A, T]``, scaled by a range, or by mean and standard deviation.

    ``reference`` are the columns of the newest observation that the A dimensions are relative to (a target position,
    relative to the hand), -1 for one that is absolute (a gripper); () if all are. ``decode`` gives relative actions,
    :meth:`to_absolute` adds the reference.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]
    reference: tuple[float, ...] = ()

    def shift_scale(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.shift, dtype=torch.float64), torch.tensor(self.scale, dtype=torch.float64)

    def to_absolute(self, x: Tensor, obs: Tensor) -> Tensor:
        """Decode samples ``[B, A, T]``, given observations ``[B, To, Do]``, to actions that an environment takes."""
        out = self.decode(x)
        return out + self.reference_of(obs).to(out) if self.reference else out

    def from_absolute(self, actions: Tensor, obs: Tensor) -> Tensor:
        """The inverse of :meth:`to_absolute`: samples of the model ``[B, A, T]`` of an environment's actions."""
        relative = actions - self.reference_of(obs).to(actions) if self.reference else actions
        return self.encode(Batch(relative)).x

    def reference_of(self, obs: Tensor) -> Tensor:
        """What actions are relative to, ``[B, A, 1]``, in observations ``[B, To, Do]``."""
        columns = torch.tensor([int(i) for i in self.reference], device=obs.device)
        return (obs[:, -1, columns.clamp(min=0)] * (columns >= 0))[:, :, None]


@dataclass(frozen=True)
class Plans(Affine):
    """Plans ``[B, A + Do, T]``, scaled row by row: A rows of actions (A may be 0), then the Do rows of states."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]
    states: tuple[float, ...]
    """one number, Do"""

    @property
    def actions(self) -> int:
        """A, the number of action rows."""
        return len(self.shift) - int(self.states[0])

    def shift_scale(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.shift, dtype=torch.float64), torch.tensor(self.scale, dtype=torch.float64)

    def encode_states(self, states: Tensor) -> Tensor:
        """States ``[B, Do, ...]``, scaled as the state rows of a sample are."""
        shift, scale = (v[self.actions :] for v in constants(self, states.dtype, states.device))
        shape = (1, -1, *(1,) * (states.ndim - 2))
        return (states - shift.reshape(shape)) / torch.where(scale > 0, scale, 1).reshape(shape)


class LearnedCodec(ABC):
    """A codec with weights, which are stored beside the JSON of :meth:`to_dict` (``genkit.training.first_stage``)."""

    shape: tuple[int, ...]
    """shape of a decoded sample"""

    @abstractmethod
    def encode(self, batch: Batch) -> Batch: ...

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def decode_smoothly(self, x: Tensor) -> Tensor:
        """As :func:`decode_smoothly`."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """``{"name": ..., "sha256": of the weights, ...}``, ready for JSON."""


def decode_smoothly(codec: Codec, x: Tensor) -> Tensor:
    """Decoded samples ``[B, *S]`` with a gradient: pictures in [0, 1] without rounding, all else as ``decode`` has it.

    A codec of latents decodes by its first stage, through which the gradient goes.
    """
    if isinstance(codec, LearnedCodec):
        return codec.decode_smoothly(x)
    return ((x + 1) / 2).clamp(0, 1) if isinstance(codec, Pixels) else codec.decode(x)


def decoded_shape(codec: Codec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a decoded sample, if the model's samples have ``shape``."""
    return codec.shape if isinstance(codec, LearnedCodec) else shape


def loses_digits(x: Tensor) -> list[int]:
    """The dimensions of float64 numbers ``[N, C, ...]`` whose spread float32 does not resolve."""
    x = _per_dimension(x)
    error, spread = (x - x.float().double()).abs().amax(1), x.std(1, correction=0)
    return ((error > spread / LARGEST_SHIFT * 32) & (x.amin(1) != x.amax(1))).nonzero().flatten().tolist()


def _per_dimension(x: Tensor) -> Tensor:
    """``[N, C, ...] -> [C, N * ...]`` in float64."""
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"a codec is fitted to [N, C, ...] numbers; given shape {tuple(x.shape)}")
    return x.to(torch.float64).movedim(1, 0).flatten(1)


CODECS: dict[str, type] = {
    "pixels": Pixels,
    "identity": Identity,
    "min-max": MinMax,
    "standardize": Standardize,
    "actions": Actions,
    "plans": Plans,
}


def to_dict(codec: Codec) -> dict[str, Any]:
    """``{"name": ..., **fields}``, ready for JSON. ``ValueError`` for a codec that is not in ``CODECS``."""
    if isinstance(codec, LearnedCodec):
        return codec.to_dict()
    for name, kind in CODECS.items():
        if type(codec) is kind:
            return {"name": name, **{f.name: getattr(codec, f.name) for f in fields(kind)}}
    raise ValueError(f"{type(codec).__name__} is not in CODECS; it holds {', '.join(CODECS)}")


def from_dict(stored: Mapping[str, Any]) -> Codec:
    """The codec of :func:`to_dict`. ``ValueError`` for an unknown name, and for missing or unknown fields."""
    values = dict(stored)
    name = values.pop("name", None)
    if name not in CODECS:
        raise ValueError(f"codec {name!r} is unknown; allowed: {', '.join(CODECS)}")
    needed = [f.name for f in fields(CODECS[name])]
    if sorted(values) != sorted(needed):
        raise ValueError(f"codec {name!r}: given {sorted(values)}; needs {sorted(needed)}")
    return CODECS[name](**{k: tuple(float(v) for v in values[k]) for k in needed})
