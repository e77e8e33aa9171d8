"""What the newest checkpoint of a run holds."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from genkit.training.checkpoint import find_checkpoint


def saved_tensors(run: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint, by ``FILE/NAME``: networks, averages, optimizers."""
    files = sorted(find_checkpoint(run).glob("*.safetensors"))
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}
