"""Rewards of pictures, what they cost, and choosing at inference: closed forms first, then the commands."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from genkit.cli.commands.finetune import main as finetune
from genkit.cli.commands.rollout import main as rollout
from genkit.cli.commands.train import main as train
from genkit.core import Batch, Label, Spec, Vector
from genkit.data.codecs import Identity, Pixels
from genkit.diffusion.paths import VP, Linear, ODEOnlyPath
from genkit.diffusion.samplers import Seeds, bind
from genkit.diffusion.value_guidance import value_guidance
from genkit.objectives import Flow
from genkit.rl.finetune import image_rewards as image
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.ddpo import DDPO
from genkit.rl.finetune.divergence import compare_with_reference, gaussian_kl
from genkit.rl.finetune.dppo import DPPO
from genkit.rl.finetune.evaluation import plot_reward_kl
from genkit.rl.finetune.experience import Experience
from genkit.rl.finetune.learner import Learner
from genkit.rl.finetune.noise import FixedNoise, LearnedNoise
from genkit.rl.finetune.tasks import FunctionTask
from genkit.rl.policies.best_of_n import best_of
from genkit.rl.policies.q_function import Decisions, discounted_returns, learn_q, load_q, save_q
from genkit.training.checkpoint import find_checkpoint
from genkit.training.directory import find_run, read_log
from genkit.training.loop import State
from tests.support.exact import F64, Constant, ExactDenoiser, Mixture

PATHS = [Linear(), VP()]
on_paths = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
MEAN, VAR = 0.7, 0.3


def bell(mean, var):
    return Mixture(torch.ones(1, dtype=F64), torch.tensor([[mean]], dtype=F64), torch.tensor([[[var]]], dtype=F64))


# ----------------------------------------------------------------------------------------------------- guided by Q
@on_paths
def test_a_linear_value_gives_the_tilted_law_exactly(path):
    """``N(m, v) exp(s g x)`` is ``N(m + s v g, v)``; the guided denoiser is that law's at every time."""
    slope, scale = -1.3, 0.8
    guided = value_guidance(lambda x, cond: slope * x[:, 0], scale, VAR)(ExactDenoiser(bell(MEAN, VAR), path))
    tilted = ExactDenoiser(bell(MEAN + scale * VAR * slope, VAR), path)
    x = torch.linspace(-3, 3, 12, dtype=F64)[:, None]
    t = torch.linspace(0.05, 1, 12, dtype=F64)
    got, want = guided(x, t, {}), tilted(x, t, {})
    assert torch.allclose(got.x0, want.x0, atol=1e-12)
    assert torch.allclose(got.x1, want.x1, atol=1e-12)


@on_paths
def test_a_quadratic_value_gives_the_tilted_law_after_some_rounds(path):
    """``N(m, v) exp(-s c (x - a)^2 / 2)`` has the precision ``1/v + s c``: a bandit whose best action is known."""
    aim, curve, scale = -1.0, 2.0, 1.2
    value = lambda x, cond: -curve * (x[:, 0] - aim) ** 2 / 2  # noqa: E731
    precise = 1 / VAR + scale * curve
    law = bell((MEAN / VAR + scale * curve * aim) / precise, 1 / precise)
    guided = value_guidance(value, scale, VAR, rounds=200)(ExactDenoiser(bell(MEAN, VAR), path))
    x = torch.linspace(-3, 3, 12, dtype=F64)[:, None]
    t = torch.linspace(0.05, 1, 12, dtype=F64)
    assert torch.allclose(guided(x, t, {}).x0, ExactDenoiser(law, path)(x, t, {}).x0, atol=1e-9)
    z = torch.special.ndtri((torch.arange(301, dtype=F64) + 0.5) / 301)[:, None]
    drawn = bind("heun", 40, value_guidance(value, scale, VAR, rounds=10))(ExactDenoiser(bell(MEAN, VAR), path))(z, {})
    assert float(drawn.mean()) == pytest.approx(float(law.means[0, 0]), abs=0.01)
    assert float(drawn.var()) == pytest.approx(1 / precise, rel=0.05)


