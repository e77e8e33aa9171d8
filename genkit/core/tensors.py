"""Networks as named tensors in safetensors files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPE_NAMES = {  # of types in a safetensors file, in the order in which its tensors lie there, last first
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip


def to_tensors(nets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return ``{"net.conv.weight": ...}``: copies on the CPU that share no memory."""
    return {
        f"{name}.{k}": v.cpu().contiguous().clone() for name, net in nets.items() for k, v in net.state_dict().items()
    }


def local_rows(value: Tensor) -> Tensor:
    """What this rank has of a sharded tensor (a ``DTensor``); any other tensor itself."""
    return value.to_local() if hasattr(value, "to_local") else value  # type: ignore[attr-defined]


def copy_to_cpu(value: Tensor) -> Tensor:
    """A copy of a tensor, of a sharded one of this rank's rows, that shares no memory."""
    return local_rows(value).detach().cpu().contiguous().clone()


def count_parameters(net: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in net.parameters())


def unsaved_buffers(net: nn.Module) -> dict[int, Any]:
    """The buffers that are not saved, by id: tables, and the frozen weights under a LoRA. Copies share them."""
    return {id(m._buffers[k]): m._buffers[k] for m in net.modules() for k in m._non_persistent_buffers_set}


def load_tensors(nets: Mapping[str, nn.Module], stored: Mapping[str, Tensor], file: Path) -> None:
    """Load the tensors of ``file`` into ``nets``.

    Raises ``ValueError`` that names the first tensor that is missing, unknown or of another shape.
    """
    require_fit(nets, stored, file)
    for name, net in nets.items():
        net.load_state_dict({k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")})


def require_fit(nets: Mapping[str, nn.Module], stored: Mapping[str, Tensor], file: Path) -> None:
    """``ValueError`` that names the first tensor of ``file`` that is missing, unknown or of another shape."""
    if mismatched := mismatched_keys(nets, stored):
        raise ValueError(f"{file}: does not fit the run's config.yaml, first at {mismatched[0]}")


def mismatched_keys(nets: Mapping[str, nn.Module], stored: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that are missing or unknown; if there are none, those with another shape."""
    shapes = {f"{name}.{k}": v.shape for name, net in nets.items() for k, v in net.state_dict().items()}
    return sorted(shapes.keys() ^ stored.keys()) or [k for k in shapes if shapes[k] != stored[k].shape]


def cache_folder() -> Path:
    """Return the folder for files that can be recreated or downloaded: ``$GENKIT_CACHE``, or ``~/.cache/genkit``."""
    return Path(os.environ.get("GENKIT_CACHE") or "~/.cache/genkit").expanduser()


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
