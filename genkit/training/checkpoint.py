"""Checkpoints: safetensors with checksums, complete or absent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genkit.config import load_yaml
from genkit.config.numbers import CheckpointStep
from genkit.core import Codec, Objective, Spec, spec_to_dict
from genkit.core.files import atomic_directory, remove_directory
from genkit.core.links import follow_links, set_link
from genkit.core.messages import warn_once
from genkit.core.tensors import load_tensors, require_fit, sha256
from genkit.data import codecs
from genkit.training.best import read_best
from genkit.training.directory import is_complete, list_checkpoints, list_incomplete, list_saved, read_state, step_of
from genkit.training.optimizers.state_files import optimizer_pieces, restore_optimizers
from genkit.training.shared_files import Exchange, Piece, write_together
from genkit.training.state import State


def is_intact(path: Path, recorded: str) -> bool:
    """Whether a file is there and has the recorded checksum."""
    return path.is_file() and sha256(path) == recorded


def find_sound_checkpoint(
    run: Path, step: CheckpointStep | None = None, note: Callable[[str], None] = lambda text: None
) -> Path:
    """The newest checkpoint whose files all have their recorded checksums, or the one of ``step``.

    ``note`` is called for each damaged one that is skipped. ``ValueError`` if none is intact.
    """
    candidates = [find_checkpoint(run, step)] if step is not None else list_saved(run)[::-1]
    for checkpoint in candidates:
        damaged = first_damage(checkpoint)
        if damaged is None:
            return checkpoint
        note(f"{checkpoint.name} is damaged ({damaged}); it is skipped")
    tried = ", ".join(p.name for p in candidates) or "none"
    raise ValueError(f"run: given {run}, which has no intact checkpoint; tried: {tried}")


def first_damage(checkpoint: Path, names: Iterable[str] | None = None) -> str | None:
    """The first file of a checkpoint that is missing or damaged, of ``names`` or of all; None if there is none."""
    try:
        recorded = read_state(checkpoint)["sha256"]
    except ValueError:
        return "state.json"
    wanted = recorded if names is None else [name for name in names if name in recorded]
    return next((name for name in wanted if not is_intact(checkpoint / name, recorded[name])), None)


def find_intact_checkpoint(run: Path, step: CheckpointStep | None, file: str) -> Path:
    """The checkpoint of ``step``; for None the one that ``latest`` points at, or, if its ``file`` is damaged, the
    newest of which it is not, with a warning.

    ``ValueError`` if the one of ``step``, or every one, is damaged.
    """
    checkpoint = find_checkpoint(run, step)
    if (damaged := first_damage(checkpoint, [file])) is None:
        return checkpoint
    others = [p for p in list_checkpoints(run)[::-1] if p != checkpoint] if step is None else []
    for other in others:
        if first_damage(other, [file]) is None:
            warn_damaged(checkpoint, damaged, other)
            return other
    saved = ", ".join(str(step_of(p)) for p in list_checkpoints(run) if p != checkpoint) or "no other"
    raise ValueError(f"{checkpoint / damaged}: is damaged (another sha256 than recorded); saved steps, for --step: "
                     f"{saved}")  # fmt: skip


def warn_damaged(checkpoint: Path, file: str, used: Path) -> None:
    """Say that a checkpoint is passed over."""
    warn_once(f"{checkpoint} is damaged ({file}); {used.name} is used")


def find_checkpoint(run: Path, step: CheckpointStep | None = None) -> Path:
    """The checkpoint that ``latest`` points at, or the one of ``step``. ``ValueError`` names those that exist.

    If that of ``latest`` is incomplete, it is the newest complete one, with a warning.
    """
    complete = list_checkpoints(run)
    if not complete:
        raise ValueError(f"run: given {run}, which has no complete checkpoint yet")
    if step == "best":
        step = best_step(run)
    if step is None:
        latest = follow_links(run / "latest").resolve()
        if is_complete(latest):
            return latest
        for damaged in list_incomplete(run):
            if damaged == latest or step_of(damaged) > step_of(complete[-1]):
                warn_damaged(damaged, "state.json", complete[-1])
        return complete[-1]
    for path in complete:
        if step_of(path) == step:
            return path
    saved = ", ".join(str(step_of(p)) for p in complete)
    raise ValueError(f"step: given {step}; saved: {saved}")


def best_step(run: Path) -> int:
    """The step of the best checkpoint. ``ValueError`` if the run chose none."""
    best = read_best(run)
    if best is None or best.step is None:
        raise ValueError(f"step: given best, but {run.name} chose no best checkpoint; train with --val-every 100 "
                         "--keep-best val/loss, or name a step")  # fmt: skip
    return best.step


def network_pieces(nets: Mapping[str, nn.Module], state: State) -> dict[str, Piece]:
    """Networks as named tensors, as this rank has them."""
    return {f"{name}.{k}": state.piece(v, v) for name, net in nets.items() for k, v in net.state_dict().items()}


def save_checkpoint(
    run: Path,
    state: State,
    objective: Objective,
    spec: Spec,
    codec: Codec,
    *,
    seed: int,
    keep: int,
    data: Mapping[str, Any] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    best: int | None = None,
    use_best: bool = False,
    announce: bool = True,
) -> Path:
    """Write ``checkpoints/step-N``, point ``latest`` at it, and keep the newest ``keep`` checkpoints.

    ``data`` is the fingerprint of the training data. With the first checkpoint of a run, ``OUT/latest`` points at it,
    unless ``announce`` is off.
    ``extra`` holds further files by name. ``best`` is the step of the best checkpoint, which is kept as well;
    ``latest`` points at that one with ``use_best``.
    """
    files = checkpoint_files(state, objective, extra)
    record = checkpoint_record(run, state, spec, codec, seed, data)
    return write_checkpoint(run, files, record, keep=keep, best=best, use_best=use_best, announce=announce)


def checkpoint_files(
    state: State, objective: Objective, extra: Mapping[str, Mapping[str, Tensor]] | None = None
) -> dict[str, dict[str, Piece]]:
    """The content of a checkpoint's files, copied to the CPU; a rank's part of it, if networks are sharded."""
    files = {"nets.safetensors": network_pieces(state.nets, state)}
    files |= {"optim.safetensors": optimizer_pieces(objective, state)}
    files |= {f"ema-{decay}.safetensors": network_pieces(nets, state) for decay, nets in state.emas.items()}
    for name, content in (extra or {}).items():
        files[name] = {k: Piece(v, tuple(v.shape)) for k, v in content.items()}
    return files


def checkpoint_record(
    run: Path, state: State, spec: Spec, codec: Codec, seed: int, data: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What ``state.json`` holds, without the checksums."""
    return {
        "step": state.step,
        "skipped": state.skipped,
        "seed": seed,
        "spec": spec_to_dict(spec),
        "codec": codecs.to_dict(codec),
        "data": dict(data or {}),
        "meter": state.meter,
        **({"loss_scales": state.loss_scales} if state.loss_scales else {}),
        "settings": load_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {},
    }


