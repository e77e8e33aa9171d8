"""genkit bench few-step: rows of equal budget, resumable; an ensemble whose members see a second time."""

import json
import struct
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import few_step, few_step_data
from benchmarks.ensemble import EnsembleMLP, train
from genkit.cli.main import main
from genkit.data.standard_images import FashionMnist
from genkit.diffusion.flow_map import SPAN
from genkit.evaluation.metrics import wasserstein2
from genkit.evaluation.metrics.features import Classifier
from genkit.objectives import Flow
from genkit.training.loop import Diverged
from tools import results

QUICK = ["bench", "few-step", "--only", "plane", "--seeds", "2", "--seconds", "0.05"]


def test_rows_are_measured_once_and_each_way_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(few_step_data, "NUM_TEST", 64)
    monkeypatch.setattr(few_step_data, "NUM_PAIRS", 128)
    monkeypatch.setattr(few_step, "TIMED", 3)
    out = tmp_path / "few.json"
    steps = {
        "flow": 4,
        "improved": 4,
        "drift": 1,
        "gan": 1,
        "reflow": 4,
        "distilled": 1,
        "progressive": 4,
        "dmd-gan": 1,
    }
    assert main([*QUICK, "--ways", *steps, "--out", str(out)]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert cells.keys() == {f"plane/{way}" for way in ("real", *steps)}
    for way, count in steps.items():
        values = cells[f"plane/{way}"]["values"]["W2"]
        assert list(values) == ["1", "2", "4", "8"][:count]
        assert all(len(v) == 2 and 0 < v[0] != v[1] for v in values.values())
    assert cells["plane/distilled"]["steps"][0] >= 3 * few_step.TIMED  # three trainings
    assert cells["plane/reflow"]["steps"][0] >= 2 * few_step.TIMED
    assert cells["plane/progressive"]["steps"][0] >= 5 * few_step.TIMED  # a flow and four rounds
    assert len(cells["plane/gan"]["steps"]) == 2  # one seed after the other
    monkeypatch.setattr(few_step, "measure", lambda *a: pytest.fail("measured again"))
    picture = tmp_path / "few.png"
    assert main([*QUICK, "--ways", "improved", "--out", str(out), "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    assert "eight Gaussians, W2" in capsys.readouterr().out
    assert main([*QUICK[:-1], "3", "--ways", "improved", "--out", str(out)]) == 2
    assert "measured with seconds 0.05, not 3.0" in capsys.readouterr().err


def test_a_seed_that_diverges_is_counted_and_the_next_row_is_measured(tmp_path, monkeypatch, capsys):
    """The drifting models of all seeds together diverge, and one of two GANs."""
    monkeypatch.setattr(few_step_data, "NUM_TEST", 8)

    def generators(trainer, way, counts):
        if way == "drift" or trainer.setting.seeds[0] == 1:
            raise Diverged("step 3: no finite gradient")
        return {1: lambda z, cond, noise: z}

    monkeypatch.setattr(few_step, "generators", generators)
    out, picture = tmp_path / "few.json", tmp_path / "few.png"
    assert main([*QUICK, "--ways", "drift", "gan", "--out", str(out), "--picture", str(picture)]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert cells["plane/drift"] == {"budget": 0.05, "values": {}, "cpu_seconds": [], "steps": [], "diverged": [0]}
    assert cells["plane/gan"]["diverged"] == [1]
    assert len(cells["plane/gan"]["values"]["W2"]["1"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("diverged") == 2
    monkeypatch.setattr(results, "load", lambda name: {"cells": cells})
    drift, gan = results.few_step_rows("plane", "W2", 3, ["1"])
    assert drift[:2] == ["drifting (1 of 1 seeds diverged)", ""]
    assert gan[0] == "GAN (1 of 2 seeds diverged)"
    assert float(gan[1]) > 0


def test_a_budget_is_a_number_of_steps(monkeypatch):
    """Steps are timed first: three times the seconds are three times the steps."""
    clock = iter(range(1000))
    monkeypatch.setattr(few_step.time, "process_time", lambda: next(clock))
    trained, setting = [], few_step_data.plane(2)
    make = lambda steps: few_step.TRAININGS["improved"].make(setting, steps, 1.0)  # noqa: E731
    monkeypatch.setattr(few_step, "train", lambda objective, net, draw, *, steps, **options: trained.append(steps))
    for seconds in (10.0, 30.0):
        trainer = few_step.Trainer(setting, seconds, 0, 1.0)
        trainer.fit(make, {"net": torch.nn.Identity()}, lambda n: None)
        assert trainer.steps == trained[-1] == few_step.TIMED * seconds
        assert trainer.used == 1


def test_drawing_pairs_is_part_of_the_budget(monkeypatch):
    monkeypatch.setattr(few_step_data, "NUM_PAIRS", 8)
    clock, trained = iter(range(1000)), []
    monkeypatch.setattr(few_step.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(few_step, "train", lambda objective, net, draw, *, steps, **options: trained.append(steps))
    setting, flow = few_step_data.plane(1), Flow()
    trainer, nets = few_step.Trainer(setting, 10.0, 0, 1.0), setting.make_nets(0, flow)
    draw = few_step.draw_pairs(trainer, flow, nets)
    assert trainer.used == 1
    trainer.fit(lambda steps: flow, nets, draw)
    assert trained[-1] == few_step.TIMED * 9


def test_students_start_from_their_teacher_and_share_its_budget(monkeypatch):
    """Half of the steps are the flow's; each round of progressive distillation starts from the one before."""
    clock, trained = [0.0], []

    def train_a_little(objective, nets, draw, *, steps, **options):
        clock[0] += steps / few_step.TIMED  # a second for as many
        if steps > few_step.TIMED:
            start = {k: net.state_dict() for k, net in nets.items()}
            trained.append((objective, steps, {k: {n: v.clone() for n, v in w.items()} for k, w in start.items()}))
            with torch.no_grad():
                [p.add_(1) for p in nets["net"].parameters()]

    monkeypatch.setattr(few_step.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(few_step, "train", train_a_little)
    for way, students in (("progressive", 4), ("dmd", 1), ("dmd-gan", 1)):
        trained.clear()
        found = few_step.generators(few_step.Trainer(few_step_data.plane(2), 100.0, 0, 1.0), way, few_step.STEPS)
        (flow, first, before), *rest = trained
        assert isinstance(flow, Flow)
        assert [len(rest), len(found)] == [students, students]
        assert sum(steps for _, steps, _ in rest) == pytest.approx(first, rel=0.1)
        for objective, _, start in rest:
            weights = {k: v + 1 for k, v in before["net"].items()}
            for name in ("net", "teacher", *objective.starts_from):
                if name in start and objective.starts_from.get(name, "net"):
                    assert all(torch.equal(start[name][k], v) for k, v in weights.items()), (way, name)
            before = start
        if way == "progressive":
            assert [(o.teacher_steps, o.steps) for o, *_ in rest] == [(16, 8), (8, 4), (4, 2), (2, 1)]
            assert list(found) == list(few_step.STEPS)
    assert rest[0][0].gan_weight == few_step.GAN_WEIGHT


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
    x = few_step_data.draw_ring(4000, 3)
    assert float(x.norm(dim=1).mean()) == pytest.approx(2, abs=0.02)
    assert few_step_data.real_plane(1, None)["W2"][0] > 0.1
    assert wasserstein2(x[:500], x[:500]) == 0


def test_a_budget_is_above_zero(capsys):
    assert main([*QUICK[:-1], "0"]) == 2
    assert "seconds: given 0.0; allowed above 0" in capsys.readouterr().err


def test_a_gan_is_trained_for_one_seed_after_the_other():
    """One setting for each seed, with its own networks and test points; all other rows train the seeds at once."""
    part = few_step.PARTS["plane"]
    (together,) = part.settings(None, 3, "shortcut")
    alone = part.settings(None, 3, "gan")
    assert [s.batch for s in (together, *alone)] == [768, 256, 256, 256]
    assert len({float(s.test(0, None)[0].sum()) for s in alone}) == 3
    assert len(together.score(together.test(0, None)[0])["W2"]) == 3
    nets = [s.make_nets(s.seeds[0], s.gan)["generator"] for s in alone]
    z = torch.randn(4, 2)
    assert len({float(net(z).detach().sum()) for net in nets}) == 3
    assert nets[0](z).shape == (4, 2)


@pytest.mark.parametrize("way", few_step.UNGUIDED)
def test_every_way_has_a_row_on_images(monkeypatch, way):
    """Networks, noise and rows fit each other on the digits; a sample of each is finite."""
    monkeypatch.setattr(few_step_data, "NUM_TEST", 20)
    monkeypatch.setattr(few_step_data, "NUM_PAIRS", 40)
    monkeypatch.setattr(few_step, "TIMED", 1)
    part = few_step.PARTS["digits"]
    cell = few_step.measure(part.settings(None, 1, way), way, 0.01, part)
    assert all(0 < v < 1e6 for v in cell["values"]["Fréchet"]["1"])
    assert (list(cell["values"]["accuracy"]) == ["1"]) == (way in ("drift", "gan", "distilled", "dmd", "dmd-gan"))


def test_guidance_at_two_passes_and_at_one_start_from_the_same_noise(monkeypatch):
    monkeypatch.setattr(few_step_data, "NUM_TEST", 20)
    monkeypatch.setattr(few_step, "TIMED", 1)
    part = few_step.PARTS["guided"]
    assert part.ways == ("one-pass", "two-passes")
    for way in part.ways:
        cell = few_step.measure(part.settings(None, 1, way), way, 0.01, part)
        assert list(cell["values"]["Fréchet"]) == ["1", "2", "4", "8"]


def test_as_many_pictures_are_measured_as_are_asked_for(monkeypatch):
    """Of each model, and of the real digits drawn with replacement; more of these are nearer to all of them."""
    (setting,) = few_step.PARTS["digits"].settings(None, 1, "shortcut", 70)
    z, cond = setting.test(0, None)
    assert z.shape == (70, 1, 8, 8) == setting.noise(0)((1, 8, 8)).shape
    assert cond["label"].tolist() == [i % 10 for i in range(70)]
    monkeypatch.setattr(few_step_data, "NUM_DRAWS", 2)
    few, many = (few_step_data.resampled_digits(n)["Fréchet"] for n in (100, 10_000))
    assert len(few) == 2
    assert min(few) > max(many) == pytest.approx(few_step_data.real_digits(1, None)["Fréchet"][0], abs=0.1)


def test_images_of_fashion_mnist_are_predicted_by_every_flow(monkeypatch):
    """The noise of 784 pixels does not pass through 256 features: all rows that may predict either predict the data;
    the consistency rule, which refuses that, predicts v."""
    setting = few_step_data.replace(few_step_data.plane(1), prediction="x0")
    for way in ("flow", *few_step.RULES, *few_step.GUIDED):
        expected = "v" if way == "consistency" else "x0"
        assert few_step.TRAININGS[way].make(setting, 10, None).prediction == expected
    seen = []
    monkeypatch.setattr(few_step, "train", lambda objective, nets, draw, **options: seen.append(objective.prediction))
    monkeypatch.setattr(few_step_data, "NUM_PAIRS", 8)
    few_step.generators(few_step.Trainer(setting, 1.0, 0, 1.0), "distilled", (1,))
    assert set(seen) == {"x0"}
    assert len(seen) == 9  # three of each training: the first steps, the timed ones, the budget


@pytest.mark.parametrize("way", ["alpha", "consistency"])
def test_curricula_see_how_far_training_is(monkeypatch, way):
    """A batch without its step would stand for the end of training."""
    setting, seen = few_step_data.plane(1), []
    objective = few_step.TRAININGS[way].make(setting, 30, 1.0)
    error = type(objective.rule).error
    monkeypatch.setattr(
        type(objective.rule), "error", lambda rule, u, jumps, step: (seen.append(step), error(rule, u, jumps, step))[1]
    )
    train(objective, setting.make_nets(0, objective), setting.draw, steps=4, batch=8, lr=1e-3)
    assert seen == [0, 1, 2, 3]


def test_fashion_is_measured_in_the_features_of_a_classifier(tmp_path, monkeypatch):
    """On 60 pictures in torchvision's layout; held-out ones are the reference, and training ones the row "real"."""
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(few_step_data, "Classifier", partial(Classifier, steps=2))
    monkeypatch.setattr(few_step_data, "NUM_TEST", 20)
    monkeypatch.setattr(few_step, "TIMED", 1)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 60), ("t10k", 40)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, n, 28, 28) + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, n) + bytes(i % 10 for i in range(n)))
    part = few_step.PARTS["fashion"]
    cell = few_step.measure(part.settings(tmp_path, 1, "shortcut"), "shortcut", 0.01, part)
    assert list(cell["values"]["Fréchet"]) == ["1", "2", "4", "8", "20"]
    assert all(0 <= v[0] <= 1 for v in cell["values"]["accuracy"].values())
    scores = few_step_data.FashionScores(tmp_path)
    held_out = few_step_data.first_rows(FashionMnist(root=str(tmp_path)).load("test"), 40).x
    assert scores.distance(held_out) < 1e-4 < part.real(1, tmp_path)["Fréchet"][0] < cell["values"]["Fréchet"]["1"][0]
