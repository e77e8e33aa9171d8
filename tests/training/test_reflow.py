"""Reflow: the pairs of a model, a straighter flow trained on them, and distillation to one step."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.backbones import MLP
from genkit.cli.commands.reflow import main as reflow_command
from genkit.cli.commands.train import main as train_command
from genkit.core import Batch, Draw, Label, Spec
from genkit.data import DATA
from genkit.data.pairs import Pairs
from genkit.diffusion.samplers import Seeds, bind, uniform
from genkit.objectives import Flow
from genkit.objectives.matching.couplings import GivenPairs
from genkit.objectives.matching.distillation import Distillation
from genkit.training import reflow as module
from genkit.training.reflow import reflow
from genkit.training.run import load_run


def train(objective, draw, steps, nets=None):
    torch.manual_seed(0)
    nets = nets or objective.networks(MLP(width=64, depth=2), Spec((2,)))
    optimizer = torch.optim.Adam(nets["net"].parameters(), 2e-3)
    phase = objective.phases[0].name
    for i in range(steps):
        loss = objective.loss(phase, nets, replace(draw(i), draw=Draw((1, i), 0, 256))).per_sample.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return nets


def bend(flow, nets, z):
    """Excess of the path's energy over that of a straight line between the same ends; 0: straight."""
    states = [z]
    out = flow.generator(nets, bind("heun", uniform(30), callback=lambda i, x, p: states.append(x)))(z, {})
    energy = (torch.stack(states).diff(dim=0) ** 2).sum(-1).mean(1).sum() * 30
    return float(energy / ((out - z) ** 2).sum(1).mean()) - 1


def off(x):
    """Mean distance to the nearest of the eight centres."""
    angle = torch.arange(8) * torch.pi / 4
    return float(torch.cdist(x.detach(), 2**0.5 * torch.stack([angle.cos(), angle.sin()], 1)).amin(1).mean())


@pytest.mark.slow
def test_reflow_straightens_and_distillation_needs_one_step():
    """Liu et al. 2023, section 2.2, on 8 Gaussians: paths are straighter, and one Euler step ends closer."""
    data = DATA["8gaussians"](n=25_600).load("train").x
    rows = lambda x, i: x[torch.arange(256 * i, 256 * (i + 1)) % len(x)]  # noqa: E731
    flow, again = Flow(), Flow(coupling=GivenPairs())
    first = train(flow, lambda i: Batch(rows(data, i)), 400)
    x1 = Seeds(range(12_800))((2,))
    x = flow.generator(first, bind("heun", 20))(x1, {})
    paired = lambda i: Batch(rows(x, i), x1=rows(x1, i))  # noqa: E731
    second = train(again, paired, 400)
    z = Seeds(range(50_000, 51_000))((2,))
    assert bend(again, second, z) < 0.2 * bend(flow, first, z)
    step = lambda f, nets: f.generator(nets, bind("ddim", 1))(z, {})  # noqa: E731
    assert off(step(again, second)) < 0.5 * off(step(flow, first))
    x2, ends, euler = (again.generator(second, s)(v, {}) for s, v in (
        (bind("heun", 20), x1), (bind("heun", 20), z), (bind("ddim", 1), z)))  # fmt: skip
    distil = Distillation()
    last = train(distil, lambda i: Batch(rows(x2, i), x1=rows(x1, i)), 250, nets=second)  # goes on, as in the paper
    miss = lambda x: float((x - ends).square().sum(1).mean())  # noqa: E731
    assert miss(distil.generator(last)(z, {}).detach()) < 0.5 * miss(euler)


def test_distillation_is_one_euler_step_and_takes_no_sampler():
    nets = {"net": lambda x, t, c: x * 0.25 + t[:, None]}
    z = torch.randn(5, 2)
    assert torch.allclose(Distillation().generator(nets)(z, {}), z - (0.25 * z + 1), atol=1e-6)
    with pytest.raises(ValueError, match="one step of its own"):
        Distillation().generator(nets, bind("heun", 4))
    with pytest.raises(ValueError, match="no pairs"):
        Distillation().loss("denoise", nets, Batch(torch.randn(4, 2)))
    x0, x1 = torch.randn(2, 6, 2)
    loss = Distillation().loss("denoise", {"net": lambda x, t, c: x * t[:, None]}, Batch(x0, x1=x1)).per_sample
    assert torch.allclose(loss, (x0**2).mean(1), atol=1e-6)  # (x1 - (x1 - x0))^2 at x = x1, t = 1


def test_distillation_of_a_network_that_predicts_the_data():
    """Its output at t = 1 is the sample itself, and the error is that of the sample."""
    objective, net = Distillation(prediction="x0"), lambda x, t, c: x * 0.25 + t[:, None]
    z, (x0, x1) = torch.randn(5, 2), torch.randn(2, 6, 2)
    torch.testing.assert_close(objective.generator({"net": net})(z, {}), 0.25 * z + 1)
    loss = objective.loss("denoise", {"net": net}, Batch(x0, x1=x1)).per_sample
    torch.testing.assert_close(loss, (0.25 * x1 + 1 - x0).square().mean(1))


SMALL = ["--backbone=mlp", "--backbone.width=16", "--batch=16", "--steps=4", "--sample-every=0", "--no-tensorboard"]


