"""`sweep` and `genkit sweep`: the Pareto front, what is confirmed, and what a second call still has to do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from genkit.cli import main as cli
from genkit.evaluation import Card, Estimate, ModelSamples, SweepSettings, sweep, sweeps
from genkit.evaluation.sweeps import SweepPoint, choose_points, front_of, parse_interval
from tests.support.evaluation import refusal, train

ARGS = ["--n=24", "--confirm-n=40", "--num-confirm-extra=1", "--steps", "2", "3", "4", "--sampler", "ddim", "heun",
        "--guidance", "1", "2", "--interval", "all", "0.2-0.8", "--json"]  # fmt: skip


@pytest.fixture
def moons(tmp_path):
    args = ["--data=moons", "--data.n=300", "--backbone.width=16", "--steps=10", "--ema", "0.5", "0.9"]
    return train(tmp_path, *args)


def sweep_json(capsys, run, *argv):
    capsys.readouterr()
    assert cli.main(["sweep", str(run), *ARGS, *argv]) == 0
    return json.loads(capsys.readouterr().out)


def make_point(passes, value, metric="fid"):
    return SweepPoint(None, Card({metric: Estimate(value)}, {"passes": passes}), metric)


def test_nothing_beats_the_pareto_front():
    points = [make_point(*p) for p in [(9, 3.0), (5, 4.0), (5, 5.0), (2, 9.0), (12, 3.0), (20, 1.0), (7, 4.5)]]
    assert [(p.passes, p.value) for p in front_of(points)] == [(2, 9.0), (5, 4.0), (9, 3.0), (20, 1.0)]
    assert [(p.passes, p.value) for p in choose_points(points, 1)[4:]] == [(12, 3.0)]
    recall = [make_point(passes, value, "recall") for passes, value in [(1, 0.2), (2, 0.5), (3, 0.4)]]
    assert [p.value for p in front_of(recall)] == [0.2, 0.5], "higher recall is better"


def test_a_sweep_screens_confirms_and_resumes_from_its_cards(moons, capsys, monkeypatch):
    result = sweep_json(capsys, moons)
    made = {path: Card.load(path) for path in moons.glob("eval/*.json")}
    screened = [card for card in made.values() if card.settings["n"] == 24]
    confirmed = [card for card in made.values() if card.settings["n"] == 40]
    assert len(screened) == 2 * 3 * 3, "guidance 1 has no interval: 2 samplers, 3 numbers of steps, 3 kinds of guidance"
    assert len(confirmed) == len(result["points"]) < len(screened)
    nfe = {(card.settings["sampler"], card.settings["steps"]): card.nfe for card in screened}
    assert nfe == {("ddim", k): k for k in (2, 3, 4)} | {("heun", k): 2 * k - 1 for k in (2, 3, 4)}
    for p in result["points"]:
        others = [q for q in result["points"] if q is not p]
        assert p["pareto"] is not any(q["passes"] <= p["passes"] and q["w2"] <= p["w2"] for q in others)
    assert all(p["passes"] > p["nfe"] for p in result["points"] if p["guidance"] != 1)
    assert (moons / "eval" / Path(result["picture"]).name).stat().st_size > 1000

    # a card of the sweep is the card of genkit eval with the same settings
    card = max(confirmed, key=lambda card: card.settings["passes"])
    s = card.settings
    same = ["--n=40", "--metrics=w2", *(f"--{k}={s[k]}" for k in ("sampler", "steps", "guidance"))]
    if s["guidance_interval"]:
        same += ["--guidance-interval", *map(str, s["guidance_interval"])]
    assert cli.main(["eval", str(moons), *same, f"--out={moons}/one.json"]) == 0
    assert Card.load(moons / "one.json").metrics == card.metrics

    # a second call draws nothing, and only what is missing after a card is gone
    monkeypatch.setattr(ModelSamples, "rows", lambda *_: pytest.fail("drawn again"))
    assert sweep_json(capsys, moons) == result
    monkeypatch.undo()
    missing = sorted(moons.glob("eval/*.json"))[3]
    missing.unlink()
    drawn, rows = [], ModelSamples.rows
    monkeypatch.setattr(ModelSamples, "rows", lambda self, *a: drawn.append(a[1] - a[0]) or rows(self, *a))
    assert sweep_json(capsys, moons) == result
    assert sum(drawn) == made[missing].settings["n"], "one card was missing, and one is made"


def test_a_sweep_over_averages(moons, capsys):
    argv = ["sweep", str(moons), "--n=20", "--confirm-n=20", "--steps", "2", "--ema", "0.5", "0.9", "none"]
    assert cli.main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {p["ema"] for p in result["points"]} == {"0.5", "0.9", "none"}
    assert cli.main(argv) == 0
    assert "Pareto" in capsys.readouterr().out


def test_sweep_from_python_prints_nothing(moons, capsys):
    capsys.readouterr()
    calls = []
    result = sweep(moons, n=20, confirm_n=20, steps=(2, 3), device="cpu", progress=lambda *call: calls.append(call))
    assert capsys.readouterr() == ("", "")
    assert calls[-1] == ("screening", 40, 40)
    assert (result.metric, result.n, len(result.points)) == ("w2", 20, 2)
    assert not result.plot_path.exists()
    assert result.save_plot() == result.plot_path


def test_a_combination_that_diverges_is_left_out_with_a_message(moons, capsys, monkeypatch):
    rows = ModelSamples.rows

    def diverge_at_three_steps(self, *a):
        if self.sampling.steps == 3:
            raise ValueError("sample 0 is not finite")
        return rows(self, *a)

    def diverge(self, *a):
        raise ValueError("sample 0 is not finite")

    monkeypatch.setattr(ModelSamples, "rows", diverge_at_three_steps)
    assert cli.main(["sweep", str(moons), "--n=20", "--confirm-n=20", "--steps", "2", "3"]) == 0
    assert "left out: default sampler 3 steps" in capsys.readouterr().out
    monkeypatch.setattr(ModelSamples, "rows", diverge)
    line = refusal(capsys, "sweep", moons, "--n=22", "--confirm-n=22", "--steps", "2", "3")
    assert "none of 2 combinations" in line


def test_mistakes_are_one_line(moons, capsys):
    messages = {
        "interval: given '1-2-3'": ["--guidance", "2", "--interval", "1-2-3"],
        "metric: given 'fod'": ["--metric=fod"],
        "did you mean fid?": ["--metric=fod"],
        "--sampler[1]: given 'hoin'": ["--sampler", "heun", "hoin"],
        "ema: given 0.7": ["--ema", "0.7"],
        "is unknown": ["--reference=nowhere"],
    }
    for words, argv in messages.items():
        assert words in refusal(capsys, "sweep", moons, "--n=20", *argv)
    assert not list(moons.glob("eval/*"))


def test_intervals_are_parsed():
    assert parse_interval("all") is None
    assert parse_interval("0.2-0.75") == (0.2, 0.75)


@pytest.mark.parametrize(("given", "minutes", "expected"), [
    ({}, 5500 / 60, (500, 5000)), ({}, 5499 / 60, (500, 2000)), ({}, 20, (200, 1000)), ({}, 1e-3, (50, 200)),
    ({"n": 30}, 1e-3, (30, 5000)), ({"confirm_n": 30}, 1e-3, (500, 30)), ({"n": 9, "confirm_n": 9}, 1e-3, (9, 9)),
])  # fmt: skip
def test_a_sweep_fits_into_the_minutes_and_says_what_it_leaves_out(monkeypatch, caplog, given, minutes, expected):
    """A sample of every combination takes a second."""
    monkeypatch.setattr(sweeps, "time_sample", lambda combinations: 1.0)
    assert sweeps.choose_counts(SweepSettings(max_minutes=minutes, **given), [None] * 4) == expected
    full = (given.get("n", 500), given.get("confirm_n", 5000))
    said = f"--n {full[0]} --confirm-n {full[1]}, or --max-minutes" in caplog.text
    assert said == (expected != full)


def test_the_time_of_a_sweep_follows_steps_and_guidance(moons):
    device = torch.device("cpu")
    one = SweepSettings(steps=(4,), batch=8)
    more = replace(one, steps=(4, 8), guidance=(1.0, 2.0))
    few, many = (sweeps.list_combinations(moons, settings, device) for settings in (one, more))

    class Clock:
        now = 0.0

        def perf_counter(self):
            self.now += 1.0
            return self.now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "time", Clock())
        assert sweeps.time_sample(few) == 1 / 8  # of a batch of eight, which takes a second
        assert sweeps.time_sample(many) == (4 + 8 + 2 * 4 + 2 * 8) / 4 / 8


def test_the_table_cuts_off_no_number_and_no_column(moons, capsys, monkeypatch):
    """In a terminal, or a pipe, of 80 columns; settings that all points share are in one line below it."""
    monkeypatch.setenv("COLUMNS", "80")
    argv = ["--n=20", "--confirm-n=30", "--steps", "2", "3", "--sampler", "ddim", "heun", "--ema", "0.5", "0.9"]
    assert cli.main(["sweep", str(moons), *argv, "--device=cpu"]) == 0
    out = capsys.readouterr().out
    head = next(line for line in out.splitlines() if "NFE" in line)
    assert head.split() == ["NFE", "passes", "w2", "sampler", "steps", "ema", "Pareto"]
    assert "…" not in out
    assert "all with guidance 1, interval –" in out
