"""`genkit sweep`: what is on the Pareto list, what is confirmed, what a second call still has to do."""

import json
import os

import pytest

from genkit.cli import main as cli
from genkit.cli.commands.sweep import Point, interval_of, pareto, promising
from genkit.evaluation import Drawn, cards
from genkit.training.sampling import Sampling

ARGS = ["--n=24", "--confirm=40", "--spare=1", "--steps", "2", "3", "4", "--sampler", "ddim", "heun", "--guidance", "1",
        "2", "--interval", "all", "0.2-0.8", "--json"]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    before = os.environ.get("GENKIT_CACHE")
    os.environ["GENKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("GENKIT_CACHE") if before is None else os.environ.update(GENKIT_CACHE=before)


@pytest.fixture
def moons(tmp_path):
    argv = ["--data=moons", "--data.n=300", "--backbone.width=16", "--steps=10", "--batch=16", "--tensorboard=false",
            "--device=cpu", "--sample-every=0", "--warmup=0", "--ema", "0.5", "0.9", f"--out={tmp_path}"]  # fmt: skip
    assert cli.main(["train", *argv]) == 0
    return (tmp_path / "latest").resolve()


def sweep(capsys, run, *argv):
    capsys.readouterr()
    assert cli.main(["sweep", str(run), *ARGS, *argv]) == 0
    return json.loads(capsys.readouterr().out)


def point(passes, value, metric="fid"):
    card = {"metrics": {metric: {"value": value}}, "settings": {"passes": passes}}
    return Point(Sampling(steps=int(10 * passes), guidance=value), card, metric)


def test_the_pareto_list_is_what_nothing_beats():
    points = [point(*p) for p in [(9, 3.0), (5, 4.0), (5, 5.0), (2, 9.0), (12, 3.0), (20, 1.0), (7, 4.5)]]
    assert [(p.passes, p.value) for p in pareto(points)] == [(2, 9.0), (5, 4.0), (9, 3.0), (20, 1.0)]
    assert [(p.passes, p.value) for p in promising(points, 1)[4:]] == [(12, 3.0)]
    recall = [point(p, v, "recall") for p, v in [(1, 0.2), (2, 0.5), (3, 0.4)]]
    assert [p.value for p in pareto(recall)] == [0.2, 0.5], "of recall the larger is the better"


def test_a_sweep_screens_confirms_and_is_taken_up_by_its_cards(moons, capsys, monkeypatch):
    told = sweep(capsys, moons)
    made = {p: cards.read(p) for p in moons.glob("eval/*.json")}
    screened = [c for c in made.values() if c["settings"]["n"] == 24]
    confirmed = [c for c in made.values() if c["settings"]["n"] == 40]
    assert len(screened) == 2 * 3 * 3, "guidance 1 knows no interval: 2 samplers, 3 numbers of steps, 3 ways to guide"
    assert len(confirmed) == len(told["points"]) < len(screened)
    nfe = {(c["settings"]["sampler"], c["settings"]["steps"]): c["settings"]["nfe"] for c in screened}
    assert nfe == {("ddim", k): k for k in (2, 3, 4)} | {("heun", k): 2 * k - 1 for k in (2, 3, 4)}
    beaten = lambda p: any(  # noqa: E731
        q["passes"] <= p["passes"] and q["w2"] <= p["w2"] and q is not p for q in told["points"]
    )
    assert [p["pareto"] for p in told["points"]] == [not beaten(p) for p in told["points"]]
    assert all(p["passes"] > p["nfe"] for p in told["points"] if p["guidance"] != 1)
    assert (moons / "eval").joinpath(os.path.basename(told["picture"])).stat().st_size > 1000
    some = max(confirmed, key=lambda c: c["settings"]["passes"])
    s = some["settings"]
    same = ["--n=40", "--metrics=w2", *(f"--{k}={s[k]}" for k in ("sampler", "steps", "guidance"))]
    if s["guidance_interval"]:
        same += ["--guidance-interval", *map(str, s["guidance_interval"])]
    assert cli.main(["eval", str(moons), *same, f"--out={moons}/one.json"]) == 0
    assert cards.read(moons / "one.json")["metrics"] == some["metrics"]

    monkeypatch.setattr(Drawn, "rows", lambda *_: pytest.fail("drawn again"))
    assert sweep(capsys, moons) == told
    monkeypatch.undo()
    gone = sorted(moons.glob("eval/*.json"))[3]
    gone.unlink()
    drawn, rows = [], Drawn.rows
    monkeypatch.setattr(Drawn, "rows", lambda self, *a: drawn.append(a[1] - a[0]) or rows(self, *a))
    assert sweep(capsys, moons) == told
    assert sum(drawn) == made[gone]["settings"]["n"], "one card was missing, and one is made"


def test_a_sweep_over_averages_says_which(moons, capsys):
    argv = ["sweep", str(moons), "--n=20", "--confirm=20", "--steps", "2", "--ema", "0.5", "0.9", "none"]
    assert cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {p["ema"] for p in told["points"]} == {"0.5", "0.9", "none"}
    assert cli.main(argv) == 0
    assert "Pareto" in capsys.readouterr().out


def test_a_combination_that_diverges_is_left_out_and_said(moons, capsys, monkeypatch):
    rows = Drawn.rows

    def poisoned(self, *a):
        if self.settings["steps"] == 3:
            raise ValueError("sample 0 is not finite")
        return rows(self, *a)

    monkeypatch.setattr(Drawn, "rows", poisoned)
    assert cli.main(["sweep", str(moons), "--n=20", "--confirm=20", "--steps", "2", "3"]) == 0
    assert "left out: usual sampler 3 steps" in capsys.readouterr().out
    monkeypatch.setattr(Drawn, "rows", lambda *_: (_ for _ in ()).throw(ValueError("sample 0 is not finite")))
    assert cli.main(["sweep", str(moons), "--n=22", "--confirm=22", "--steps", "2", "3"]) == 2
    assert "none of 2 combinations" in capsys.readouterr().err


def test_mistakes_are_one_line(moons, capsys):
    says = {
        "interval: given '1-2-3'": ["--guidance", "2", "--interval", "1-2-3"],
        "metric: given 'fod'": ["--metric=fod"],
        "did you mean fid?": ["--metric=fod"],
        "sampler: given 'hoin'": ["--sampler", "heun", "hoin"],
        "ema: given 0.7": ["--ema", "0.7"],
        "is unknown": ["--reference=nowhere"],
    }
    for words, argv in says.items():
        capsys.readouterr()
        assert cli.main(["sweep", str(moons), "--n=20", *argv]) == 2, argv
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    assert not list(moons.glob("eval/*"))


def test_intervals_are_read():
    assert interval_of("all") is None
    assert interval_of("0.2-0.75") == (0.2, 0.75)
