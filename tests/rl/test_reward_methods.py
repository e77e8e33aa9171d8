"""Reward methods: gradients and optima against closed forms."""

import dataclasses

import pytest
import torch
from torch import nn

from genkit.backbones import MLP
from genkit.core import Batch, Spec, expand
from genkit.data.codecs import Identity
from genkit.diffusion.paths import Linear
from genkit.objectives import DDPM, EDM, Flow
from genkit.rl.finetune.advantages import clip_quantiles
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.ddpo import DDPO
from genkit.rl.finetune.divergence import compare_with_reference
from genkit.rl.finetune.dppo import DPPO, clipped_surrogate
from genkit.rl.finetune.experience import Experience
from genkit.rl.finetune.methods import METHODS
from genkit.rl.finetune.mixed import Mixed, sample_differentiably
from genkit.rl.finetune.noise import NOISES, FixedNoise, LearnedNoise, SDENoise
from genkit.rl.finetune.rwr import RWR, reward_weights
from genkit.rl.finetune.tasks import FunctionTask
from tests.support.exact import F64, Constant, ExactDenoiser, Mixture
from tests.support.learning import AIM, COUNT, PLAIN, STD, THETA, bandit, constant_demos, make_learner, steps_of


@pytest.mark.parametrize("name", ["dppo", "mixed"])
def test_policy_gradient_is_that_of_the_gaussian_bandit(name):
    experience, slope = bandit()
    settings = {"lr": 0.01, "batch": COUNT, "warmup": 0}
    method = {"dppo": DPPO(**settings, epochs=1, bc_coef=0.0), "mixed": Mixed(**settings)}[name]
    net = Constant(THETA)
    demos = constant_demos(THETA, dtype=F64)  # already what the network says: no gradient
    method.update(
        make_learner({"net": net}, Chain.on_grid(Linear(), 1, FixedNoise(STD)), demos=demos), None, experience, 0
    )
    assert float(net.theta.detach() - THETA) / 0.01 == pytest.approx(slope, rel=2e-3)


def test_an_iteration_of_mixed_goes_no_further_than_its_clip():
    """A hundred steps on the same trajectories. Without a clip they go all the way to the best mean, which is AIM."""
    experience, _ = bandit()
    moved = []
    for clip in (0.05, 1e9):
        net = Constant(THETA)
        own = lambda number, start, stop, net=net: Batch(net.theta.detach().expand(stop - start, 1))  # noqa: E731  no pull from them
        learner = make_learner({"net": net}, Chain.on_grid(Linear(), 1, FixedNoise(STD)), demos=own)
        Mixed(lr=0.2, batch=COUNT // 100, warmup=0, clip=clip).update(learner, None, experience, 0)
        moved.append(float(net.theta.detach()) - THETA)
    assert 0 < moved[0] < 0.25 < 0.5 < moved[1]


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_lambda_weighs_the_reward_against_the_demonstrations(weight):
    """The slope of ``(theta - data)^2 - lambda E[R] / std(R)``, both parts in closed form."""
    experience, slope = bandit()
    data, net = 0.1, Constant(THETA)
    demos = constant_demos(data, dtype=F64)
    near = Flow(prediction="x0", loss_space="x0", cond_dropout=0.0)
    learner = make_learner({"net": net}, Chain.on_grid(Linear(), 1, FixedNoise(STD)), objective=near, demos=demos)
    Mixed(lr=0.01, batch=COUNT, warmup=0, weight=weight).update(learner, None, experience, 0)
    assert float(net.theta.detach() - THETA) / 0.01 == pytest.approx(weight * slope - 2 * (THETA - data), rel=2e-3)


def test_discount_over_denoising_steps_and_the_last_ones_alone():
    """Discounted by 0 the last step alone is credited, as it is where it alone is trained, of half as many rows."""
    moved = []
    for more in (
        {"denoise_gamma": 0.0, "ft_denoising_steps": None},
        {"ft_denoising_steps": 1},
        {"ft_denoising_steps": 2, "denoise_gamma": 1.0},
    ):
        net = Constant(THETA)
        learner = make_learner({"net": net}, Chain.on_grid(Linear(), 2, FixedNoise(STD)), demos=None)
        experience = FunctionTask(lambda x, cond: -((x[:, 0] - AIM) ** 2), "near", Identity(), 512, 1).collect(
            learner, 0
        )
        DPPO(lr=0.01, batch=2048, warmup=0, epochs=1, bc_coef=0.0, **more).update(learner, None, experience, 0)
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
    """Of the last steps: the trajectory to them is that of the weights as they are, and does not move with them."""
    chain = Chain.on_grid(Linear(), 4, SDENoise(0.5), min_std=0.1)
    z = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    drawn = torch.randn(4, 6, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    reward = lambda x: (x.sin().sum(1) + x[:, 0] * x[:, 1]).mean()  # noqa: E731

    def noise():
        left = iter(drawn)
        return lambda shape: next(left)

    grads = []
    for save in (True, False):
        net = Bent()
        reward(sample_differentiably(chain, PLAIN.denoiser(net), z, {}, noise(), last, save)).backward()
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
    assert clipped_surrogate(ratio, gain, 0.1).tolist() == pytest.approx([1.1, -1.5, 0.5, -0.9, 2.1])


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
    chain = Chain.on_grid(objective.denoiser(nets["net"]).path, 5, NOISES[noise](), min_std=0.05)
    learner = make_learner(nets, chain, spec, objective)
    experience = FunctionTask(lambda x, cond: x.sum(1), "sum", Identity(), 64, 1).collect(learner, 0)
    logs = DPPO(lr=1e-20, epochs=1, batch=50, clip=1e-6, bc_coef=0.0, ft_denoising_steps=None).update(
        learner, None, experience, 0
    )
    assert logs["clipped"] == 0
    assert logs["kl_step"] < 1e-12
    assert compare_with_reference(learner, experience)[1]["kl_reference"] < 1e-12


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
    weight = reward_weights(slope * x[:, 0], tau)
    assert float(weight.mean()) == pytest.approx(1)

    class Shifted(nn.Module):
        def __init__(self, law):
            super().__init__()
            self.law, self.off = law, nn.Parameter(torch.zeros(3, dtype=F64))

        def forward(self, x, t, cond):
            features = torch.stack([torch.ones_like(x), x, x.sin()])
            return ExactDenoiser(self.law, Linear())(x, t, {}).x0 + (self.off[:, None, None] * features).sum(0)

    norms = {}
    for name, law in (("tilted", tilted), ("p0", p0)):
        torch.manual_seed(0)
        net = Shifted(law)
        learner = make_learner({"net": net}, Chain.on_grid(Linear(), 1, FixedNoise()))
        RWR(demo_fraction=0.0).loss(learner, Batch(x, {}, weight), learner.shares(torch.arange(len(x)))[0]).backward()
        norms[name] = float(net.off.grad.norm())
    assert norms["tilted"] < 0.05 * norms["p0"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_raises_a_reward(name):
    spec, aim = Spec((2,)), torch.tensor([0.8, -0.5])
    torch.manual_seed(0)
    nets = {"net": MLP(width=32, depth=1).denoiser(spec)}
    demos = constant_demos(0.0, 2)
    settings = {  # of those that hold on to the model as it was
        "dppo": {"bc_coef": 0.0},
        "ddpo": {"epochs": 5, "kl": 0.0},
        "mixed": {"weight": 3.0},
        "rwr": {"demo_fraction": 0.1},
    }.get(name, {})
    method = METHODS[name](lr=1e-2, batch=256, warmup=0, bc_batch=16, **settings)
    steps = steps_of(method, Chain.on_grid(Linear(), 2, FixedNoise(0.3)))
    learner = make_learner(nets, steps, spec, demos=demos, optimizer=torch.optim.Adam)
    task = FunctionTask(lambda x, cond: -((x - aim) ** 2).sum(1), "near", Identity(), 256, 1)
    rewards = []
    for i in range(15):
        experience, logs = method.collect(learner, task, i)
        logs |= method.update(learner, task, experience, i)
        rewards.append(logs["reward"])
    assert rewards[0] < -0.85  # 0.89, and what noise adds
    assert rewards[-1] > -0.6  # noise alone costs 0.18, or more where two steps add up


def test_through_follows_the_gradient_of_a_reward():
    spec = Spec((2,))
    torch.manual_seed(0)
    nets = {"net": MLP(width=32, depth=1).denoiser(spec)}
    learner = make_learner(nets, Chain.on_grid(Linear(), 2, FixedNoise(0.0)), spec, optimizer=torch.optim.Adam,
                  demos=constant_demos(0.0, 2))  # fmt: skip
    task = FunctionTask(lambda x, cond: -((x - 0.5) ** 2).sum(1), "near", Identity(), 256, 1)
    method = Mixed(gradient="through", weight=10.0, lr=1e-2, batch=64, warmup=0, bc_batch=16)
    method.check(learner.chain, task)
    before = task.collect(learner, 0)
    for i in range(10):
        method.update(learner, task, task.collect(learner, i), i)
    assert task.collect(learner, 0).logs["reward"] > before.logs["reward"] + 0.2


def test_an_update_that_trims_is_that_of_trimmed_advantages():
    experience, _ = bandit()
    moved = {}
    for name, trim, advantages in (
        ("clipped", 0.1, experience.advantages),
        ("by hand", 0.0, clip_quantiles(experience.advantages, 0.1)),
        ("not", 0.0, experience.advantages),
    ):
        net = Constant(THETA)
        method = DPPO(lr=0.01, batch=COUNT, warmup=0, epochs=1, bc_coef=0.0, clip_advantage_quantile=trim)
        learner = make_learner({"net": net}, Chain.on_grid(Linear(), 1, FixedNoise(STD)))
        method.update(learner, None, experience._replace(advantages=advantages), 0)
        moved[name] = float(net.theta.detach() - THETA)
    assert moved["clipped"] == moved["by hand"]
    assert abs(moved["clipped"] - moved["not"]) > 1e-4


def test_the_learning_rate_rises_after_the_critics_warm_up():
    method = DPPO(lr=0.8, warmup=2, lr_ramp=3)
    assert [method.learning_rate(i) for i in range(2, 8)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert DPPO(lr=0.8, warmup=2).learning_rate(2) == 0.8
    experience, _ = bandit()
    moved = []
    for ramp in (0, 3):
        net = Constant(THETA)
        method = DPPO(lr=0.01, batch=COUNT, warmup=0, epochs=1, bc_coef=0.0, lr_ramp=ramp)
        method.update(make_learner({"net": net}, Chain.on_grid(Linear(), 1, FixedNoise(STD))), None, experience, 0)
        moved.append(float(net.theta.detach() - THETA))
    assert moved[1] == pytest.approx(moved[0] / 4)


def test_rewards_stay_in_units_of_the_first_and_a_nat_has_its_price():
    """Rewards a hundred times as large change nothing; ones that have become alike push a hundred times less."""
    z = torch.linspace(-2, 2, 64)[:, None]

    def gradient(method, rewards, spread):
        learner = make_learner(Constant(0.0), Chain.on_grid(Linear(), 1, FixedNoise(1.0)))
        learner.reward_std = spread
        task = FunctionTask(lambda x, cond: rewards, "given", Identity(), 64, 1)
        experience = task.collect(learner, 0)
        method.update(learner, task, experience, 0)
        return float(learner.state.nets["net"].theta.detach())

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
    learner = make_learner(Constant(theta), Chain.on_grid(Linear(), 1, FixedNoise(std)))
    nn.init.constant_(learner.frozen["net"].theta, theta0)
    task = FunctionTask(lambda x, cond: torch.zeros(len(x)), "none", Identity(), 64, 1)
    experience, far = compare_with_reference(learner, task.collect(learner, 0))
    assert far["kl_reference"] == pytest.approx((theta - theta0) ** 2 / (2 * std**2), rel=1e-6)
    DDPO(lr=0.01, batch=64, kl=price).update(learner, task, experience, 0)
    moved = float(learner.state.nets["net"].theta.detach()) - theta
    assert moved / 0.01 == pytest.approx(-price * (theta - theta0) / std**2, rel=1e-5)


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
    chain = dataclasses.replace(Chain.on_grid(Linear(), 1, LearnedNoise(std)), sigma=sigma)
    learner = make_learner(net, chain, noise=torch.optim.SGD(sigma.parameters(), lr=0.01))
    z = torch.special.ndtri((torch.arange(count, dtype=F64) + 0.5) / count)[:, None]
    task = FunctionTask(lambda x, cond: -((x[:, 0] - aim) ** 2), "near", Identity(), count, 1)
    with torch.no_grad():
        trajectory = chain.sample(learner.denoiser, torch.zeros_like(z), noise=lambda shape: z)
        rewards = task.reward(trajectory.xs[-1], {}).double()
    experience = Experience(trajectory, {}, rewards - rewards.mean(), None, {})
    DPPO(lr=0.01, batch=count, epochs=1, bc_coef=0.0, warmup=0, clip=10.0).update(learner, task, experience, 0)
    want = -2 * std**2 / float(rewards.std(correction=0))
    assert float(sigma.value.detach()) / 0.01 == pytest.approx(want, rel=2e-3)
