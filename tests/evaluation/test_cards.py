"""Cards: what they contain, how they are compared, and what is never written."""

import hashlib
import json

import pytest

from genkit.cli import main as cli
from genkit.core.tensors import sha256
from genkit.evaluation import Card, Estimate, compare, evaluate
from genkit.evaluation.cards import MetricComparison, parse_card, require_finite
from genkit.training.run import load_run
from tests.support.evaluation import refusal, train, values


def test_a_card_has_everything_that_the_number_depends_on(moons):
    before = set(moons.glob("eval/*"))
    argv = ["eval", str(moons), "--metrics=fid,w2", "--n=40", "--steps=3", "--guidance=2", "--ema=0.999"]
    assert cli.main(argv) == 0
    (path,) = set(moons.glob("eval/*")) - before
    assert path.name.startswith("0000008-heun3-g2-n40-")
    s = json.loads(path.read_text())["settings"]
    run = load_run(moons)
    assert s["weights_sha256"] == sha256(run.directory / s["weights"])
    expected = {"ema": "0.999", "step": 8, "sampler": "heun", "grid": "uniform", "guidance": 2, "seed": 0}
    assert {key: s[key] for key in expected} == expected
    assert (s["nfe"], s["passes"]) == (5, 10)
    assert s["reference"]["sha256"] == hash_data(run.config.data.load("train"))
    assert s["features"]["name"] == "raw"
    assert {"torch", "genkit", "numpy"} <= s["versions"].keys()
    assert s["seconds"] > 0
    assert s["effective_batch"] == 3, "16 blocks, so that no rank idles"
    assert "too high" in s["notes"][0]


def test_a_card_of_a_run_with_an_adapter_is_not_that_of_the_run(moons, tmp_path):
    """They had one file, and an interrupted evaluation of one went on with the other."""
    lora = train(tmp_path, "--data=moons", "--data.n=400", "--backbone.width=16", "--steps=20", "--lr=0.1",
                 f"--init={moons}", "--lora.rank=2")  # fmt: skip
    runs = [load_run(moons), load_run(moons, adapter=lora), load_run(moons, adapter=lora, adapter_scale=0.5),
            load_run(lora), load_run(lora, adapter_scale=0.5)]  # fmt: skip
    cards = [evaluate(run, n=40, steps=2, metrics="w2") for run in runs]
    assert len({card.path for card in cards}) == len({card.settings["weights_sha256"] for card in cards}) == 5
    assert [card.settings.get("adapter", "")[-3:] for card in cards[::3]] == ["", ""]
    assert "at 0.5" in cards[2].settings["adapter"]
    assert cards[1].metrics == cards[3].metrics != cards[0].metrics
    assert compare(cards[0], cards[1])


def hash_data(data):
    digest = hashlib.sha256(str(((2,), len(data))).encode())
    digest.update(data.x.numpy().tobytes())
    digest.update(data.cond["label"].numpy().tobytes())
    return digest.hexdigest()


def test_compared_cards_may_differ_in_the_weights_only(moons, tmp_path, capsys):
    argv = ["eval", str(moons), "--metrics=w2,mmd", "--n=40", "--steps=2"]
    for name, extra in {"a": ["--step=4"], "b": [], "more": ["--n=50"], "guided": ["--guidance=2"]}.items():
        assert cli.main([*argv, *extra, f"--out={tmp_path}/{name}.json"]) == 0
    capsys.readouterr()
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert cli.main(["eval", "--compare", a, b, "--json"]) == 0
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)["metrics"]}
    assert rows["w2"]["a"]["value"] == values(Card.load(a))["w2"]
    assert rows["w2"]["overlap"] is None
    assert rows["mmd"]["overlap"] is True
    assert cli.main(["eval", "--compare", a, b]) == 0
    assert "overlap" in capsys.readouterr().out
    for option in ("--metrics=kid", f"--out={tmp_path}/c.json", "--save-stats=stats:x", "--n=7", "--features=raw"):
        line = refusal(capsys, "eval", "--compare", a, b, option)  # which would do nothing
        assert line.split("=")[0].startswith(f"genkit: {option[2:].partition('=')[0].replace('-', '_')}: given with")
    line = refusal(capsys, "eval", "--compare", a, tmp_path / "more.json")
    assert "n: 40 and 50" in line
    assert "differ in more than the weights" in line
    assert "guidance: 1.0 and 2.0" in refusal(capsys, "eval", "--compare", a, tmp_path / "guided.json")
    assert "is not a card" in refusal(capsys, "eval", "--compare", a, moons / "config.yaml")
    assert "needs two" in refusal(capsys, "eval", "--compare", a)


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [((1, 0.5, 1.5), (2, 1.4, 2.6), True), ((1, 0.5, 1.5), (2, 1.6, 2.4), False), ((2, 1.6, 2.4), (1, 0.5, 1.5), False),
     ((1, None, None), (2, 1.4, 2.6), None)],
)  # fmt: skip
def test_intervals_overlap_or_do_not(a, b, overlap):
    assert MetricComparison("fid", Estimate(*a), Estimate(*b)).overlap is overlap


def test_a_number_that_is_not_finite_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="kid: is nan"):
        require_finite({"kid": Estimate(float("nan"))})
    assert require_finite({"kid": Estimate(1.0, float("nan"), 2.0)}) == {"kid": Estimate(1.0, None, 2.0)}
    with pytest.raises(ValueError, match="JSON"):
        Card({"kid": Estimate(float("inf"))}, {}).save(tmp_path / "card.json")
    assert not (tmp_path / "card.json").exists()


def test_a_card_needs_a_place(tmp_path):
    card = Card({"kid": Estimate(1.0)}, {"n": 10})
    with pytest.raises(ValueError, match="name a file"):
        card.save()
    assert Card.load(card.save(tmp_path / "card.json")) == card


@pytest.mark.parametrize("settings", [{}, {"sampler": "heun"}, {"features": {"name": "raw"}, "n": 3, "notes": ["few"]}])
def test_any_card_has_a_readable_repr(settings):
    card = parse_card(json.dumps({"metrics": {"fid": {"value": 1.25, "low": 1, "high": 2}}, "settings": settings}))
    assert repr(card).startswith(f"{card.title('fid')}  1.25 [1, 2]\n")
