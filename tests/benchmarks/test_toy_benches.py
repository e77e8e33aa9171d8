"""The small benchmarks: genkit bench toy, prediction and reflow."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import make_moons, make_s_curve

from benchmarks import prediction, reflow, toy
from benchmarks.ensemble import EnsembleMLP, PerMember
from benchmarks.results import ResultsFile
from genkit.core import Batch
from genkit.diffusion.paths import Linear
from genkit.objectives.matching.couplings import Independent, OptimalTransport
from genkit.objectives.matching.flow import Flow


# ---------------------------------------------------------------------------------------------------------- ensemble
def test_members_of_an_ensemble_are_independent_mlps():
    net = EnsembleMLP(3, 2, 8, 2, F.selu)
    x, t = torch.randn(12, 2), torch.rand(12)
    out = net(x, t)
    for k in range(3):  # against torch's own layers
        h = torch.cat([x, t[:, None]], 1)[4 * k : 4 * k + 4]
        for i, (w, b) in enumerate(zip(net.weights, net.biases, strict=True)):
            h = F.linear(h, w[k].T, b[k, 0])
            h = F.selu(h) if i < 2 else h
        torch.testing.assert_close(out[4 * k : 4 * k + 4], h)
    out[4:8].square().sum().backward()
    for p in net.parameters():
        assert p.grad is not None
        assert p.grad[1].abs().sum() > 0
        assert p.grad[[0, 2]].abs().sum() == 0


def test_a_coupling_per_member_moves_no_source_to_another_member():
    x, x1, t = torch.randn(32, 2), torch.randn(32, 2), torch.rand(32)
    parts = [
        OptimalTransport()(Batch(a), b, Linear(), u) for a, b, u in zip(*(v.chunk(4) for v in (x, x1, t)), strict=True)
    ]
    results = PerMember(OptimalTransport(), 4)(Batch(x), x1, Linear(), t)
    torch.testing.assert_close(results[0], x)
    torch.testing.assert_close(results[1], torch.cat([b for _, b in parts]))
    assert not torch.equal(results[1], OptimalTransport()(Batch(x), x1, Linear(), t)[1])


def test_a_results_file_is_resumed_and_refuses_other_settings(tmp_path):
    out = tmp_path / "deep" / "r.json"
    ResultsFile(out, {"steps": 3, "dims": (1, 2)}, ["toy"]).add("a", {"w2": [1.0]}, np.ones(3))
    again = ResultsFile(out, {"steps": 3, "dims": (1, 2)}, ["toy"])
    assert set(again.cells) == {"a"}
    assert again.cells["a"] == {"w2": [1.0]}
    assert np.array_equal(again.arrays["a"], np.ones(3))
    with pytest.raises(ValueError, match="steps 3, not 4"):
        ResultsFile(out, {"steps": 4, "dims": (1, 2)}, ["toy"])
    out.write_text("{}")
    with pytest.raises(ValueError, match="no results file"):
        ResultsFile(out, {"steps": 3}, ["toy"])


# --------------------------------------------------------------------------------------------------------------- toy
def test_shapes_agree_with_scikit_learn():
    for ours, theirs in (
        (toy.HalfMoons(n=400, noise=0.0), 2 * make_moons(400)[0] - [1, 0]),
        (toy.SCurve(n=400, noise=0.0), 1.5 * make_s_curve(4000, random_state=0)[0][:, [0, 2]]),
    ):
        distance = torch.cdist(ours.load("test").x.double(), torch.from_numpy(theirs))
        assert distance.min(0).values.max() < 0.05
        assert distance.min(1).values.max() < 0.05
    ring = toy.Ring(n=800).load("test").x
    modes = ring.unflatten(0, (8, 100))
    torch.testing.assert_close(modes.mean(1).norm(dim=1), torch.full((8,), 5.0), atol=0.4, rtol=0)
    torch.testing.assert_close(modes.std(1), torch.ones(8, 2), atol=0.3, rtol=0)


def test_the_energy_of_a_constant_velocity():
    """It is the squared norm, and every trajectory is a straight line."""
    v = torch.tensor([3.0, -1.0])
    z = toy.sobol_normals(64, 0)
    torch.testing.assert_close(toy.sobol_normals(1024, 0).var(0), torch.ones(2), atol=0.01, rtol=0)
    x, energy, trajectory = toy.integrate(Flow(), lambda x, t, cond: v.expand_as(x), z, steps=10)  # type: ignore[arg-type]
    torch.testing.assert_close(x, z - v)
    torch.testing.assert_close(energy, torch.full((64,), 10.0))
    torch.testing.assert_close(trajectory[5], z - v / 2)


def test_optimal_transport_shortens_the_way():
    """After a full training the energies differ by about 3 : 1, and the shortest trajectory has 29.4."""
    column, energy = toy.COLUMNS["moons->8gaussians"], {}
    for name, coupling in toy.METHODS.items():
        values, trajectories = toy.measure(column, coupling, seeds=1, steps=200, test=256)
        energy[name] = values["energy"][0]
        assert trajectories.shape == (21, 128, 2)
    assert energy["OT-CFM"] < 0.75 * energy["I-CFM"]
    assert abs(energy["OT-CFM"] - toy.measure_limits(column, 256)["cost"]) < 12
    assert type(toy.METHODS["I-CFM"]) is Independent


def test_bench_toy_measures_a_cell_once(tmp_path, monkeypatch, capsys):
    argv = ["--seeds", "2", "--steps", "2", "--test", "64", "--only", "N->moons", "--out", str(tmp_path / "toy.json")]
    assert toy.main([*argv, "--picture", str(tmp_path / "toy.png")]) == 0
    record = json.loads((tmp_path / "toy.json").read_text())
    assert set(record["cells"]) == {"N->moons", "I-CFM N->moons", "OT-CFM N->moons"}
    assert len(record["cells"]["OT-CFM N->moons"]["npe"]) == 2
    assert record["settings"]["steps"] == 2
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    monkeypatch.setattr(toy, "measure", lambda *a: pytest.fail("measured again"))
    assert toy.main(argv) == 0
    assert "0.130±0.016" in capsys.readouterr().out  # the published number
    with pytest.raises(ValueError, match="given 'moon'; allowed: I-CFM"):
        toy.main(["--only", "moon"])
    with pytest.raises(ValueError, match="seeds: given 0"):
        toy.main(["--seeds", "0"])


# -------------------------------------------------------------------------------------------------------- prediction
def test_the_basis_is_orthonormal_and_the_path_keeps_some_data():
    up = prediction.plane_basis(16)
    torch.testing.assert_close(up @ up.T, torch.eye(2))
    assert torch.equal(up, prediction.plane_basis(16))
    path = prediction.BoundedPath()
    ends = torch.tensor([0.0, 1.0])
    assert path.alpha(ends).tolist() == pytest.approx([1, 0.05])
    assert path.sigma(ends).tolist() == [0, 1]


@pytest.fixture(scope="module")
def narrow():
    """Networks 32 wide: too narrow to carry 64 numbers of noise, wide enough for a plane."""
    return {
        (p, d): prediction.measure(p, d, seeds=1, steps=200, width=32, test=200, lr=3e-3)[0]
        for p in prediction.PREDICTIONS
        for d in (2, 64)
    }


def test_in_the_plane_all_predictions_work(narrow):
    for p in prediction.PREDICTIONS:
        assert narrow[p, 2]["w2"][0] < 1.0, p


def test_in_many_dimensions_only_x0_works(narrow):
    assert narrow["x0", 64]["w2"][0] < 0.7
    assert narrow["x0", 64]["off"][0] < 0.1
    for p in ("eps", "velocity"):
        assert narrow[p, 64]["off"][0] > 5, p


@pytest.mark.slow
def test_at_512_dimensions_only_x0_works():
    results = {p: prediction.measure(p, 512, seeds=1, steps=200)[0] for p in prediction.PREDICTIONS}
    assert results["x0"]["w2"][0] < 0.5
    assert results["x0"]["off"][0] < 0.5
    for p in ("eps", "velocity"):
        assert results[p]["off"][0] > 5, p


# ------------------------------------------------------------------------------------------------------------ reflow
def test_one_step_is_better_with_each_reflow():
    results = reflow.measure_plane(1, 200, test=400, pairs=2000)
    one = {row: values["one"][0] for row, values in results.items()}
    assert one["2-RF"] < 0.75 * one["1-RF"]
    assert one["3-RF distilled"] < 0.75 * one["1-RF"]
    assert results["3-RF"]["many"][0] < 0.75 * one["1-RF"]  # reflow keeps the distribution


def test_so_many_samples_of_the_digits_are_measured(monkeypatch):
    seen = []

    def draw(z, cond, noise=None):
        seen.append((len(z), len(cond["label"])))
        return z

    ladder = lambda net, rows, pairs, evaluate, **how: {"RF": {"one": evaluate(draw)}}  # noqa: E731
    monkeypatch.setattr(reflow, "train_ladder", ladder)
    rows = reflow.measure_digits(1, 1, samples=70)
    assert seen == [(70, 70)]
    assert set(rows) == {"RF", "real"}