def test_value_guidance_refuses_what_it_cannot_do():
    value = lambda x, cond: x.sum(1)  # noqa: E731
    with pytest.raises(ValueError, match="var: given 0; allowed above 0"):
        value_guidance(value, 1.0, 0)
    with pytest.raises(ValueError, match="rounds: given 0"):
        value_guidance(value, 1.0, rounds=0)
    with pytest.raises(ValueError, match="no diffusion"):
        value_guidance(value, 1.0)(ExactDenoiser(bell(0.0, 1.0), ODEOnlyPath(Linear())))


# ----------------------------------------------------------------------------------------------------- best of N
def plain(z, cond, noise=None):
    return z if noise is None else z + 0 * noise(z.shape[1:])


def test_best_of_n_takes_the_largest_of_each_row_whatever_the_batch():
    value = lambda x, cond: x[:, 0] * cond["sign"]  # noqa: E731
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
    draw = Seeds(range(4))
    z = draw((2,))
    best = best_of(plain, value, 5)(z, {"sign": sign}, draw)
    again = Seeds(range(4))
    every = torch.stack([again((2,)) for _ in range(5)])
    want = torch.where(sign > 0, every[:, :, 0].amax(0), every[:, :, 0].amin(0))
    assert torch.equal(best[:, 0], want)
    alone = Seeds([2])
    assert torch.equal(best_of(plain, value, 5)(alone((2,)), {"sign": sign[2:3]}, alone)[0], best[2])
    assert torch.equal(best_of(plain, value, 1)(z, {"sign": sign}, draw), z)
    with pytest.raises(ValueError, match="best_of: given 0"):
        best_of(plain, value, 0)


def test_returns_to_go_by_hand():
    """Two worlds, chunks of two steps, gamma 0.5: the second ends at its third step, what follows is not its own."""
    rewards = np.array([[1, 1], [2, 2], [3, 3], [4, 100], [5, 100]], float)
    ended = np.array([[0, 0], [0, 0], [0, 1], [0, 0], [1, 0]], bool)
    value, valid = discounted_returns(rewards, ended, 2, 0.5)
    assert value.T.tolist() == [[3 + 0.5 * (7 + 0.5 * 5), 7 + 0.5 * 5, 5], [3 + 0.5 * 3, 3, 0]]
    assert valid.T.tolist() == [[True, True, True], [True, True, False]]


OBS = Spec((1, 3), {"obs": Vector((1, 1))})


