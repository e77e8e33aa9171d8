"""Conditions, and the layout of a sample.

A condition is a named tensor in ``cond``. An absent condition is null: the network uses a learned embedding instead.
Some names are reserved. ``cond["mask"]``, Bool ``[B, L]``, marks the tokens that exist. ``cond["keep"]``, Bool ``[B]``,
marks the *samples* that see their conditions at all (False: null), and ``cond["keep.NAME"]``, Bool ``[B]``, those that
see the condition NAME. ``cond["target_time"]``, Float ``[B]``, is the time that a flow map goes to
(:mod:`genkit.diffusion.flow_map`). ``cond["sizes"]``, Float ``[B, 6]``, is what some networks are told of the size of a
picture (:mod:`genkit.data.buckets`); the others pass over it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

Cond = Mapping[str, Tensor]
NO_COND: Cond = {}
SCALE_INPUT = "guidance"  # the scale of guidance of each sample [B], for a network that takes it as an input
SIZES_INPUT = "sizes"  # of each picture [B, 6]: stored height and width, top and left of the crop, height and width
RESERVED = ("keep", "mask", "target_time", SCALE_INPUT, SIZES_INPUT)


@dataclass(frozen=True)
class Label:
    """A class index: ``cond[name]`` is Int ``[B]`` in [0, num).

    ``centers`` holds one sample per class, flattened and concatenated, in the model's units, if a class stands for a
    sample (the anchor near which an action chunk lies). ``empty`` are the classes without a sample in the training
    data; they are no part of what the classes mean, and are not compared.
    """

    num: int
    names: tuple[str, ...] = ()
    centers: tuple[float, ...] = ()
    empty: tuple[int, ...] = field(default=(), compare=False)

    @property
    def trained(self) -> list[int]:
        """The classes that have samples."""
        return [i for i in range(self.num) if i not in self.empty]

    def number(self, given: int | str, option: str = "label") -> int:
        """The class that a number or a name stands for. Text is a name, or a number if no class has that name.

        Raises ``ValueError`` that lists the classes.
        """
        if isinstance(given, str) and given in self.names:
            return self.names.index(given)
        is_number = not isinstance(given, str) or re.fullmatch(r"[0-9]{1,18}", given)
        if is_number and 0 <= (number := int(given)) < self.num:
            return number
        allowed, words = f"0..{self.num - 1}", [name for i, name in enumerate(self.names) if name != str(i)]
        if words:
            allowed += " or a name: " + ", ".join(words[:20]) + (", ..." if len(words) > 20 else "")
        close = difflib.get_close_matches(str(given), words, 1)
        raise ValueError(
            f"{option}: given {given}; allowed {allowed}" + (f"; did you mean {close[0]}?" if close else "")
        )

    def check(self, name: str, value: Tensor, batch: int) -> None:
        """``ValueError`` unless ``value`` is valid for ``batch`` samples."""
        if value.shape != (batch,) or value.dtype.is_floating_point:
            raise ValueError(f"cond[{name!r}]: given {tuple(value.shape)} of {value.dtype}; needs [{batch}] integers")
        if batch and (int(value.min()) < 0 or int(value.max()) >= self.num):
            raise ValueError(f"{name}: given {int(value.min())}..{int(value.max())}; allowed 0..{self.num - 1}")


@dataclass(frozen=True)
class Vector:
    """Numbers without an image's layout (an observation, an embedding): ``cond[name]`` is Float ``[B, *shape]``.

    They are given in the data's own units. Networks see ``(value - shift) / scale``, clamped to ``[-limit, limit]``
    (None: not clamped); ``shift`` and ``scale`` have one number per entry of the last axis, () meaning unchanged. They
    are stored here so that they travel with the model. ``entries`` names what the last axis is composed of, in this
    order, () if it is one thing: the entries of an observation that is a dictionary. A frozen text ``encoder`` computes
    a pooled state together with the tokens of a text. With ``tokens`` each row of the first axis (an observed step) is
    a token for cross-attention.
    """

    shape: tuple[int, ...]
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    limit: float | None = None
    entries: tuple[str, ...] = ()
    encoder: str = ""
    tokens: bool = False

    def check(self, name: str, value: Tensor, batch: int) -> None:
        """``ValueError`` unless ``value`` is valid for ``batch`` samples."""
        if value.shape != (batch, *self.shape):
            raise ValueError(f"cond[{name!r}]: given shape {tuple(value.shape)}; needs {(batch, *self.shape)}")


@dataclass(frozen=True)
class Image:
    """An image of the sample's own size, concatenated to it: ``cond[name]`` is Float ``[B, channels, *size]``."""

    channels: int

    def check(self, name: str, value: Tensor, batch: int) -> None:
        """``ValueError`` unless ``value`` is valid for ``batch`` samples."""
        if value.ndim < 3 or value.shape[:2] != (batch, self.channels):
            raise ValueError(f"cond[{name!r}]: given shape {tuple(value.shape)}; needs ({batch}, {self.channels}, ...)")


