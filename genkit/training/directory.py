"""The run directory: a configuration, checkpoints, a log and pictures. No pickle anywhere.

    runs/0007-digits-flow-unet/
      config.yaml    env.json    log.jsonl    loss.png    samples/step-0050000.png    latest -> checkpoints/step-0050000
      codec/first-stage.safetensors  (latent models only: a copy of their first stage, made once)
      pipeline.json  policy.json  inverse.safetensors  (some: see USED_WITH)
      base.json  (LoRA and fine-tuning: the weights that they began from, with their sha256)
      checkpoints/step-0050000/  nets.safetensors  ema-0.999.safetensors  optim.safetensors  state.json (written last)

Checkpoints and links are written under a temporary name, then renamed, so a directory is consistent whatever kills the
run.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from genkit.config import load_object
from genkit.core.files import write_text
from genkit.core.links import follow_links, require_link

RUN_SOURCES = {
    "hf": "genkit.integrations.hub:find_hub_run"
}  # scheme of SCHEME://NAME -> "module:function" of a higher room
# What decides, besides settings, weights and codec, how a run is used: the scheduler of the pipeline that it began
# from, how a fine-tuned policy acts, and the actions of a policy that plans states. Exported and published with it.
USED_WITH = ("pipeline.json", "policy.json", "inverse.safetensors")
STATE_KEYS = {"step", "skipped", "seed", "spec", "codec", "sha256"}


def create_run(out: str | Path, name: str) -> Path:
    """Make the directory ``out/NNNN-name``, numbered after the largest there is.

    Raises ``ValueError`` if ``out/latest``, which will refer to it when it has a checkpoint, is a file of the user's.
    """
    out = follow_links(Path(out).expanduser())
    require_link(out / "latest")
    out.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [int(m[1]) for p in out.iterdir() if (m := re.match(r"(\d{4,})-", p.name))]
        run = out / f"{max(numbers, default=-1) + 1:04d}-{name}"
        try:
            run.mkdir()
        except FileExistsError:  # another process was faster
            continue
        return run


def find_run(path: str | Path) -> Path:
    """The resolved run directory at ``path``, or the local copy of ``hf://OWNER/NAME``.

    ``ValueError`` says what is there instead.
    """
    if not str(path):
        raise ValueError("run: given an empty text; needs a run directory, such as runs/latest")
    scheme, separator, _ = str(path).partition("://")
    if separator and scheme in RUN_SOURCES:
        return load_object(RUN_SOURCES[scheme])(str(path))
    run = follow_links(Path(path).expanduser())
    if (run / "config.yaml").is_file():
        return run.resolve()
    if not run.exists():
        near = run.parent if run.parent.is_dir() else Path("runs")
        runs = run_names(near)
        known = f"{near} holds {', '.join(runs[-5:])}" if runs else "train one first: genkit train --objective=flow"
        raise ValueError(f"run: given {path}, which does not exist; {known}")
    if runs := run_names(run):
        raise ValueError(f"run: given {path}, which holds runs; give one of them: {path}/{runs[-1]}")
    raise ValueError(f"run: given {path}, which holds no config.yaml; a run is a directory that genkit train wrote")


def run_names(folder: Path) -> list[str]:
    """The names of the runs in a folder, and of links to them, in order."""
    return sorted(p.name for p in folder.glob("*") if (p / "config.yaml").is_file()) if folder.is_dir() else []


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The record in ``state.json``. ``ValueError`` if it is missing or damaged: the checkpoint is incomplete then."""
    path = checkpoint / "state.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or not record.keys() >= STATE_KEYS:
        raise ValueError(f"{path}: is missing or damaged")
    return record


def is_complete(checkpoint: Path) -> bool:
    """Whether ``state.json``, which is written last, is there and can be read."""
    try:
        read_state(checkpoint)
    except ValueError:
        return False
    return True


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [p for p in list_saved(run) if is_complete(p)]


def list_incomplete(run: Path) -> list[Path]:
    """The checkpoints whose ``state.json`` is missing or damaged, oldest first: a kill leaves none such."""
    return [p for p in list_saved(run) if not is_complete(p)]


def list_saved(run: Path) -> list[Path]:
    """The directories of all checkpoints, complete or not, oldest first."""
    named = [p for p in (run / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(named, key=step_of)


def append_log(run: Path, record: Mapping[str, Any]) -> None:
    """Add one line to ``log.jsonl``."""
    with open(run / "log.jsonl", "a") as f:
        f.write(json.dumps(record) + "\n")


def parse_log(run: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of ``log.jsonl``, and the number of lines that cannot be read (cut off by a kill, or damaged)."""
    path = run / "log.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records, len(lines) - len(records)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of ``log.jsonl``; lines that cannot be read are skipped."""
    return parse_log(run)[0]


def rewind_log(
    run: Path, step: int, results: str | None = None, note: Callable[[str], None] = lambda text: None
) -> None:
    """Drop the records after ``step``: what a killed run did past its last checkpoint is done again. So are ``results``
    of a finished run, the records with entries of this name (``after/success``).

    If there are lines that cannot be read, the old file is kept as ``log.jsonl.bak`` or, if that exists,
    ``log.jsonl.bak.1`` and so on, and ``note`` is called.
    """
    records, unreadable = parse_log(run)
    if unreadable:
        copy = free_path(run / "log.jsonl.bak")
        shutil.copyfile(run / "log.jsonl", copy)
        note(f"note     {unreadable} lines of log.jsonl cannot be read; the old file is kept as {copy.name}")
    kept = [r for r in records if r["step"] <= step]
    if results is not None:
        kept = [r for r in kept if not any(name.startswith(f"{results}/") for name in r)]
    write_text(run / "log.jsonl", "".join(json.dumps(r) + "\n" for r in kept))


def free_path(path: Path) -> Path:
    """``path``, or with the first number behind its name that no file has yet."""
    numbered = (path.with_name(f"{path.name}.{i}") for i in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def slug(name: str) -> str:
    """A block's name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name.rpartition(":")[2])