def test_q_learns_what_followed_and_is_blind_to_what_is_not_done(tmp_path):
    """Returns ``-(first action - obs)^2``: its gradient and its largest are known."""
    g = torch.Generator().manual_seed(0)
    obs, x = torch.rand(2000, 1, 1, generator=g) - 0.5, torch.randn(2000, 1, 3, generator=g)
    returns = 100 - 10 * (x[:, 0, 0] - obs[:, 0, 0]) ** 2
    used = torch.tensor([[1.0, 0.0, 0.0]])
    q, explains = learn_q(OBS, used, Decisions(obs, x, returns), epochs=20, batch=128, lr=3e-3)
    assert explains > 0.9
    here = torch.zeros(5, 1, 3)
    here[:, 0, 0] = torch.linspace(-1, 1, 5)
    other = here + torch.tensor([0.0, 5.0, -5.0])
    said = q(here, {"obs": torch.zeros(5, 1, 1)})
    assert torch.equal(said, q(other, {"obs": torch.zeros(5, 1, 1)}))
    assert int(said.argmax()) == 2
    about = {"weights": "ema", "act_steps": 1}
    save_q(tmp_path, q, {**about, "episodes": 3})
    again = load_q(tmp_path, OBS, about)
    assert torch.equal(again(here, {"obs": torch.zeros(5, 1, 1)}), said)
    with pytest.raises(ValueError, match="was learned with act_steps 1, not 2"):
        load_q(tmp_path, OBS, {"act_steps": 2})
    (tmp_path / "q.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        load_q(tmp_path, OBS, about)
    with pytest.raises(ValueError, match="--fit-q"):
        load_q(tmp_path / "none", OBS, about)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    out = tmp_path_factory.mktemp("policy")
    train(["--data=four-ways", "--data.n=20", "--objective.prediction=x0", "--backbone.width=32", "--backbone.depth=2",
           "--steps=30", "--batch=64", "--sample-every=0", "--no-tensorboard", "--device=cpu", "--precision=fp32",
           "--workers=0", "--out", str(out)])  # fmt: skip
    return find_run(out / "latest")


def test_rollout_learns_q_and_heeds_it(policy, capsys):
    some = [str(policy), "--episodes", "8", "--json", "--no-picture", "--max-steps", "16"]
    with pytest.raises(ValueError, match=r"has no q\.safetensors yet; learn one: --fit-q 500"):
        rollout([*some, "--best-of", "4"])
    found = {}
    for name, more in {
        "plain": [],
        "best": ["--fit-q", "20", "--best-of", "4"],
        "guided": ["--q-guidance", "2"],
    }.items():
        assert rollout([*some, *more]) == 0
        found[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "q_explained_variance" in found["best"]
    assert (policy / "q.safetensors").is_file()
    assert (policy / "rollouts" / "step30-k4-best4-seed100000-n8.json").is_file()
    assert (policy / "rollouts" / "step30-k4-q2-seed100000-n8.json").is_file()
    with pytest.raises(ValueError, match="was learned with act_steps"):
        rollout([*some, "--best-of", "4", "--act-steps", "2"])


# ----------------------------------------------------------------------------------------------------- learning
def learner(net, chain, spec=None, lr=0.1, noise=None):
    optimizers = {"denoise": torch.optim.SGD(net.parameters(), lr=lr, fused=True)}
    flow = Flow(prediction="x0", drop=0.0)
    demos = lambda number, start, stop: Batch(torch.zeros(stop - start, 1))  # noqa: E731
    return Learner(
        flow, State({"net": net}, {}, optimizers), chain, spec or Spec((1,)), demos, 0, noise_optimizer=noise
    )


def test_rewards_stay_in_units_of_the_first_and_a_nat_has_its_price():
    """Rewards a hundred times as large change nothing; ones that have become alike push a hundred times less."""
    z = torch.linspace(-2, 2, 64)[:, None]

    def gradient(method, rewards, spread):
        who = learner(Constant(0.0), Chain.over(Linear(), 1, FixedNoise(1.0)))
        who.reward_std = spread
        task = FunctionTask(lambda x, cond: rewards, "given", Identity(), 64, 1)
        seen = task.collect(who, 0)
        method.update(who, task, seen, 0)
        return float(who.state.nets["net"].theta.detach())

    own = DDPO(lr=0.01, batch=64, kl=0.0)
    first = gradient(own, z[:, 0], 0.0)
    assert abs(first) > 1e-5
    assert gradient(own, 100 * z[:, 0], 0.0) == pytest.approx(first, rel=1e-5)
    assert gradient(own, 0.01 * z[:, 0], float(z.std(correction=0))) == pytest.approx(0.01 * first, rel=1e-4)
    usual = DPPO(lr=0.01, batch=64, epochs=1, bc_coef=0.0, warmup=0)
    assert gradient(usual, 0.01 * z[:, 0], float(z.std(correction=0))) == pytest.approx(first, rel=1e-4)


def test_the_price_of_a_nat_pulls_back_by_its_gradient():
    """Of ``kl (theta - theta0)^2 / (2 std^2)``, where no reward differs."""
    theta0, theta, std, price = 0.2, 0.5, 0.7, 0.3
    who = learner(Constant(theta), Chain.over(Linear(), 1, FixedNoise(std)))
    nn.init.constant_(who.frozen["net"].theta, theta0)
    task = FunctionTask(lambda x, cond: torch.zeros(len(x)), "none", Identity(), 64, 1)
    seen, far = compare_with_reference(who, task.collect(who, 0))
    assert far["kl_reference"] == pytest.approx((theta - theta0) ** 2 / (2 * std**2), rel=1e-6)
    DDPO(lr=0.01, batch=64, kl=price).update(who, task, seen, 0)
    moved = float(who.state.nets["net"].theta.detach()) - theta
    assert moved / 0.01 == pytest.approx(-price * (theta - theta0) / std**2, rel=1e-5)


def test_divergence_of_normals_of_two_widths():
    law = torch.distributions.Normal
    g = torch.Generator().manual_seed(0)
    mean, other = torch.randn(2, 4, 3, generator=g, dtype=F64)
    std, wide = torch.rand(2, 4, 3, generator=g, dtype=F64) + 0.1
    want = torch.distributions.kl_divergence(law(mean, std), law(other, wide)).sum(1)
    assert torch.allclose(gaussian_kl(mean, std, other, wide), want)
    assert torch.allclose(
        gaussian_kl(mean, std[:, :1], other, std[:, :1]), (((mean - other) / std[:, :1]) ** 2).sum(1) / 2
    )


def test_learned_noise_follows_the_gradient_of_the_bandit():
    """Of ``E[-(a - aim)^2] = -(theta - aim)^2 - sigma^2`` by the logarithm of sigma: ``-2 sigma^2``."""
    std, aim, count = 0.8, 1.0, 20_001

    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.zeros((), dtype=F64))

        def forward(self, x, k, cond):
            return self.value.exp().expand_as(x)

    sigma, net = Log(), Constant(0.3)
    chain = dataclasses.replace(Chain.over(Linear(), 1, LearnedNoise(std)), sigma=sigma)
    who = learner(net, chain, noise=torch.optim.SGD(sigma.parameters(), lr=0.01))
    z = torch.special.ndtri((torch.arange(count, dtype=F64) + 0.5) / count)[:, None]
    task = FunctionTask(lambda x, cond: -((x[:, 0] - aim) ** 2), "near", Identity(), count, 1)
    with torch.no_grad():
        walk = chain.sample(who.denoiser, torch.zeros_like(z), noise=lambda shape: z)
        rewards = task.reward(walk.xs[-1], {}).double()
    seen = Experience(walk, {}, rewards - rewards.mean(), None, {})
    DPPO(lr=0.01, batch=count, epochs=1, bc_coef=0.0, warmup=0, clip=10.0).update(who, task, seen, 0)
    want = -2 * std**2 / float(rewards.std(correction=0))
    assert float(sigma.value.detach()) / 0.01 == pytest.approx(want, rel=2e-3)


# ----------------------------------------------------------------------------------------------------- pictures
def test_conditions_that_samples_are_drawn_for():
    spec = Spec((1, 4, 4), {"label": Label(3)})
    never = lambda rows: pytest.fail("asked for data")  # noqa: E731
    scoring = lambda **more: FunctionTask(image.brightness, "", Pixels(), 8, more.pop("group", 1), **more)  # noqa: E731
    assert scoring(group=2).conditions(spec, 8, never)["label"].tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert scoring(label=2).conditions(spec, 3, never)["label"].tolist() == [2, 2, 2]
    free = scoring(unconditional=True).conditions(spec, 4, never)
    assert not free["keep"].any()
    spec.check(free, 4)
    seen = Spec((2,), {"obs": Vector((1, 1))})
    data = {"obs": torch.arange(4.0).reshape(4, 1, 1)}
    got = scoring(group=2).conditions(seen, 8, lambda rows: {k: v[:rows] for k, v in data.items()})
    assert got["obs"].flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_rewards_see_what_a_person_sees():
    """A pixel that is whiter than white is white: no reward for leaving the range."""
    task = FunctionTask(image.brightness, "brightness", Pixels(), 2, 1)
    x = torch.tensor([1.0, 50.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    assert task.reward(x, {}).tolist() == [1.0, 1.0]


def test_reward_against_divergence_is_drawn_once_both_are_known(tmp_path):
    out = tmp_path / "reward-kl.png"
    assert plot_reward_kl([{"step": 1, "reward": 1.0}, {"step": 2, "reward": 2.0}], out) is None
    assert not out.exists()
    records = [{"step": i, "reward": math.log1p(i), "kl_reference": float(i)} for i in range(5)]
    assert plot_reward_kl(records, out) == out
    assert out.stat().st_size > 1000


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    train(["--data=digits", "--objective=flow", "--backbone=mlp", "--backbone.width=32", "--backbone.depth=1",
           "--steps=20", "--sample-every=0", "--no-tensorboard", "--device=cpu", "--precision=fp32", "--workers=0",
           "--out", str(out)])  # fmt: skip
    return find_run(out / "latest")


LIGHT = ["--reward", "genkit.rl.finetune.image_rewards:brightness"]
BRIGHT = [*LIGHT, "--method=ddpo", "--method.lr", "5e-3", "--method.batch", "40", "--method.epochs", "2",
          "--exploration-noise=sde", "--steps", "3", "--min-std", "0.1", "--samples", "120", "--ema", "0.5",
          "--eval-samples", "40", "--no-tensorboard"]  # fmt: skip


def test_pictures_become_brighter_and_the_run_tells_at_what_price(digits, tmp_path):
    assert finetune([str(digits), *BRIGHT, "--method.kl", "0.001", "--iterations", "15", "--out", str(tmp_path)]) == 0
    run = find_run(tmp_path / "latest")
    before, after = (json.loads((run / f"{name}.json").read_text()) for name in ("before", "after"))
    assert after["reward"]["value"] > before["reward"]["value"] + 2 * before["reward_std"]
    assert before.keys() >= {"frechet", "frechet_class", "precision", "recall", "accuracy", "reward_std"}
    assert before["frechet_class"]["low"] <= before["frechet_class"]["value"] <= before["frechet_class"]["high"]
    log = [r for r in read_log(run) if "kl_reference" in r]
    assert log[0]["kl_reference"] == 0 < log[-1]["kl_reference"]
    for name in ("samples/before.png", "samples/after.png", "reward-kl.png"):
        assert (run / name).stat().st_size > 500


def test_it_ends_where_the_divergence_is_too_large_and_resumes_the_same(digits, tmp_path, capsys):
    more = ["--method.kl", "0", "--eval-samples", "0", "--save-every", "2"]
    finetune([str(digits), *BRIGHT, *more, "--max-kl", "5", "--iterations", "10", "--out", str(tmp_path / "a")])
    assert "stopped  at iteration" in capsys.readouterr().out
    run = find_run(tmp_path / "a" / "latest")
    log = [r for r in read_log(run) if "kl_reference" in r]
    assert 1 < len(log) < 10
    assert max(r["kl_reference"] for r in log) <= 5
    finetune([str(digits), *BRIGHT, *more, "--iterations", "4", "--out", str(tmp_path / "b")])
    finetune([str(digits), *BRIGHT, *more, "--iterations", "2", "--out", str(tmp_path / "c")])
    finetune(["--resume", str(tmp_path / "c" / "latest"), "--iterations", "4"])
    b, c = ([r for r in read_log(find_run(tmp_path / x / "latest")) if "kl_reference" in r] for x in "bc")
    assert [r["kl_reference"] for r in b] == [r["kl_reference"] for r in c]


def test_learned_noise_trains_along_and_resumes(policy, tmp_path):
    usual = ["--exploration-noise=learned", "--num-envs", "8", "--num-steps", "4", "--eval-episodes", "0",
             "--method.batch", "64", "--method.warmup", "0", "--save-every", "1", "--no-tensorboard"]  # fmt: skip
    finetune([str(policy), *usual, "--iterations", "2", "--out", str(tmp_path / "a")])
    finetune([str(policy), *usual, "--iterations", "1", "--out", str(tmp_path / "b")])
    finetune(["--resume", str(tmp_path / "b" / "latest"), "--iterations", "2"])
    from safetensors.torch import load_file

    a, b = (load_file(find_checkpoint(find_run(tmp_path / x / "latest")) / "finetune.safetensors") for x in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    last = [k for k in a if k.startswith("noise.") and "last" in k]
    assert last
    assert any(float(a[k].abs().max()) > 0 for k in last)  # it began at zero


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--label", "10", *BRIGHT], r"label: given 10; allowed 0\.\.9"),
        (["--method=rwr", "--exploration-noise=learned", *LIGHT], "exploration_noise: learned has no effect on rwr"),
        (["--method=mixed", "--method.gradient", "through", "--exploration-noise=learned", *LIGHT],
         "exploration_noise: learned is trained by the likelihood ratio"),
    ],
)  # fmt: skip
def test_bad_requests_in_one_line(digits, tmp_path, argv, message):
    with pytest.raises(ValueError, match=message) as e:
        finetune([str(digits), "--eval-samples", "0", "--out", str(tmp_path), *argv])
    assert "\n" not in str(e.value)


def test_labels_have_no_effect_in_an_environment(policy, tmp_path):
    with pytest.raises(ValueError, match="label, unconditional: have no effect in an environment"):
        finetune([str(policy), "--label", "3", "--out", str(tmp_path)])
