"""Search for settings of a training by trials that are runs: :func:`tune`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from genkit import config
from genkit.config import load_object
from genkit.config.command import merge_trees
from genkit.config.names import NameIn
from genkit.config.numbers import Count, Natural
from genkit.config.paths import PathText
from genkit.config.trust import require_trust
from genkit.core import Direction
from genkit.core.device import pick_device
from genkit.core.files import format_error, write_text
from genkit.core.links import follow_links
from genkit.core.memory import is_out_of_memory
from genkit.core.progress import Progress
from genkit.training.annotations import read_annotations
from genkit.training.best import BestCheckpoint, choose_metric, read_best
from genkit.training.defaults import read_with_defaults
from genkit.training.directory import create_run
from genkit.training.loop import Diverged
from genkit.training.measurements import MEASUREMENTS, interval
from genkit.training.resume import first_difference, settings_difference
from genkit.training.session import tracker_names
from genkit.training.settings import TrainSettings, changeable
from genkit.training.stopping import stop_signals
from genkit.training.train import train
from genkit.training.tuning.paths import with_lasting_choices, with_lasting_paths
from genkit.training.tuning.space import FOLLOWING, Dimension, parse_space, value_of, with_values
from genkit.training.tuning.study import ActiveTrial, SearchStudy, StudyResults, import_optuna
from genkit.training.validation import validation_metrics

STUDY_FILE, BEST_SETTINGS, TRIALS = "tune.yaml", "best.yaml", "trials"
METRICS = "genkit.evaluation.metrics:METRICS"  # in a higher room, for the directions of its numbers
ROLLOUTS = "genkit.rl.policies.periodic:DIRECTIONS"
VALIDATIONS, EVALUATIONS, ROLLOUTS_OF_A_TRIAL = 10, 4, 4  # unless the settings say how often
COMPARISON = ("objectives can be compared by --val-levels 0.1 0.5 0.9 --keep-best val/velocity, codecs by a metric of "
              "--eval-every, data by none")  # fmt: skip
SEARCHED_NEVER = {
    "dry_run", "eval_every", "eval_features", "eval_metrics", "eval_n", "eval_steps", "eval_weights", "keep_best",
    "keep_checkpoints", "log_every", "name", "note", "out", "rank_timeout", "resume", "rollout_conditions",
    "rollout_episodes", "rollout_every", "rollout_max_steps", "rollout_steps", "sample_every", "sample_guidance",
    "sample_prompts", "save_every", "step", "tags", "tensorboard", "tracker_project", "trackers", "val_every",
    "val_levels", "val_n",
}  # fmt: skip  # where, and how a trial is measured: the same for all
FREE_IN_TRIAL = {"device", "threads", "workers", "tensorboard", "trackers", "note", "tags", "tracker_project",
                 "keep_checkpoints"}  # fmt: skip  # do not change what a trial gives
FREE_IN_STUDY = {"trials", "out", "name", *FREE_IN_TRIAL}
logger = logging.getLogger("genkit")


@dataclass(frozen=True)
class TuneSettings(TrainSettings):
    """Search for the settings of a training. Every trial is a run, with these settings but for what is searched."""

    # -- search
    space: tuple[str, ...] = ()
    """Options to search by their dotted names: NAME=LOW..HIGH, NAME=log:LOW..HIGH for equal ratios, NAME=A,B,C for
    choices. Say lr=log:1e-4..1e-2 optimizer=adamw,muon backbone.depth=2..6. The first trial has the
    settings as they are; one that lies outside of what is searched is drawn."""
    kept: tuple[Annotated[str, NameIn("genkit.training.tuning.space:FOLLOWING")], ...] = ()
    """Options, such as lr, that keep their value with every choice of optimizer and objective, and not the default of
    that choice. Those that are given are kept anyway."""
    trials: Count = changeable(20)
    """Trials of the study, over all processes that share it and all times that it is resumed."""
    startup: Natural = 10
    """Random trials, before the sampler (TPE) models which values were good."""
    prune_startup: Natural = 5
    """Complete trials before others are stopped early."""
    prune_warmup: Natural = 0
    """Steps of a trial before it may be stopped. It is if the metric, or the better end of its interval, has never been
    as good as the median of the complete trials at this step."""
    keep_best: str | None = changeable("val/loss")
    """The metric that is optimised: val/loss, one of --eval-every, such as fid, or one of --rollout-every, such as
    success. The value of a trial is its best."""
    resume: PathText | None = None
    """Directory of a study to go on with, also while other processes do, with its own settings."""


@dataclass(frozen=True)
class TunedStudy:
    """A study, and what came of it."""

    directory: Path
    results: StudyResults
    stopped: bool = False
    """whether a signal ended it; it is to be resumed"""

    @property
    def best_settings(self) -> Path | None:
        """The settings of the best trial, for ``genkit train --config``; None if no trial is complete."""
        path = self.directory / BEST_SETTINGS
        return path if path.is_file() else None


class StudyStopped(Exception):  # control flow, not an error
    """A signal has ended the training of a trial."""


def tune(
    settings: TuneSettings | None = None,
    *,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> TunedStudy:
    """Search for the settings of a training, and return the study: its trials, which are runs, and the best settings.

    ``changes`` are settings by name, in the form of YAML: ``tune(data="moons", space=["lr=log:1e-4..1e-1"])``.
    ``resume`` goes on with the study in a directory, whose settings it keeps but for ``trials`` and what has no effect
    on results; a trial that a kill interrupted goes on from its checkpoint. ``ValueError`` for a space or settings that
    do not fit, before the first trial.
    """
    import_optuna()
    stored = folder = None
    if resume is not None:
        folder = find_study(resume)
        stored = stored_study(folder)
        settings = continued_study(folder, stored, config.override(settings or stored, **changes))
    else:
        settings = config.override(settings, **changes) if settings else read_study_settings(changes)
        settings = with_kept(lasting(replace(settings, resume=None)), changes)
    plain = trial_base(settings)
    target = choose_target(plain)
    space = parse_space(settings.space, plain, SEARCHED_NEVER, settings.kept)
    doubtful = find_incomparable(target.metric, space)
    pick_device(plain.device)  # what this machine lacks is no fault of a trial
    tracker_names(plain)
    folder = folder or create_run(settings.out, settings.name or "tune")
    if settings != stored:
        write_text(folder / STUDY_FILE, config.to_yaml(settings))
    first = {dimension.name: value_of(plain, dimension.name) for dimension in space}
    study = SearchStudy(
        folder, space, target.metric, target.direction, settings.seed, first,
        settings.startup, settings.prune_startup, settings.prune_warmup,
    )  # fmt: skip
    logger.info(f"study    {folder}: {target.metric}, {target.direction} is better; {len(space)} options")
    if doubtful:
        logger.info(f"note     {target.metric} may be another quantity for another {', '.join(doubtful)}; {COMPARISON}")
    kept = settings.kept
    with stop_signals() as signals:  # also one that comes between trials, or in the last step of one
        with contextlib.suppress(StudyStopped):
            study.run(lambda trial: run_trial(trial, plain, progress, kept), settings.trials, lambda: bool(signals))
        with study.locked():  # else an older best might replace that of another process
            results = study.results()
            if results.best:
                values = read_values(study, results.best.values)
                best = trial_settings(replace(plain, note=None, tags=()), values, kept)
                write_text(folder / BEST_SETTINGS, config.to_yaml(best))
        unfinished = len(results.trials) < settings.trials or results.count("running") > 0
        return TunedStudy(folder, results, bool(signals) and unfinished)


def read_study_settings(changes: Mapping[str, Any]) -> TuneSettings:
    """The settings that ``changes`` describe, with the defaults that suit them."""
    init, codec = (changes[k] if isinstance(changes.get(k), str) else None for k in ("init", "codec"))
    settings = read_with_defaults(
        lambda defaults: config.from_dict(TuneSettings, merge_trees(defaults, changes)), init, codec
    )
    assert isinstance(settings, TuneSettings)
    return settings


def with_kept(settings: TuneSettings, given: Iterable[str]) -> TuneSettings:
    """``settings`` that keep also those of the ``given`` options, by their dotted names, that would follow a choice."""
    names = {name.partition(".")[0] for name in given}
    return replace(settings, kept=tuple(name for name in FOLLOWING if name in names or name in settings.kept))


def trial_base(settings: TuneSettings) -> TrainSettings:
    """The settings of a training that all trials share. ``ValueError`` for those that no trial can have."""
    if settings.dry_run or settings.step is not None:
        raise ValueError("tune: dry_run and step are for genkit train; leave them out")
    plain = replace(config.narrow(settings, TrainSettings), resume=None)
    return replace(plain, keep_best=settings.keep_best or "val/loss")


def choose_target(plain: TrainSettings) -> BestCheckpoint:
    """The metric of the study and its direction. ``ValueError`` if no trial measures it."""
    plain = with_intervals(plain)
    known: dict[str, Direction] = validation_metrics(plain)
    metrics = load_object(METRICS)
    for name in map(str.strip, plain.eval_metrics.split(",")) if plain.eval_metrics else metrics:
        known |= {f"eval/{value}": metrics[name].direction for value in metrics[name].values}
    known |= {f"rollout/{name}": direction for name, direction in load_object(ROLLOUTS).items()}
    intervals = {name: interval(plain, name) for name in MEASUREMENTS}
    assert plain.keep_best is not None
    return choose_metric(plain.keep_best, known, {"val": plain.val_every, **intervals})


def find_incomparable(metric: str, space: Sequence[Dimension]) -> list[str]:
    """The options of the space that may change what ``metric`` measures, as any of the objective may change its loss.

    ``ValueError`` for one that surely does: another objective, codec or data.
    """
    parts = {"data"}
    if metric.startswith("val/"):
        parts |= {"codec"} if "velocity" in metric else {"codec", "objective"}
    names = [d.name for d in space if d.name.partition(".")[0] in parts]
    if blocks := [name for name in names if name in parts]:
        raise ValueError(f"space: given {blocks[0]}, but {metric} is another quantity for each of its choices; "
                         f"{COMPARISON}")  # fmt: skip
    return names


def with_intervals(settings: TrainSettings) -> TrainSettings:
    """``settings`` that measure the metric, and often enough to stop early, if they do not say what or how often."""
    name = settings.keep_best or ""
    if name.startswith("val/"):
        return replace(settings, val_every=settings.val_every or max(1, settings.steps // VALIDATIONS))
    if name.removeprefix("rollout/") in load_object(ROLLOUTS):
        every = settings.rollout_every or max(1, settings.steps // ROLLOUTS_OF_A_TRIAL)
        return replace(settings, rollout_every=every)
    value = name.removeprefix("eval/")
    needed = next((key for key, metric in load_object(METRICS).items() if value in metric.values), None)
    every = settings.eval_every or max(1, settings.steps // EVALUATIONS)
    return replace(settings, eval_every=every, eval_metrics=settings.eval_metrics or needed)


def trial_settings(plain: TrainSettings, values: Mapping[str, Any], kept: Collection[str] = ()) -> TrainSettings:
    """The settings of a trial with these ``values``, and of a training that repeats it."""
    return with_intervals(with_values(plain, values, kept))


def run_trial(
    trial: ActiveTrial, plain: TrainSettings, progress: Progress | None, kept: Collection[str] = ()
) -> float | None:
    """Train the run of a trial, from its checkpoint if it has one; the best metric, None if it was stopped early or has
    diverged."""
    out, name = trial.study.folder.resolve() / TRIALS, f"trial-{trial.number:04d}"
    settings = replace(trial_settings(plain, trial.values, kept), out=str(out), name=name)
    begun = sorted(path.parent for path in out.glob(f"*-{name}/config.yaml"))
    metric = trial.study.metric
    values = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.values.items())
    logger.info(f"trial {trial.number}  {values}")

    def watch(record: Mapping[str, Any]) -> bool:
        if metric not in record:
            return False
        end = "low" if trial.study.direction == "lower" else "high"
        return trial.report(record["step"], record[metric], record.get(f"{metric}_{end}"))

    try:
        if begun:
            run = train(resume=begun[-1], progress=progress, watch=watch, **free_settings(settings, begun[-1]))
        else:
            run = train(settings, progress=progress, watch=watch)
    except ValueError as e:
        if isinstance(e.__cause__, Diverged):
            logger.info(f"trial {trial.number}: {e}")
            return None
        raise
    except Exception as e:
        if is_out_of_memory(e):
            raise ValueError(f"out of memory ({format_error(e)[:150]})") from e
        raise
    finally:  # a run that has diverged or failed is looked at, too
        for path in sorted(out.glob(f"*-{name}"))[-1:]:
            trial.trial.set_user_attr("run", f"{TRIALS}/{path.name}")
    if run.ending == "signal":
        raise StudyStopped
    if run.ending == "watch":
        logger.info(f"trial {trial.number}: stopped at step {run.step}, worse than the median")
        return None
    best = read_best(run.directory)
    logger.info(f"trial {trial.number}: {best}")
    return best.value if best else None


def free_settings(settings: TrainSettings, run: Path) -> dict[str, Any]:
    """Those of ``settings`` with which the ``run`` of a trial goes on, though it may have begun with others; without
    the note if it has that already."""
    free = {name: getattr(settings, name) for name in FREE_IN_TRIAL}
    noted = settings.note in [note.text for note in read_annotations(run).notes]
    return {**free, "note": None} if noted else free


def fresh_seed(folder: Path) -> int:
    """A seed that the best trial of the study in ``folder`` does not have."""
    path = folder / BEST_SETTINGS
    return int(config.load_yaml(path).get("seed", 0)) + 1 if path.is_file() else 1


def read_values(study: SearchStudy, texts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of a recorded trial, whose choices are texts."""
    return {d.name: d.read(texts[d.name]) for d in study.space}


