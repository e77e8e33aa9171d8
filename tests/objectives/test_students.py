"""Objectives that learn from a copy of themselves: exact resume, micro-batches, ranks, other starting weights."""

import os

import pytest
import torch
from accelerate import Accelerator

from genkit import config
from genkit.backbones import MLP
from genkit.cli.main import main
from genkit.core import Batch, Draw, Label, Spec
from genkit.core.links import set_link
from genkit.data.codecs import Identity
from genkit.objectives import DMD, ProgressiveDistillation
from genkit.training.directory import read_log
from genkit.training.loop import fit, initial_state
from genkit.training.run import init_from, load_run
from genkit.training.settings import TrainSettings
from tests.support.ranks import on_two_ranks
from tests.support.runs import saved_tensors

SMALL = ["--backbone.width=16", "--backbone.depth=1", "--batch=32", "--warmup=0", "--ema", "0.9", "--device=cpu",
         "--sample-every=0", "--no-tensorboard", "--workers=0"]  # fmt: skip
STUDENTS = {
    "progressive": ProgressiveDistillation(teacher_steps=8, steps=2, round_steps=2, guidance=3.0),
    "dmd": DMD(steps=2, gan_weight=0.1, fake_updates=2, teacher_guidance=2.0),
    "dmd-head": DMD(gan_weight=0.1, fake_updates=2, discriminator="head", head_weight=0.1),
}
ARGS = {
    "progressive": ["--objective=progressive-distillation", "--objective.teacher-steps=8", "--objective.round-steps=2"],
    "dmd": ["--objective=dmd", "--objective.steps=2", "--objective.gan-weight=0.1", "--objective.fake-updates=2"],
    "dmd-head": ["--objective=dmd", "--objective.gan-weight=0.1", "--objective.discriminator=head"],
}


def small(objective, accelerator=None, micro_batch=None):
    """Three steps in float64, in which a round ends; the weights."""
    how = {"steps": 3, "batch": 32, "micro_batch": micro_batch, "ema": [0.9], "precision": "fp32", "warmup": 0}
    settings = config.from_dict(TrainSettings, {"objective": "flow", **how})
    torch.manual_seed(0)
    nets = objective.networks(MLP(width=16, depth=1), Spec((2,), {"label": Label(3)}))
    nets = {k: net.double() if any(True for _ in net.parameters()) else net for k, net in nets.items()}
    with torch.no_grad():
        for p in (p for net in nets.values() for p in net.parameters()):
            p += 0.1 * torch.randn_like(p)

    def stream(step, draw, first, last):
        mine, rows = Draw((3, step, draw), first, last), torch.arange(first, last)
        draws = Draw((4, step, draw), first, last)
        return Batch(mine.normal(2).double(), {"label": rows % 3}, draw=draws, step=step)

    before = {f"{k}.{n}": v.clone() for k, net in nets.items() for n, v in net.state_dict().items()}
    state = initial_state(objective, nets, settings)
    fit(objective, state, stream, Identity(), settings, accelerator or Accelerator(cpu=True))
    return before, {f"{k}.{n}": v.detach() for k, net in nets.items() for n, v in net.state_dict().items()}


def test_two_ranks_with_four_pieces_each_are_one_rank():
    both = on_two_ranks(lambda a: {name: small(o, a, micro_batch=4)[1] for name, o in STUDENTS.items()})
    for name, objective in STUDENTS.items():
        before, whole = small(objective)
        for key, value in whole.items():
            assert torch.equal(both[0][name][key], both[1][name][key]), (name, key)
            # the network's own waves of time are float32
            assert torch.allclose(both[0][name][key], value, atol=1e-6), (name, key)
        moved = {key.partition(".")[0] for key in whole if not torch.equal(whole[key], before[key])}
        rounds = {"net", "teacher", "average", "rounds"}
        assert moved == (rounds if name == "progressive" else {"net", "fake", "discriminator"})


def run_of(folder, *args):
    assert main(["train", *SMALL, f"--out={folder}", *args]) == 0
    return (folder / "latest").resolve()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    return run_of(out, "--data=moons", "--data.n=400", "--data.labels", "--backbone=mlp", "--steps=3")


@pytest.mark.parametrize("name", ARGS)
def test_resume_is_bit_identical(base, tmp_path, name):
    """Step 3 lies within a round; the teacher's run may be gone."""
    args = ["--init", str(base), *ARGS[name], "--steps=6", "--backbone.dropout=0.1"]
    whole = run_of(tmp_path / "a", *args)
    half = run_of(tmp_path / "b", *args, "--save-every=3")
    set_link(half / "latest", "checkpoints/step-0000003")
    os.rename(half / "checkpoints/step-0000006", half / "gone")
    base.rename(base.with_name("gone"))
    try:
        assert main(["train", "--resume", str(half)]) == 0
    finally:
        base.with_name("gone").rename(base)
    a, b = saved_tensors(whole), saved_tensors(half)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert any(k.endswith("/loss") for k in read_log(half)[-1])


def test_all_networks_start_from_the_run_and_its_data_are_used(base):
    run = load_run(base)
    for objective in (ProgressiveDistillation(of=run.objective), DMD(of=run.objective, gan_weight=0.1)):
        nets = objective.networks(run.config.backbone, run.spec)
        init_from(nets, base, objective=objective)
        for name in set(nets) - {"rounds", "discriminator"}:
            theirs, ours = run.nets["net"].state_dict(), nets[name].state_dict()
            assert all(torch.equal(theirs[k], ours[k]) for k in theirs), name
            assert all(p.data_ptr() != q.data_ptr() for p, q in
                       zip(nets[name].parameters(), run.nets["net"].parameters(), strict=True))  # fmt: skip
    with_scale = ProgressiveDistillation(of=run.objective, guidance=3.0)
    nets = with_scale.networks(run.config.backbone, run.spec)
    init_from(nets, base, objective=with_scale)
    x, cond = torch.randn(6, 2), {"label": torch.arange(6) % 2}
    plain = run.nets["net"](x, torch.full((6,), 0.5), cond)
    scaled = nets["net"](x, torch.full((6,), 0.5), {**cond, "guidance": torch.full((6,), 0.4)})
    assert torch.equal(plain, scaled), "a scale that has not been learned changes something"


@pytest.mark.parametrize("name", ARGS)
def test_the_command_suggests_what_runs(base, tmp_path, name, capsys):
    run_of(tmp_path, "--init", str(base), *ARGS[name], "--steps=1")
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next ")).split()[2:]
    assert command[0] == "sample"
    assert main([*command, "--device=cpu"]) == 0
