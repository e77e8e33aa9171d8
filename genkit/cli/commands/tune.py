"""`genkit tune`: search for the settings of a training."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from genkit.cli.commands.train import peek_setting
from genkit.cli.output import console
from genkit.config import load_yaml, parse
from genkit.config.command import find_given, peek_option
from genkit.evaluation.report import write_report
from genkit.training.defaults import read_with_defaults
from genkit.training.settings import TrainSettings
from genkit.training.tuning.tune import (
    STUDY_FILE,
    TunedStudy,
    TuneSettings,
    find_study,
    fresh_seed,
    stored_study,
    tune,
    with_kept,
)


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code, 130 if a signal stopped the search."""
    resumed = peek_option(argv, "resume")
    if resumed is not None:
        if peek_option(argv, "config") is not None:
            raise ValueError(f"resume: a study goes on with its own {STUDY_FILE}; leave --config out")
        stored_study(find_study(resumed))  # refuses foreign code before the file is parsed with the command line
        argv = ["--config", str(find_study(resumed) / STUDY_FILE), *argv]

    def read(defaults: Mapping[str, Any]) -> TrainSettings:
        return parse(TuneSettings, argv, prog="genkit tune", description=TuneSettings.__doc__, defaults=defaults)

    settings = read({}) if resumed else read_with_defaults(
        read, peek_setting(argv, "init"), peek_setting(argv, "codec")
    )  # fmt: skip
    assert isinstance(settings, TuneSettings)
    if not resumed:
        settings = with_kept(settings, given_options(argv))
    study = tune(settings, resume=resumed)
    conclude_study(study)
    return 130 if study.stopped else 0


def given_options(argv: list[str]) -> set[str]:
    """The options that the command line gives, or its file; that of another study says itself which ones it keeps."""
    file = peek_option(argv, "config")
    tree = load_yaml(file) if file else {}
    return find_given(argv) | (set() if "kept" in tree else set(tree))


def conclude_study(study: TunedStudy) -> None:
    """Say how it ended, which trial is the best, and what to do next."""
    results = study.results

    def say(text: str) -> None:
        console.print(text, markup=False)

    counts = {state: results.count(state) for state in ("complete", "pruned", "failed", "running")}
    say(f"trials   {len(results.trials)}: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n))
    if results.best:
        values = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                           for k, v in results.best.values.items())  # fmt: skip
        say(f"best     trial {results.best.number}: {results.metric} {results.best.value:.5g}  {values}")
    say(f"page     {write_report(study.directory)}")
    if study.stopped:
        say(f"stopped; continue with: genkit tune --resume {shlex.quote(str(study.directory))}")
    elif study.best_settings:
        seed = fresh_seed(study.directory)
        say(f"next     genkit train --config {shlex.quote(str(study.best_settings))} --seed {seed}")
