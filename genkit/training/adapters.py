"""A further LoRA, a run's or that in a file, merged into the weights of a run that is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from genkit.backbones import lora
from genkit.config import load_object
from genkit.core.tensors import sha256
from genkit.training.averages import weights_file
from genkit.training.checkpoint import find_intact_checkpoint, read_tensors
from genkit.training.directory import find_run
from genkit.training.settings import stored_settings

MERGE_LORA_FILE = "genkit.integrations.lora_files:merge_lora_file"  # of a higher room, imported on demand


@dataclass(frozen=True)
class MergedAdapter:
    """A LoRA that was added to the weights of a run."""

    place: Path
    """the directory of the LoRA run, or the LoRA file"""
    file: Path
    """the weights"""
    scale: float

    def describe(self) -> str:
        """Name, scale and the sha256 of the weights: what the change is known by."""
        return f"{self.place.name} at {self.scale:g}, sha256 {sha256(self.file)}"


def merge_adapter(nets: Mapping[str, nn.Module], adapter: str | Path, scale: float = 1.0) -> MergedAdapter:
    """Add a LoRA run's slowest average, or the change in a LoRA file, to the weights of ``nets``, in place."""
    if str(adapter).endswith(".safetensors"):
        file = Path(adapter).expanduser()
        load_object(MERGE_LORA_FILE)(nets, file, scale)
        return MergedAdapter(file, file, scale)
    other = find_run(adapter)
    cfg = stored_settings(other)
    if not cfg.lora.active:
        raise ValueError(f"lora: given {adapter}, which is no LoRA run; train one: --init RUN --lora.rank 8")
    name = weights_file(cfg, None)
    checkpoint = find_intact_checkpoint(other, None, name)
    lora.merge(nets, cfg.lora, read_tensors(checkpoint, name), checkpoint / name, scale)
    return MergedAdapter(other, checkpoint / name, scale)