def write_checkpoint(
    run: Path,
    files: Mapping[str, Mapping[str, Piece]],
    record: Mapping[str, Any],
    *,
    keep: int,
    best: int | None = None,
    use_best: bool = False,
    announce: bool = True,
    exchange: Exchange | None = None,
) -> Path:
    """Write a checkpoint whose content was copied. With an ``exchange`` all ranks call it, and write their parts."""
    final = run / "checkpoints" / f"step-{record['step']:07d}"
    if exchange and exchange.rank:
        write_together(None, files, exchange)
        return final
    first = not list_checkpoints(run)
    with atomic_directory(final) as part:
        if exchange:
            write_together(part, files, exchange)
        else:
            for name, content in files.items():
                save_file({k: piece.rows for k, piece in content.items()}, part / name)
        # state.json comes last: a checkpoint without it is incomplete.
        record = {**record, "sha256": {name: sha256(part / name) for name in files}}
        (part / "state.json").write_text(json.dumps(record, indent=1))
    kept = final if best is None else final.with_name(f"step-{best:07d}")
    point_latest(run, kept if use_best else final)
    if first and announce:
        set_link(run.parent / "latest", run.name)
    for old in list_checkpoints(run)[:-keep]:
        if old != kept:
            remove_directory(old)
    return final


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time, while training goes on; a kill leaves the one before.

    As a context it waits for the last one, unless Ctrl-C ends it at once. An error of the thread is raised by the next
    :meth:`start` or :meth:`wait`.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin ``work()``, once the one before has ended."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as e:  # raised in the thread that waits
                self.error = e

        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:
            self.wait()


def point_latest(run: Path, checkpoint: Path) -> None:
    """Let ``RUN/latest`` refer to ``checkpoint``: a kill between the two, or damage, leaves it at another one."""
    set_link(run / "latest", f"checkpoints/{checkpoint.name}")


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint, whose checksum has been compared. ``ValueError`` if it has none such."""
    recorded = read_state(checkpoint)["sha256"]
    if name not in recorded:
        raise ValueError(f"{checkpoint}: has no {name}; it holds {', '.join(recorded)}")
    return load_file(checkpoint / name)


def restore(checkpoint: Path, state: State, objective: Objective) -> None:
    """Load a checkpoint into ``state``, in place: networks, averages, optimizers and step.

    Its checksums are those that :func:`find_sound_checkpoint` has compared.
    """
    record = read_state(checkpoint)
    load_networks(state, state.nets, read_tensors(checkpoint, "nets.safetensors"), checkpoint)
    for decay, nets in state.emas.items():
        load_networks(state, nets, read_tensors(checkpoint, f"ema-{decay}.safetensors"), checkpoint)
    restore_optimizers(read_tensors(checkpoint, "optim.safetensors"), objective, state)
    state.step, state.skipped, state.meter = record["step"], record["skipped"], record.get("meter", {})
    state.loss_scales = record.get("loss_scales", {})


def load_networks(state: State, nets: Mapping[str, nn.Module], stored: Mapping[str, Tensor], file: Path) -> None:
    """Load the tensors of ``file`` into ``nets``, of a sharded network this rank's rows."""
    if state.sharding is None:
        load_tensors(nets, stored, file)
        return
    require_fit(nets, stored, file)
    state.sharding.load(nets, stored)
