"""genkit tune: the space, the study on planted functions, and trials that are runs."""

import math
import os
import re
import signal
import time
from dataclasses import dataclass, fields, replace

import pytest
import torch

import genkit
from genkit import config
from genkit.backbones import MLP
from genkit.cli.main import main
from genkit.evaluation.report import write_report
from genkit.training.annotations import read_annotations
from genkit.training.measurements import MEASUREMENTS
from genkit.training.settings import TrainSettings
from genkit.training.tuning.space import parse_space, value_of, with_values
from genkit.training.tuning.study import SearchStudy, read_results
from genkit.training.tuning.tune import (
    SEARCHED_NEVER,
    choose_target,
    find_incomparable,
    run_trial,
    with_intervals,
)

SPACE = ["lr=log:1e-4..1e-1", "batch=16..128", "optimizer=adamw,muon"]
OPTIMUM = {"lr": 1e-2, "batch": 64, "optimizer": "muon"}
STEPS = 8
TINY = {"data": {"name": "moons", "n": 200}, "backbone": {"name": "mlp", "width": 8, "depth": 1}, "batch": 8,
        "steps": 6, "val_n": 50, "save_every": 2, "sample_every": 0, "workers": 0, "tensorboard": False,
        "device": "cpu", "threads": 1}  # fmt: skip


@pytest.fixture(autouse=True)
def _needs_optuna():
    pytest.importorskip("optuna")


def planted(values):
    """A function with its only minimum, 0, at ``OPTIMUM``."""
    away = math.log10(values["lr"] / OPTIMUM["lr"]) ** 2 + ((values["batch"] - OPTIMUM["batch"]) / 64) ** 2
    return away + 0.5 * (values["optimizer"] != OPTIMUM["optimizer"])


def evaluate_planted(trial, at=None):
    """A learning curve that falls to the planted value, whatever it is; ``at`` is called before each report."""
    for step in range(1, STEPS + 1):
        if at:
            at(trial.number, step)
        if trial.report(step, planted(trial.values) + 2 / step):
            return None
    return planted(trial.values)


def open_study(folder, seed=0):
    settings = TrainSettings()
    space = parse_space(SPACE, settings)
    first = {d.name: value_of(settings, d.name) for d in space}
    return SearchStudy(folder, space, "val/loss", "lower", seed, first, startup=6)


