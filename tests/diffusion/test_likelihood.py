"""Likelihood against the closed form of the mixture, for vectors and for images."""

import json
import math
from itertools import pairwise

import pytest
import torch

from genkit.cli.commands.likelihood import main as likelihood
from genkit.cli.commands.train import main as train_command
from genkit.core import Prediction
from genkit.diffusion.paths import PATHS, VE, VP, Cosine, Linear
from genkit.diffusion.posterior import LearnedVariance
from genkit.diffusion.samplers import (
    CountingDenoiser,
    Seeds,
    bits_per_dim,
    dequantise,
    karras,
    log_prob,
    nodes,
    trailing,
    uniform,
    variational_bound,
)
from genkit.diffusion.samplers.likelihood import PIXEL
from genkit.diffusion.samplers.vlb import log_level
from genkit.evaluation.likelihoods import choose_rows
from genkit.training.run import load_run
from tests.support.exact import F64, Bell, ExactDenoiser, Mixture, three

MIXTURE = three()
PATH_LIST = [cls() for cls in PATHS.values()]
on_every_path = pytest.mark.parametrize("path", PATH_LIST, ids=lambda p: type(p).__name__)


class Pictures:
    """The exact denoiser of independent normal pixels, each of its own mean and spread, ``[C, H, W]``."""

    def __init__(self, path, mean, std):
        self.path, self.mean, self.std = path, mean, std

    def __call__(self, x, t, cond):
        a, s = (c.reshape(-1, 1, 1, 1) for c in (self.path.alpha(t), self.path.sigma(t)))
        away = (x - a * self.mean) / (a**2 * self.std**2 + s**2)
        return Prediction(self.mean + a * self.std**2 * away, s * away)

    def log_prob(self, x):
        return torch.distributions.Normal(self.mean, self.std).log_prob(x).flatten(1).sum(1)


def pictures(path=None):
    g = torch.Generator().manual_seed(3)
    mean, std = torch.rand(2, 3, 2, generator=g, dtype=F64) - 0.5, 0.3 + torch.rand(2, 3, 2, generator=g, dtype=F64)
    denoise = Pictures(path or Linear(), mean, std)
    return denoise, mean + std * torch.randn(8, 2, 3, 2, generator=g, dtype=F64)


@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=["Linear", "Cosine"])
def test_the_mixture_to_1e_4(path):
    """256 Heun steps. Far out in the tails, for one in twenty, it is a little more."""
    x, _ = MIXTURE.sample(200, seed=1)
    error = (log_prob(ExactDenoiser(MIXTURE, path), x, times=uniform(256)(path)) - MIXTURE.log_prob(x)).abs()
    assert float(error.mean()) < 4e-5
    assert float(error.quantile(0.95)) < 1e-4
    assert float(error.max()) < 4e-4


@on_every_path
def test_the_mixture_on_every_path(path):
    """VP and VE keep a trace of the data at their end, which is neglected: 1e-3 nats on the mean, 1e-2 on the worst."""
    x, _ = MIXTURE.sample(100, seed=2)
    error = log_prob(ExactDenoiser(MIXTURE, path), x, times=uniform(100)(path)) - MIXTURE.log_prob(x)
    assert float(error.mean().abs()) < 1e-3
    assert float(error.abs().max()) < 1e-2


def test_second_order():
    x, _ = MIXTURE.sample(50, seed=1)
    errors = []
    for n in (32, 64, 128):
        got = log_prob(ExactDenoiser(MIXTURE, Linear()), x, times=uniform(n)(Linear()))
        errors.append(float((got - MIXTURE.log_prob(x)).abs().mean()))
    assert all(math.log2(a / b) > 1.8 for a, b in pairwise(errors)), errors


