"""Rewards by the gradient through the generator: closed forms, every one-step generator, exact resume, adapters."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.reflow import DigitScores, load_digits
from genkit import finetune, train
from genkit.cli.commands.finetune import main as command
from genkit.core import Spec
from genkit.data.codecs import Identity
from genkit.evaluation.metrics import Moments, frechet_distance
from genkit.evaluation.metrics.frechet import frechet_contributions
from genkit.evaluation.trained_features import trained_features
from genkit.objectives import DMD, GAN, VAE, Drift, Flow, FlowMap
from genkit.rl.finetune import loop
from genkit.rl.finetune.direct import Direct, gather_moments
from genkit.rl.finetune.frechet_reward import FrechetReward
from genkit.rl.finetune.tasks import FunctionTask
from genkit.training.directory import find_run, read_log
from tests.support.exact import F64
from tests.support.learning import make_learner
from tests.support.ranks import on_two_ranks

QUIET = {"workers": 0, "tensorboard": False, "sample_every": 0, "ema": (0.9,)}
RING, SMALL = {"name": "8gaussians", "n": 1000}, {"name": "mlp", "width": 32, "depth": 2}


# ------------------------------------------------------------------------------------------------------ closed forms
@pytest.mark.parametrize("rows", [5, 40])
def test_the_gradient_within_a_population_is_that_of_its_distance(rows):
    """Of 40 samples the newest have a gradient: times 40 over their number it is that of the distance of all 40."""
    g = torch.Generator().manual_seed(1)
    turn = torch.randn(3, 3, generator=g, dtype=F64)
    everything = torch.randn(40, 3, generator=g, dtype=F64) @ turn + 1
    reference = Moments.of(torch.randn(500, 3, generator=g, dtype=F64))
    x = everything[-rows:].clone().requires_grad_()
    contributions = frechet_contributions(x, reference, Moments.of(everything))
    assert float(contributions.detach().mean()) == pytest.approx(
        frechet_distance(Moments.of(everything), reference), rel=1e-10
    )
    (gradient,) = torch.autograd.grad(contributions.mean(), x)
    h = 1e-4
    for i, j in ((0, 0), (rows - 1, 2)):
        ends = []
        for step in (h, -h, 2 * h, -2 * h):
            moved = everything.clone()
            moved[40 - rows + i, j] += step
            ends.append(frechet_distance(Moments.of(moved), reference))
        difference = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * h)
        assert float(gradient[i, j]) * rows / 40 == pytest.approx(difference, abs=1e-8)


class Affine(nn.Module):
    """Samples ``a z + m``."""

    def __init__(self, a, m):
        super().__init__()
        self.a, self.m = (nn.Parameter(torch.tensor(v, dtype=F64)) for v in (a, m))

    def forward(self, z):
        return self.a * z.double() + self.m


def affine_learner(a=1.5, m=0.4):
    return make_learner({"net": Affine(a, m)}, lambda nets: lambda z, cond, noise=None: nets["net"](z), Spec((1,)))


def normals(learner, n, number=0):
    return FunctionTask(None, "", Identity(), n, 1).draw(learner, number, n)[0].double()[:, 0]


NORMAL = Moments(None, torch.tensor([0.1], dtype=F64), torch.tensor([[1.2**2]], dtype=F64))


def test_a_step_follows_the_closed_form_for_normal_data():
    """``(mean - 0.1)^2 + (std - 1.2)^2`` of ``a z + m``, with its gradient in a and m, to 1e-6 of a step of SGD."""
    learner = affine_learner()
    n = 300
    z = normals(learner, n)
    mean, std = 1.5 * z.mean() + 0.4, 1.5 * z.std()
    gradient = torch.stack([2 * z.mean() * (mean - 0.1) + 2 * z.std() * (std - 1.2), 2 * (mean - 0.1)])
    gradient = gradient / max(1, float(gradient.norm()))  # steps are clipped
    task = FunctionTask(FrechetReward(nn.Flatten(), NORMAL), "frechet", Identity(), n, 1)
    logs = Direct(lr=0.1, batch=n, population=n).update(learner, task, None, 0)
    net = learner.state.nets["net"]
    assert float(1.5 - net.a.detach()) == pytest.approx(0.1 * float(gradient[0]), abs=1e-7)
    assert float(0.4 - net.m.detach()) == pytest.approx(0.1 * float(gradient[1]), abs=1e-7)
    assert logs["reward"] == pytest.approx(-float((mean - 0.1) ** 2 + (std - 1.2) ** 2), rel=1e-6)


def test_a_population_forgets_exponentially_and_begins_as_one():
    """Its mean is that of the newest batch by 1/4 and of what was before by 3/4; before the first step it is drawn."""
    learner, n = affine_learner(1.0, 0.0), 50
    task = FunctionTask(FrechetReward(nn.Flatten(), NORMAL), "frechet", Identity(), n, 1)
    method = Direct(lr=1e-12, batch=n, population=4 * n)
    expected = []
    for i in range(3):
        method.update(learner, task, None, i)
        population = learner.population
        expected.append((population.n, float(population.mean), float(population.cov)))
    first = torch.cat([normals(learner, n, -1_000_003 + k) for k in range(4)])
    mean, second = float(first.mean()), float((first**2).mean())
    for i in range(3):
        z = normals(learner, n, i * 1_000_003)
        mean, second = 0.75 * mean + 0.25 * float(z.mean()), 0.75 * second + 0.25 * float((z**2).mean())
        assert expected[i][0] == 4 * n
        assert expected[i][1] == pytest.approx(mean, abs=1e-6)
        assert expected[i][2] == pytest.approx((second - mean**2) * 4 * n / (4 * n - 1), abs=1e-6)


def test_small_batches_of_a_population_reach_the_data():
    """With fewer rows than features a step, which alone have no distance."""
    torch.manual_seed(0)
    net = nn.Linear(4, 4).double()
    reference = Moments.of(torch.randn(2000, 4, generator=torch.Generator().manual_seed(3), dtype=F64) * 2 + 1)
    learner = make_learner({"net": net}, lambda nets: lambda z, cond, noise=None: nets["net"](z.double()), Spec((4,)))
    task = FunctionTask(FrechetReward(nn.Flatten(), reference), "frechet", Identity(), 20, 1)
    for population, works in ((400, True), (4, False)):
        method = Direct(lr=0.05, batch=4, population=population)
        if not works:
            learner.population = None
            with pytest.raises(ValueError, match=r"of 4 samples in 4 .* larger --method.population"):
                method.update(learner, task, None, 0)
            continue
        rewards = [method.update(learner, task, None, i)["reward"] for i in range(60)]
        assert rewards[0] < -6
        assert max(rewards[-5:]) > -0.6


def test_two_ranks_are_one():
    def step(accelerator=None):
        learner = affine_learner()
        learner.accelerator, learner.micro_batch = accelerator, 7
        task = FunctionTask(FrechetReward(nn.Flatten(), NORMAL), "frechet", Identity(), 60, 1)
        for i in range(2):
            Direct(lr=0.1, batch=30, population=100).update(learner, task, None, i)
        net, population = learner.state.nets["net"], learner.population
        return torch.stack([net.a.detach(), net.m.detach(), population.mean[0], population.cov[0, 0]])

    one, two = step(), on_two_ranks(step)
    for rank in two:
        assert torch.allclose(rank, one, rtol=1e-12, atol=1e-12)
    assert gather_moments(affine_learner(), NORMAL) is NORMAL


# -------------------------------------------------------------------------------------------- every one-step generator
@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A barely trained model of each kind."""
    how = {**QUIET, "data": RING, "backbone": SMALL, "out": str(tmp_path_factory.mktemp("bases")), "batch": 64}
    flow = train(steps=60, **how)
    student = {k: v for k, v in how.items() if k not in ("data", "backbone")} | {"init": str(flow.directory)}
    return {
        "flow": flow,
        "shortcut": train(objective="flow-map", steps=20, **how),
        "improved": train(objective={"name": "flow-map", "rule": "improved"}, steps=20, **how),
        "gan": train(objective={"name": "gan", "latent": (4,)}, steps=20, **how),
        "vae": train(objective={"name": "vae", "latent": (2,)}, steps=20, **how),
        "drift": train(objective="drift", steps=20, **{**how, "batch": 256}),
        "dmd": train(objective={"name": "dmd", "fake_updates": 1, "gan_weight": 0.1}, steps=3, **student),
        "dmd of two steps": train(objective={"name": "dmd", "fake_updates": 1, "steps": 2}, steps=3, **student),
        "progressive": train(objective={"name": "progressive-distillation", "teacher_steps": 2}, steps=3, **student),
    }


