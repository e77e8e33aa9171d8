"""Training a flow map: ranks, micro-batches, exact resume, teachers, other runs' weights, and what is learned."""

import math
import os
import re
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from genkit import config
from genkit.backbones import MLP, DiT, UNet
from genkit.cli.main import main
from genkit.core import Batch, Draw, Label, Spec
from genkit.core.links import set_link
from genkit.data.codecs import Identity, Standardize
from genkit.data.toy import Moons
from genkit.diffusion.guidance import classifier_free
from genkit.diffusion.samplers import Seeds, bind
from genkit.objectives import Flow, FlowMap
from genkit.objectives.flow_map.flow_map import load_teacher
from genkit.objectives.flow_map.guidance import GuidedTeacher, draw_guidance
from genkit.objectives.flow_map.rules import RULES, Improved, Lagrangian
from genkit.rl.policies.policy import Policy
from genkit.training.directory import read_log
from genkit.training.loop import fit, initial_state
from genkit.training.run import load_run
from genkit.training.sampling import require_same_units
from genkit.training.settings import TrainSettings
from tests.support.objectives import train
from tests.support.ranks import on_two_ranks

SMALL = ["train", "--data=moons", "--data.n=400", "--data.labels", "--backbone=mlp", "--backbone.width=16",
         "--backbone.depth=1", "--batch=32", "--warmup=0", "--ema", "0.9", "--device=cpu", "--sample-every=0",
         "--no-tensorboard"]  # fmt: skip


def run_of(folder, *args):
    assert main([*SMALL, f"--out={folder}", *args]) == 0
    return (folder / "latest").resolve()


def weights(run):
    return load_file(run / "latest" / "nets.safetensors")


def same(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------------------------- ranks and pieces
def small(rule, accelerator=None, micro_batch=None):
    """Three steps in float64; the weights."""
    how = {"steps": 3, "batch": 32, "micro_batch": micro_batch, "ema": [0.9], "precision": "fp32"}
    settings = config.from_dict(TrainSettings, {"objective": "flow-map", **how})
    objective = FlowMap(rule=rule)
    torch.manual_seed(0)
    nets = {"net": objective.networks(MLP(width=16, depth=1), Spec((2,), {"label": Label(3)}))["net"].double()}
    with torch.no_grad():
        for p in nets["net"].parameters():
            p += 0.1 * torch.randn_like(p)

    def stream(step, draw, first, last):
        mine, rows = Draw((3, step, draw), first, last), torch.arange(first, last)
        draws = Draw((4, step, draw), first, last)
        return Batch(mine.normal(2).double(), {"label": rows % 3}, draw=draws, step=step)

    state = initial_state(objective, nets, settings)
    fit(objective, state, stream, Identity(), settings, accelerator or Accelerator(cpu=True))
    return {k: v.detach() for k, v in nets["net"].state_dict().items()}


def test_two_ranks_with_four_pieces_each_are_one_rank(tmp_path):
    """Derivative passes on the bare network and gradients through its wrapper, in float64, for every rule."""
    both = on_two_ranks(lambda a: {name: small(cls(), a, micro_batch=4) for name, cls in RULES.items()})
    for name, cls in RULES.items():
        for key, value in small(cls()).items():
            assert torch.equal(both[0][name][key], both[1][name][key]), (name, key)
            # the network's own waves of time are float32
            assert torch.allclose(both[0][name][key], value, atol=1e-7), (name, key)


SLOWER = [pytest.param(rule, marks=pytest.mark.slow) for rule in RULES if rule not in ("shortcut", "lagrangian")]


@pytest.mark.parametrize("rule", ["shortcut", "lagrangian", *SLOWER])
def test_resume_is_bit_identical(tmp_path, rule):
    args = [f"--objective.rule={rule}", "--objective=flow-map", "--steps=5", "--backbone.dropout=0.1"]
    whole = run_of(tmp_path / "a", *args)
    half = run_of(tmp_path / "b", *args, "--save-every=2")
    set_link(half / "latest", "checkpoints/step-0000002")
    for step in ("0000004", "0000005"):
        os.rename(half / "checkpoints" / f"step-{step}", half / f"gone-{step}")
    assert main(["train", "--resume", str(half)]) == 0
    assert same(whole, half)
    assert {"denoise/map", "denoise/loss"} <= read_log(half)[-1].keys()


@pytest.mark.parametrize("backbone", [UNet(width=8, mults=(1, 2)), DiT(width=16, depth=1), MLP(width=16, depth=1)])
@pytest.mark.parametrize("rule", RULES)
def test_every_backbone_learns_by_every_rule(rule, backbone):
    """Pictures with attention, whose fused kernels have no forward-mode derivative; bf16 too."""
    objective, spec = FlowMap(rule=RULES[rule]()), Spec((1, 8, 8), {"label": Label(3)})
    nets = objective.networks(backbone, spec)
    batch = Batch(torch.randn(6, 1, 8, 8), {"label": torch.arange(6) % 3}, draw=Draw((1,), 0, 6), step=7)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss("denoise", nets, batch).per_sample
    assert loss.dtype == torch.float32
    objective.loss("denoise", nets, batch).per_sample.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in nets["net"].parameters())
    sampler = bind(objective.sampler, 2)
    noise = lambda shape: torch.randn(6, *shape)  # noqa: E731
    assert objective.generator(nets, sampler)(torch.randn(6, 1, 8, 8), batch.cond, noise).shape == (6, 1, 8, 8)