# --------------------------------------------------------------------------------------------------- the directory
def find_study(path: str | Path) -> Path:
    """The directory of a study. ``ValueError`` if there is none."""
    folder = follow_links(Path(path).expanduser())
    if not (folder / STUDY_FILE).is_file():
        raise ValueError(f"resume: given {path}, which holds no {STUDY_FILE}; needs a directory of genkit tune")
    return folder


def stored_study(folder: Path) -> TuneSettings:
    """The settings in a study's ``tune.yaml``. ``ValueError`` if it is damaged or needs code that is not trusted."""
    tree = config.load_yaml(folder / STUDY_FILE)
    require_trust(TuneSettings, tree, folder / STUDY_FILE)
    return config.from_dict(TuneSettings, tree)


def continued_study(folder: Path, stored: TuneSettings, settings: TuneSettings) -> TuneSettings:
    """The ``stored`` settings of the study in ``folder``, with those of ``settings`` that have no effect on its trials.

    ``ValueError`` if ``settings`` would give other trials.
    """
    given = replace(settings, resume=None)
    for name, (before, after) in settings_difference(lasting(stored), lasting(given)).items():
        if name not in FREE_IN_STUDY:
            setting, was, now = first_difference(name, before, after)
            raise ValueError(f"{setting}: given {now}, but the study in {folder} was begun with {was}; leave it out, "
                             "or begin another without --resume")  # fmt: skip
    return replace(stored, **{name: getattr(settings, name) for name in FREE_IN_STUDY})


def lasting(settings: TuneSettings) -> TuneSettings:
    """``settings`` with paths, also those that are searched, that do not depend on the working directory."""
    settings = with_lasting_paths(settings)
    plain = config.narrow(settings, TrainSettings)
    return replace(settings, space=with_lasting_choices(settings.space, plain, SEARCHED_NEVER))
