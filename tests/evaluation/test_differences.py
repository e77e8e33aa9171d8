"""`genkit diff`: what differs, nothing else, and only numbers that `genkit eval --compare` would compare."""

import json

import pytest

from genkit import diff_runs
from genkit.cli import main as cli
from genkit.evaluation import Card, compare
from genkit.evaluation.best import find_best
from genkit.evaluation.differences import differing
from genkit.evaluation.metrics import Estimate, metric_direction
from tests.support.evaluation import refusal, train

MOONS = ["--data=moons", "--data.n=100", "--backbone.width=8", "--steps=2"]
EVAL = ["--n=40", "--metrics=w2,mmd"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two runs that differ in what ``CHANGES`` says, each with a card of the same kind, and one with another."""
    out = tmp_path_factory.mktemp("diff") / "runs"
    a = train(out, *MOONS)
    b = train(out, *MOONS, "--lr=5e-4", "--objective.path=cosine", "--data.noise=0.2", "--backbone.width=16")
    for run in (a, b):
        assert cli.main(["eval", str(run), *EVAL, "--steps=2", "--reference=moons"]) == 0
    assert cli.main(["eval", str(b), *EVAL, "--steps=3", "--reference=moons"]) == 0
    return a, b


def test_only_what_differs(pair):
    result = diff_runs(*pair)
    assert dict(result.settings) == {
        "lr": (0.001, 0.0005),
        "objective.path.name": ("linear", "cosine"),
        "data.noise": (0.05, 0.2),
        "backbone.width": (8, 16),
    }
    assert "sha256" in result.data
    assert "n" not in result.data
    assert result.parameters["all"][0] < result.parameters["all"][1]
    assert set(result.progress) == {"denoise/loss"}
    assert result.environment == {}


def test_a_run_does_not_differ_from_itself(pair):
    result = diff_runs(pair[0], pair[0])
    assert not any([result.settings, result.data, result.parameters, result.environment, result.progress])
    assert all(row.estimates[0] == row.estimates[1] for row in result.metrics)


def test_the_metrics_are_those_of_eval_compare(pair):
    result = diff_runs(*pair)
    by_steps = [{card.settings["steps"]: card for card in run.cards} for run in result.runs]
    expected = compare(by_steps[0][2], by_steps[1][2])
    assert [(row.metric, *row.estimates) for row in result.metrics] == [(c.metric, c.a, c.b) for c in expected]
    for row, comparison in zip(result.metrics, expected, strict=True):
        assert row.best is not None
        marks = {True: {"best, tied", "tied"}, False: {"best", ""}, None: {"best, no interval", ""}}[comparison.overlap]
        assert {row.best.mark(0), row.best.mark(1)} == marks


def test_the_newest_of_several_comparable_cards_counts(pair, tmp_path):
    run = diff_runs(*pair).runs[0]
    card = run.cards[0]
    newer = Card({"w2": Estimate(0.125)}, {**card.settings, "step": 1000})
    path = newer.save(run.path / "eval" / "newer.json")
    try:
        row = next(row for row in diff_runs(*pair).metrics if row.metric == "w2")
        assert row.estimates[0] == Estimate(0.125)
    finally:
        path.unlink()


def test_cards_that_do_not_compare_are_said_not_to(pair, tmp_path, capsys):
    other = train(tmp_path, *MOONS)
    assert cli.main(["eval", str(other), "--n=20", "--steps=2", "--metrics=w2", "--reference=moons"]) == 0
    result = diff_runs(pair[0], other)
    assert result.metrics == ()
    assert "no card is comparable" in result.incomparable[0]
    assert "n: 40 and 20" in result.incomparable[0]
    capsys.readouterr()
    assert cli.main(["diff", str(pair[0]), str(other)]) == 0
    assert "note: " in capsys.readouterr().out


def test_the_command_prints_the_library_result(pair, capsys):
    capsys.readouterr()
    assert cli.main(["diff", *map(str, pair), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(diff_runs(*pair).to_dict()))
    assert cli.main(["diff", *map(str, pair)]) == 0
    out = capsys.readouterr().out
    for text in ("backbone.width", "cosine", "code and machine", "the same", "2 steps, guidance 1; 40 samples"):
        assert text in out
    assert "seed" not in out


def test_three_runs(pair):
    result = diff_runs(pair[0], pair[1], pair[0])
    assert result.settings["lr"] == (0.001, 0.0005, 0.001)
    assert all(len(row.estimates) == 3 for row in result.metrics)


def test_mistakes(pair, tmp_path, capsys):
    assert "needs two or more" in refusal(capsys, "diff", pair[0])
    assert "does not exist" in refusal(capsys, "diff", pair[0], tmp_path / "none")
    (tmp_path / "config.yaml").write_text("")
    assert "config.yaml: is empty" in refusal(capsys, "diff", pair[0], tmp_path)


def test_an_absent_setting_is_not_one_that_is_none():
    assert differing([{"a": None, "b": 1}, {"b": 1}]) == {"a": (None, None)}
    assert differing([{"a": [1]}, {"a": [1]}]) == {}


@pytest.mark.parametrize(
    ("metric", "estimates", "marks"),
    [
        ("fid", [(3, 2, 4), (2, 1, 2.5), (9, 8, 10)], ["tied", "best, tied", ""]),
        ("recall", [(0.3, 0.2, 0.4), (0.9, 0.8, 1.0)], ["", "best"]),
        ("fid", [(3,), (2, 1, 2.5)], ["no interval", "best"]),
        ("fid", [(3, 2, 4), (2,)], ["", "best, no interval"]),
        ("fid", [(2, 1, 3), (2, 1, 3)], ["best, tied", "tied"]),
        ("fid", [(3, 2, 4), None], None),
        ("unheard_of", [(3, 2, 4), (1, 0, 2)], None),
    ],
)
def test_the_best_respects_intervals(metric, estimates, marks):
    best = find_best(metric_direction(metric), [e and Estimate(*e) for e in estimates])
    assert (best and [best.mark(i) for i in range(len(estimates))]) == marks