# ------------------------------------------------------------------------------------ teachers and other weights
@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("teacher"), "--objective=flow", "--steps=3")


def test_a_run_starts_as_the_flow_whose_weights_it_takes(teacher, tmp_path):
    args = ["--objective=flow-map", "--objective.rule=lagrangian", f"--init={teacher}", "--steps=1", "--lr=1e-12"]
    run = run_of(tmp_path, *args)
    theirs, ours = load_run(teacher), load_run(run, ema="none")
    z, cond = torch.randn(5, 2), {"label": torch.arange(5) % 2}
    for target in ({}, {"target_time": torch.full((5,), 0.1)}):
        a, b = (r.denoiser(z, torch.full((5,), 0.7), {**cond, **target}).x0 for r in (theirs, ours))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--objective.rule=improved"], "--objective.time-rate 1"),
        (["--objective.rule=shortcut", "--objective.path=cosine"], "set --objective.path"),
        (["--objective.rule=shortcut", "--objective.prediction=x0"], "--objective.prediction"),
    ],
)
def test_weights_that_mean_something_else_are_refused(teacher, tmp_path, capsys, args, message):
    command = [*SMALL, "--objective=flow-map", f"--init={teacher}", f"--out={tmp_path}", "--steps=1"]
    assert main([*command, *args]) == 2
    assert message in capsys.readouterr().err
    assert main([*command, "--objective.rule=improved", "--objective.time-rate=1"]) == 0


def test_a_teacher_is_learned_from_as_its_velocity_says(teacher, tmp_path):
    """Guided: the error on r = t is that against the teacher's guided velocity, and its weights stay as they are."""
    before = weights(teacher)
    objective = FlowMap(rule=Improved(share=0.5), teacher=str(teacher), teacher_guidance=2.0, cond_dropout=0.0)
    spec = Spec((2,), {"label": Label(2)})
    objective.setup(spec)
    net = objective.networks(MLP(width=16, depth=1), spec)["net"]
    batch = Batch(torch.randn(64, 2), {"label": torch.arange(64) % 2}, draw=Draw((1,), 0, 64))
    u = objective.learned_map(net, batch.cond, objective.open_teacher(torch.device("cpu")))
    jumps = objective.draw_jumps(batch, u)
    run, same_time = load_run(teacher), jumps.r == jumps.t
    null = {**batch.cond, "keep": torch.zeros(64, dtype=torch.bool)}
    good, bad = (run.denoiser(jumps.z, jumps.t, c).velocity for c in (batch.cond, null))
    guided = bad + 2 * (good - bad)
    torch.testing.assert_close(jumps.velocity, guided)
    error = objective.rule.error(u, jumps, None)
    torch.testing.assert_close(-error[same_time], guided[same_time])  # the untrained network says 0
    student = run_of(tmp_path, "--objective=flow-map", f"--objective.teacher={teacher}", "--steps=2")
    assert load_run(student).objective.teacher == str(teacher)
    assert all(torch.equal(v, before[k]) for k, v in weights(teacher).items())