def test_adaptive():
    """dopri5 to 1e-6 is right to 1e-5, whatever the grid after its first node; and a step of half the cost is worse."""
    x, _ = MIXTURE.sample(30, seed=1)
    errors, calls = [], []
    for tolerance in (1e-3, 1e-6):
        denoise = CountingDenoiser(ExactDenoiser(MIXTURE, Linear()))
        got = log_prob(denoise, x, times=uniform(256)(Linear()), solver="dopri5", rtol=tolerance, atol=tolerance)
        errors.append(float((got - MIXTURE.log_prob(x)).abs().max()))
        calls.append(denoise.calls)
    assert errors[1] < 1e-5 < errors[0] < 2e-2
    assert calls[0] < calls[1] < 200
    again = log_prob(ExactDenoiser(MIXTURE, Linear()), x, times=torch.tensor([1.0, 0.7, 1 / 256, 0.0]).double(),
                     solver="dopri5", rtol=1e-6, atol=1e-6)  # fmt: skip
    assert torch.allclose(again, got, atol=1e-12)


@pytest.mark.parametrize("path", [Linear(), VP()], ids=["Linear", "VP"])
def test_images(path):
    denoise, x = pictures(path)
    for solver in ("heun", "dopri5"):
        got = log_prob(denoise, x, times=uniform(128)(path), solver=solver)
        assert got.shape == (8,)
        assert torch.allclose(got, denoise.log_prob(x), atol=2e-3 if path == Linear() else 2e-2)  # VP: see above


def test_conditions_reach_the_denoiser():
    x, label = MIXTURE.sample(30, seed=1)
    got = log_prob(ExactDenoiser(MIXTURE, Linear()), x, {"label": label}, times=uniform(64)(Linear()))
    one = torch.stack([MIXTURE.component(int(k)).log_prob(v[None])[0] for v, k in zip(x, label, strict=True)])
    assert torch.allclose(got, one, atol=5e-3)


def test_a_wide_and_a_shifted_gaussian():
    """A closed form with a large log-determinant, so that no constant can hide."""
    covs = torch.diag(torch.tensor([9.0, 0.25, 4.0], dtype=F64))[None]
    m = Mixture(torch.ones(1, dtype=F64), torch.tensor([[3.0, -1.0, 0.5]], dtype=F64), covs)
    x, _ = m.sample(20)
    assert torch.allclose(
        log_prob(ExactDenoiser(m, Linear()), x, times=uniform(200)(Linear())), m.log_prob(x), atol=1e-3
    )


# ---------------------------------------------------------------------------------------------- Hutchinson
def test_hutchinson_is_unbiased():
    """Its mean over many draws is the exact divergence's answer, within three standard errors."""
    x = MIXTURE.sample(4, seed=1)[0].repeat_interleave(500, dim=0)
    denoise, times = ExactDenoiser(MIXTURE, Linear()), uniform(24)(Linear())
    g = torch.Generator().manual_seed(0)
    noise = lambda shape: torch.randn(len(x), *shape, generator=g, dtype=F64)  # noqa: E731
    rough = log_prob(denoise, x, times=times, divergence="hutchinson", noise=noise).reshape(4, 500)
    truth = log_prob(denoise, x[::500], times=times)
    off = (rough.mean(1) - truth) / (rough.std(1) / math.sqrt(500))
    assert float(off.abs().max()) < 3.5
    assert float(rough.std(1).min()) > 0.05


def test_hutchinson_is_exact_where_the_jacobian_is_diagonal():
    """Rademacher vectors: ``e_i^2 = 1``, so independent pixels have no variance (Gaussian ones would)."""
    denoise, x = pictures()
    exact = log_prob(denoise, x, times=uniform(20)(Linear()))
    for probes in (1, 3):
        rough = log_prob(denoise, x, times=uniform(20)(Linear()), divergence="hutchinson", probes=probes)
        assert torch.allclose(rough, exact, atol=1e-10)