KINDS = {
    "flow": {"net"}, "shortcut": {"net"}, "improved": {"net"}, "gan": {"generator"}, "vae": {"decoder"},
    "drift": {"net"}, "dmd": {"net"}, "dmd of two steps": {"net"}, "progressive": {"net"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_one_step_generator_follows_the_distance(bases, kind, tmp_path):
    """Towards points that are shifted and wider; only the networks that samples are drawn from learn."""
    base, reward = bases[kind], f"{__name__}:aim_far"
    new = finetune(
        base, reward=reward, method={"name": "direct", "lr": 1e-3, "batch": 128}, samples=128, iterations=30,
        eval_samples=200, tensorboard=False, out=str(tmp_path), ema=0.0, steps=1 if kind == "flow" else None,
    )  # fmt: skip
    assert new.after["reward"]["value"] > new.before["reward"]["value"] + 1
    assert changed(new, base) == KINDS[kind]
    assert new.steps == (1 if kind in ("flow", "shortcut", "improved") else None)
    assert not trained_features(new.directory)


def changed(new, base):
    """The names of the networks that differ."""
    pairs = {k: zip(net.parameters(), base.nets[k].parameters(), strict=True) for k, net in new.nets.items()}
    return {k for k, weights in pairs.items() if any(not torch.equal(a, b) for a, b in weights)}


def aim_far(x, cond):
    """A reward for the tests above: minus the squared distance to (4, 4)."""
    return -(x - 4).square().sum(1)


def test_the_phase_of_the_generator():
    names = [(o, o.generator_phase) for o in (Flow(), FlowMap(), Drift(), VAE(), GAN(), DMD(), DMD(gan_weight=1.0))]
    assert [name for _, name in names] == ["denoise", "denoise", "drift", "vae", "generator", "generator", "generator"]
    assert all(name in [p.name for p in objective.phases] for objective, name in names)


# ------------------------------------------------------------------------------------------------------------ digits
@pytest.fixture(scope="module")
def digits_map(tmp_path_factory):
    return train(data="digits", backbone={"name": "mlp", "width": 96, "depth": 2}, objective="flow-map", steps=120,
                 batch=128, out=str(tmp_path_factory.mktemp("digits")), **QUIET)  # fmt: skip


@pytest.mark.parametrize(
    ("features", "distance", "accuracy"),
    [("raw", 0.6, 0.1), ("classifier", 0.9, 0.25)],
)
@pytest.mark.slow
def test_digits_are_nearer_to_held_out_ones_by_another_ruler(digits_map, features, distance, accuracy, tmp_path):
    """Fréchet distance in the class scores of an SVM of pixels, and its accuracy: neither was trained on."""
    base, scores = digits_map, DigitScores(load_digits("train"), load_digits("test"))

    def judge(run):
        x = run.sample(500, label=list(range(10)), batch=500, seed=10**6).x.float() / 127.5 - 1
        right = scores.svm.predict(scores.pixels(x)) == (torch.arange(500) % 10).numpy()
        return scores.distance(x), float(right.mean())

    new = finetune(
        base, reward=f"frechet:{features}", samples=256, iterations=40, ema=0.9, eval_samples=100, tensorboard=False,
        method={"lr": 3e-4, "population": 2048}, out=str(tmp_path),
    )  # fmt: skip
    before, after = judge(base), judge(new)
    assert after[0] < distance * before[0], (before, after)
    assert after[1] > before[1] + accuracy, (before, after)
    assert trained_features(new.directory) == [features]
    assert new.after["reward"]["value"] > 0.7 * new.before["reward"]["value"]  # a distance is of all samples


# ------------------------------------------------------------------------------------------------ the infrastructure
def test_a_run_continues_to_the_last_bit_with_its_population(bases, tmp_path):
    how = ["--reward", "frechet", "--samples", "64", "--method.batch", "32", "--method.population", "500",
           "--eval-samples", "50", "--save-every", "2", "--no-tensorboard", "--device", "cpu"]  # fmt: skip
    for name, first in (("whole", 4), ("parts", 2)):
        assert command([str(bases["gan"].directory), *how, f"--iterations={first}", f"--out={tmp_path / name}"]) == 0
    whole, parts = (find_run(tmp_path / name / "latest") for name in ("whole", "parts"))
    assert command(["--resume", str(parts), "--iterations=4"]) == 0
    for file in ("nets.safetensors", "ema-0.99.safetensors", "optim.safetensors", "finetune.safetensors"):
        a, b = (load_file(run / "checkpoints" / "step-0000004" / file) for run in (whole, parts))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), file
    assert int(a["population.n"]) == 500
    log = [r["reward"] for r in read_log(whole) if "reward" in r]
    assert log == [r["reward"] for r in read_log(parts) if "reward" in r]
    assert len(log) == 4


@pytest.mark.parametrize("kind", ["gan", "dmd", "shortcut"])
def test_an_adapter_is_trained_alone(bases, kind, tmp_path):
    pytest.importorskip("peft")
    new = finetune(bases[kind], reward="frechet", method={"lr": 3e-3, "population": 1}, samples=256, iterations=20,
                   eval_samples=200, lora={"rank": 2}, tensorboard=False, out=str(tmp_path), ema=0.0)  # fmt: skip
    stored = load_file(find_run(new.directory) / "latest" / "nets.safetensors")
    assert stored
    assert all("lora_" in k or "finished" in k for k in stored)
    assert new.after["reward"]["value"] > new.before["reward"]["value"]
    assert changed(new, bases[kind]) == KINDS[kind]


def not_differentiable(x, cond):
    """A reward without a gradient."""
    return x.detach().sum(1)


@pytest.mark.parametrize(("kind", "changes", "says"), [
    ("gan", {"steps": 2}, "steps: has no effect on GAN, which draws in one pass"),
    ("gan", {"min_std": 0.2}, "min_std: has no effect on the method direct"),
    ("flow", {"max_kl": 1.0}, "max_kl: has no effect on the method direct"),
    ("flow", {"exploration_noise": "ddim"}, "exploration_noise: has no effect on the method direct"),
    ("gan", {"method": "ddpo"}, "GAN draws in one pass and has no chain .* try --method direct"),
    ("shortcut", {"method": "ddpo"}, "is a flow map, whose jumps are not .* try --method direct"),
    ("gan", {"reward": f"{__name__}:not_differentiable", "method": "direct"}, "has no gradient to follow"),
])  # fmt: skip
def test_what_has_no_effect_or_no_gradient_is_refused(bases, kind, changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        finetune(bases[kind], **{"reward": "frechet", **changes}, out=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_method_of_a_reward():
    assert loop.name_method({"reward": "frechet", "method": {"lr": 1.0}})["method"] == {"name": "direct", "lr": 1.0}
    assert loop.name_method({"reward": "frechet:raw", "method": "mixed"})["method"] == "mixed"
    assert loop.name_method({"reward": "env"}) == {"reward": "env"}