def test_a_teacher_of_other_samples_or_another_path_is_refused(teacher):
    with pytest.raises(ValueError, match="teacher: given one of samples"):
        FlowMap(teacher=str(teacher)).setup(Spec((1, 8, 8)))
    from genkit.diffusion.paths import Cosine

    with pytest.raises(ValueError, match="teacher: given one trained on"):
        FlowMap(teacher=str(teacher), path=Cosine()).setup(Spec((2,)))
    assert load_teacher.cache_info().currsize >= 0


MISFITS = {  # arguments of the teacher and of the map, and what is wrong with them
    "null": (["--objective.cond-dropout=0"], [], "never trained without its conditions.* --objective.cond-dropout 0"),
    "guided": (["--objective.cond-dropout=0"], ["--objective.teacher-guidance=2", "--objective.cond-dropout=0"],
               "nothing to guide away from"),
    "fewer": (["--data.no-labels"], [], r"conditions none; the data have label \(2 classes\)"),
    "more": ([], ["--data.no-labels"], r"conditions label \(2 classes\); the data have none"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_a_teacher_that_would_be_asked_what_it_never_learned_is_refused(name, tmp_path, capsys):
    of_teacher, of_map, message = MISFITS[name]
    teacher = run_of(tmp_path / "teacher", "--objective=flow", "--steps=1", *of_teacher)
    capsys.readouterr()
    command = [*SMALL, "--objective=flow-map", f"--objective.teacher={teacher}", f"--out={tmp_path}", "--steps=1"]
    assert main([*command, *of_map]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_a_teacher_without_null_is_learned_from_with_all_conditions(tmp_path):
    teacher = run_of(tmp_path / "teacher", "--objective=flow", "--steps=1", "--objective.cond-dropout=0")
    run_of(
        tmp_path, "--objective=flow-map", f"--objective.teacher={teacher}", "--steps=1", "--objective.cond-dropout=0"
    )


@pytest.mark.parametrize("objective", ["flow-map", "dmd"])
def test_predictions_of_samples_in_other_units_are_not_learned_from(objective, tmp_path, capsys):
    small = ["train", "--data=four-ways", "--data.n=20", "--backbone.width=16", "--backbone.depth=1", "--batch=8",
             "--steps=1", "--device=cpu", "--sample-every=0", "--no-tensorboard", f"--out={tmp_path}"]  # fmt: skip
    assert main([*small, "--objective=flow"]) == 0
    run = (tmp_path / "latest").resolve()
    option, given = ("teacher", "--objective.teacher") if objective == "flow-map" else ("init", "--init")
    command = [*small, f"--objective={objective}", "--objective.cond-dropout=0", f"{given}={run}"]
    command = [c for c in command if objective == "flow-map" or "cond-dropout" not in c]
    assert main([*command, "--data.scaling=standardize"]) == 2
    assert f"{option}: was trained on samples" in capsys.readouterr().err
    assert main(command) == 0


def test_units_that_were_measured_again_are_the_same():
    spec, codec = Spec((2,)), Standardize((1.0, -1.0), (2.0, 3.0))
    for near in (codec, Standardize((1.001, -1.0), (2.0, 3.001))):
        require_same_units("init", (spec, codec), (spec, near))
    for other in (Standardize((1.1, -1.0), (2.0, 3.0)), Identity()):
        with pytest.raises(ValueError, match="init: was trained on samples"):
            require_same_units("init", (spec, codec), (spec, other))


# -------------------------------------------------------------------------------------------------- what is learned
def two_modes(n=4000):
    g = torch.Generator().manual_seed(3)
    side = torch.randint(0, 2, (n, 1), generator=g) * 2.0 - 1
    return side + 0.15 * torch.randn(n, 2, generator=g)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "steps", "limit"),
    [("improved", 1200, 0.2), ("mean", 1200, 0.3), ("lagrangian", 1200, 0.3), ("shortcut", 1200, 0.3),
     ("alpha", 1200, 0.35), ("consistency", 1200, 0.35)],
)  # fmt: skip
def test_one_step_draws_two_modes(rule, steps, limit):
    """The share of samples more than 0.6 from a mode: a flow's one Euler step puts nearly all in the middle."""
    rules = {"alpha": {"start": 100, "end": 800}, "consistency": {"stage_steps": 150}}
    objective = FlowMap(rule=RULES[rule](**rules.get(rule, {})))
    nets = train(objective, MLP(width=64, depth=2), two_modes(), Spec((2,)), steps, lr=3e-3, clip=1.0)
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        x = objective.generator(nets, bind(objective.sampler, 1))(z, {})
    far = ((x.abs() - 1).norm(dim=1) > 0.6).float().mean()
    right = (x.mean(1) > 0).float().mean()
    assert float(far) < limit, float(far)
    assert 0.4 < float(right) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "steps", "limit"), [("lagrangian", 120, 0.3), ("shortcut", 400, 1.2)])
