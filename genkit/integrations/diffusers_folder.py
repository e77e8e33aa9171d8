"""Folders that diffusers saved: a model or a pipeline, on this machine or downloaded from the hub."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from genkit.core.hub import HUB_NAME, call_hub

DENOISERS = ("unet", "transformer")  # the folders of a pipeline that may hold its network
WANTED = (  # of a repository on the hub: settings, vocabularies and safetensors, nothing that runs
    "*.json", "*.txt", "*.model", "diffusion_pytorch_model*.safetensors",
    *(f"{part}*/*.safetensors" for part in (*DENOISERS, "vae", "text_encoder")),
)  # fmt: skip
UNWANTED = ("*.fp16.*", "*non_ema*", "*ema_only*", "*flax*", "*onnx*")  # the same weights once more


def locate(location: str, option: str = "init") -> Path:
    """The folder ``location``, or the local copy of OWNER/NAME of the hub. ``ValueError`` if there is neither."""
    root = Path(location).expanduser()
    return root if root.is_dir() else download(location, option)


@lru_cache(maxsize=8)  # a command asks several times: for the settings, for a note, for the weights
def download(name: str, option: str = "init") -> Path:
    """The local copy of OWNER/NAME of the hub. ``ValueError`` if it cannot be downloaded."""
    if not HUB_NAME.fullmatch(name):
        raise ValueError(
            f"{option}: there is no folder {name}; needs a folder of save_pretrained, or OWNER/NAME of the hub"
        )
    return call_hub(
        f"{option}: there is no folder {name}",
        name,
        lambda hub: Path(hub.snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))),
        "; else download it elsewhere and name its folder",
    )


def read_json(path: Path, option: str = "init") -> dict[str, Any]:
    """The settings in a JSON file. ``ValueError`` if it is damaged."""
    try:
        content = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{option}: {path} is not valid JSON: {e}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{option}: {path} holds no settings")
    return content


def split_location(location: str) -> tuple[str, Path | None]:
    """Model and file of ``P+FILE``, the weights or the LoRA to take with a model; the file is None for ``P`` alone."""
    base, plus, file = location.rpartition("+")
    if not plus or not file.endswith(".safetensors") or Path(location).expanduser().is_dir():
        return location, None
    return base, Path(file).expanduser().resolve()


def canonical_name(location: str) -> str:
    """``location`` as config.yaml stores it: the absolute path of a folder, or a name of the hub; with its file."""
    base, file = split_location(location)
    name = str(Path(base).expanduser().resolve()) if Path(base).expanduser().is_dir() else base
    return name if file is None else f"{name}+{file}"