def test_probes_reduce_the_variance():
    x, _ = MIXTURE.sample(300, seed=1)
    denoise, times = ExactDenoiser(MIXTURE, Linear()), uniform(24)(Linear())
    exact = log_prob(denoise, x, times=times)
    spread = [
        float((log_prob(denoise, x, times=times, divergence="hutchinson", probes=p) - exact).square().mean())
        for p in (1, 9)
    ]
    assert spread[0] / spread[1] == pytest.approx(9, rel=0.5)


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_sample_i_has_its_own_directions(solver):
    x, _ = MIXTURE.sample(5, seed=1)
    how = {"times": uniform(16)(Linear()), "divergence": "hutchinson", "solver": solver, "rtol": 1e-7, "atol": 1e-7}
    denoise = ExactDenoiser(MIXTURE, Linear())
    together = log_prob(denoise, x, noise=Seeds(range(5), dtype=F64), **how)
    apart = [log_prob(denoise, x[i : i + 1], noise=Seeds([i], dtype=F64), **how) for i in range(5)]
    assert torch.allclose(together, torch.cat(apart), atol=1e-12 if solver == "heun" else 1e-5)
    other = log_prob(denoise, x, noise=Seeds(range(5, 10), dtype=F64), **how)
    assert not torch.allclose(together, other, atol=1e-3)


# ---------------------------------------------------------------------------------- cost, weights, misuse
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_cost_and_no_traces(divergence):
    """Heun on n steps: 2n - 1 evaluations, none at t = 0; works within no_grad, and leaves the weights no gradients."""
    net = torch.nn.Linear(2, 2).double()

    class Net:
        path = Linear()

        def __call__(self, x, t, cond):
            assert float(t.min()) > 0
            v = net(x)
            return Prediction(x - t[:, None] * v, x + (1 - t[:, None]) * v)

    denoise = CountingDenoiser(Net())
    with torch.no_grad():
        got = log_prob(denoise, torch.randn(3, 2, dtype=F64), times=uniform(10)(Linear()), divergence=divergence)
    assert denoise.calls == 19
    assert not got.requires_grad
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"divergence": "skilling"}, "divergence: given 'skilling'; allowed exact, hutchinson"),
        ({"solver": "euler"}, "solver: given 'euler'"),
        ({"probes": 0}, "probes: given 0"),
        ({"rtol": 0.0}, "rtol: given 0.0"),
        ({"atol": -1.0}, "atol: given -1.0"),
        ({"times": torch.tensor([0.9, 0.0])}, "needs the whole path"),
        ({"times": torch.tensor([1.0, 0.1])}, "needs the whole path"),
        ({"times": torch.tensor([0.0, 1.0])}, "strictly falling"),
    ],
)
def test_senseless_settings_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        log_prob(
            ExactDenoiser(MIXTURE, Linear()), torch.zeros(1, 2).double(), **{"times": torch.tensor([1.0, 0.0]), **how}
        )


def test_pixels_are_refused_until_dequantised():
    with pytest.raises(ValueError, match="dequantise"):
        log_prob(ExactDenoiser(MIXTURE, Linear()), torch.zeros(1, 2, dtype=torch.uint8), times=torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"allowed torch\.uint8"):
        dequantise(torch.zeros(1, 2))


# ----------------------------------------------------------------------------------------- bits per dimension
def test_dequantised_pixels_stay_in_their_bin():
    """And round back to themselves, and fill the bin evenly; sample i's numbers are its own."""
    from genkit.data.codecs import Pixels

    pixels = torch.arange(256, dtype=torch.uint8).repeat(50, 1)
    x = dequantise(pixels, Seeds(range(50)))
    within = (x.double() + 1) * 127.5 - pixels
    assert float(within.min()) > -0.5 - 1e-4
    assert float(within.max()) < 0.5 + 1e-4
    assert float(within.mean()) == pytest.approx(0, abs=0.01)
    assert float(within.var()) == pytest.approx(1 / 12, rel=0.03)
    inner = pixels[:, 1:255]
    assert float((Pixels().decode(x)[:, 1:255] == inner).double().mean()) > 0.999
    assert torch.equal(x[3:4], dequantise(pixels[:1], Seeds([3])))


