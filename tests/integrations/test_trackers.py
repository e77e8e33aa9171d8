"""Trackers: real ones offline (slow, if installed), TensorBoard, and one that fails."""

import json
import logging
import sqlite3
from dataclasses import fields
from typing import get_args

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from genkit.cli.main import main
from genkit.integrations import trackers
from genkit.integrations.trackers import TRACKERS, RunTracker, Trackers
from genkit.training.directory import read_log
from genkit.training.settings import TrackerName, TrainSettings

QUICK = ["--data=moons", "--data.n=64", "--backbone.width=8", "--batch=16", "--workers=0", "--device=cpu",
         "--log-every=2", "--sample-every=4"]  # fmt: skip


def train(out, *argv):
    assert main(["train", *QUICK, f"--out={out}", *argv]) == 0
    return (out / "latest").resolve()


def logged_scalars(run):
    """``{name: {step: value}}`` of what the trackers get: all numbers of the log but its clocks."""
    scalars = {}
    for record in read_log(run):
        for name, value in record.items():
            if name not in ("step", "samples", "seconds"):
                scalars.setdefault(name, {})[record["step"]] = value
    return scalars


class Fragile(RunTracker):
    """A tracker that fails where it is told to, and else counts what it gets."""

    package = "json"
    fails = ""
    calls: list = []  # noqa: RUF012

    def make(self):
        self.fail_at("make")
        return self

    def start(self):
        self.fail_at("start")

    def finish(self):
        self.fail_at("finish")

    def log_settings(self, settings):
        self.fail_at("log_settings")

    def log(self, values, step):
        self.fail_at("log")

    def log_picture(self, image, path, step):
        self.fail_at("log_picture")

    def fail_at(self, name):
        self.calls.append(name)
        if name == self.fails:
            raise ConnectionError("no network\nat all")


@pytest.mark.parametrize("place", ["make", "start", "log_settings", "log", "log_picture", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(tmp_path, monkeypatch, caplog, place):
    monkeypatch.setitem(TRACKERS, "wandb", Fragile)
    monkeypatch.setattr(Fragile, "fails", place)
    monkeypatch.setattr(Fragile, "calls", [])
    with caplog.at_level(logging.WARNING, logger="genkit"):
        run = train(tmp_path, "--steps=4", "--trackers=wandb")
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning == "warning  wandb does not work, training goes on without it: ConnectionError: no network at all"
    assert Fragile.calls[-1] == place, "it was called again"
    assert Fragile.calls.count(place) == 1
    assert read_log(run)[-1]["step"] == 4


def test_a_resumed_run_goes_on_under_the_same_id(tmp_path, monkeypatch):
    opened = []

    class Remembering(Fragile):
        def make(self):
            opened.append((self.id, self.resumed, self.step))
            return self

    monkeypatch.setitem(TRACKERS, "wandb", Remembering)
    run = train(tmp_path, "--steps=2", "--trackers=wandb")
    assert main(["train", "--resume", str(run), "--steps=4"]) == 0
    other = train(tmp_path, "--steps=2", "--trackers=wandb")
    (a, b, c) = opened
    assert a[0] == b[0] != c[0]
    assert (a[1:], b[1:]) == ((False, 0), (True, 2))
    assert json.loads((run / "trackers.json").read_text()) == {"wandb": a[0]}
    assert json.loads((other / "trackers.json").read_text()) == {"wandb": c[0]}


def test_the_setting_names_the_registry_and_missing_packages_are_asked_for(tmp_path, capsys, monkeypatch):
    assert get_args(TrackerName) == tuple(TRACKERS)
    assert {"trackers", "tracker_project"} <= {f.name for f in fields(TrainSettings) if f.metadata.get("changeable")}
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert main(["train", *QUICK, f"--out={tmp_path}/runs", "--no-tensorboard", "--trackers=mlflow"]) == 2
    assert "trackers: given mlflow, which is not installed: pip install mlflow" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_tensorboard_has_scalars_pictures_and_settings_and_goes_on(tmp_path):
    run = train(tmp_path, "--steps=4", "--val-every=2", "--no-tensorboard", "--trackers=tensorboard")
    assert main(["train", "--resume", str(run), "--steps=6"]) == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name, values in logged_scalars(run).items():
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(values, rel=1e-6), name
    assert [e.step for e in events.Images("samples")] == [4, 6]
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| objective.name | flow |" in text
    assert not (run / "trackers.json").exists()


# ------------------------------------------------------------------------------------------------ the real ones
def train_twice(tmp_path, name):
    args = ["--steps=4", "--val-every=2", "--eval-every=4", "--eval-n=50", "--no-tensorboard", f"--trackers={name}",
            "--tracker-project=mine"]  # fmt: skip
    run = train(tmp_path, *args)
    first = json.loads((run / "trackers.json").read_text())
    assert main(["train", "--resume", str(run), "--steps=6"]) == 0
    assert json.loads((run / "trackers.json").read_text()) == first
    return run, first[name]


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, identity = train_twice(tmp_path, "wandb")
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    for folder in folders:
        assert folder.name.endswith(identity)
        content = (folder / f"run-{identity}.wandb").read_bytes()
        for word in (b"mine", b"val/raw/loss", b"eval/w2", b"objective.name"):
            assert word in content
        assert list(folder.glob("files/media/images/samples*.png"))


@pytest.mark.slow
def test_mlflow_in_a_local_database(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run, identity = train_twice(tmp_path, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    stored = client.get_run(identity)
    assert stored.data.params["objective.name"] == "flow"
    assert stored.info.status == "FINISHED"
    assert client.get_experiment(stored.info.experiment_id).name == "mine"
    for name, values in logged_scalars(run).items():
        if not name.startswith("eval/"):
            assert {m.step: m.value for m in client.get_metric_history(identity, name)} == pytest.approx(values), name
    assert [m.step for m in client.get_metric_history(identity, "eval/w2")] == [4, 6]
    pictures = {a.path for a in client.list_artifacts(identity, "samples")}
    assert pictures == {f"samples/{p.name}" for p in (run / "samples").glob("*.png")}


@pytest.mark.slow
def test_trackio_in_a_local_database(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    pytest.importorskip("trackio")
    run, identity = train_twice(tmp_path, "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "mine.db") as db:
        rows = db.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {identity}
    steps = {step for _, step, metrics in rows if "val/loss" in json.loads(metrics)}
    assert steps == set(logged_scalars(run)["val/loss"]) == {2, 4, 6}
    assert any("samples" in json.loads(metrics) for _, _, metrics in rows)


def test_names_that_mlflow_refuses_are_changed():
    assert trackers.MLFLOW_NAME.sub("_", "eval/fd (raw)") == "eval/fd _raw_"


def test_closing_twice_is_harmless(tmp_path):
    opened = Trackers(["tensorboard"], tmp_path, "mine", 0, {"a": 1})
    opened.close()
    opened.close()
    opened.log({"x": 1.0}, 1)
    opened.log_picture(Image.new("L", (4, 4)), tmp_path / "x.png", 1)