@dataclass(frozen=True)
class Tokens:
    """A sequence for cross-attention: ``cond[name]`` Float ``[B, L, dim]``, with ``cond["mask"]`` Bool ``[B, L]``.

    If a frozen text ``encoder`` computes them (:mod:`genkit.data.text`), its name, the ``sha256`` of its weights, the
    number of tokens it takes (``length``) and some captions of the data (``examples``) are stored here. ``padding`` is
    "seen" or "masked" for the encoders of a pipeline, which make every text ``length`` tokens long: the network sees
    the padding or a mask hides it, and the states of the empty text are null, in place of a learned token.
    """

    dim: int
    encoder: str = ""
    sha256: str = ""
    length: int = 0
    examples: tuple[str, ...] = ()
    padding: str = ""

    def check(self, name: str, value: Tensor, batch: int) -> None:
        """``ValueError`` unless ``value`` is valid for ``batch`` samples."""
        if value.ndim != 3 or value.shape[0] != batch or value.shape[2] != self.dim:
            raise ValueError(f"cond[{name!r}]: given shape {tuple(value.shape)}; needs ({batch}, length, {self.dim})")


@dataclass(frozen=True)
class Text:
    """Text as UTF-8 bytes: ``cond[name]`` is Int ``[B, L]``, each byte plus 1, padded with 0; L is at most ``length``.

    No byte of UTF-8 is above 244, so uint8 holds them. A row of zeros, the empty text, is null. ``examples`` are some
    captions of the data.
    """

    length: int
    examples: tuple[str, ...] = ()

    def check(self, name: str, value: Tensor, batch: int) -> None:
        """``ValueError`` unless ``value`` is valid for ``batch`` samples."""
        if value.ndim != 2 or len(value) != batch or value.dtype.is_floating_point or value.dtype == torch.bool:
            given = f"{tuple(value.shape)} of {value.dtype}"
            raise ValueError(
                f"cond[{name!r}]: given {given}; needs [{batch}, length] integers (genkit.data.text.to_bytes)"
            )
        if value.shape[1] > self.length:
            raise ValueError(f"cond[{name!r}]: given {value.shape[1]} bytes of text; this model reads {self.length}")
        if value.numel() and (int(value.min()) < 0 or int(value.max()) > 256):
            raise ValueError(f"{name}: given {int(value.min())}..{int(value.max())}; allowed 0..256, a byte plus 1")


@dataclass(frozen=True)
class Frames:
    """Recent camera images, the newest last: ``cond[name]`` is uint8 ``[B, *shape]``, shape = (To, C, H, W).

    Their size is independent of the sample's; an encoder that is trained with the model embeds them. ``cameras`` are
    the numbers of channels of several cameras, each with an encoder of its own; () is one camera. ``crop`` (h, w) is
    the part that networks see: the centre, unless the images are cropped already, at a random place in training. With
    ``tokens`` each image is a token for cross-attention.
    """

    shape: tuple[int, ...]
    cameras: tuple[int, ...] = ()
    crop: tuple[int, ...] = ()
    encoder: str = ""
    """of each camera, by its name in ``CAMERA_ENCODERS``; "" is cnn"""
    tokens: bool = False

    @property
    def cropped(self) -> tuple[int, ...]:
        """The shape of what networks see."""
        return (*self.shape[:2], *(self.crop or self.shape[2:]))

    def check(self, name: str, value: Tensor, batch: int) -> None:
        """``ValueError`` unless ``value`` is valid for ``batch`` samples."""
        shapes = [(batch, *shape) for shape in (self.shape, self.cropped)]
        if value.shape not in shapes or value.dtype != torch.uint8:
            given = f"{tuple(value.shape)} of {value.dtype}"
            raise ValueError(f"cond[{name!r}]: given {given}; needs {(batch, *self.shape)} of torch.uint8")


