"""Continuing a run: what may change, what is compared, and what is kept of the earlier settings."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from genkit import config
from genkit.config.numbers import CheckpointStep
from genkit.core import Data, Draw, spec_from_dict, spec_to_dict
from genkit.core.links import LINK_NAME, follow_links
from genkit.training.checkpoint import find_sound_checkpoint
from genkit.training.directory import find_run, list_saved, step_of
from genkit.training.first_stage import canonical_first_stage
from genkit.training.init_sources import canonical_init
from genkit.training.recorded import changeable_fields
from genkit.training.schedules import learning_rate
from genkit.training.settings import TrainSettings, stored_settings

FINGERPRINT_ROWS = 64  # samples, evenly spaced, whose content a fingerprint covers
Note = Callable[[str], None]
Settings = TypeVar("Settings")


def settings_difference(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """``{field: (old value, new value)}``, as config.yaml states them, of the fields that differ."""
    before, after = config.dump(old), config.dump(new)
    return {k: (before[k], after[k]) for k in before if before[k] != after[k]}


def continued_settings(run: Path, new: TrainSettings, note: Note) -> TrainSettings:
    """``new`` for resuming ``run``: how long, how often, how fast may change, what determines the weights may not.

    A data set that has moved may be given another ``root``; its content is compared by :func:`compare_fingerprints`.
    ``note`` is called for each change. Raises ``ValueError`` for a change that would alter the trained weights.
    """
    old = stored_settings(run)
    # what the settings leave open was decided when the run began
    precision = old.precision if new.precision == "auto" else new.precision
    threads = old.threads if new.threads is None else new.threads
    data = new.data.with_decisions_of(old.data)
    new = dataclasses.replace(
        with_canonical_paths(new),
        resume=None,
        step=None,
        note=None,
        tags=(),
        precision=precision,
        threads=threads,
        data=data,
    )
    new = decided_as(old, new)
    refuse_other_meaning(run, old, new, f"begin another run from these weights with --init {run}", note)
    return new


def refuse_other_meaning(run: Path, old: Settings, new: Settings, alternative: str, note: Note) -> None:
    """``ValueError``, which names the ``alternative``, if a field differs that may not change when ``run`` is resumed.

    The fields that may are ``changeable``; a block of data may have another ``root``. ``note`` is called for each.
    """
    for name, (before, after) in settings_difference(old, new).items():
        if isinstance(before, dict) and "root" in before and {**before, "root": None} == {**after, "root": None}:
            before, after = before["root"], after["root"]
        elif name not in changeable_fields(type(new)):
            setting, was, given = first_difference(name, before, after)
            raise ValueError(
                f"{setting}: given {describe(given)}, but {run.name} was trained with {describe(was)}; a resumed run "
                f"keeps its {name}: leave it out, or {alternative}"
            )
        note(f"changed  {name}: {describe(before)} -> {describe(after)}")


def first_difference(name: str, before: Any, after: Any) -> tuple[str, Any, Any]:
    """The dotted name of the first setting that differs, within blocks of one class, and its two values."""
    if isinstance(before, dict) and isinstance(after, dict) and before.get("name") == after.get("name"):
        inner = next(k for k in before | after if before.get(k) != after.get(k))
        return first_difference(f"{name}.{inner}", before.get(inner), after.get(inner))
    return name, before, after


def with_canonical_paths(settings: TrainSettings) -> TrainSettings:
    """``settings`` with ``codec`` and ``init`` as config.yaml states them, independent of the working directory.

    What is not there any more stays as it is: a run needs neither to be resumed.
    """
    resolved = {}
    for name, resolve in (("codec", canonical_first_stage), ("init", canonical_init)):
        if value := getattr(settings, name):
            with contextlib.suppress(ValueError):
                resolved[name] = resolve(value)
    return dataclasses.replace(settings, **resolved)


def decided_as(old: TrainSettings, new: TrainSettings) -> TrainSettings:
    """``new`` with what it and its objective leave open about the steps as the ``old`` run decided it."""
    new = dataclasses.replace(new, warmup=old.warmup if new.warmup is None else new.warmup)
    before, after = old.objective, new.objective
    if type(before) is not type(after):
        return new
    own = {f.name for f in dataclasses.fields(cast(Any, after))}.intersection(after.open_settings)
    decided = {k: getattr(before, k) for k in own if getattr(after, k) is None}
    return dataclasses.replace(new, objective=dataclasses.replace(cast(Any, after), **decided)) if decided else new


def describe(value: Any) -> str:
    """A setting in a message: a block by its name."""
    return str(value["name"]) if isinstance(value, dict) and "name" in value else str(value)


def note_schedule(old: TrainSettings, new: TrainSettings, step: int, note: Note) -> None:
    """Say how the learning rate jumps if a schedule that depends on the number of steps is made longer or shorter."""
    before, after = learning_rate(old, step), learning_rate(new, step)
    if old.steps != new.steps and abs(before - after) > 0.05 * max(before, after):
        change = f"the learning rate at step {step} is {after:.2g}, not {before:.2g}"
        note(f"note     the schedule now ends at step {new.steps}: {change}")


def keep_old_config(run: Path, step: int) -> None:
    """Keep ``config.yaml`` as ``config-STEP.yaml``, the settings until that step."""
    path = run / f"config-{step}.yaml"
    if not path.exists():
        shutil.copyfile(run / "config.yaml", path)


def resume_point(run: Path, step: CheckpointStep | None, note: Note) -> Path | None:
    """The checkpoint to go on from: the newest sound one, or the one of ``step``; None if the run has none.

    Later checkpoints are set aside, in ``checkpoints/superseded``, or ``damaged`` if they are: they count no longer.
    """
    if step is None and not list_saved(run):
        note("note     no checkpoint was saved yet: the run begins again at step 0")
        return None
    try:
        checkpoint = find_sound_checkpoint(run, step, lambda text: note(f"note     {text}"))
    except ValueError:
        if step is not None:
            raise
        note("note     no intact checkpoint is left: the run begins again at step 0")
        checkpoint = None
    later = [p for p in list_saved(run) if checkpoint is None or step_of(p) > step_of(checkpoint)]
    if later:
        folder = run / "checkpoints" / ("damaged" if step is None else "superseded")
        set_aside(later, folder)
        note(f"note     {len(later)} later checkpoint{'s are' if len(later) > 1 else ' is'} set aside in {folder}")
    return checkpoint


def set_aside(paths: Iterable[Path], folder: Path) -> None:
    """Move files or directories into ``folder``, over those of the same names."""
    folder.mkdir(exist_ok=True)
    for path in paths:
        shutil.rmtree(folder / path.name, ignore_errors=True)
        path.rename(folder / path.name)


def find_resumable(settings: TrainSettings) -> Path | None:
    """The newest run below ``settings.out`` that was started with these settings, for ``--resume auto``."""
    refuse_moving_paths(settings)
    resolved = {"threads", "precision", "resume", "step"}  # differ between a command line and what it became
    settings = with_canonical_paths(settings)
    # a run that is older than held-out shares has the data as they are given
    alternatives = [
        dataclasses.replace(settings, data=source.with_absolute_root())
        for source in (settings.data.with_decisions(), settings.data)
    ]
    out = Path(settings.out).expanduser()
    for path in sorted(out.glob("*-*"), reverse=True) if out.is_dir() else ():
        if path.is_symlink() or not (path / "config.yaml").is_file():
            continue
        try:
            stored = stored_settings(path)
            given = [decided_as(stored, alternative) for alternative in alternatives]
            differences = [set(settings_difference(stored, settings)) for settings in given]
        except ValueError:
            continue
        if any(not difference - changeable_fields(TrainSettings) - resolved for difference in differences):
            return find_run(path)
    return None


def refuse_moving_paths(settings: TrainSettings) -> None:
    """``ValueError`` if a setting names a run by ``latest`` in ``out``: another one as soon as this run has begun."""
    moving = Path(settings.out).expanduser().resolve() / LINK_NAME
    given = {"codec": settings.codec, "init": settings.init, "data.root": getattr(settings.data, "root", None)}
    for name, text in given.items():
        path = Path(text).expanduser() if isinstance(text, str) else Path()
        if any(p.name == LINK_NAME and p.parent.resolve() / LINK_NAME == moving for p in (path, *path.parents)):
            raise ValueError(
                f"{name}: given {text} with --resume auto, but {LINK_NAME} is another run once this one has begun; "
                f"name the run itself: {follow_links(path).resolve()}"
            )


# -------------------------------------------------------------------------------------------------- the data
def data_fingerprint(data: Data) -> dict[str, Any]:
    """Number of samples, layout (with class names) and a hash of the content of evenly spaced samples."""
    rows = torch.linspace(0, len(data) - 1, min(FINGERPRINT_ROWS, len(data))).round().long()
    batch = data.batch(rows, Draw((0,), 0, len(rows)))
    digest = hashlib.sha256()
    for value in [batch.x, *(batch.cond[k] for k in sorted(batch.cond))]:
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.cpu().contiguous().numpy().tobytes())
    return {"n": len(data), "spec": spec_to_dict(data.spec), "sha256": digest.hexdigest()}


def compare_fingerprints(stored: Mapping[str, Any], current: Mapping[str, Any], note: Note) -> None:
    """``ValueError`` if the samples or their classes mean something else now; ``note`` is called for others."""
    if not stored:
        return
    # through JSON, as the stored one went
    current = json.loads(json.dumps(current))
    if spec_from_dict(stored["spec"]) != spec_from_dict(current["spec"]):
        raise ValueError(
            f"data: {difference_of_specs(stored['spec'], current['spec'])}; a resumed run needs its own data"
        )
    if stored["n"] != current["n"]:
        now = f"{current['n']} now; batches will differ"
        note(f"note     data: {stored['n']} samples when the run was saved, {now}")
    elif stored["sha256"] != current["sha256"]:
        note("note     data: the same number of samples as when the run was saved, but other content")


def difference_of_specs(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between the layouts of two data sets, for a message."""
    if old["shape"] != new["shape"]:
        return f"samples were {old['shape']}, and are {new['shape']} now"
    for name in sorted(old["cond"].keys() | new["cond"].keys()):
        before, after = old["cond"].get(name), new["cond"].get(name)
        if before != after:
            was, now = ((c or {}).get("names") or c or "absent" for c in (before, after))
            return f"{name} was {was}, and is {now} now"
    return "the layout has changed"