def test_the_command_makes_pairs_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_command(["--data=moons", "--device=cpu", *SMALL]) == 0
    assert reflow_command(["runs/latest", "--n=10", "--batch=4", "--steps=3", "--out=p.npz"]) == 0
    assert reflow_command(["runs/latest", "--n=10", "--batch=10", "--steps=3", "--out=q.npz"]) == 0
    p, q = Pairs(root="p.npz").load(), Pairs(root="q.npz").load()
    assert torch.allclose(p.samples.x, q.samples.x, atol=1e-5)  # pair i has its own seed
    assert torch.equal(p.x1, q.x1)
    assert torch.equal(p.x1[3], Seeds([1_000_003])((2,))[0])
    assert p.spec.cond["label"] == Label(2)
    again = ["--data=pairs", "--data.root=p.npz", "--device=cpu", *SMALL]
    assert train_command([*again, "--objective.coupling=given"]) == 0
    assert train_command([*again, "--objective=distillation"]) == 0
    with pytest.raises(ValueError, match="this one adds noise"):
        reflow_command(["runs/0000-moons-flow-mlp", "--n=4", "--sampler=ancestral"])
    capsys.readouterr()


def test_reflow_is_a_call_that_returns_the_file_and_prints_nothing(tmp_path, capsys):
    assert train_command(["--data=moons", "--device=cpu", f"--out={tmp_path}", *SMALL]) == 0
    run, calls = load_run(tmp_path / "latest"), []
    capsys.readouterr()
    made = reflow(run, n=10, batch=4, steps=2, progress=lambda *call: calls.append(call))
    assert capsys.readouterr() == ("", "")
    assert made.path == run.directory / "pairs-step4.npz"
    assert (made.num_pairs, made.run) == (10, run)
    assert calls == [("pairs", 0, 10), ("pairs", 4, 10), ("pairs", 8, 10), ("pairs", 10, 10)]
    by_path = reflow(tmp_path / "latest", n=10, batch=10, steps=2, out=tmp_path / "p.npz", device="cpu")
    one, other = (Pairs(root=str(p.path)).load().samples.x for p in (made, by_path))
    assert torch.allclose(one, other, atol=1e-5)
    with pytest.raises(ValueError, match="stepz"):
        reflow(run, stepz=3)


class Clock:
    """A second passes with each look at it."""

    now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


def test_without_a_number_the_pairs_fit_into_the_minutes(tmp_path, monkeypatch, caplog):
    """24 pairs take two seconds, so 12 fit into each; what is left out is said, and how long all take."""
    assert train_command(["--data=moons", "--device=cpu", f"--out={tmp_path}", *SMALL]) == 0
    run = load_run(tmp_path / "latest")
    monkeypatch.setattr(module, "time", Clock())
    made = reflow(run, batch=16, steps=1, max_minutes=0.1)
    assert made.num_pairs == 72
    assert "reflow: 72 of 50000 pairs take about 0.1 minutes; all would take about 1 h 9 min" in caplog.text
    caplog.clear()
    asked = reflow(run, n=72, batch=72, steps=1, out=tmp_path / "p.npz")
    assert not caplog.text
    few, same = (Pairs(root=str(p.path)).load() for p in (made, asked))
    assert torch.allclose(few.samples.x, same.samples.x, atol=1e-5)
    assert torch.equal(few.x1, same.x1)
    assert torch.equal(few.samples.cond["label"], same.samples.cond["label"])


def test_a_few_pairs_have_all_classes_of_sorted_data(tmp_path):
    """A folder is sorted by class, so the first samples are of one class."""
    x = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    np.savez(tmp_path / "sorted.npz", x=x, y=np.repeat([0, 1, 2], 20))
    argv = [
        "--data=npz",
        f"--data.root={tmp_path / 'sorted.npz'}",
        "--backbone=mlp",
        "--device=cpu",
        f"--out={tmp_path}",
    ]
    assert train_command([*argv, *SMALL]) == 0
    made = reflow(tmp_path / "latest", n=18, steps=1, out=tmp_path / "p.npz", device="cpu")
    counts = np.bincount(Pairs(root=str(made.path)).load().samples.cond["label"].numpy(), minlength=3)
    assert counts.min() >= 2, counts


def printed_commands(output):
    """The commands in the output, as arguments of `genkit train`."""
    commands = dict(re.findall(r"^(straighten|one step) +genkit train (.+)$", output, re.M))
    return {k: shlex.split(v) for k, v in commands.items()}


def test_reflow_twice_and_distillation_by_the_printed_commands(tmp_path, monkeypatch, capsys):
    """Each starts from the model that drew its pairs; the one-step model needs no sampler."""
    monkeypatch.chdir(tmp_path)
    assert train_command(["--data=moons", "--device=cpu", *SMALL]) == 0
    for generation in (1, 2):
        capsys.readouterr()
        newest = f"runs/{Path('runs/latest').resolve().name}"
        assert reflow_command([newest, "--n=16", "--steps=3", f"--out=p{generation}.npz"]) == 0
        printed = printed_commands(capsys.readouterr().out)
        before = Path("runs/latest").resolve()
        assert train_command([*printed["straighten"], "--lr=1e-12", "--steps=1"]) == 0
        run = load_run("runs/latest")
        assert run.config.objective.coupling == GivenPairs()
        assert run.config.init == str(before)
        old, new = (next(r.nets["net"].parameters()) for r in (load_run(before), run))
        assert torch.allclose(old, new, atol=1e-6)
    assert train_command([*printed["one step"], "--steps=1"]) == 0
    run = load_run("runs/latest")
    assert isinstance(run.objective, Distillation)
    assert run.config.init == str(before)
    assert run.sample(3).x.shape == (3, 2)


def test_a_model_without_velocities_is_no_start_for_distillation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_command(["--data=moons", "--objective=ddpm", "--device=cpu", *SMALL]) == 0
    capsys.readouterr()
    assert reflow_command(["runs/latest", "--n=8", "--steps=2"]) == 0
    printed = printed_commands(capsys.readouterr().out)
    assert not any("--init" in argv for argv in printed.values())
    for argv in printed.values():
        assert train_command([*argv, "--steps=1"]) == 0
