"""The messages between a policy's server and its clients: a JSON header and raw tensors, and nothing that runs code.

A message is the length of the header in bytes (4 bytes, big-endian), the header (a JSON object in UTF-8) and the bytes
of its tensors, one after the other. The header has a ``type``, and its ``tensors`` are described by ``{"name": "obs",
"dtype": "float32", "shape": [2]}``: row-major, little-endian, float32, float64, int64 or uint8.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

MAX_HEADER = 2**16  # bytes
MAX_BODY = 2**26  # bytes of all tensors of a message
DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"), "float64": np.dtype("<f8"), "int64": np.dtype("<i8"), "uint8": np.dtype("u1"),
}  # fmt: skip
Header = dict[str, Any]


class BrokenConnection(ConnectionError):
    """A message whose end is unknown, so that none after it can be read."""


def pack_message(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> bytes:
    """The bytes of a message. ``ValueError`` for a tensor of a type that messages do not have."""
    described, parts = [], []
    for name, value in (tensors or {}).items():
        if value.dtype.name not in DTYPES:
            raise ValueError(f"{name}: given {value.dtype}; allowed: {', '.join(DTYPES)}")
        described.append({"name": name, "dtype": value.dtype.name, "shape": list(value.shape)})
        parts.append(np.ascontiguousarray(value, DTYPES[value.dtype.name]).tobytes())
    text = json.dumps({**header, "tensors": described}).encode()
    return b"".join([struct.pack(">I", len(text)), text, *parts])


def read_message(receive: Callable[[int], bytes]) -> tuple[Header, dict[str, np.ndarray]] | None:
    """The next message, where ``receive(n)`` gives exactly n bytes, or fewer at the end; None at the end.

    ``ValueError`` for one that is not as described but has been read to its end. :class:`BrokenConnection` if its end
    is unknown.
    """
    start = receive(4)
    if not start:
        return None
    (length,) = struct.unpack(">I", start) if len(start) == 4 else (MAX_HEADER + 1,)
    if length > MAX_HEADER:
        raise BrokenConnection(f"header: given {length} bytes; allowed up to {MAX_HEADER}")
    text = receive(length)
    try:
        header = json.loads(text)
        described = [describe(entry) for entry in header.get("tensors", [])]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as e:
        raise BrokenConnection(f"header: is not a JSON object with tensors of name, dtype and shape: {e}") from None
    sizes = [math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in described]
    if sum(sizes) > MAX_BODY:
        raise BrokenConnection(f"tensors: given {sum(sizes)} bytes; allowed up to {MAX_BODY}")
    body = receive(sum(sizes))
    if len(body) < sum(sizes):
        raise BrokenConnection("tensors: the connection ended before their last byte")
    tensors: dict[str, np.ndarray] = {}
    for (name, dtype, shape), size in zip(described, sizes, strict=True):
        part, body = body[:size], body[size:]
        if name in tensors:
            raise ValueError(f"tensors: given {name!r} twice")
        tensors[name] = np.frombuffer(part, DTYPES[dtype]).reshape(shape)
    return header, tensors


def describe(entry: Any) -> tuple[str, str, list[int]]:
    """``(name, dtype, shape)`` of a tensor's description. ``ValueError`` or ``KeyError`` for another."""
    name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
    if not isinstance(name, str) or dtype not in DTYPES:
        raise ValueError(f"given dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or any(type(n) is not int or not 0 <= n <= MAX_BODY for n in shape):
        raise ValueError(f"{name}: given shape {shape!r}; needs a list of whole numbers")
    return name, dtype, shape
