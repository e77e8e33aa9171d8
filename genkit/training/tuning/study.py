"""A study: trials of a search, their order and their records, on Optuna and its journal.

    runs/0007-tune/
      tune.yaml    study.jsonl    results.json    best.yaml    trials/0000-trial-0000/

A trial is a function of the seed, its number and the trials that are over when it begins, not of the process that runs
it: what a kill interrupts is taken up by the next process, from the checkpoint of its run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from genkit.core import Direction
from genkit.core.files import write_text
from genkit.training.tuning.space import Dimension

JOURNAL, RESULTS, LOCKS = "study.jsonl", "results.json", "locks"
TrialState = Literal["complete", "pruned", "failed", "running"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a study."""

    number: int
    state: TrialState
    """pruned: stopped early, or its training diverged; failed: its settings do not fit together"""
    values: Mapping[str, Any]
    """what it tried, by dotted name"""
    value: float | None
    """the metric: the best of a complete trial, the last one of another"""
    curve: Mapping[str, float]
    """the metric by step"""
    run: str | None = None
    """its run, relative to the directory of the study"""
    problem: str | None = None
    """why it failed"""


@dataclass(frozen=True)
class StudyResults:
    """The trials of a study so far, as ``results.json`` keeps them."""

    metric: str
    direction: Direction
    trials: Sequence[TrialRecord]
    importances: Mapping[str, float] = field(default_factory=dict)
    """share of the variance of the metric that each option explains (fANOVA); empty with few complete trials"""

    @property
    def best(self) -> TrialRecord | None:
        """The complete trial with the best value."""
        complete = [t for t in self.trials if t.state == "complete" and t.value is not None]
        sign = 1 if self.direction == "lower" else -1
        return min(complete, key=lambda t: sign * (t.value or 0.0), default=None)

    def count(self, state: TrialState) -> int:
        """The number of trials in this state."""
        return sum(t.state == state for t in self.trials)


def read_results(folder: Path) -> StudyResults:
    """The results in the directory of a study. ``ValueError`` if they are missing or damaged."""
    try:
        tree = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        return StudyResults(**{**tree, "trials": [TrialRecord(**trial) for trial in tree["trials"]]})
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(
            f"{folder / RESULTS}: is missing or damaged; genkit tune --resume {folder} writes it"
        ) from None


class KernelLock:
    """The lock of a journal, which ends with its process, also with one that is killed."""

    def __init__(self, path: Path):
        self.lock = FileLock(path)

    def acquire(self) -> bool:
        """Wait for it."""
        self.lock.acquire()
        return True

    def release(self) -> None:
        """Let others write."""
        self.lock.release()


class ActiveTrial:
    """A trial that this process runs."""

    def __init__(self, study: SearchStudy, trial: Any, values: Mapping[str, Any]):
        self.study, self.trial, self.values = study, trial, values

    @property
    def number(self) -> int:
        """Its number, from 0 on."""
        return self.trial.number

    def report(self, step: int, value: float | None, likely: float | None = None) -> bool:
        """Record the metric at ``step``, and return whether to stop: even ``likely``, the better end of its interval
        (None: the value itself), is worse than the median of the complete trials at this step, or it is not finite.

        A step that is reported again after a kill changes nothing, and is decided as before.
        """
        if value is None or not math.isfinite(value):
            return True
        frozen = self.study.frozen(self.number)
        if step not in frozen.intermediate_values:
            self.trial.report(value, step)
            self.trial.set_user_attr(f"likely:{step}", value if likely is None else likely)
            frozen = self.study.frozen(self.number)
        return self.study.is_worse(frozen, step)


