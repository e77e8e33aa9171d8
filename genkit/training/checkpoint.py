"""Checkpoints: safetensors with checksums, complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from genkit.core import Codec, Objective, Spec, spec_to_dict
from genkit.core.tensors import load_tensors, sha256, to_tensors
from genkit.data import codecs
from genkit.training.directory import symlink
from genkit.training.loop import State, phase_parameters


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. ``ValueError`` if there are none."""
    complete = sorted(p for p in (run / "checkpoints").glob("step-*") if (p / "state.json").is_file())
    if not complete:
        raise ValueError(f"run: given {run}, which has no complete checkpoint yet")
    return complete


def find_checkpoint(run: Path, step: int | None = None) -> Path:
    """The checkpoint that ``latest`` points at, or the one of ``step``. ``ValueError`` names those that exist."""
    complete = list_checkpoints(run)
    if step is None:
        latest = run / "latest"
        return latest.resolve() if (latest / "state.json").is_file() else complete[-1]
    for path in complete:
        if int(path.name.removeprefix("step-")) == step:
            return path
    saved = ", ".join(p.name.removeprefix("step-").lstrip("0") for p in complete)
    raise ValueError(f"step: given {step}; saved: {saved}")


def optimizer_tensors(objective: Objective, state: State) -> dict[str, Tensor]:
    """The optimizers' state by name: ``{"denoise/net.conv.weight/exp_avg": ...}``."""
    return {
        f"{phase.name}/{name}/{key}": value.cpu().contiguous().clone()
        for phase in objective.phases
        for name, p in phase_parameters(phase, state.nets)
        for key, value in state.optimizers[phase.name].state.get(p, {}).items()
    }


def save_checkpoint(
    run: Path,
    state: State,
    objective: Objective,
    spec: Spec,
    codec: Codec,
    *,
    seed: int,
    keep: int,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    best: int | None = None,
) -> Path:
    """Write ``checkpoints/step-N``, point ``latest`` at it, and keep the newest ``keep`` checkpoints.

    ``extra`` holds further files by name. With ``best``, the step of the best checkpoint, ``latest`` points at that
    one, which is kept as well.
    """
    final = run / "checkpoints" / f"step-{state.step:07d}"
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files = {"nets.safetensors": to_tensors(state.nets), "optim.safetensors": optimizer_tensors(objective, state)}
    files |= {f"ema-{decay}.safetensors": to_tensors(nets) for decay, nets in state.emas.items()}
    files |= {name: dict(content) for name, content in (extra or {}).items()}
    for name, content in files.items():
        save_file(content, part / name)
    # state.json comes last: a checkpoint without it is not one.
    record = {
        "step": state.step,
        "skipped": state.skipped,
        "seed": seed,
        "spec": spec_to_dict(spec),
        "codec": codecs.to_dict(codec),
        "sha256": {name: sha256(part / name) for name in files},
    }
    (part / "state.json").write_text(json.dumps(record, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    chosen = final if best is None else final.with_name(f"step-{best:07d}")
    symlink(run / "latest", f"checkpoints/{chosen.name}")
    for old in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
        if old != chosen:
            shutil.rmtree(old)
    return final


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint. ``ValueError`` if it is missing or its checksum is wrong."""
    path = checkpoint / name
    recorded = json.loads((checkpoint / "state.json").read_text())["sha256"]
    if name not in recorded:
        raise ValueError(f"{checkpoint}: has no {name}; it holds {', '.join(recorded)}")
    if not path.is_file() or sha256(path) != recorded[name]:
        raise ValueError(f"{path}: is damaged (another sha256 than recorded); take an earlier checkpoint: --step N")
    return load_file(path)


def restore(checkpoint: Path, state: State, objective: Objective) -> None:
    """Load a checkpoint into ``state``, in place: networks, averages, optimizers and step."""
    record = json.loads((checkpoint / "state.json").read_text())
    load_tensors(state.nets, read_tensors(checkpoint, "nets.safetensors"), checkpoint)
    for decay, nets in state.emas.items():
        load_tensors(nets, read_tensors(checkpoint, f"ema-{decay}.safetensors"), checkpoint)
    stored = read_tensors(checkpoint, "optim.safetensors")
    for phase in objective.phases:
        for name, p in phase_parameters(phase, state.nets):
            prefix = f"{phase.name}/{name}/"
            slots = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
            # the fused kernels need the step count on the parameter's device
            state.optimizers[phase.name].state[p] = {k: v.to(p.device) for k, v in slots.items()}
    state.step, state.skipped = record["step"], record["skipped"]
