"""Networks as named tensors in safetensors files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn


def to_tensors(nets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """``{"net.conv.weight": ...}``, on the CPU, each with its own memory."""
    return {
        f"{name}.{k}": v.cpu().contiguous().clone() for name, net in nets.items() for k, v in net.state_dict().items()
    }


def load_tensors(nets: Mapping[str, nn.Module], stored: Mapping[str, Tensor], where: Path) -> None:
    """Load ``stored`` into ``nets``; ``ValueError`` names the first tensor that is missing, new or misshapen."""
    if odd := mismatched_keys(nets, stored):
        raise ValueError(f"{where}: does not fit the run's config.yaml, first at {odd[0]}")
    for name, net in nets.items():
        net.load_state_dict({k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")})


def mismatched_keys(nets: Mapping[str, nn.Module], stored: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that are missing or new; where there are none, of those that are misshapen."""
    wanted = {f"{name}.{k}": v.shape for name, net in nets.items() for k, v in net.state_dict().items()}
    return sorted(wanted.keys() ^ stored.keys()) or [k for k in wanted if wanted[k] != stored[k].shape]


def cache() -> Path:
    """Where genkit keeps what it can make or fetch again: ``$GENKIT_CACHE``, else ``~/.cache/genkit``."""
    return Path(os.environ.get("GENKIT_CACHE") or "~/.cache/genkit").expanduser()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