class SearchStudy:
    """The trials of a search in a directory, which several processes may share."""

    def __init__(
        self,
        folder: Path,
        space: Sequence[Dimension],
        metric: str,
        direction: Direction,
        seed: int = 0,
        first: Mapping[str, Any] | None = None,
        startup: int = 10,
        prune_startup: int = 5,
        prune_warmup: int = 0,
    ):
        """``first`` are the values of the first trial by name; one that lies outside the space is random. So are
        ``startup`` trials, then the sampler models the good ones (TPE, Bergstra et al. 2011). Trials may be stopped
        early after ``prune_startup`` complete ones, and ``prune_warmup`` steps."""
        optuna = import_optuna()
        self.folder, self.space, self.metric = folder, space, metric
        self.direction: Direction = direction
        (folder / LOCKS).mkdir(parents=True, exist_ok=True)
        first_values = {d.name: d.find_text((first or {}).get(d.name)) for d in space}
        sampler = make_sampler(seed, {k: v for k, v in first_values.items() if v is not None}, startup)
        self.pruner = optuna.pruners.MedianPruner(n_startup_trials=prune_startup, n_warmup_steps=prune_warmup)
        with self.locked():
            with FileLock(folder / LOCKS / "journal"):  # else it may be a line that another process writes now
                drop_torn_line(folder / JOURNAL)
            backend = optuna.storages.journal.JournalFileBackend(
                str(folder / JOURNAL), lock_obj=KernelLock(folder / LOCKS / "journal")
            )
            self.optuna_study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend), sampler=sampler, study_name="tune",
                direction="minimize" if direction == "lower" else "maximize", load_if_exists=True,
            )  # fmt: skip

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The right to begin a trial, and to write what is known of all."""
        with FileLock(self.folder / LOCKS / "ask"):
            yield

    def frozen(self, number: int) -> Any:
        """The record of a trial, as Optuna has it now."""
        return self.optuna_study.get_trials(deepcopy=False)[number]

    def run(
        self, evaluate: Callable[[ActiveTrial], float | None], trials: int, stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Run trials until the study has this many that are over, or run in other processes; none after ``stop()``.

        ``evaluate`` returns the metric, or None for a trial that was stopped early. A ``ValueError`` of its is a failed
        trial, which is raised if no trial has succeeded yet; any other error leaves the trial to the next process.
        """
        while not stop() and (begun := self.begin(trials)):
            trial, lock = begun
            try:
                self.finish(trial, evaluate)
            finally:
                lock.release()
        self.write_results(with_importances=True)

    def finish(self, trial: ActiveTrial, evaluate: Callable[[ActiveTrial], float | None]) -> None:
        """Evaluate a trial, and record what comes of it."""
        states = import_optuna().trial.TrialState
        try:
            value = evaluate(trial)
        except ValueError as e:
            trial.trial.set_user_attr("problem", " ".join(str(e).split()))
            self.optuna_study.tell(trial.number, state=states.FAIL)
            self.write_results()
            if not any(t.state == states.COMPLETE for t in self.optuna_study.get_trials(deepcopy=False)):
                raise ValueError(f"trial {trial.number}: {e}") from e
            return
        if value is None or not math.isfinite(value):
            self.optuna_study.tell(trial.number, state=states.PRUNED)
        else:
            self.optuna_study.tell(trial.number, value)
        self.write_results()

    def begin(self, trials: int) -> tuple[ActiveTrial, FileLock] | None:
        """A trial that another process left, or a new one, with its lock; None if there are ``trials`` already."""
        optuna = import_optuna()
        with self.locked():
            known = self.optuna_study.get_trials(deepcopy=False)
            for frozen in known:
                if frozen.state == optuna.trial.TrialState.RUNNING and (lock := self.lock_trial(frozen.number)):
                    trial = optuna.trial.Trial(self.optuna_study, frozen._trial_id)
                    return self.activate(trial), lock
            if len(known) >= trials:
                return None
            trial = self.optuna_study.ask()
            lock = self.lock_trial(trial.number)
            assert lock is not None, f"trial {trial.number}: the lock of a new trial is taken"
            return self.activate(trial), lock

    def activate(self, trial: Any) -> ActiveTrial:
        """The trial with its values, the same ones if it has begun before."""
        return ActiveTrial(self, trial, {d.name: d.suggest(trial) for d in self.space})

    def lock_trial(self, number: int) -> FileLock | None:
        """The lock of a trial; None if another process runs it."""
        lock = FileLock(self.folder / LOCKS / f"trial-{number:04d}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def is_worse(self, frozen: Any, step: int) -> bool:
        """Whether a trial is to stop at ``step``, by what it has reported up to then."""
        reported = {s: v for s, v in frozen.intermediate_values.items() if s <= step}
        likely = {s: frozen.user_attrs.get(f"likely:{s}", v) for s, v in reported.items()}
        copy = import_optuna().trial.FrozenTrial(
            frozen.number, frozen.state, None, frozen.datetime_start, None, frozen.params, frozen.distributions, {}, {},
            likely, frozen._trial_id,
        )  # fmt: skip
        return self.pruner.prune(self.optuna_study, copy)

    def results(self, importances: Mapping[str, float] | None = None) -> StudyResults:
        """All trials so far."""
        frozen = self.optuna_study.get_trials(deepcopy=False)
        trials = [self.record(trial) for trial in frozen]
        return StudyResults(self.metric, self.direction, trials, importances or {})

    def record(self, frozen: Any) -> TrialRecord:
        """What is known of a trial."""
        states: dict[str, TrialState] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
        curve = {str(step): value for step, value in sorted(frozen.intermediate_values.items())}
        state = states.get(frozen.state.name, "running")
        value = frozen.value if state == "complete" else next(reversed(curve.values()), None)
        attributes = frozen.user_attrs
        return TrialRecord(
            frozen.number, state, dict(frozen.params), value, curve, attributes.get("run"), attributes.get("problem")
        )

    def importances(self) -> dict[str, float]:
        """The share of the variance between complete trials that each option explains (fANOVA, Hutter et al. 2014)."""
        optuna = import_optuna()
        complete = self.optuna_study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
        if len({trial.value for trial in complete}) < 3:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            shares = optuna.importance.get_param_importances(self.optuna_study, evaluator=evaluator)
            return {name: float(share) for name, share in shares.items()}

    def write_results(self, with_importances: bool = False) -> None:
        """Write ``results.json``."""
        with self.locked():  # what is written last has been read last, too
            results = self.results(self.importances() if with_importances else None)
            write_text(self.folder / RESULTS, json.dumps(asdict(results), indent=1) + "\n")


def make_sampler(seed: int, first: Mapping[str, Any], startup: int) -> Any:
    """A TPE sampler (multivariate: Falkner et al. 2018) whose draws depend on the seed, the number of the trial and the
    trials before it only. ``first`` are values of trial 0; the others are random."""
    optuna = import_optuna()

    class SeededSampler(optuna.samplers.BaseSampler):
        """Makes a sampler for every draw, with a seed of its own."""

        def tpe(self, trial: Any, name: str = "") -> Any:
            digest = hashlib.sha256(f"{seed}/{trial.number}/{name}".encode()).digest()
            return optuna.samplers.TPESampler(
                seed=int.from_bytes(digest[:4], "little"), multivariate=True, constant_liar=True,
                n_startup_trials=startup,
            )  # fmt: skip

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {} if trial.number == 0 else self.tpe(trial).infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            return self.tpe(trial).sample_relative(study, trial, search_space) if search_space else {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            if trial.number == 0 and param_name in first:
                return first[param_name]
            return self.tpe(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    return SeededSampler()


def drop_torn_line(path: Path) -> None:
    """Remove the end of a line that a kill has cut off."""
    if not path.is_file():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with open(path, "r+b") as f:
            f.truncate(data.rfind(b"\n") + 1)


def import_optuna() -> Any:
    """Optuna, which reports no more than errors. ``ValueError`` if it is not installed."""
    try:
        import optuna  # lazy: an extra
    except ImportError:
        raise ValueError("tune: needs Optuna; pip install 'genkit-torch[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna
