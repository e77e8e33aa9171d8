"""Learning from rewards: gradients and optima against closed forms, episodes by hand, the command end to end."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from genkit.backbones import MLP
from genkit.cli.commands.finetune import Finetune, acted, world
from genkit.cli.commands.finetune import main as finetune
from genkit.cli.commands.train import main as train
from genkit.cli.main import main as genkit
from genkit.core import Batch, Spec, Vector, expand
from genkit.data.codecs import Actions, Identity
from genkit.diffusion.paths import Linear
from genkit.envs.four_ways import FourWays
from genkit.objectives import DDPM, EDM, Flow
from genkit.rl.finetune.advantages import normalised, trimmed
from genkit.rl.finetune.chain import NOISES, SDE, Chain, Fixed, Walk
from genkit.rl.finetune.dppo import DPPO, surrogate
from genkit.rl.finetune.learner import Critic, Experience, Learner, divergence, with_reference
from genkit.rl.finetune.methods import METHODS
from genkit.rl.finetune.mixed import Mixed, through
from genkit.rl.finetune.rewards import Acting, OneWay, Progress, Scoring, Success
from genkit.rl.finetune.rwr import RWR, weights_of
from genkit.rl.policies.policy import Policy
from genkit.training.checkpoint import find_checkpoint
from genkit.training.directory import find_run, read_log
from genkit.training.loop import State
from genkit.training.run import load_run
from tests.support.exact import F64, Constant, ExactDenoiser, Mixture

PLAIN = Flow(prediction="x0", cond_dropout=0.0)


def learner(nets, chain, spec=None, objective=PLAIN, demos=None, critic=None, optimizer=torch.optim.SGD):
    optimizers = {"denoise": optimizer(nets["net"].parameters(), lr=0.1)}
    values = None if critic is None else torch.optim.Adam(critic.parameters(), lr=1e-3)
    return Learner(objective, State(nets, {}, optimizers), chain, spec or Spec((1,)), demos, 0, critic, values)


# ------------------------------------------------------------------------------------------------- gradients
THETA, AIM, STD, COUNT = 0.3, 1.0, 2.0, 20_001


def bandit():
    """One step, one number, action ``theta + std z``, reward ``-(a - aim)^2``; z are the quantiles of a normal, so
    that means over the rows are integrals."""
    z = torch.special.ndtri((torch.arange(COUNT, dtype=F64) + 0.5) / COUNT)[:, None]
    a = THETA + STD * z
    walk = Walk(torch.stack([torch.zeros_like(a), a]), torch.full_like(a, THETA)[None])
    seen = Experience(walk, {}, -((a[:, 0] - AIM) ** 2), None, {})
    away = THETA - AIM
    slope = -2 * away  # of E[R] = -(theta - aim)^2 - std^2
    spread = math.sqrt(4 * away**2 * STD**2 + 2 * STD**4)  # the deviation of R
    return seen, slope / spread


@pytest.mark.parametrize("name", ["dppo", "mixed"])
def test_policy_gradient_is_that_of_the_gaussian_bandit(name):
    seen, slope = bandit()
    usual = {"lr": 0.01, "batch": COUNT, "warmup": 0}
    method = {"dppo": DPPO(**usual, epochs=1, clone=0.0), "mixed": Mixed(**usual)}[name]
    net = Constant(THETA)
    demos = lambda number, rows: Batch(torch.full((rows, 1), THETA, dtype=F64))  # noqa: E731  cloned already: slope 0
    method.update(learner({"net": net}, Chain.over(Linear(), 1, Fixed(STD)), demos=demos), None, seen, 0)
    assert float(net.theta.detach() - THETA) / 0.01 == pytest.approx(slope, rel=2e-3)


def test_an_iteration_of_mixed_goes_no_further_than_its_clip():
    """A hundred steps on the same walks. Without a clip they go all the way to the best mean, which is AIM."""
    seen, _ = bandit()
    moved = []
    for clip in (0.05, 1e9):
        net = Constant(THETA)
        own = lambda number, rows, net=net: Batch(net.theta.detach().expand(rows, 1))  # noqa: E731  no pull from them
        who = learner({"net": net}, Chain.over(Linear(), 1, Fixed(STD)), demos=own)
        Mixed(lr=0.2, batch=COUNT // 100, warmup=0, clip=clip).update(who, None, seen, 0)
        moved.append(float(net.theta.detach()) - THETA)
    assert 0 < moved[0] < 0.25 < 0.5 < moved[1]


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_lambda_weighs_the_reward_against_the_demonstrations(weight):
    """The slope of ``(theta - data)^2 - lambda E[R] / std(R)``, both parts in closed form."""
    seen, slope = bandit()
    data, net = 0.1, Constant(THETA)
    demos = lambda number, rows: Batch(torch.full((rows, 1), data, dtype=F64))  # noqa: E731
    near = Flow(prediction="x0", loss_space="x0", cond_dropout=0.0)
    who = learner({"net": net}, Chain.over(Linear(), 1, Fixed(STD)), objective=near, demos=demos)
    Mixed(lr=0.01, batch=COUNT, warmup=0, weight=weight).update(who, None, seen, 0)
    assert float(net.theta.detach() - THETA) / 0.01 == pytest.approx(weight * slope - 2 * (THETA - data), rel=2e-3)


def test_discount_over_denoising_steps_and_the_last_ones_alone():
    """Discounted by 0 the last step alone is credited, as it is where it alone is trained, of half as many rows."""
    moved = []
    for more in ({"denoise_gamma": 0.0, "last": None}, {"last": 1}, {"last": 2, "denoise_gamma": 1.0}):
        net = Constant(THETA)
        who = learner({"net": net}, Chain.over(Linear(), 2, Fixed(STD)), demos=None)
        seen = Scoring(lambda x, cond: -((x[:, 0] - AIM) ** 2), "near", Identity(), 512, 1).collect(who, 0)
        DPPO(lr=0.01, batch=2048, warmup=0, epochs=1, clone=0.0, **more).update(who, None, seen, 0)
        moved.append(float(net.theta.detach() - THETA))
    assert moved[1] == pytest.approx(2 * moved[0], rel=1e-6)
    assert moved[2] != pytest.approx(moved[0], rel=0.01)


class Bent(nn.Module):
    """A network of two numbers that sees x and t."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.8, -0.4], dtype=F64))

    def forward(self, x, t, cond):
        return torch.tanh(self.w[0] * x + self.w[1] * expand(t, x))


@pytest.mark.parametrize("last", [4, 2, 1])
def test_reward_gradient_through_the_chain_is_the_finite_difference(last):
    """Of the last steps: the walk to them is that of the weights as they are, and does not move with them."""
    chain = Chain.over(Linear(), 4, SDE(0.5), floor=0.1)
    z = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    drawn = torch.randn(4, 6, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    reward = lambda x: (x.sin().sum(1) + x[:, 0] * x[:, 1]).mean()  # noqa: E731

    def noise():
        left = iter(drawn)
        return lambda shape: next(left)

    grads = []
    for save in (True, False):
        net = Bent()
        reward(through(chain, PLAIN.denoiser(net), z, {}, noise(), last, save)).backward()
        grads.append(net.w.grad)
    base, h, slopes = Bent(), 1e-5, []
    with torch.no_grad():
        for i in range(2):
            ends = []
            for sign in (1, -1):
                net, x, draw = Bent(), z, noise()
                net.w[i] += sign * h
                for k in range(4):
                    mean, std = chain.mean_std(PLAIN.denoiser(net if k >= 4 - last else base), x, k)
                    x = mean + std * draw(())
                ends.append(float(reward(x)))
            slopes.append((ends[0] - ends[1]) / (2 * h))
    assert grads[0].tolist() == pytest.approx(slopes, rel=1e-6)
    assert torch.equal(*grads)


def test_surrogate_by_hand():
    ratio, gain = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.05]), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    assert surrogate(ratio, gain, 0.1).tolist() == pytest.approx([1.1, -1.5, 0.5, -0.9, 2.1])


def test_divergence_is_the_normals():
    chain = Chain.over(Linear(), 3, SDE(0.5), floor=0.2)
    a, b = torch.randn(2, 3, 4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    got = divergence(chain, a, b, 2)
    law = torch.distributions.Normal
    want = sum(
        torch.distributions.kl_divergence(law(a[k], chain.links[k].std), law(b[k], chain.links[k].std)).sum(1)
        for k in (1, 2)
    )
    assert torch.allclose(got, want)


@pytest.fixture
def _doubles():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_doubles")
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    "objective", [PLAIN, Flow(cond_dropout=0.0), DDPM(), EDM()], ids=["x0", "velocity", "ddpm", "edm"]
)
def test_nothing_is_clipped_before_the_first_step(objective, noise):
    """The ratios of unchanged weights are 1, whatever the noise and the objective, rows at steps of their own."""
    spec = Spec((3,))
    torch.manual_seed(0)
    nets = {"net": MLP(width=16, depth=1).denoiser(spec)}
    for p in nets["net"].parameters():
        nn.init.normal_(p, std=0.3)
    chain = Chain.over(objective.denoiser(nets["net"]).path, 5, NOISES[noise](), floor=0.05)
    who = learner(nets, chain, spec, objective)
    seen = Scoring(lambda x, cond: x.sum(1), "sum", Identity(), 64, 1).collect(who, 0)
    logs = DPPO(lr=1e-20, epochs=1, batch=50, clip=1e-6, clone=0.0, last=None).update(who, None, seen, 0)
    assert logs["clipped"] == 0
    assert logs["kl_step"] < 1e-12
    assert with_reference(who, seen)[1]["kl_reference"] < 1e-12