def in_child(function):
    """Run ``function`` in a process of its own; the process's number."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(0)
    return child


# ------------------------------------------------------------------------------------------------------- the space
@pytest.mark.parametrize(("text", "says"), [
    ("lrr=1..2", "given lrr, which is no option to search; allowed: objective, backbone, data, "),
    ("lrr=1..2", "did you mean lr?"),
    ("objective.cond-dropuot=0..1", "allowed: objective.path, objective.prediction"),
    ("objective.cond-dropuot=0..1", "did you mean objective.cond_dropout?"),
    ("out=a,b", "given out, which is no option to search"),
    ("lr", "given 'lr'; needs NAME=LOW..HIGH"),
    ("lr=1", "needs two choices or more"),
    ("lr=2..1", "the first end needs to be below the second"),
    ("lr=log:0..1", "a logarithmic interval needs ends above 0"),
    ("lr=a..b", "whose ends are no numbers"),
    ("lr=-1..1", "lr: given -1.0; should be greater than 0"),
    ("batch=1.5..3", "batch is an integer"),
    ("betas=0..1", "betas is no number; give choices"),
    ("optimizer=adamw,muonn", "given 'muonn'; allowed: adamw, "),
    ("optimizer=muon,muon", "a choice is given twice"),
])  # fmt: skip
def test_a_space_that_does_not_fit_is_refused_before_any_trial(text, says):
    with pytest.raises(ValueError, match=f"^space: .*{re.escape(says)}"):
        parse_space([text], TrainSettings(), SEARCHED_NEVER)


def test_an_option_of_one_choice_only_is_refused_with_the_other():
    with pytest.raises(ValueError, match=r"space: objective.cond_dropout: unknown setting.* with objective=vae"):
        parse_space(["objective=flow,vae", "objective.cond-dropout=0..0.3"], TrainSettings())


def test_values_become_settings_and_defaults_of_a_block_follow_its_choice():
    settings = TrainSettings()
    assert with_values(settings, {}) == settings
    assert with_values(settings, {"optimizer": "muon"}).lr == 2e-3 != settings.lr  # Muon's own default
    assert with_values(settings, {"optimizer": "muon", "lr": 0.5}).lr == 0.5
    given = with_values(TrainSettings(lr=3e-4), {"optimizer": "muon"})
    assert given.lr == 3e-4, "a rate that was given does not follow"
    changed = with_values(settings, {"objective.cond_dropout": 0.25, "betas": [0.5, 0.75], "objective": "flow"})
    assert (changed.objective.cond_dropout, changed.betas) == (0.25, (0.5, 0.75))
    own = with_values(settings, {"objective.cond_dropout": 0.25})
    assert with_values(own, {"objective": "flow"}) == own, "what is given of a block stays with its choice"
    assert with_values(own, {"objective": "ddpm"}).objective.cond_dropout == 0.1, "the others have their defaults"
    choice = parse_space(["betas=[0.9,0.99],[0.5,0.9]"], settings)[0]
    assert choice.examples == [[0.9, 0.99], [0.5, 0.9]]


def test_how_a_trial_is_measured_is_no_option_to_search():
    named = {f.name for f in fields(TrainSettings) if f.name.split("_")[0] in {"eval", "val", *MEASUREMENTS}}
    assert named <= SEARCHED_NEVER
    assert {f.name for f in fields(TrainSettings)} >= SEARCHED_NEVER


@pytest.mark.parametrize(("metric", "space", "found"), [
    ("val/loss", "objective=flow,ddpm", None),
    ("val/velocity", "objective=flow,ddpm", []),
    ("eval/fid", "objective=flow,ddpm", []),
    ("eval/fid", "data=moons,digits", None),
    ("val/velocity", "data.n=100..200", ["data.n"]),
    ("val/raw/loss", "objective.cond-dropout=0..0.3", ["objective.cond_dropout"]),
    ("val/velocity_0.1", "objective.cond-dropout=0..0.3", []),
    ("val/loss", "lr=1e-4..1e-3", []),
])  # fmt: skip
def test_a_search_by_numbers_that_cannot_be_compared_is_refused_or_noted(metric, space, found):
    parsed = parse_space([space], TrainSettings(data=config.from_dict(TrainSettings, {"data": "moons"}).data))
    if found is None:
        with pytest.raises(ValueError, match=f"{metric} is another quantity for each of its choices; objectives can"):
            find_incomparable(metric, parsed)
    else:
        assert find_incomparable(metric, parsed) == found


def test_the_metric_of_samples_that_is_optimised_is_measured():
    plain = TrainSettings(keep_best="precision", steps=100)
    assert with_intervals(plain) == replace(plain, eval_every=25, eval_metrics="prdc")
    assert choose_target(plain).metric == "eval/precision"
    with pytest.raises(ValueError, match=r"keep_best: given 'precision'; measured: .*eval/fid"):
        choose_target(replace(plain, eval_metrics="fid"))


@pytest.mark.parametrize(
    ("name", "metric", "direction"),
    [
        ("success", "rollout/success", "higher"),
        ("rollout/return", "rollout/return", "higher"),
        ("action_error", "rollout/action_error", "lower"),
    ],
)
def test_the_metric_of_rollouts_that_is_optimised_is_measured(name, metric, direction):
    plain = TrainSettings(keep_best=name, steps=100)
    assert with_intervals(plain) == replace(plain, rollout_every=25)
    assert with_intervals(replace(plain, rollout_every=7)).rollout_every == 7
    target = choose_target(plain)
    assert (target.metric, target.direction) == (metric, direction)


# ------------------------------------------------------------------------------------------------------- the study
def test_a_study_finds_a_planted_optimum_and_prunes_at_least_30_percent(tmp_path):
    study = open_study(tmp_path)
    study.run(evaluate_planted, 40)
    results = read_results(tmp_path)
    assert results.trials[0].values == {"lr": 1e-3, "batch": 64, "optimizer": "adamw"}, "the settings as they are"
    assert results.best is not None
    assert results.best.value < 0.02, "of 40 random trials the best has about 0.1"
    assert results.best.values["optimizer"] == "muon"
    assert results.count("pruned") >= 0.3 * 40
    steps = sum(len(t.curve) for t in results.trials)
    assert steps < 0.7 * 40 * STEPS, "the steps that pruning has saved"
    assert abs(sum(results.importances.values()) - 1) < 1e-6
    assert min(results.importances, key=lambda name: results.importances[name]) == "batch"


def test_trials_are_the_same_after_a_kill_at_any_place(tmp_path):
    whole = open_study(tmp_path / "whole")
    whole.run(evaluate_planted, 12)

    def run_until(last):
        def kill(number, step):
            if (number, step) == last:
                os.kill(os.getpid(), signal.SIGKILL)

        open_study(tmp_path / "cut").run(lambda trial: evaluate_planted(trial, kill), 12)

    for last in ((0, 1), (4, 5), (9, 1), (11, 3)):
        child = in_child(lambda last=last: run_until(last))
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with open(tmp_path / "cut" / "study.jsonl", "ab") as f:
        f.write(b'{"op_code": 4, "wor')  # a line that a kill has cut off
    cut = open_study(tmp_path / "cut")
    cut.run(evaluate_planted, 12)
    assert cut.results() == whole.results()
    other = open_study(tmp_path / "other", seed=1)
    other.run(evaluate_planted, 3)
    assert other.results().trials[1].values != whole.results().trials[1].values


def test_two_processes_share_one_study(tmp_path):
    def work(number, step):
        if step == 1:
            (tmp_path / f"by-{os.getpid()}-{number}").touch()
            time.sleep(0.02)

    open_study(tmp_path)
    children = [in_child(lambda: open_study(tmp_path).run(lambda t: evaluate_planted(t, work), 12)) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    results = read_results(tmp_path)
    assert [t.number for t in results.trials] == list(range(12))
    assert results.count("complete") + results.count("pruned") == 12
    begun = [path.name.split("-")[1:] for path in tmp_path.glob("by-*")]
    assert len(begun) == 12, "each trial by one process only"
    assert {int(pid) for pid, _ in begun} == set(children), "both have worked"
    assert len({str(t.values) for t in results.trials}) == 12


def test_a_trial_goes_on_while_the_better_end_of_its_interval_is_good(tmp_path):
    def evaluate(trial, likely):
        value = 1.0 if trial.number < 5 else 2.0
        return None if trial.report(1, value, value - likely) else value

    for name, likely, pruned in (("wide", 1.5, 0), ("narrow", 0.5, 3)):
        study = open_study(tmp_path / name)
        study.run(lambda trial, likely=likely: evaluate(trial, likely), 8)
        assert study.results().count("pruned") == pruned


def test_a_trial_that_fails_is_recorded_and_the_first_one_is_raised(tmp_path):
    def evaluate(trial):
        if trial.number in bad:
            raise ValueError("does not fit")
        return float("nan") if trial.number == 3 else 1.0

    bad = (0,)
    with pytest.raises(ValueError, match="trial 0: does not fit"):
        open_study(tmp_path / "first").run(evaluate, 4)
    bad = (2,)
    study = open_study(tmp_path / "later")
    study.run(evaluate, 5)
    assert [t.state for t in study.results().trials] == ["complete", "complete", "failed", "pruned", "complete"]
    assert study.results().trials[2].problem == "does not fit"


# ------------------------------------------------------------------------------------------------ trials that are runs
@pytest.mark.slow
def test_a_killed_search_of_runs_goes_on_to_the_same_results(tmp_path):
    settings = {**TINY, "space": ["lr=log:1e-4..1e-1"], "trials": 3, "val_every": 1}
    whole = genkit.tune(**settings, out=str(tmp_path / "whole"))
    trials = whole.results.trials
    assert [t.state for t in trials] == ["complete"] * 3
    assert all(list(t.curve) == [str(step) for step in range(1, 7)] for t in trials)
    runs = [genkit.load(whole.directory / t.run) for t in trials]
    assert [r.config.lr for r in runs] == [t.values["lr"] for t in trials]
    assert trials[0].values["lr"] == 1e-3

    def kill(text, done, total):
        if done == 5 and (tmp_path / "cut/0000-tune/trials/0001-trial-0001").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    child = in_child(lambda: genkit.tune(**settings, out=str(tmp_path / "cut"), progress=kill))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    folder = tmp_path / "cut" / "0000-tune"
    assert genkit.tune(resume=folder).results == whole.results
    assert len(list((folder / "trials").glob("0*"))) == 3, "the killed trial has gone on in its own run"
    assert whole.best_settings is not None
    best = config.from_dict(TrainSettings, config.load_yaml(whole.best_settings))
    assert best.lr == whole.results.best.values["lr"]
    with pytest.raises(ValueError, match=r"batch: given 9, but the study in .* was begun with 8"):
        genkit.tune(resume=folder, batch=9)
    page = write_report(folder).read_text()
    assert f"trial-{whole.results.best.number:04d}" in page
    assert all(text in page for text in ("History", "Importance", "fANOVA", "flatters"))


@dataclass(frozen=True)
class Greedy(MLP):
    """A network for which the memory does not suffice if it is wide."""

    def denoiser(self, spec):
        if self.width > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().denoiser(spec)


def test_a_trial_without_enough_memory_has_failed(tmp_path):
    """Else a study that is resumed would begin with this trial again, each time."""
    plain = replace(config.from_dict(TrainSettings, {**TINY, "keep_best": "val/loss"}), backbone=Greedy(depth=1))
    space = parse_space(["backbone.width=8,16"], plain)
    study = SearchStudy(tmp_path, space, "val/loss", "lower", 0, {"backbone.width": 16})
    with pytest.raises(ValueError, match="trial 0: out of memory"):
        study.run(lambda trial: run_trial(trial, plain, None), 1)
    (trial,) = study.results().trials
    assert (trial.state, trial.values) == ("failed", {"backbone.width": "16"})
    assert (trial.problem or "").startswith("out of memory (CUDA out of memory.")


def test_a_trial_that_diverges_names_its_run(tmp_path):
    tree = {**TINY, "keep_best": "val/loss", "lr": 1e9, "max_nonfinite_steps": 1, "clip": 0, "optimizer": "sgd"}
    plain = config.from_dict(TrainSettings, tree)
    study = SearchStudy(tmp_path, parse_space(["batch=8,16"], plain), "val/loss", "lower", 0, {"batch": 8})
    study.run(lambda trial: run_trial(trial, plain, None), 1)
    (trial,) = study.results().trials
    assert (trial.state, trial.run) == ("pruned", "trials/0000-trial-0000")
    assert (tmp_path / trial.run / "config.yaml").is_file()


def test_a_hopeless_run_is_stopped_and_says_so(tmp_path, capsys):
    argv = ["tune", "--data=moons", "--data.n=200", "--backbone=mlp", "--backbone.width=8", "--steps=4", "--ema", "0",
            "--warmup=0", "--val-every=2", "--val-n=50", "--sample-every=0", "--no-tensorboard", "--workers=0",
            f"--out={tmp_path}", "--trials=2", "--prune-startup=1", "--lr=0.1", "--tags=toy", "--seed=2"]  # fmt: skip
    assert main([*argv, "--space", "lr=1e-13,1e-12,1e-11,1e-1"]) == 0
    out = capsys.readouterr().out
    first, second = read_results(next(tmp_path.glob("*-tune"))).trials
    assert (first.state, first.values["lr"]) == ("complete", "0.1"), "the settings as they are"
    assert (second.state, list(second.curve)) == ("pruned", ["2"]), "a rate at which nothing is learned"
    assert "trial 1: stopped at step 2, worse than the median" in out
    assert "best.yaml --seed 3" in out, "another seed than the study's"
    assert all(read_annotations(next(tmp_path.glob(f"*/{t.run}"))).tags == ("toy",) for t in (first, second))
    assert main(["tune", "--space", "lrr=1..2"]) == 2
    assert "did you mean lr?" in capsys.readouterr().err
