"""genkit bench optimizers: equal seconds, and a rate that is not chosen by the seeds that are reported."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks import optimizers
from benchmarks.timed_training import HeldOut
from genkit.cli.main import main

QUICK = ["bench", "optimizers", "--tasks", "moons", "--seeds", "2"]


def test_contenders_bring_their_optimizer_schedule_and_rate():
    options = optimizers.Contender.parse("lion:wsd").options("digits", 3.0)
    assert options["optimizer"] == "lion"
    assert options["schedule"] == {"name": "wsd", "decay": 0.3}
    assert options["lr"] == pytest.approx(3e-4)  # three times Lion's default
    assert "schedule" not in optimizers.Contender.parse("schedule-free").options("moons", 1.0)  # its own default
    assert optimizers.Contender.parse("adamw").options("moons", 1.0)["lr"] == 1e-3


def test_the_rate_of_the_choice_is_reported_at_the_same_seconds(monkeypatch, tmp_path, capsys):
    """Costs and losses are given: a step of Muon takes twice as long, and its best rate is 3."""
    costs = {"adamw": 0.5, "muon": 1.0}
    trained: list[Mapping[str, Any]] = []

    def loss(options: Mapping[str, Any]) -> HeldOut:
        trained.append(options)
        return HeldOut(abs(options["lr"] - (6e-3 if options["optimizer"] == "muon" else 1e-3)) + options["seed"], 1.0)

    monkeypatch.setattr(optimizers, "step_seconds", lambda options, pilot: costs[options["optimizer"]])
    monkeypatch.setattr(optimizers, "measure_held_out", loss)
    command = [*QUICK, "--optimizers", "adamw", "muon", "--seconds", "10", "--out", str(tmp_path / "o.json")]
    assert main(command) == 0
    for name, steps, lr in (("adamw", 20, 1e-3), ("muon", 10, 6e-3)):
        own = [t for t in trained if t["optimizer"] == name]
        assert {t["steps"] for t in own} == {steps}
        assert [t["seed"] for t in own] == [1000] * 3 + [0, 1]
        assert [t["lr"] for t in own][3:] == [pytest.approx(lr)] * 2
    out = capsys.readouterr().out
    assert "0.500±0.707" in out  # of seeds 0 and 1, none of the choice
    assert "0.000±0.000" in out  # seed by seed, Muon has the loss of AdamW
    trained.clear()
    assert main(command) == 0  # resumed
    assert not trained
    assert "moons/muon/3/1" in json.loads((tmp_path / "o.json").read_text())["cells"]


@pytest.mark.parametrize(("words", "message"), [
    (["--optimizers", "adamv"], "optimizers: given adamv; allowed: adamw"),
    (["--optimizers", "adamw:cosinus"], "optimizers: given adamw:cosinus; schedules: constant"),
    (["--seconds", "0"], "seconds, rates: given 0.0"),
    (["--rates", "1", "-1"], "seconds, rates: given 20.0"),
    (["--choice-seed", "1"], "choice-seed: given 1, which is reported; allowed from 2 on"),
])  # fmt: skip
def test_bad_options_are_refused(words, message, capsys):
    assert main([*QUICK, *words]) == 2
    assert message in capsys.readouterr().err
