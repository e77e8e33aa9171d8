"""docs/contributing/metric.md, executed: a new metric is one file and one line."""

import json
import math

import numpy as np
import pytest
import torch

from genkit.cli.main import main
from genkit.evaluation.metrics import METRICS
from tests.recipes.metric import ENTRY, energy_distance
from tests.support import metrics as contract
from tests.support.recipes import page_shows


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The line that the page asks for."""
    monkeypatch.setitem(METRICS, "energy", ENTRY)


def test_the_page_shows_this_recipe():
    page_shows("metric")


def test_it_keeps_the_contract():
    contract.check_all("energy")


def test_it_has_no_bias_and_its_interval_holds_the_truth():
    """On the line, N(1, 1) against N(0, 1): ``E|N(m, 2)|`` has a closed form."""
    m, s = 1.0, math.sqrt(2)
    mean_distance = s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / (2 * s**2)) + m * math.erf(m / (s * math.sqrt(2)))
    truth = 2 * mean_distance - 2 * 2 / math.sqrt(math.pi)
    estimates = []
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        estimates.append(energy_distance(m + torch.randn(80, 1, generator=g), torch.randn(120, 1, generator=g)))
    values = np.array([e.value for e in estimates])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(len(values))
    assert np.mean([e.low < truth < e.high for e in estimates]) > 0.9


def test_eval_sweep_and_report_know_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    tiny = ["--data=moons", "--data.n=200", "--backbone.width=16", "--steps=4", "--batch=8", "--workers=0",
            "--no-tensorboard", "--device=cpu", "--sample-every=0"]  # fmt: skip
    assert main(["train", *tiny, f"--out={tmp_path}"]) == 0
    run = str(tmp_path / "latest")
    capsys.readouterr()
    assert main(["eval", run, "--metrics=energy,w2", "--n=40", "--steps=2", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["energy"]["low"] < metrics["energy"]["value"] < metrics["energy"]["high"]
    sweep = ["sweep", run, "--metric=energy", "--n=20", "--confirm-n=20", "--steps", "1", "2", "--json"]
    assert main(sweep) == 0
    assert [point["energy"] for point in json.loads(capsys.readouterr().out)["points"]]
    assert main(["report", run, f"--out={tmp_path}/report.html"]) == 0
    assert "energy ↓" in (tmp_path / "report.html").read_text()
    capsys.readouterr()
    assert main(["eval", run, "--metrics=enrgy"]) == 2
    assert "did you mean energy?" in capsys.readouterr().err