def test_a_network_that_predicts_large_pictures_learns(rule, steps, limit):
    """Digits of 28x28, in four steps: root mean square error of the mean of each class.

    Lagrangian jumps weighted as the velocities are had 0.62 (0.09 with their own weight), shortcuts whose targets are
    not kept in a ball 2.5 (0.58 with).
    """
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    data = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear")
    label, spec = torch.tensor(digits.target), Spec((1, 28, 28), {"label": Label(10)})
    objective = FlowMap(rule=RULES[rule](), prediction="x0", cond_dropout=0.0)
    objective = objective.decide(lambda: 1.0, lambda: float(data.square().mean((1, 2, 3)).max().sqrt()))
    backbone = MLP(width=256, depth=4)
    nets = train(objective, backbone, data, spec, steps, size=64, lr=1e-3, cond={"label": label}, clip=1.0)
    z = torch.randn(200, 1, 28, 28, generator=torch.Generator().manual_seed(9))
    asked = torch.arange(200) % 10
    with torch.no_grad():
        x = objective.generator(nets, bind("flow_map", 4))(z, {"label": asked})
    errors = [x[asked == k].mean(0) - data[label == k].mean(0) for k in range(10)]
    assert float(torch.stack(errors).square().mean().sqrt()) < limit


def test_settings_are_part_of_the_configuration():
    tree = {"objective": {"name": "flow-map", "rule": {"name": "lagrangian", "share": 0.25}, "prediction": "x0"}}
    objective = config.from_dict(TrainSettings, tree).objective
    assert objective == FlowMap(rule=Lagrangian(share=0.25), prediction="x0")
    rates = [o.label_rate for o in (objective, FlowMap(), FlowMap(rule=Improved()), replace(FlowMap(), time_rate=0.5))]
    assert rates == [1, 1, 0.01, 0.5]


