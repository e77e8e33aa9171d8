"""`genkit train`: train any objective on any data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from genkit import config
from genkit.cli.next_steps import suggest_use
from genkit.cli.output import console
from genkit.config import parse
from genkit.config.command import peek_option
from genkit.training.defaults import read_with_defaults
from genkit.training.directory import find_run, read_log
from genkit.training.distributed import is_main_process
from genkit.training.dry_run import estimate_training
from genkit.training.settings import TrainSettings, stored_settings
from genkit.training.train import TrainedRun, train


def main(argv: list[str]) -> int:
    """Run the command; the exit code, 130 if a signal stopped the training, 0 if it ended as the settings ask."""
    settings, resumed = read_settings(argv)
    if settings.dry_run:
        estimate = estimate_training(settings)
        if is_main_process():
            console.print(estimate.to_yaml(), end="", markup=False)
        return 0
    run = train(settings, resume=resumed)
    if is_main_process():
        conclude(run)
    return 130 if run.ending == "signal" else 0


def read_settings(argv: list[str]) -> tuple[TrainSettings, str | None]:
    """The settings that ``argv`` asks for, and the run to resume."""
    resumed = peek_option(argv, "resume")
    if resumed == "":
        raise ValueError("resume: given an empty text; needs a run directory, such as runs/latest, or auto")
    if resumed is not None and resumed != "auto":
        if peek_option(argv, "config") is not None:
            raise ValueError("resume: a run continues with its own config.yaml; leave --config out")
        if peek_option(argv, "init") is not None:
            raise ValueError("init: a resumed run goes on with its own weights; leave --init out")
        stored_settings(find_run(resumed))  # refuses foreign code before the file is parsed with the command line
        argv = ["--config", str(find_run(resumed) / "config.yaml"), *argv]

    def read(defaults: Mapping[str, Any]) -> TrainSettings:
        return parse(
            TrainSettings, argv, prog="genkit train", description="Train an objective on data.", defaults=defaults
        )

    if resumed not in (None, "auto"):
        return read({}), resumed
    return read_with_defaults(read, peek_setting(argv, "init"), peek_setting(argv, "codec")), resumed


def peek_setting(argv: list[str], name: str) -> str | None:
    """A setting of text on the command line, or else in the file of ``--config``."""
    file = peek_option(argv, "config")
    value = peek_option(argv, name) or (config.load_yaml(file).get(name) if file else None)
    return value if isinstance(value, str) else None


def conclude(run: TrainedRun) -> None:
    """Say how it ended, where the pictures are, and what to do next."""

    def say(text: str) -> None:
        console.print(text, markup=False)

    resume = f"genkit train --resume {shlex.quote(str(run.directory))}"
    if run.ending == "signal":
        say(f"stopped at step {run.step}, saved; continue with: {resume}")
        return
    if run.ending == "max_time":
        say(f"stopped at step {run.step} after --max-time {run.config.max_time}, saved; continue with: {resume}")
        return
    if run.ending == "patience" and run.best:
        say(f"stopped at step {run.step}, saved: {run.best.metric} has not improved in {run.best.worse} evaluations; "
            f"to go on all the same: {resume} --patience {2 * run.best.worse}")  # fmt: skip
    if run.best:
        say(f"best     {run.best}; choose it by --step best")
    records = [r for r in read_log(run.directory) if "samples_per_s" in r]
    skipped = records[-1]["skipped"] if records else 0
    say(f"trained {run.step} steps" + (f", {skipped} skipped" if skipped else ""))
    for path in [*sorted((run.directory / "samples").glob("step-*.png"))[-1:], run.directory / "loss.png"]:
        say(f"picture  {path}")
    if records and (warning := run.objective.warning(records[-1])):
        say(f"note     {warning}")
    for line, command in zip(("next     ", "then     "), suggest_use(run), strict=False):
        say(line + command)
