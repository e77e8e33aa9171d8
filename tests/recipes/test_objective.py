"""docs/contributing/objective.md, executed: a new objective is one file and one line."""

import os

import numpy as np
import pytest
import torch

from genkit.cli.main import main
from genkit.config import from_dict, load_yaml, to_yaml
from genkit.core import Batch, Draw
from genkit.core.links import set_link
from genkit.objectives import OBJECTIVES
from genkit.training.run import load_run
from genkit.training.settings import TrainSettings
from tests.recipes.objective import MeanFlow
from tests.support import objectives as contract
from tests.support.recipes import TINY, page_shows
from tests.support.runs import saved_tensors


@pytest.fixture(autouse=True)
def _mean_flow(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "mean-flow", MeanFlow)


def train(folder, *args):
    assert main(["train", *TINY, "--objective=mean-flow", "--ema", "0.9", "0.99", f"--out={folder}", *args]) == 0
    return (folder / "latest").resolve()


def test_the_page_shows_this_recipe():
    page_shows("objective")


def test_loss_does_not_depend_on_how_the_batch_is_cut():
    contract.check_loss_does_not_depend_on_how_the_batch_is_cut(MeanFlow())


def test_resume_is_bit_identical(tmp_path):
    whole = train(tmp_path / "a", "--steps=8")
    half = train(tmp_path / "b", "--steps=8", "--save-every=4")
    set_link(half / "latest", "checkpoints/step-0000004")
    os.rename(half / "checkpoints" / "step-0000008", half / "gone")
    assert main(["train", "--resume", str(half)]) == 0
    a, b = saved_tensors(whole), saved_tensors(half)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_micro_batches_change_nothing(tmp_path):
    whole, cut = saved_tensors(train(tmp_path / "a")), saved_tensors(train(tmp_path / "b", "--micro-batch=3"))
    assert all(torch.allclose(whole[k], cut[k], atol=1e-5) for k in whole if k.startswith("net"))


def test_it_draws_and_refuses_samplers(tmp_path, capsys):
    run = train(tmp_path)
    out = tmp_path / "points.npz"
    command = ["sample", str(run), "--n=8", "--format=npz", f"--out={out}"]
    assert main(command) == 0
    with np.load(out) as arrays:
        assert np.isfinite(arrays["arr_0"]).all()
    assert main([*command, "--sampler=heun"]) == 2
    assert "draws in one" in capsys.readouterr().err


def test_its_settings_survive_yaml(tmp_path):
    config = TrainSettings(objective=MeanFlow(same=0.5))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_dict(TrainSettings, load_yaml(tmp_path / "config.yaml")) == config


def test_from_outside_the_package(tmp_path, monkeypatch):
    monkeypatch.delitem(OBJECTIVES, "mean-flow")
    args = [*TINY, "--objective=tests.recipes.objective:MeanFlow", "--objective.same=0.5", f"--out={tmp_path}"]
    assert main(["train", *args]) == 0
    assert load_run(tmp_path / "latest").objective == MeanFlow(same=0.5)


def test_the_exact_average_velocity_is_stationary_and_draws_exact_samples():
    """For normal data the flow is linear, ``x_r = mu_r + (s_r / s_t) (x_t - mu_t)``, and ``u = (x_t - x_r) / (t - r)``.

    At this u the gradient of the loss is zero along any function of (x, t, r), to within its standard error.
    """
    mean, std, n = 2.0, 0.5, 60_000

    def moments(t):
        return (1 - t) * mean, ((1 - t) ** 2 * std**2 + t**2).sqrt()

    def exact(x, label, cond, factor=1.0):
        t, span = 100 * label[:, None], cond["span"][:, None].clamp(min=1e-6)
        (mu_t, s_t), (mu_r, s_r) = moments(t), moments(t - span)
        return factor * (x - mu_r - s_r / s_t * (x - mu_t)) / span

    def slope(factor):
        probe = torch.zeros(3, dtype=torch.float64, requires_grad=True)

        def net(x, label, cond):
            directions = torch.cat([torch.tanh(x), 100 * label[:, None] + 0 * x, cond["span"][:, None] + 0 * x], 1)
            return exact(x, label, cond, factor) + (directions * probe).sum(1, keepdim=True)

        draw = Draw((3,), 0, n)
        batch = Batch(mean + std * draw.normal(1).double(), draw=draw)
        loss = MeanFlow(same=0.3).loss("match", {"net": net}, batch).per_sample
        parts = [torch.autograd.grad(p.mean(), probe, retain_graph=True)[0] for p in loss.split(n // 30)]
        return (torch.stack(parts).mean(0) / (torch.stack(parts).std(0) / 30**0.5)).abs().max()

    assert float(slope(1.0)) < 5
    assert float(slope(0.8)) > 7
    z = torch.randn(100, 1, dtype=torch.float64)
    x = MeanFlow().generator({"net": exact})(z, {})
    torch.testing.assert_close(x, mean + std * z)
