"""``base.json``: the weights that a LoRA adapts, or that fine-tuning by reward began from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from genkit.core.files import write_text
from genkit.core.tensors import sha256
from genkit.core.weight_files import weight_files
from genkit.training.directory import find_run

BASE_FILE = "base.json"


def write_base(run: Path, origin: Mapping[str, str]) -> None:
    """Record which weights a LoRA adapts or a fine-tuning run began from, with their checksum."""
    record = {**origin, "sha256": weights_sha256(base_weights(origin))}
    if "adapter" in origin:
        record["adapter_sha256"] = sha256(Path(origin["adapter"]))
    write_text(run / BASE_FILE, json.dumps(record, indent=1) + "\n")


def base_weights(origin: Mapping[str, str]) -> Path:
    """The weights file that :func:`init_from` returned."""
    return Path(origin["run"]) / origin["weights"]


def weights_sha256(path: Path) -> str:
    """The SHA-256 of a weights file; of an index of several, one of all that it names."""
    files = weight_files(path)
    if files == [path]:
        return sha256(path)
    return hashlib.sha256("".join(f"{p.name} {sha256(p)}\n" for p in files).encode()).hexdigest()


def read_base(run: Path, given: str | Path | None = None) -> dict[str, str]:
    """The origin in ``base.json``, also if the base was moved together with the run, or to the place that is ``given``.

    Raises ``ValueError`` if its weights are gone or have changed.
    """
    if not (run / BASE_FILE).is_file():
        raise ValueError(f"{run}: has no {BASE_FILE}, which says which weights it began from")
    origin = json.loads((run / BASE_FILE).read_text())
    moved = {**origin, "run": str(run.parent / Path(origin["run"]).name)}
    elsewhere = [{**origin, "run": str(find_run(given))}] if given is not None else []
    present = [o for o in (origin, moved, *elsewhere) if base_weights(o).is_file()]
    if not present:
        raise ValueError(f"{run}: began from {base_weights(origin)}, which is not there any more; put it back, or its "
                         "run beside this one")  # fmt: skip
    adapter = Path(origin.get("adapter", ""))
    if "adapter" in origin and (not adapter.is_file() or sha256(adapter) != origin["adapter_sha256"]):
        raise ValueError(f"{run}: began with the LoRA {adapter}, which is gone or has changed; put it back")
    for candidate in present:
        if weights_sha256(base_weights(candidate)) == origin["sha256"]:
            return candidate
    raise ValueError(f"{run}: began from {base_weights(present[0])}, which has changed since (another sha256)")