# ------------------------------------------------------------------------------------ guidance as an input
class TwoClasses(torch.nn.Module):
    """The exact guided velocity of two classes with means -1 and 1 and no spread, as a network of r = t."""

    def velocity(self, x, t, mean):
        return (x - (1 - t) * mean) / t - mean

    def forward(self, x, label, cond):
        t, scale = label[:, None], 1 / (1 - cond["guidance"][:, None])
        low, high = cond["guidance_low"][:, None], 1 - cond["guidance_high"][:, None]
        scale = torch.where((low <= t) & (t <= high), scale, 1.0)
        null = self.velocity(x, t, torch.tanh(x * (1 - t) / t**2))  # E[x0 | x] of both classes
        good = self.velocity(x, t, 2.0 * cond["label"][:, None] - 1)
        keep = cond.get("keep", torch.ones(len(x), dtype=torch.bool))[:, None]
        return torch.where(keep, null + scale * (good - null), null)


def test_the_guided_velocity_is_the_fixed_point_of_its_target():
    """With the exact guided map in the network, the target at each sample is the guided velocity itself."""
    objective, n = FlowMap(guidance=5.0, time_rate=1.0), 4000
    label = torch.arange(n) % 2
    batch = Batch((2.0 * label[:, None] - 1).double(), {"label": label}, draw=Draw((1,), 0, n))
    cond = {**(dropped := batch.drop(0.1)), **draw_guidance(batch, dropped, 5.0)}
    assert float(cond["guidance"].log().mean()) == pytest.approx(0.9 * 0.5 * math.log(5), rel=0.05)
    assert bool((cond["guidance"][~cond["keep"]] == 1).all())
    u = objective.learned_map(TwoClasses(), cond)
    jumps = objective.draw_jumps(batch, u)
    keep = cond["keep"] & (jumps.t > 0.05)
    torch.testing.assert_close(jumps.velocity[keep], u.frozen(jumps.z, jumps.t, jumps.t)[keep], rtol=1e-6, atol=1e-6)
    plain = TwoClasses().velocity(jumps.z, jumps.t[:, None], batch.x)
    inside = (cond["guidance_low"] <= jumps.t) & (jumps.t <= cond["guidance_high"])
    torch.testing.assert_close(jumps.velocity[~inside], plain[~inside])
    assert 0.1 < float((~inside).double().mean()) < 0.5


def test_guidance_as_an_input_takes_one_pass(tmp_path):
    run = load_run(run_of(tmp_path, "--objective=flow-map", "--objective.guidance=4", "--steps=3"))
    points = Moons(n=400, labels=True).load("train")
    largest = points.codec.encode(points.batch(torch.arange(400), Draw((0,), 0, 400))).x.square().mean(1).max().sqrt()
    assert run.objective.data_radius == pytest.approx(1.5 * float(largest), rel=1e-3)
    samples = run.sample(4, steps=1, guidance=3.0)
    assert samples.network_rows == 1 == run.sample(4, steps=1).network_rows
    weights = run.nets["net"].state_dict()
    run.nets["net"].load_state_dict({k: torch.randn_like(v) if "on_guidance" in k else v for k, v in weights.items()})
    late = {"guidance": 3.0, "guidance_interval": (0.3, 0.9)}
    settings = {"none": {}, "three": {"guidance": 3.0}, "late": late}
    x = {name: run.sample(4, steps=1, **how).x for name, how in settings.items()}
    assert not torch.allclose(x["none"], x["three"])
    assert not torch.allclose(x["late"], x["three"])
    with pytest.raises(ValueError, match="1 to 4, the scales that this model was trained for"):
        run.sample(4, steps=1, guidance=5.0)