def test_reward_weighted_regression_ends_at_the_tilted_law():
    """With R linear, p0 exp(R / tau) of a normal mixture is one again, in closed form: its posterior mean makes the
    weighted regression's slope vanish in any direction, and that of p0 does not."""
    means = torch.tensor([[-1.0], [1.2]], dtype=F64)
    var, tau, slope = 0.2, 0.7, 0.9
    p0 = Mixture(torch.tensor([0.6, 0.4], dtype=F64), means, torch.full((2, 1, 1), var, dtype=F64))
    s = slope / tau
    heavier = p0.weights * (s * means[:, 0] + s**2 * var / 2).exp()
    tilted = Mixture(heavier / heavier.sum(), means + s * var, p0.covs)
    x = p0.sample(200_000)[0]
    weight = weights_of(slope * x[:, 0], tau)
    assert float(weight.mean()) == pytest.approx(1)

    class Says(nn.Module):
        def __init__(self, law):
            super().__init__()
            self.law, self.off = law, nn.Parameter(torch.zeros(3, dtype=F64))

        def forward(self, x, t, cond):
            features = torch.stack([torch.ones_like(x), x, x.sin()])
            return ExactDenoiser(self.law, Linear())(x, t, {}).x0 + (self.off[:, None, None] * features).sum(0)

    found = {}
    for name, law in (("tilted", tilted), ("p0", p0)):
        torch.manual_seed(0)
        net = Says(law)
        who = learner({"net": net}, Chain.over(Linear(), 1, Fixed()))
        RWR(demos=0.0).loss(who, Batch(x, {}, weight), torch.arange(len(x)), ()).backward()
        found[name] = float(net.off.grad.norm())
    assert found["tilted"] < 0.05 * found["p0"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_raises_a_reward(name):
    spec, aim = Spec((2,)), torch.tensor([0.8, -0.5])
    torch.manual_seed(0)
    nets = {"net": MLP(width=32, depth=1).denoiser(spec)}
    demos = lambda number, rows: Batch(torch.zeros(rows, 2))  # noqa: E731
    more = {"dppo": {"clone": 0.0}, "ddpo": {"epochs": 5, "kl": 0.0}, "mixed": {"weight": 3.0}, "rwr": {"demos": 0.1}}[
        name
    ]
    who = learner(nets, Chain.over(Linear(), 2, Fixed(0.3)), spec, demos=demos, optimizer=torch.optim.Adam)
    task = Scoring(lambda x, cond: -((x - aim) ** 2).sum(1), "near", Identity(), 256, 1)
    method = METHODS[name](lr=1e-2, batch=256, warmup=0, clone_batch=16, **more)
    rewards = []
    for i in range(15):
        seen = task.collect(who, i)
        method.update(who, task, seen, i)
        rewards.append(seen.logs["reward"])
    assert rewards[0] < -0.9
    assert rewards[-1] > -0.6  # noise alone costs 0.18, or more where two steps add up


def test_through_follows_the_gradient_of_a_reward():
    spec = Spec((2,))
    torch.manual_seed(0)
    nets = {"net": MLP(width=32, depth=1).denoiser(spec)}
    who = learner(nets, Chain.over(Linear(), 2, Fixed(0.0)), spec, optimizer=torch.optim.Adam,
                  demos=lambda number, rows: Batch(torch.zeros(rows, 2)))  # fmt: skip
    task = Scoring(lambda x, cond: -((x - 0.5) ** 2).sum(1), "near", Identity(), 256, 1)
    method = Mixed(gradient="through", weight=10.0, lr=1e-2, batch=64, warmup=0, clone_batch=16)
    method.check(who.chain, task)
    before = task.collect(who, 0)
    for i in range(10):
        method.update(who, task, task.collect(who, i), i)
    assert task.collect(who, 0).logs["reward"] > before.logs["reward"] + 0.2


# ------------------------------------------------------------------------------------------------- episodes
class Clock:
    """N worlds of one number, the time; a step is worth 1, and the time limit (or, if so told, the world) ends it."""

    obs_dim = action_dim = 1

    def __init__(self, num, max_steps, terminates=False):
        self.num, self.max_steps, self.terminates = num, max_steps, terminates
        self.time = np.zeros(num)

    def reset(self, seeds, rows=None):
        self.time[range(self.num) if rows is None else rows] = 0
        return self.time[:, None].copy()

    def step(self, actions):
        ended = self.time >= self.max_steps
        self.time = np.where(ended, self.time, self.time + 1)
        now = ~ended & (self.time >= self.max_steps)
        no = np.zeros(self.num, bool)
        return (
            self.time[:, None].copy(),
            1.0 - ended,
            now if self.terminates else no,
            no if self.terminates else now,
            {},
        )


class Flat(Critic):
    """Knows no better than that all is worth 3."""

    def forward(self, obs):
        return torch.full((len(obs),), 3.0)


def acting(env, num, decisions, lam=0.0, act_steps=2, spec=None, lost=None):
    spec = spec or Spec((1, 2), {"obs": Vector((1, 1))})
    nets = {"net": MLP(width=8, depth=1).denoiser(spec)}
    critic = Flat(spec)
    critic.scale.fill_(1.0)
    who = learner(nets, Chain.over(Linear(), 1, Fixed(0.1)), spec, critic=critic)
    task = Acting(env, Actions((0.0,), (1.0,)), act_steps, decisions, 0.5, lam, lost)
    task.begin(who, 0)
    return task, who


@pytest.mark.parametrize("terminates", [True, False])
def test_time_limits_are_bootstrapped_from_and_ends_are_not(terminates):
    """One world of five steps, two to a decision: of three decisions the last brings 1 and ends the episode."""
    task, who = acting(Clock(1, 5, terminates), 1, 6)
    seen = task.collect(who, 0)
    goes_on, end = 2 + 0.5 * 3 - 3, 1 - 3 + (0 if terminates else 0.5 * 3)
    assert seen.advantages.tolist() == [goes_on, goes_on, end] * 2
    assert seen.cond["obs"].flatten().tolist() == [0, 2, 4, 0, 2, 4]
    assert torch.equal(seen.returns, seen.advantages + 3)
    assert seen.logs == {"reward": 10.0, "episodes": 2.0, "return": 5.0}  # no success: this world knows of none


def test_first_episodes_are_cut_at_ages_of_their_own():
    task, who = acting(Clock(4, 8), 4, 4)
    obs = task.collect(who, 0).cond["obs"].reshape(4, 4)
    assert obs.T.tolist() == [[0, 0, 2, 4], [0, 2, 0, 2], [0, 2, 4, 0], [0, 2, 4, 6]]
    assert task.collect(who, 1).cond["obs"].reshape(4, 4)[0].tolist() == [6, 4, 2, 0]


def test_cut_episodes_are_not_counted_but_bootstrapped():
    task, who = acting(Clock(4, 8), 4, 4)
    seen = task.collect(who, 0)
    assert seen.advantages.tolist() == [0.5] * 16
    assert seen.logs["episodes"] == 1


def test_one_way_alone_is_worth_something():
    from genkit.envs.four_ways import FourWays, FourWaysExpert

    env = OneWay(FourWays(8), 2)
    guide = FourWaysExpert(8)
    seeds = list(range(8))
    obs = env.reset(seeds)
    guide.reset(seeds)
    total, success = np.zeros(8), np.zeros(8, bool)
    for _ in range(80):
        obs, reward, _, _, info = env.step(guide.act(obs))
        total += reward
        success |= info["success"]
    assert total.tolist() == [0, 0, 1, 0] * 2
    assert success.tolist() == [False, False, True, False] * 2
    with pytest.raises(ValueError, match=r"mode: given 4; allowed 0\.\.3"):
        OneWay(FourWays(2), 4)


class Nearby:
    """Two worlds that pay 0.9 a step for being near. The first succeeds in its third step, and says so from then on;
    without ``says`` neither says anything."""

    num, obs_dim, action_dim, max_steps, at = 2, 1, 1, 5, 0

    def __init__(self, says=True):
        self.says = says

    def reset(self, seeds, rows=None):
        self.at = 0
        return np.zeros((2, 1))

    def step(self, actions):
        self.at += 1
        good = np.array([self.at >= 3, False])
        return np.zeros((2, 1)), np.full(2, 0.9), np.zeros(2, bool), np.full(2, self.at == 5), (
            {"success": good.astype(float)} if self.says else {}
        )  # fmt: skip


def test_success_pays_once_and_nothing_else_does():
    env = Success(Nearby())
    for _ in range(2):  # and again after a reset
        env.reset([0, 1])
        paid = [env.step(np.zeros((2, 1)))[1].tolist() for _ in range(5)]
        assert paid == [[0, 0], [0, 0], [1, 0], [0, 0], [0, 0]]
    env.reset([1], [1])  # of the other row: what the first had, it has had
    assert [env.step(np.zeros((2, 1)))[1].tolist() for _ in range(5)] == [[0, 0]] * 5
    with pytest.raises(ValueError, match="reward: this environment does not say"):
        Success(Nearby(says=False))


class Rising(Nearby):
    """What a step is worth rises to 0.6, falls, and comes to 1 with success."""

    def step(self, actions):
        obs, _, terminated, truncated, info = super().step(actions)
        return obs, np.array([[0.2, 0.6, 1.0, 1.0, 0.5][self.at - 1], 0.3]), terminated, truncated, info


def test_progress_pays_for_coming_near_and_not_for_being_there():
    env = Progress(Rising())
    for _ in range(2):
        env.reset([0, 1])
        paid = np.array([env.step(np.zeros((2, 1)))[1] for _ in range(5)])
        assert np.allclose(paid[:, 0], [0.2, 0.4, 0.4 + 1, 0, -0.5])
        assert np.allclose(paid[:, 1], [0.3, 0, 0, 0, 0])
    env.reset([1], [1])
    assert np.allclose(env.step(np.zeros((2, 1)))[1], [0.2 - 0.5, 0.3])
    with pytest.raises(ValueError, match="reward: this environment does not say"):
        Progress(Nearby(says=False))


def test_what_is_paid_is_what_was_asked_for(policy):
    run = load_run(policy, device="cpu")
    actor = Policy.load(run)
    asked = Finetune(reward="progress", steps=2, eval_episodes=4)
    assert type(world(asked, actor, 2)) is Progress
    assert type(world(replace(asked, reward="success"), actor, 2)) is Success
    assert type(world(replace(asked, reward="env"), actor, 2)) is FourWays
    one = world(replace(asked, mode=1), actor, 2)
    assert isinstance(one, OneWay)
    assert type(one.env) is Progress
    found = [acted(replace(asked, reward=name), run, run.nets, range(4)) for name in ("env", "success")]
    assert [("best_reward" in f) for f in found] == [True, False]
    assert found[0]["success"] == found[1]["success"]
    assert found[1]["success"]["value"] == found[1]["return"]["value"]


# ------------------------------------------------------------------------------------------------- the command
def nan_reward(x, cond):
    return torch.where(torch.arange(len(x)) == 3, math.nan, x.flatten(1).sum(1))


def flat_reward(x, cond):
    return x.mean()


def height(x, cond):
    return x[:, 1].mean(1)


SMALL = ["--num", "8", "--decisions", "4", "--eval-episodes", "8", "--method.batch", "64", "--method.warmup", "1",
         "--save-every", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    out = tmp_path_factory.mktemp("policy")
    train(["--data=four-ways", "--data.n=20", "--objective.prediction=x0", "--backbone.width=32", "--backbone.depth=2",
           "--steps=30", "--batch=64", "--sample-every=0", "--no-tensorboard", "--device=cpu", "--precision=fp32",
           "--workers=0", "--out", str(out)])  # fmt: skip
    return find_run(out / "latest")


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    out = tmp_path_factory.mktemp("moons")
    train(["--data=moons", "--backbone.width=16", "--backbone.depth=1", "--steps=2", "--sample-every=0",
           "--no-tensorboard", "--device=cpu", "--out", str(out)])  # fmt: skip
    return find_run(out / "latest")


def test_a_resumed_run_is_the_run_that_was_never_stopped(policy, tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    finetune([str(policy), "--iterations", "4", "--out", str(whole), *SMALL])
    finetune([str(policy), "--iterations", "2", "--out", str(part), *SMALL])
    finetune(["--resume", str(part / "latest"), "--iterations", "4"])
    a, b = (find_checkpoint(find_run(p / "latest")) for p in (whole, part))
    for file in ("nets.safetensors", "ema-0.99.safetensors", "optim.safetensors", "finetune.safetensors"):
        x, y = load_file(a / file), load_file(b / file)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x), file
    run = load_run(whole / "latest")
    old = load_run(policy)
    assert run.step == 4
    assert run.weights.endswith("ema-0.99.safetensors")
    assert any(
        not torch.equal(x, y) for x, y in zip(run.nets["net"].parameters(), old.nets["net"].parameters(), strict=True)
    )
    log = read_log(run.directory)
    assert {"before/success", "before/mode_entropy_bits"} <= log[0].keys()
    assert {"after/success", "after/mode_entropy_bits"} <= log[-1].keys()
    assert [r["step"] for r in log] == [0, 1, 2, 3, 4, 4]
    assert log[1]["kl_reference"] == log[2]["kl_reference"] == 0  # the critic warms up alone
    assert log[3]["kl_reference"] > 0
    assert genkit(["info", str(whole / "latest")]) == 0
    assert "after/success" in capsys.readouterr().out
    assert genkit(["rollout", str(whole / "latest"), "--episodes", "2", "--json", "--no-picture"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 2


def test_a_function_is_a_reward_too(policy, tmp_path):
    finetune([str(policy), "--reward", "test_finetune:height", "--iterations", "6", "--samples", "128",
              "--method.lr", "2e-3", "--method.batch", "256", "--method.clone", "0",
              "--out", str(tmp_path)])  # fmt: skip
    log = [r for r in read_log(find_run(tmp_path / "latest")) if "reward" in r]
    assert log[-1]["reward"] > log[0]["reward"] + log[0]["reward_std"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reward", "test_finetune:nan_reward"], "reward: test_finetune:nan_reward gave nan for sample 3"),
        (["--reward", "test_finetune:flat_reward"], r"reward: test_finetune:flat_reward gave \(\) for 250 samples"),
        (
            ["--reward", "brightness"],
            "reward: given 'brightness'; allowed: env, success, progress, or package.module:function",
        ),
        (["--reward", "no_such_module:f"], "reward: given no_such_module:f; there is no module no_such_module"),
        (["--reward", "test_finetune:nothing"], "the module has no such function"),
        (["--method=ppo"], "method: given 'ppo'; allowed: dppo, ddpo, mixed, rwr"),
        (["--noise=brown"], "noise: given 'brown'; allowed: fixed, ddim, sde"),
        (["--env", "five-ways"], "five-ways"),
        (["--mode", "7"], r"mode: given 7; allowed 0\.\.3"),
        (["--noise=ddim", "--floor", "0"], "noise: step 4 of 4 has none"),
        (["--method=mixed", "--method.gradient", "through"], "an environment has no gradient; allowed: ratio"),
        (["--method.last", "5"], "last: given 5; allowed 1 … 4"),
        (["--samples", "10", "--group", "3", "--reward", "test_finetune:height"], "group: given 3 of 10 samples"),
        (["--lost", "8", "--reward", "test_finetune:height"], "lost: have no effect where the reward is a function"),
    ],
)
def test_bad_requests_in_one_line(policy, tmp_path, argv, message):
    with pytest.raises(ValueError, match=message) as e:
        finetune([str(policy), "--eval-episodes", "0", "--out", str(tmp_path), *argv])
    assert "\n" not in str(e.value)


def test_runs_that_cannot_be_improved(moons, policy, tmp_path):
    with pytest.raises(ValueError, match="not actions given obs"):
        finetune([str(moons), "--out", str(tmp_path)])
    with pytest.raises(ValueError, match=r"it has no finetune\.yaml"):
        finetune(["--resume", str(policy)])
    with pytest.raises(ValueError, match="run: not given"):
        finetune([])


# ------------------------------------------------------------------------------------------------- pictures
def test_rewards_of_pictures():
    from genkit.rl.finetune import image_rewards as image

    flat = torch.full((1, 3, 16, 16), 0.25)
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    both = torch.cat([flat, noise])
    assert image.brightness(both, {})[0] == 0.25
    assert torch.equal(image.darkness(both, {}), -image.brightness(both, {}))
    sizes = image.incompressibility(both[:, :1], {})
    assert 0.2 < float(sizes[0]) < float(sizes[1]) < 2  # kilobytes: a header, and what cannot be compressed
    assert torch.equal(image.compressibility(both[:, :1], {}), -sizes)
    assert image.compressibility(both, {}).shape == (2,)


@pytest.mark.slow
def test_the_judge_knows_an_eight():
    from genkit.core import Draw
    from genkit.data import DATA
    from genkit.rl.finetune import image_rewards as image

    data = DATA["digits"]().load("test")
    batch = data.batch(torch.arange(200), Draw((0,), 0, 200))
    x = (batch.x.float() / 255).requires_grad_()
    said = image.eight(x, {})
    is_eight = batch.cond["label"] == 8
    assert float(said[is_eight].mean()) > float(said[~is_eight].mean()) + 2
    assert float(torch.autograd.grad(said.sum(), x)[0].abs().sum()) > 0


# ------------------------------------------------------------------------------------------------- what a fall does
def test_rare_advantages_become_the_quantiles():
    a = torch.cat([torch.linspace(-1, 1, 201, dtype=F64), torch.tensor([-500.0], dtype=F64)])
    cut = trimmed(a, 0.05)
    low, high = np.quantile(a.numpy(), [0.05, 0.95])
    assert cut.numpy() == pytest.approx(a.numpy().clip(low, high))
    assert float(normalised(cut).max()) > 1.4  # beside the fall, uncut: 0.08
    assert trimmed(a, 0.0) is a


def test_an_update_that_trims_is_that_of_trimmed_advantages():
    seen, _ = bandit()
    moved = {}
    for name, trim, advantages in (
        ("asked", 0.1, seen.advantages),
        ("by hand", 0.0, trimmed(seen.advantages, 0.1)),
        ("not", 0.0, seen.advantages),
    ):
        net = Constant(THETA)
        method = DPPO(lr=0.01, batch=COUNT, warmup=0, epochs=1, clone=0.0, trim=trim)
        who = learner({"net": net}, Chain.over(Linear(), 1, Fixed(STD)))
        method.update(who, None, seen._replace(advantages=advantages), 0)
        moved[name] = float(net.theta.detach() - THETA)
    assert moved["asked"] == moved["by hand"]
    assert abs(moved["asked"] - moved["not"]) > 1e-4


def test_the_learning_rate_rises_after_the_critics_warm_up():
    method = DPPO(lr=0.8, warmup=2, ramp=3)
    assert [method.rate(i) for i in range(2, 8)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert DPPO(lr=0.8, warmup=2).rate(2) == 0.8
    seen, _ = bandit()
    moved = []
    for ramp in (0, 3):
        net = Constant(THETA)
        method = DPPO(lr=0.01, batch=COUNT, warmup=0, epochs=1, clone=0.0, ramp=ramp)
        method.update(learner({"net": net}, Chain.over(Linear(), 1, Fixed(STD))), None, seen, 0)
        moved.append(float(net.theta.detach() - THETA))
    assert moved[1] == pytest.approx(moved[0] / 4)


@pytest.mark.parametrize("terminates", [True, False])
def test_an_episode_that_is_lost_ends_and_is_not_bootstrapped(terminates):
    """The clock is at 4 after two decisions, 1.5 scales of 2 from the demonstrations' 1; it would go on to 8."""
    spec = Spec((1, 2), {"obs": Vector((1, 1), (1.0,), (2.0,))})
    task, who = acting(Clock(1, 8, terminates), 1, 4, spec=spec, lost=1.4)
    seen = task.collect(who, 0)
    goes_on, end = 2 + 0.5 * 3 - 3, 2 - 3
    assert seen.cond["obs"].flatten().tolist() == [0, 2, 0, 2]
    assert seen.advantages.tolist() == [goes_on, end] * 2
    assert seen.logs == {"reward": 8.0, "episodes": 2.0, "return": 4.0}