def test_bits_per_dim_of_a_known_code_length():
    """Pixels of a normal law, rounded: the average of -log2 P(bin), by the normal's own distribution function."""
    mean, std = torch.tensor(0.1, dtype=F64), torch.tensor(0.25, dtype=F64)  # about 32 grey levels wide
    law = torch.distributions.Normal(mean, std)
    g = torch.Generator().manual_seed(0)
    y = mean + std * torch.randn(400, 1, 2, 2, generator=g, dtype=F64)
    pixels = ((y + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    edges = [(pixels.double() + d) / 127.5 - 1 for d in (-0.5, 0.5)]
    truth = -(law.cdf(edges[1]) - law.cdf(edges[0])).log2().flatten(1).mean(1)
    x = dequantise(pixels, Seeds(range(400), dtype=F64))
    log_p = log_prob(Pictures(Linear(), mean, std), x, times=uniform(64)(Linear()))
    got = bits_per_dim(log_p, 4)
    assert got.value == pytest.approx(float(truth.mean()), abs=2e-3)
    assert got.stderr == pytest.approx(float(truth.std()) / math.sqrt(400), rel=0.05)


def test_bits_per_dim_by_hand():
    """A uniform density over the 256 levels of each pixel is 8 bits."""
    log_p = torch.full((10,), 12 * math.log(PIXEL / 256))
    assert bits_per_dim(log_p, 12) == (pytest.approx(8), pytest.approx(0, abs=1e-6))
    assert bits_per_dim(torch.tensor([math.log(0.25)]), 1, scale=1.0).value == pytest.approx(2)
    assert math.isnan(bits_per_dim(torch.zeros(1), 1).stderr)
    assert bits_per_dim(torch.tensor([0.0, 2 * math.log(2)]), 1, scale=1.0) == (pytest.approx(-1), pytest.approx(1))
    with pytest.raises(ValueError, match="needs"):
        bits_per_dim(torch.zeros(0), 1)


def test_any_grid_will_do():
    x, _ = MIXTURE.sample(20, seed=1)
    got = log_prob(ExactDenoiser(MIXTURE, Linear()), x, times=karras(200)(Linear()))
    assert torch.allclose(got, MIXTURE.log_prob(x), atol=3e-3)


# --------------------------------------------------------------------------------------- the variational bound
def chain_of(path, n, std=0.8, mean=0.3):
    times = uniform(n)(path)
    return Bell(path, mean, std, times), times


def normals_of(n, dims=1, std=0.8, mean=0.3):
    return mean + std * torch.randn(n, dims, generator=torch.Generator().manual_seed(2), dtype=F64)


ENTROPY = math.log(0.8 * math.sqrt(2 * math.pi * math.e))


@pytest.mark.parametrize("n", [1, 3, 20])
def test_the_bound_of_the_true_steps_is_the_likelihood(n):
    """With the true mean and variance of every step the chain is the data's own: the bound is the entropy, for any
    number of steps (the linear path ends in pure noise)."""
    denoise, times = chain_of(Linear(), n)
    got = variational_bound(denoise, normals_of(60_000), times=times, noise=drawn(60_000))
    assert got.steps.shape == (60_000, n - 1)
    assert float(got.prior.abs().max()) == 0
    error = float(got.total.std()) / math.sqrt(60_000)
    assert float(got.total.mean()) == pytest.approx(ENTROPY, abs=4 * error)
    assert error < 0.006


def drawn(n, seed=3):
    g = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(n, *shape, generator=g, dtype=F64)


def closed_form(path, times, variance, std=0.8, mean=0.3):
    """The expected bound of N(mean, std^2) and its exact denoiser, by the closed forms of KL divergences."""
    grid, total = nodes(path, times), 0.0
    total += (grid[0].alpha / grid[0].sigma) ** 2 * (mean**2 + std**2) / 2
    for a, b in pairwise(grid):
        left = std**2 * a.sigma**2 / (a.alpha**2 * std**2 + a.sigma**2)  # Var(x0 | x_t)
        r = a.alpha / b.alpha
        beta = a.sigma**2 - (r * b.sigma) ** 2
        posterior, pull = beta * (b.sigma / a.sigma) ** 2, beta * b.alpha / a.sigma**2
        if b.sigma > 0:
            var = {"small": posterior, "large": beta}[variance]
            total += (math.log(var / posterior) + (posterior + pull**2 * left) / var - 1) / 2
        else:
            two = nodes(path, torch.tensor([2 * a.t, a.t], dtype=F64))
            before = two[1].sigma ** 2 * (1 - (two[0].alpha / two[1].alpha * two[1].sigma / two[0].sigma) ** 2)
            var = {"small": min(before, beta), "large": beta}[variance]
            total += (math.log(2 * math.pi * var) + left / var) / 2
    return total


@pytest.mark.parametrize("path", [Linear(), VP(), VE()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_bound_has_its_closed_form(path, variance):
    n = 20_000
    x, times = normals_of(n), uniform(7)(path)
    got = variational_bound(Bell(path, 0.3, 0.8, times), x, times=times, variance=variance, noise=drawn(n)).total
    error = float(got.std()) / math.sqrt(n)
    assert float(got.mean()) == pytest.approx(closed_form(path, times, variance), abs=4 * error)
    assert error < 0.03


def test_the_bound_closes_as_the_chain_grows():
    """Never below the entropy; with "large", which is right for normal data in the limit, the gap is of order 1 / N."""
    gaps = [closed_form(Linear(), uniform(n)(Linear()), "large") - ENTROPY for n in (10, 40, 160, 640)]
    assert gaps[-1] > 0
    assert all(3 < a / b < 5 for a, b in pairwise(gaps)), gaps
    for n in (10, 160):
        denoise, times = chain_of(Linear(), n)
        got = variational_bound(denoise, normals_of(4000), times=times, variance="large", noise=drawn(4000)).total
        assert float(got.mean()) == pytest.approx(
            ENTROPY + gaps[(10, 40, 160).index(n)], abs=4 * float(got.std()) / math.sqrt(4000)
        )


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_the_steps_of_the_bound_are_those_of_diffusers(variance):
    """KL divergences between the steps of a DDPMScheduler that knows the noise and of one that guesses it."""
    from diffusers import DDPMScheduler

    kind = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}[variance]
    s = DDPMScheduler(variance_type=kind, clip_sample=False, timestep_spacing="trailing")
    s.set_timesteps(20)
    x0, guess = normals_of(5, 2), lambda x, t: (torch.tanh(x + t), torch.sin(3 * x))

    class Net:
        path = VP()

        def __call__(self, x, t, cond):
            eps, w = guess(x, t[0])
            a, sigma = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
            return LearnedVariance.of(Prediction((x - sigma * eps) / a, eps), w)

    got = variational_bound(Net(), x0, times=trailing(20)(VP()), variance=variance, noise=drawn(5))
    noise, normal = drawn(5), torch.distributions.Normal
    for i, k in enumerate(s.timesteps[:-1]):
        z = noise((2,))
        x = s.add_noise(x0, z, k)
        eps, w = guess(x, (k + 1) / 1000)
        spread = s._get_variance(k, predicted_variance=w)
        spread = (spread / 2).exp() if variance == "learned" else spread.sqrt()
        mean = lambda e: module_mean(s, e, k, x)  # noqa: B023, E731
        true = normal(mean(z), s._get_variance(k, variance_type="fixed_small").double().sqrt())
        kl = torch.distributions.kl_divergence(true, normal(mean(eps), spread.double().expand_as(x)))
        assert torch.allclose(got.steps[:, i], kl.sum(1), rtol=2e-3, atol=1e-6), i


def module_mean(scheduler, eps, k, x):
    """The mean of a step: the scheduler's own, with noise that is zero."""
    import diffusers.schedulers.scheduling_ddpm as module

    learned = scheduler.config.variance_type == "learned_range"
    original, module.randn_tensor = module.randn_tensor, lambda shape, **how: torch.zeros(shape, dtype=F64)
    try:
        return scheduler.step(torch.cat([eps, eps], 1) if learned else eps, k, x).prev_sample
    finally:
        module.randn_tensor = original


def test_the_levels_of_a_pixel_sum_to_one():
    """And are differences of the normal's distribution function, open at both ends, down to a tail of e^-10^5."""
    x = (torch.arange(256, dtype=F64) / 127.5 - 1).repeat(4, 1)
    mean, std = (
        torch.tensor(v, dtype=F64)[:, None].expand(4, 256) for v in ([-0.9, 0.2, 0.999, 2.0], [0.2, 0.01, 3.0, 0.005])
    )
    got = log_level(x, mean, 2 * std.log())
    assert torch.allclose(got.exp().sum(1), torch.ones(4, dtype=F64), atol=1e-12)
    law = torch.distributions.Normal(mean, std)
    inner = slice(1, 255)
    direct = (law.cdf(x + 1 / 255) - law.cdf(x - 1 / 255))[:, inner]
    assert torch.allclose(got.exp()[:, inner], direct, atol=1e-12)
    assert torch.allclose(got[:, 0].exp(), law.cdf(x + 1 / 255)[:, 0], atol=1e-12)
    assert bool(got.isfinite().all())
    assert float(got[3, 0]) == pytest.approx(float(-(((3 - 1 / 255) / 0.005) ** 2) / 2), rel=1e-3)


def test_the_bound_of_pixels_is_their_code_length():
    """Pixels of a normal law about 32 levels wide: with exact steps the bound is the average of -log2 P(level)."""
    n, law = 30_000, torch.distributions.Normal(torch.tensor(0.1, dtype=F64), torch.tensor(0.25, dtype=F64))
    pixels = ((normals_of(n, 4, 0.25, 0.1) + 1) * 127.5).round().clamp(0, 255)
    x, half = pixels / 127.5 - 1, 1 / 255
    truth = -(law.cdf(x + half) - law.cdf(x - half)).log2().mean(1)
    times = uniform(60)(Linear())
    got = variational_bound(Bell(Linear(), 0.1, 0.25, times), x, times=times, pixels=True, noise=drawn(n)).total
    bits = got / (4 * math.log(2)) - truth
    assert float(bits.mean()) == pytest.approx(0, abs=4 * float(bits.std()) / math.sqrt(n) + 1e-3)
    assert float(bits.std()) / math.sqrt(n) < 5e-3


def test_senseless_bounds_are_refused():
    denoise, x = ExactDenoiser(MIXTURE, Linear()), torch.zeros(1, 2, dtype=F64)
    for how, message in (
        ({"variance": "huge"}, "variance: given 'huge'; allowed small, large, learned"),
        ({"variance": "learned"}, "has learned none"),
        ({"times": torch.tensor([0.9, 0.0])}, "needs the whole path"),
        ({"times": torch.tensor([1.0, 0.1])}, "needs the whole path"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            variational_bound(denoise, x, **{"times": torch.tensor([1.0, 0.0]), **how})
        assert "\n" not in str(refused.value)


# ----------------------------------------------------------------------------------------------- the command
TINY = ["--steps=3", "--batch=16", "--backbone.width=16", "--sample-every=0", "--no-tensorboard", "--device=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps for each kind of model."""
    out = tmp_path_factory.mktemp("runs")
    kinds = {
        "learned": ["--data=digits", "--objective=ddpm", "--objective.learn-variance", "--objective.timesteps=40"],
        "points": ["--data=moons", "--objective=ddpm"],
        "flow": ["--data=moons"],
        "ot": ["--data=moons", "--objective.coupling=ot"],
    }
    for name, how in kinds.items():
        assert train_command([*how, *TINY, f"--out={out}", f"--name={name}"]) == 0
    return {name: next(out.glob(f"*-{name}")) for name in kinds}


def told(capsys, *argv):
    capsys.readouterr()
    assert likelihood([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_command_tells_the_bound_term_by_term(trained, capsys):
    """As `variational_bound` has it for the same samples and seeds; whatever the batch; all steps, or every fourth."""
    found = told(capsys, str(trained["learned"]), "--bound=vlb", "--n=6")
    cut = told(capsys, str(trained["learned"]), "--bound=vlb", "--n=6", "--batch=4")
    assert found["bits_per_dim"]["value"] == pytest.approx(cut["bits_per_dim"]["value"], rel=1e-5)
    run = load_run(trained["learned"])
    data = run.config.data.load("test")
    rows = choose_rows(len(data), 6, 0)
    x, label = data.x[rows].float() / 127.5 - 1, data.cond["label"][rows]
    with torch.no_grad():
        truth = variational_bound(run.denoiser, x, {"label": label}, times=torch.linspace(1, 0, 41, dtype=F64),
                                  variance="learned", pixels=True, noise=Seeds(range(6)))  # fmt: skip
    bits = lambda nats: float(nats.mean()) / (64 * math.log(2))  # noqa: E731
    assert found["bits_per_dim"]["value"] == pytest.approx(bits(truth.total), rel=1e-5)
    assert found["terms"]["data"]["value"] == pytest.approx(bits(truth.data), rel=1e-5)
    assert found["terms"]["prior"]["value"] == pytest.approx(bits(truth.prior), rel=1e-4)
    steps = found["terms"]["steps"]
    assert len(steps) == 39
    assert (steps[0]["t"], steps[-1]["s"]) == (1, 1 / 40)
    assert sum(s["value"] for s in steps) == pytest.approx(bits(truth.steps.sum(1)), rel=1e-5)
    assert found["log_prob_nats"]["value"] == pytest.approx(-float(truth.total.mean()), rel=1e-5)
    fewer = told(capsys, str(trained["learned"]), "--bound=vlb", "--n=6", "--steps=10", "--variance=large")
    assert [s["t"] for s in fewer["terms"]["steps"]] == pytest.approx([1 - k / 10 for k in range(9)])


def test_bounds_of_points_and_of_other_paths(trained, capsys):
    """In nats of a density, on the discrete times of a DDPM or uniform in the chart; by the ODE for any coupling."""
    for name in ("points", "flow"):
        found = told(capsys, str(trained[name]), "--bound=vlb", "--n=8", "--steps=30")
        assert found["bits_per_dim"]["value"] == pytest.approx(
            -found["log_prob_nats"]["value"] / (2 * math.log(2)), rel=1e-9
        )
        assert len(found["terms"]["steps"]) == 29
        assert found["bits_per_dim"]["stderr"] > 0
    assert math.isfinite(told(capsys, str(trained["ot"]), "--n=4", "--steps=8")["bits_per_dim"]["value"])


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("ot", ["--bound=vlb"], "makes it no diffusion; allowed: ode"),
        ("points", ["--bound=vlb", "--steps=1001"], "allowed 1 … 1000"),
        ("points", ["--bound=vlb", "--variance=learned"], "has learned none"),
        ("points", ["--bound=vlb", "--probes=2"], "which is for the ODE"),
        ("points", ["--variance=large"], "allowed with --bound vlb"),
    ],
)
def test_the_command_refuses_what_has_no_meaning(trained, name, how, message):
    with pytest.raises(ValueError, match=message) as refused:
        likelihood([str(trained[name]), "--n=2", *how])
    assert "\n" not in str(refused.value)
