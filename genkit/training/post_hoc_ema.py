"""Post-hoc EMA (Karras et al. 2024, section 3.2): averages of any width, reconstructed after training from snapshots.

While training, two power-function averages are kept and stored every so often; afterwards another width is the
combination of the stored ones whose profile is closest (:func:`genkit.training.power_ema.combine_profiles`).

Snapshots are in ``averages/step-N`` of the run. Of more than ``power_ema_keep`` of them, every second one is removed,
so that they stay evenly spaced: those at multiples of ``power_ema_every 2^j`` are kept, with the smallest j that is
enough.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genkit.core.files import atomic_directory, atomic_write, remove_directory
from genkit.core.messages import warn_once
from genkit.core.tensors import sha256, to_tensors
from genkit.training.checkpoint import first_damage
from genkit.training.directory import step_of
from genkit.training.power_ema import PREFIX, average_names, combine_profiles, slowest_key, width_of

if TYPE_CHECKING:
    from genkit.training.settings import TrainSettings
    from genkit.training.state import State

FOLDER, RECONSTRUCTED, SUMS = "averages", "reconstructed", "sha256.json"
LARGEST_RESIDUAL = 0.02  # distance between a profile and its reconstruction that is worth a warning


def snapshot_spacing(step: int, every: int, keep: int) -> int:
    """Steps between the snapshots that are kept at ``step``: ``every``, doubled until at most ``keep`` are left."""
    spacing = every
    while step // spacing > keep:
        spacing *= 2
    return spacing


def list_snapshots(run: Path) -> list[Path]:
    """The snapshots of a run, oldest first."""
    found = [p for p in (run / FOLDER).glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def is_snapshot_due(step: int, settings: TrainSettings) -> bool:
    """Whether the averages at ``step`` are among those to keep."""
    return step % snapshot_spacing(step, settings.power_ema_every, settings.power_ema_keep) == 0


def save_snapshot(run: Path, state: State, settings: TrainSettings) -> None:
    """Store the power-function averages of a whole (gathered) state."""
    (run / FOLDER).mkdir(exist_ok=True)
    with atomic_directory(run / FOLDER / f"step-{state.step:07d}") as part:
        for name in average_names(settings.power_ema):
            save_file(to_tensors(state.emas[name]), part / f"ema-{name}.safetensors")
        (part / SUMS).write_text(json.dumps({p.name: sha256(p) for p in part.glob("*.safetensors")}))


def thin_snapshots(run: Path, step: int, settings: TrainSettings) -> None:
    """Remove the snapshots that are too many at ``step``."""
    spacing = snapshot_spacing(step, settings.power_ema_every, settings.power_ema_keep)
    for old in list_snapshots(run):
        if step_of(old) % spacing:
            remove_directory(old)


def forget_snapshots(run: Path, step: int) -> None:
    """Remove the snapshots after ``step``, from which a run goes on, and all reconstructed averages."""
    for path in list_snapshots(run):
        if step_of(path) > step:
            remove_directory(path)
    shutil.rmtree(run / FOLDER / RECONSTRUCTED, ignore_errors=True)


def read_average(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of an average in a snapshot or a checkpoint. ``ValueError`` if the file is damaged."""
    file = folder / f"ema-{name}.safetensors"
    if (folder / "state.json").is_file():
        damaged = first_damage(folder, [file.name]) is not None
    else:
        try:
            recorded = json.loads((folder / SUMS).read_text())
        except (OSError, ValueError):
            recorded = {}
        damaged = not file.is_file() or recorded.get(file.name) != sha256(file)
    if damaged:
        raise ValueError(f"{file}: is missing or damaged; without {folder.name} the average is less exact: remove it")
    return load_file(file)


def reconstruct(run: Path, checkpoint: Path, settings: TrainSettings, width: float) -> Path:
    """The file with the average of ``width`` at a checkpoint, which is written when it is first asked for.

    It combines the snapshots up to that step and the averages in the checkpoint itself; a warning says if they are too
    few for this width. ``ValueError`` if one is damaged.
    """
    step = step_of(checkpoint)
    target = run / FOLDER / RECONSTRUCTED / checkpoint.name / f"ema-{PREFIX}{width}.safetensors"
    if target.is_file():
        return target
    folders = [*(p for p in list_snapshots(run) if step_of(p) < step), checkpoint]
    stored = [(folder, w) for folder in folders for w in settings.power_ema]
    weights, residual = combine_profiles([(step_of(folder), w) for folder, w in stored], step, width)
    if residual > LARGEST_RESIDUAL:
        warn_once(f"ema: {PREFIX}{width} at step {step} is off by {100 * residual:.0f} % of its profile, as there are "
                  f"only {len(folders)} snapshots; keep more with --power-ema-every")  # fmt: skip
    total: dict[str, Any] = {}
    dtypes: dict[str, torch.dtype] = {}
    for (folder, w), weight in zip(stored, weights, strict=True):
        for key, value in read_average(folder, f"{PREFIX}{w}").items():
            dtypes[key] = value.dtype
            # numbers that are no weights (counters) are those of the last one
            total[key] = total.get(key, 0) + float(weight) * value.double() if value.is_floating_point() else value
    with atomic_write(target) as part:
        save_file({key: value.to(dtypes[key]).contiguous() for key, value in total.items()}, part)
    return target


def weights_file(cfg: TrainSettings, ema: str | None) -> str:
    """The file of a checkpoint that holds this average. ``ValueError`` names those that exist."""
    kept = [*map(str, sorted(cfg.ema)), *average_names(cfg.power_ema)]
    if ema is None:
        slowest = slowest_key([*cfg.ema, *average_names(cfg.power_ema)])
        ema = "none" if slowest is None else str(slowest)
    if ema != "none" and ema not in kept:
        further = f", {PREFIX}WIDTH of any width" if cfg.power_ema else ""
        raise ValueError(f"ema: given {ema}; this run has: {', '.join([*kept, 'none'])}{further}")
    return "nets.safetensors" if ema == "none" else f"ema-{ema}.safetensors"


def reconstructed_width(cfg: TrainSettings, ema: str | None) -> float | None:
    """The width of a power-function average that the run did not keep, but can reconstruct; None for any other."""
    width = None if ema is None or not cfg.power_ema else width_of(ema)
    return None if width in cfg.power_ema else width