@dataclass(frozen=True)
class Scalar:
    """A number of order one, on which the output depends smoothly: ``cond[name]`` is Float ``[B]``.

    A second time, or a guidance scale. Objectives add it to the networks that they make; data have none. It is no
    condition that can be dropped: ``keep`` has no effect on it, and an absent one is 0, at which the network is as it
    would be without.
    """

    def check(self, name: str, value: Tensor, batch: int) -> None:
        """``ValueError`` unless ``value`` is valid for ``batch`` samples."""
        if value.shape != (batch,) or not value.dtype.is_floating_point:
            raise ValueError(f"cond[{name!r}]: given {tuple(value.shape)} of {value.dtype}; needs [{batch}] floats")


NEWER_FIELDS: Mapping[type, tuple[str, ...]] = {  # omitted if empty, as in specs written before they existed
    Vector: ("entries", "encoder", "tokens"),
    Frames: ("cameras", "crop", "encoder", "tokens"),
    Tokens: ("padding",),
    Label: ("empty",),
}
Condition = Label | Vector | Image | Tokens | Text | Frames | Scalar
KINDS: Mapping[str, type] = {
    "label": Label,
    "vector": Vector,
    "image": Image,
    "tokens": Tokens,
    "text": Text,
    "frames": Frames,
    "scalar": Scalar,
}


def keep_target(name: str) -> str | None:
    """The condition that ``cond[name]`` masks if ``name`` is ``keep.NAME``, else None."""
    return name[5:] if name.startswith("keep.") else None


@dataclass(frozen=True)
class Spec:
    """Layout of one sample: ``shape`` is ``(D,)``, ``(C, T)`` or ``(C, H, W)``; ``cond`` its conditions by name.

    Data define it; backbones build networks for it.
    """

    shape: tuple[int, ...]
    cond: Mapping[str, Condition] = field(default_factory=dict)

    def check(self, cond: Cond, batch: int) -> None:
        """Raise ``ValueError`` if ``cond`` does not fit: an unknown name, a wrong shape, a label out of range."""
        for name, value in cond.items():
            if name == "keep" or keep_target(name) in self.cond:
                _require_bool(name, value, (batch,))
            elif name == SIZES_INPUT:
                Vector((6,)).check(name, value, batch)
            elif name == "mask":
                tokens = [k for k, kind in self.cond.items() if isinstance(kind, Tokens) and k in cond]
                if not tokens:
                    raise ValueError("cond['mask'] is given, but there are no tokens that it could mask")
                _require_bool(name, value, tuple(cond[tokens[0]].shape[:2]))
            elif name not in self.cond:
                raise ValueError(f"condition {name!r} is unknown here; allowed: {', '.join(self.cond) or 'none'}")
            else:
                self.cond[name].check(name, value, batch)


def _require_bool(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape or value.dtype != torch.bool:
        given = f"{tuple(value.shape)} of {value.dtype}"
        raise ValueError(f"cond[{name!r}]: given {given}; needs {list(shape)} bool")


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """A spec as JSON values; :func:`spec_from_dict` is the inverse."""
    names = {kind: name for name, kind in KINDS.items()}

    def describe(kind: Condition) -> dict[str, Any]:
        values = asdict(kind)
        for field_name in NEWER_FIELDS.get(type(kind), ()):
            if not values[field_name]:
                del values[field_name]
        return {"kind": names[type(kind)], **values}

    return {"shape": list(spec.shape), "cond": {k: describe(v) for k, v in spec.cond.items()}}


def spec_from_dict(d: Mapping[str, Any]) -> Spec:
    """The spec that :func:`spec_to_dict` described."""

    def condition(v: Mapping[str, Any]) -> Any:
        values = {k: tuple(x) if isinstance(x, list) else x for k, x in v.items() if k != "kind"}
        return KINDS[v["kind"]](**values)

    return Spec(tuple(d["shape"]), {k: condition(v) for k, v in d["cond"].items()})
