"""The trainings of the benchmark: found, continued or started, each in its own process, with what they cost."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.quality.settings import Quality
from genkit import config
from genkit.config import to_yaml
from genkit.core.files import write_text
from genkit.training.checkpoint import find_checkpoint
from genkit.training.resume import decided_as
from genkit.training.settings import TrainSettings

IGNORED = ("precision", "threads", "device", "resume", "out", "workers")  # resolved by training, or free to change


# ---------------------------------------------------------------------------------------------- finding a training
def is_same(a: TrainSettings, b: TrainSettings) -> bool:
    """Whether the training of the stored settings ``a`` leads to the same networks as one of ``b``, which may leave
    settings open that training decides."""
    stored = replace(a, **{name: getattr(b, name) for name in IGNORED})
    sources = (source.with_absolute_root() for source in (b.data, b.data.with_decisions()))
    return any(stored == decided_as(a, replace(b, data=source)) for source in (b.data, *sources))


def find_run(cfg: TrainSettings) -> tuple[Path | None, int]:
    """The newest run of exactly this configuration that can be continued, and its step; ``None, 0`` without one."""
    for run in sorted(Path(cfg.out).glob(f"*-{cfg.name}"), reverse=True):
        try:
            if is_same(config.from_dict(TrainSettings, config.load_yaml(run / "config.yaml")), cfg):
                return run, int(find_checkpoint(run).name.removeprefix("step-"))
        except ValueError:  # of another version, half-written, or killed before its first checkpoint
            continue
    return None, 0


# ---------------------------------------------------------------------------------------------------------- cost
@dataclass(frozen=True)
class Cost:
    """CPU and wall seconds of the processes that trained ``steps`` steps, including their start and pictures."""

    cpu: float
    wall: float
    steps: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.cpu + other.cpu, self.wall + other.wall, self.steps + other.steps)

    def scaled_to(self, steps: int) -> Cost:
        """The cost of ``steps`` steps: parts whose cost was lost are assumed to have cost as much per step."""
        scale = steps / max(1, self.steps)
        return Cost(self.cpu * scale, self.wall * scale, steps)


def read_cost(run: Path) -> Cost:
    """The recorded cost of all sessions of a run."""
    try:
        sessions = [Cost(**session) for session in json.loads((run / "cost.json").read_text())]
    except (OSError, ValueError, TypeError):
        sessions = []
    return Cost(*(sum(getattr(session, name) for session in sessions) for name in ("cpu", "wall", "steps")))


def record_cost(run: Path, session: Cost) -> None:
    """Append the cost of one session."""
    path = run / "cost.json"
    sessions = json.loads(path.read_text()) if path.is_file() else []
    write_text(path, json.dumps([*sessions, asdict(session)]) + "\n")


def children_seconds() -> float:
    """CPU seconds of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ------------------------------------------------------------------------------------------------------- training
@contextmanager
def terminate_like_interrupt() -> Iterator[None]:
    """Let SIGTERM raise ``KeyboardInterrupt``, so that ``finally`` blocks run and a training can save."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def launch(argv: Sequence[str]) -> int:
    """Run ``genkit train`` in its own process and return the exit code. If we are ended, it is told to save first."""
    with terminate_like_interrupt(), subprocess.Popen([sys.executable, "-m", "genkit", "train", *argv]) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise


def train(cfg: TrainSettings) -> Path:
    """The run of a finished training of ``cfg``: found, continued or started. ``ValueError`` if the training fails."""
    run, first = find_run(cfg)
    if run is not None and first >= cfg.steps:
        return run
    if run is None:
        path = write_text(Path(cfg.out).parent / "configs" / f"{cfg.name}.yaml", to_yaml(cfg))
        argv = ["--config", str(path)]
    else:
        argv = ["--resume", str(run)]
    start, cpu_before = time.perf_counter(), children_seconds()
    try:
        code = launch(argv)
    finally:
        run, last = find_run(cfg)
        if run is not None and last > first:
            cpu, wall = children_seconds() - cpu_before, time.perf_counter() - start
            record_cost(run, Cost(round(cpu, 2), round(wall, 2), last - first))
    if code == 130:
        raise KeyboardInterrupt
    if run is None or last < cfg.steps:
        raise ValueError(f"{cfg.name}: training ended with code {code}; the line above says why")
    return run


@dataclass(frozen=True)
class TrainedRow:
    """The run of a row, and the cost of its training and, if it has one, of its first stage's."""

    run: Path
    cost: Cost


def train_row(settings: Quality, name: str, seed: int) -> TrainedRow:
    """A finished training of a row, and of its first stage."""
    cfg, first_stage = settings.train_config(name, seed), settings.first_stage_config(name, seed)
    if first_stage is None:
        run = train(cfg)
        return TrainedRow(run, read_cost(run))
    stage = train(first_stage)
    run = train(replace(cfg, codec=str(stage.resolve())))
    return TrainedRow(run, read_cost(stage) + read_cost(run))