def test_a_guided_teacher_gives_each_sample_its_scale(teacher):
    objective = FlowMap(guidance=4.0, teacher=str(teacher))
    batch = Batch(torch.randn(64, 2), {"label": torch.arange(64) % 2}, draw=Draw((1,), 0, 64))
    cond = {**batch.cond, **draw_guidance(batch, batch.cond, 4.0)}
    net = objective.networks(MLP(width=8, depth=1), Spec((2,), {"label": Label(2)}))["net"]
    u = objective.learned_map(net, cond, objective.open_teacher(torch.device("cpu")))
    jumps = objective.draw_jumps(batch, u)
    run, null = load_run(teacher), {**batch.cond, "keep": torch.zeros(64, dtype=torch.bool)}
    good, bad = (run.denoiser(jumps.z, jumps.t, c).velocity for c in (batch.cond, null))
    inside = (cond["guidance_low"] <= jumps.t) & (jumps.t <= cond["guidance_high"])
    scale = torch.where(inside, cond["guidance"], 1.0)[:, None]
    torch.testing.assert_close(jumps.velocity, bad + scale * (good - bad), rtol=1e-4, atol=1e-4)


def test_a_guided_teacher_is_classifier_free_guidance_inside_the_interval():
    """With a network whose prediction depends strongly on the condition; the second sample is outside its interval."""
    net = lambda x, t, cond: (1.0 + cond["label"][:, None] * cond.get("keep", torch.ones(len(x)))[:, None]) * x  # noqa: E731
    denoise, x, t, label = Flow().denoiser(net), torch.ones(2, 2), torch.tensor([0.5, 0.9]), torch.tensor([1, 2])
    given = {"label": label, "guidance": torch.tensor([3.0, 3.0]), "guidance_low": torch.zeros(2),
             "guidance_high": torch.full((2,), 0.8)}  # fmt: skip
    got = GuidedTeacher(denoise)(x, t, given).x0
    guided, plain = (d(x, t, {"label": label}).x0 for d in (classifier_free(3.0)(denoise), denoise))
    torch.testing.assert_close(got, torch.stack([guided[0], plain[1]]))
    assert float((guided - plain).abs().min()) > 0.5


def test_guidance_without_a_null_or_conditions_is_refused():
    with pytest.raises(ValueError, match="nothing to guide away from"):
        FlowMap(guidance=3.0, cond_dropout=0.0)
    with pytest.raises(ValueError, match="no conditions to guide by"):
        FlowMap(guidance=3.0).networks(MLP(), Spec((2,)))
    with pytest.raises(ValueError, match="scale is an input"):
        FlowMap(guidance=3.0, teacher="x", teacher_guidance=2.0)


# ------------------------------------------------------------------------------------------------------ policies
def test_a_policy_jumps_by_its_map(tmp_path, capsys):
    """Not by a step of its velocity, and it is no chain of steps that reward could train."""
    args = ["--data=four-ways", "--data.n=8", "--backbone=mlp", "--backbone.width=16", "--steps=3", "--warmup=0",
            "--device=cpu", "--sample-every=0", "--no-tensorboard", "--lr=0.01", f"--out={tmp_path}"]  # fmt: skip
    assert main(["train", "--objective=flow-map", *args]) == 0
    run = load_run(tmp_path / "latest")
    weights = run.nets["net"].state_dict()
    run.nets["net"].load_state_dict({k: torch.randn_like(v) if "on_span" in k else v for k, v in weights.items()})
    policy = Policy.load(run)
    assert (policy.steps, run.objective.policy_sampler) == (1, "flow_map")
    obs, noise = torch.zeros(2, *run.spec.cond["obs"].shape), Seeds([3, 4])
    z, cond = noise(run.spec.shape), {"obs": obs}
    with torch.no_grad():
        jump = policy.generate(z, cond)
        at_once = run.denoiser(z, torch.ones(2), {**cond, "target_time": torch.zeros(2)}).x0
        velocity = run.denoiser(z, torch.ones(2), cond).x0
    torch.testing.assert_close(jump, at_once)
    assert not torch.allclose(jump, velocity)
    capsys.readouterr()
    assert main(["finetune", str(run.directory), "--iterations=1", "--num-envs=4", "--method.warmup=0"]) == 2
    assert "is a flow map" in capsys.readouterr().err
