"""genkit bench guidance: the difference of the same seeds with Student's interval; measured once."""

import json
import math

import pytest

from benchmarks import guidance
from genkit.cli.main import main


def cell(two, one):
    values = {name: {"accuracy": v, "fid": -v} for name, v in zip(guidance.ARMS, (two, one), strict=True)}
    return {"values": {"2": values}}


def test_the_difference_is_that_of_the_same_seed():
    """Differences 1, 2 and 3: mean 2, and t(0.975, 2) = 4.3027 times 1 / sqrt(3)."""
    cells = [cell(0, 1), cell(10, 12), cell(-5, -2)]
    assert guidance.difference(cells, "2", "accuracy") == pytest.approx((2, 4.302653 / math.sqrt(3)))
    assert guidance.difference(cells, "2", "fid")[0] == pytest.approx(-2)
    mean, half = guidance.difference(cells[:1], "2", "accuracy")
    assert mean == 1
    assert math.isnan(half)


def test_seeds_are_measured_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guidance, "SAMPLES", 20)
    monkeypatch.setattr(guidance, "COMPARED", 4)
    monkeypatch.setattr(guidance, "STEPS", 2)
    monkeypatch.setitem(guidance.PARTS, "digits", guidance.Part({"name": "digits"}, {"name": "mlp", "width": 8}, 2, 1))
    out = tmp_path / "guidance.json"
    argv = ["bench", "guidance", "--only", "digits", "--seeds", "1", "--out", str(out)]
    assert main(argv) == 0
    measured = json.loads(out.read_text())["cells"]["digits/0"]
    assert set(measured["values"]) == {"1", "2", "4"}
    assert all(set(measured["values"][scale]) == set(guidance.ARMS) for scale in ("2", "4"))
    assert set(measured["missed"]) == {"2", "4"}
    monkeypatch.setattr(guidance, "measure", lambda *a: pytest.fail("measured again"))
    assert main(argv) == 0
    assert "digits, accuracy" in capsys.readouterr().out
    assert main([*argv, "--steps", "7"]) == 2
