"""genkit bench few-step: rows of equal budget, resumable; an ensemble whose members see a second time."""

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import few_step
from benchmarks.ensemble import EnsembleMLP
from genkit.cli.main import main
from genkit.diffusion.flow_map import SPAN
from genkit.evaluation.metrics import wasserstein2

QUICK = ["bench", "few-step", "--only", "plane", "--seeds", "2", "--seconds", "0.05"]


def test_rows_are_measured_once_and_each_way_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(few_step, "NUM_TEST", 64)
    monkeypatch.setattr(few_step, "NUM_PAIRS", 128)
    monkeypatch.setattr(few_step, "TIMED", 3)
    out = tmp_path / "few.json"
    assert main([*QUICK, "--ways", "flow", "improved", "drift", "reflow", "--out", str(out)]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert cells.keys() == {f"plane/{way}" for way in ("real", "flow", "improved", "drift", "reflow")}
    for way, steps in (("flow", 4), ("improved", 4), ("drift", 1), ("reflow", 1)):
        values = cells[f"plane/{way}"]["values"]["W2"]
        assert list(values) == ["1", "2", "4", "8"][:steps]
        assert all(len(v) == 2 and 0 < v[0] != v[1] for v in values.values())
    assert cells["plane/reflow"]["steps"][0] >= 3 * few_step.TIMED  # three trainings
    monkeypatch.setattr(few_step, "measure", lambda *a: pytest.fail("measured again"))
    assert main([*QUICK, "--ways", "improved", "--out", str(out)]) == 0
    assert "eight Gaussians, W2" in capsys.readouterr().out
    assert main([*QUICK[:-1], "3", "--ways", "improved", "--out", str(out)]) == 2
    assert "measured with seconds 0.05" in capsys.readouterr().err


def test_a_budget_is_a_number_of_steps(monkeypatch):
    """Steps are timed first: three times the seconds are three times the steps."""
    clock = iter(range(1000))
    monkeypatch.setattr(few_step.time, "process_time", lambda: next(clock))
    trained = []
    monkeypatch.setattr(few_step, "train", lambda objective, net, draw, *, steps, **options: trained.append(steps))
    for seconds in (10.0, 30.0):
        trainer = few_step.Trainer(few_step.plane(2), seconds, 0, 1.0)
        trainer.fit(lambda steps: few_step.make_objective("improved", steps, 1.0), torch.nn.Identity(), lambda n: None)
        assert trainer.steps == trained[-1] == 20 * seconds
        assert trainer.used == 1


def test_a_member_of_an_ensemble_sees_its_own_numbers():
    net = EnsembleMLP(2, 2, 8, 2, F.silu, (SPAN,))
    x, t, span = torch.randn(6, 2), torch.rand(6), torch.rand(6)
    before = net(x, t, {SPAN: span})
    moved = span.clone()
    moved[4] += 0.5
    after = net(x, t, {SPAN: moved})
    changed = (after != before).any(1)
    assert changed.tolist() == [False] * 4 + [True, False]


def test_the_ring_is_eight_gaussians():
    x = few_step.draw_ring(4000, 3)
    assert float(x.norm(dim=1).mean()) == pytest.approx(2, abs=0.02)
    assert few_step.real_values("plane", 1)["values"]["W2"]["1"][0] > 0.1
    assert wasserstein2(x[:500], x[:500]) == 0


def test_a_budget_is_above_zero(capsys):
    assert main([*QUICK[:-1], "0"]) == 2
    assert "seconds: given 0.0; allowed above 0" in capsys.readouterr().err
