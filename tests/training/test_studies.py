"""Studies of genkit tune over several processes, directories and signals: all trials have the settings of the study."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock, Timeout

import genkit
from genkit import config
from genkit.cli.main import main
from genkit.training.annotations import annotate, read_annotations
from genkit.training.best import BestCheckpoint, read_best
from genkit.training.directory import create_run
from genkit.training.settings import TrainSettings, stored_settings
from genkit.training.tuning import tune as tuning
from genkit.training.tuning.paths import lasting_path
from genkit.training.tuning.space import FOLLOWING, format_choice, parse_space
from genkit.training.tuning.study import LOCKS, SearchStudy, read_results
from genkit.training.tuning.tune import BEST_SETTINGS, STUDY_FILE, TuneSettings, lasting, stored_study

TINY = {"data": {"name": "moons", "n": 200}, "backbone": {"name": "mlp", "width": 8, "depth": 1}, "batch": 8,
        "steps": 4, "val_n": 20, "val_every": 4, "save_every": 4, "sample_every": 0, "workers": 0,
        "tensorboard": False, "device": "cpu", "threads": 1}  # fmt: skip


@pytest.fixture(autouse=True)
def _needs_optuna():
    pytest.importorskip("optuna")


@pytest.fixture
def trials(monkeypatch):
    """The settings of all trainings, which take no time; that of the index ``trials.interrupted`` gets a signal."""

    class Trials(list[TrainSettings]):
        interrupted: int | None = None

    trained = Trials()

    def train(settings=None, *, resume=None, progress=None, watch=None, **changes):
        if resume is None:
            assert settings is not None
            run = create_run(settings.out, settings.name)
        else:
            run, settings = resume, config.override(stored_settings(resume), **changes)
        (run / "config.yaml").write_text(config.to_yaml(replace(settings, note=None, tags=())))
        if settings.note or settings.tags:
            annotate(run, settings.note, tags=settings.tags)
        trained.append(settings)
        if len(trained) - 1 == trained.interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            return SimpleNamespace(ending="signal", directory=run, step=1)
        BestCheckpoint("val/loss", "lower", 4, float(len(trained))).write(run)
        return SimpleNamespace(ending="complete", directory=run, step=4)

    monkeypatch.setattr(tuning, "train", train)
    return trained


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


# ------------------------------------------------------------------------------------------------------------- paths
def test_all_trials_start_from_the_run_that_latest_was_when_the_study_began(tmp_path):
    runs = tmp_path / "runs"
    base = genkit.train(**TINY, out=str(runs))
    study = genkit.tune(**TINY, init=str(runs / "latest"), space=["lr=1e-3,1e-2"], trials=1, out=str(tmp_path / "s"))
    other = genkit.train(**TINY, out=str(runs))
    assert (runs / "latest").resolve() == other.directory
    resumed = genkit.tune(resume=study.directory, trials=2)
    inits = [stored_settings(study.directory / t.run).init for t in resumed.results.trials if t.run]
    assert inits == [str(base.directory)] * 2
    assert config.load_yaml(study.directory / BEST_SETTINGS)["init"] == str(base.directory)
    with pytest.raises(
        ValueError, match=rf"init: given {other.directory}, but the study .* begun with {base.directory}"
    ):
        genkit.tune(resume=study.directory, init=str(runs / "latest"))


def test_a_study_reads_the_same_files_from_any_directory(tmp_path, monkeypatch, trials):
    for name in ("w1", "w2"):
        (tmp_path / name).mkdir()
        for file in ("d.npz", "other.npz"):
            np.savez(tmp_path / name / file, x=np.zeros((50, 2), np.float32))
    monkeypatch.chdir(tmp_path / "w1")
    plain = {**TINY, "data": "d.npz", "prior": {"data": "other.npz"}, "space": ["lr=1e-3,1e-2"]}
    study = genkit.tune(**plain, trials=1, out=str(tmp_path / "s"))
    monkeypatch.chdir(tmp_path / "w2")
    genkit.tune(resume=study.directory, trials=2)
    for settings in (*trials, stored_study(study.directory)):
        assert getattr(settings.data, "root", None) == str(tmp_path / "w1/d.npz")
        assert getattr(settings.prior.data, "root", None) == str(tmp_path / "w1/other.npz")
    assert config.load_yaml(study.directory / BEST_SETTINGS)["data"]["root"] == str(tmp_path / "w1/d.npz")
    with pytest.raises(ValueError, match=r"data.root: given .*w2/d.npz, but the study .* was begun with .*w1/d.npz"):
        genkit.tune(resume=study.directory, data="d.npz")


def test_searched_paths_are_those_of_the_directory_in_which_the_study_began(tmp_path, monkeypatch):
    (tmp_path / "w").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
        np.savez(tmp_path / f"{name}, 1.npz", x=np.zeros((50, 2), np.float32))
    (tmp_path / "latest").symlink_to("b")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    monkeypatch.chdir(tmp_path / "w")
    texts = ("codec=../a,../latest", "init=../a,null", "optimizer=adamw,muon",
             'prior.data="../a, 1.npz",none', 'data.root="../a, 1.npz","../b, 1.npz"', "lr=1e-4..1e-2")  # fmt: skip
    data = config.from_dict(TrainSettings, {"data": "../a, 1.npz"}).data
    settings = TuneSettings(data=data, space=texts, sample_prompts="../prompts.txt")
    new = lasting(settings)
    root = str(tmp_path)
    assert new.sample_prompts == f"{root}/prompts.txt"
    monkeypatch.chdir(tmp_path)
    assert lasting(new) == new
    found = [d.examples for d in parse_space(new.space, config.narrow(new, TrainSettings))]
    assert found == [
        [f"{root}/a", f"{root}/b"], [f"{root}/a", None], ["adamw", "muon"],
        [f"{root}/a, 1.npz", "none"], [f"{root}/a, 1.npz", f"{root}/b, 1.npz"], [1e-4, 1e-2],
    ]  # fmt: skip
    assert new.space[2] == texts[2]
    assert new.space[5] == texts[5]


def test_a_path_behind_its_kind_lasts_too_and_other_names_stay(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lasting_path("diffusers:m") == f"diffusers:{tmp_path / 'm'}"
    assert [lasting_path(name) for name in ("hf://a/b", "diffusers:a/b", "google/t5")] == [
        "hf://a/b", "diffusers:a/b", "google/t5",
    ]  # fmt: skip


def test_paths_above_this_folder_are_choices():
    assert parse_space(["codec=../a,../b"], TrainSettings())[0].examples == ["../a", "../b"]
    assert format_choice("codec", ["../a", "b, c", None]) == "codec=../a, 'b, c', null"
    for text in ("codec=../a", "optimizer=adamw..muon"):
        with pytest.raises(ValueError, match=r"^space: .* needs two choices or more"):
            parse_space([text], TrainSettings())
    for text in ("lr=1e-3..x", "betas=a..b", "lr=log:1,2"):
        with pytest.raises(ValueError, match=r"whose ends are no numbers"):
            parse_space([text], TrainSettings())


# ----------------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_step_of_a_trial_ends_the_study_after_it(tmp_path, number):
    def stop(what, done, total):
        if done == 4:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    study = genkit.tune(**TINY, space=["lr=1e-3,1e-2,1e-1"], trials=3, out=str(tmp_path), progress=stop)
    assert study.stopped
    assert [t.state for t in study.results.trials] == ["complete"]
    assert signal.getsignal(number) is before
    rest = genkit.tune(resume=study.directory, trials=2)
    assert not rest.stopped
    assert [t.state for t in rest.results.trials] == ["complete"] * 2


def test_a_signal_while_the_last_trial_ends_does_not_leave_the_study_unfinished(tmp_path, trials, monkeypatch):
    monkeypatch.setattr(tuning, "read_best", lambda run: os.kill(os.getpid(), signal.SIGINT) or read_best(run))
    study = genkit.tune(**TINY, space=["lr=1e-3,1e-2"], trials=1, out=str(tmp_path))
    assert not study.stopped
    again = genkit.tune(resume=study.directory, trials=3)
    assert again.stopped
    assert len(again.results.trials) == 2, "between two trials"


# ---------------------------------------------------------------------------------------------------------- settings
def test_the_command_that_comes_next_trains_the_best_settings(tmp_path, capsys):
    tiny = {**TINY, "val_every": 0, "steps": 2}
    study = genkit.tune(**tiny, space=["lr=1e-3,1e-2"], trials=1, out=str(tmp_path))
    assert study.best_settings is not None
    assert main(["train", "--config", str(study.best_settings), "--seed", "1"]) == 0
    assert "best     step" in capsys.readouterr().out


@pytest.mark.parametrize(("metric", "field"), [("fid", "eval_every"), ("success", "rollout_every")])
def test_the_best_settings_say_how_often_their_metric_is_measured(tmp_path, trials, metric, field):
    study = genkit.tune(**TINY, keep_best=metric, space=["lr=1e-3,1e-2"], trials=1, out=str(tmp_path))
    best = config.from_dict(TrainSettings, config.load_yaml(study.directory / BEST_SETTINGS))
    assert getattr(best, field) == getattr(trials[0], field) == 1
    assert best == replace(trials[0], out=str(tmp_path), name=None)


OPTIMIZERS = ["optimizer=adamw,schedule-free,sgd"]


@pytest.mark.parametrize(("given", "rates"), [({}, {1e-3, 0.1, None}), ({"lr": 1e-3}, {1e-3}), ({"lr": 3e-3}, {3e-3})])
def test_a_rate_that_is_given_is_that_of_all_optimizers(tmp_path, trials, given, rates):
    study = genkit.tune(**TINY, **given, space=OPTIMIZERS, trials=4, seed=1, out=str(tmp_path))
    genkit.tune(resume=study.directory, trials=12)
    assert {type(s.optimizer).__name__ for s in trials} == {"AdamW", "ScheduleFree", "SGD"}
    default = config.from_dict(TrainSettings, {"optimizer": "schedule-free"}).lr
    assert {s.lr for s in trials} == {default if rate is None else rate for rate in rates}
    best = config.load_yaml(study.directory / BEST_SETTINGS)
    assert best["lr"] in {s.lr for s in trials}


def test_options_that_are_given_on_the_command_line_or_in_its_file_are_kept(tmp_path, trials):
    file = tmp_path / "settings.yaml"
    file.write_text(config.to_yaml(config.from_dict(TuneSettings, TINY)).replace("kept: []\n", ""))
    plain = ["tune", "--data=moons", "--backbone=mlp", "--no-tensorboard", "--trials=1", f"--out={tmp_path}", "--space",
             *OPTIMIZERS]  # fmt: skip

    def kept(*more):
        assert main([*plain, *more]) == 0
        return stored_study(max(tmp_path.glob("*-tune"))).kept

    assert kept() == ()
    assert kept("--lr=1e-3", "--schedule", "cosine", "--ema", "0.999") == ("lr", "schedule", "ema")
    assert kept("--schedule.floor=0.0", "--kept", "betas") == ("schedule", "betas")
    assert kept("--config", str(file)) == tuple(FOLLOWING), "as genkit train --config FILE --optimizer sgd has them"
    assert kept("--config", str(min(tmp_path.glob("*-tune")) / STUDY_FILE), "--lr", "1e-3") == ("lr",)


def test_metrics_may_be_written_with_spaces():
    plain = TrainSettings(keep_best="mmd", eval_metrics="w2, mmd", steps=100)
    assert tuning.choose_target(plain).metric == "eval/mmd"


# ------------------------------------------------------------------------------------------------------------ resume
def test_a_study_that_is_made_longer_stays_so(tmp_path, trials):
    study = genkit.tune(**TINY, space=["lr=1e-3,1e-2"], trials=2, out=str(tmp_path))
    trials.interrupted = 2
    assert genkit.tune(resume=study.directory, trials=4).stopped
    trials.interrupted = None
    assert main(["tune", "--resume", str(study.directory)]) == 0
    assert read_results(study.directory).count("complete") == 4


def test_an_interrupted_trial_goes_on_with_the_options_of_the_resumed_study(tmp_path, trials):
    trials.interrupted = 0
    study = genkit.tune(**TINY, space=["lr=1e-3,1e-2"], trials=2, note="first", out=str(tmp_path))
    for file in (study.directory / STUDY_FILE, *study.directory.glob("trials/*/config.yaml")):
        edit(file, "device: cpu", "device: xpu")  # as if the study had begun on another machine
    with pytest.raises(ValueError, match=r"^device: given xpu, and torch sees no such device here"):
        genkit.tune(resume=study.directory)
    assert len(trials) == 1, "no trial has failed for want of a device"
    argv = ["tune", "--resume", str(study.directory), "--device=cpu", "--threads=2", "--keep-checkpoints=7"]
    assert main(argv) == 0
    assert [(s.device, s.threads, s.keep_checkpoints) for s in trials[1:]] == [("cpu", 2, 7)] * 2
    stored = stored_study(study.directory)
    assert (stored.device, stored.threads, stored.keep_checkpoints) == ("cpu", 2, 7)
    assert read_results(study.directory).count("complete") == 2
    notes = [read_annotations(run.parent).notes for run in study.directory.glob("trials/0*/config.yaml")]
    assert [[note.text for note in found] for found in notes] == [["first"]] * 2


# --------------------------------------------------------------------------------------------------------- the study
def test_the_first_trial_has_the_settings_as_they_are_but_for_those_outside_the_space(tmp_path):
    space = parse_space(["lr=log:1e-6..1e-1", "batch=128..512", "warmup=0..10"], TrainSettings())
    study = SearchStudy(tmp_path, space, "val/loss", "lower", 0, {"lr": 1e-3, "batch": 64, "warmup": None})
    study.run(lambda trial: 1.0, 1)
    values = study.results().trials[0].values
    assert values["lr"] == 1e-3
    assert 128 <= values["batch"] <= 512


def test_no_other_process_ends_a_trial_between_the_results_and_the_best_settings(tmp_path, trials, monkeypatch):
    free = {}

    def write(path, text, write_text=tuning.write_text):
        try:
            with FileLock(path.parent / LOCKS / "ask", timeout=0):
                free[path.name] = True
        except Timeout:
            free[path.name] = False
        write_text(path, text)

    monkeypatch.setattr(tuning, "write_text", write)
    genkit.tune(**TINY, space=["lr=1e-3,1e-2"], trials=1, out=str(tmp_path))
    assert free[BEST_SETTINGS] is False
