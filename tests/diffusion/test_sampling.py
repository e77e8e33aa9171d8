"""Samplers against a closed-form mixture, and step by step against diffusers.

Every test over ``SAMPLERS`` finds a new entry by itself; ``FACTS`` must then say what is to be expected of it.
"""

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genkit.core import Prediction
from genkit.diffusion.guidance import clamp, classifier_free
from genkit.diffusion.parametrization import Karras, NetDenoiser
from genkit.diffusion.paths import PATHS, VE, VP, Linear, chart, mix, times_at
from genkit.diffusion.posterior import Learned, width
from genkit.diffusion.samplers import (
    GRIDS,
    SAMPLERS,
    Counted,
    Seeds,
    ancestral,
    bind,
    churn,
    ddim,
    dopri5,
    dpmpp_2m,
    dpmpp_3m,
    dpmpp_sde,
    heun,
    invert,
    karras,
    leading,
    linspace,
    logsnr,
    nodes,
    restart,
    rk4,
    sde,
    trailing,
    uniform,
    unipc,
)  # fmt: skip
from genkit.diffusion.samplers.inversion import ODE
from genkit.diffusion.samplers.steps import nodes_at
from tests.support.exact import F64, Bell, ExactDenoiser, three

MIXTURE = three()
PATH_LIST = [cls() for cls in PATHS.values()]
on_every_path = pytest.mark.parametrize("path", PATH_LIST, ids=lambda p: type(p).__name__)


class Fact(NamedTuple):
    nfe: int | None  # evaluations in 7 uniform steps to the data; None: depends on the model
    steps: int  # enough for the moments of the mixture to come out right
    order: float | None = None  # of the fixed-grid deterministic ones
    spacing: str = "tau"  # the grid on which the order shows


FACTS = {
    "ddim": Fact(7, 80, 1.0),
    "ancestral": Fact(7, 100),
    "heun": Fact(2 * 7 - 1, 20, 2.0),
    "rk4": Fact(4 * 7 - 1, 10, 4.0),
    "dpmpp_2m": Fact(7, 30, 2.0),
    "dpmpp_3m": Fact(7, 30, 3.0, "log-SNR"),
    "unipc": Fact(7, 30, 3.0, "log-SNR"),  # UniP-2 with UniC-2: order 2 + 1
    "dopri5": Fact(None, 1),
    "churn": Fact(2 * 7 - 1, 40),
    "sde": Fact(7, 60),
    "dpmpp_sde": Fact(7, 40),
    "restart": Fact(2 * 8 - 1 + 2 * 2 * 3, 20),  # its lower level is an eighth node; two times three Heun steps
}
ORDERED = [k for k, fact in FACTS.items() if fact.order]


class Quick(ExactDenoiser):
    """The exact denoiser, for samples that all stand at one time, as in every sampler."""

    def __call__(self, x, t, cond):
        assert float(t[0]) > 0
        assert bool((t == t[0]).all())
        m, a, s = self.mixture, self.path.alpha(t[:1]), self.path.sigma(t[:1])
        inverse = torch.linalg.inv(a**2 * m.covs + s**2 * torch.eye(m.dim, dtype=x.dtype))
        away = x[:, None] - a * m.means
        solved = torch.einsum("kij,bkj->bki", inverse, away)
        post = torch.softmax(m.weights.log() - (away * solved).sum(-1) / 2 + torch.logdet(inverse) / 2, dim=1)
        x0 = (post[..., None] * (m.means + a * torch.einsum("kij,bkj->bki", m.covs, solved))).sum(1)
        return Prediction(x0, (x - a * x0) / s)


class Normal:
    """The exact denoiser of standard normal data of any shape."""

    def __init__(self, path):
        self.path = path

    def __call__(self, x, t, cond):
        assert float(t.min()) > 0
        a, s = (c.reshape(-1, *(1,) * (x.ndim - 1)) for c in (self.path.alpha(t), self.path.sigma(t)))
        return Prediction(a * x / (a**2 + s**2), s * x / (a**2 + s**2))


def normals(n, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)


def in_chart(sampler, path, z, taus, **options):
    """Sample between the chart times ``taus``, from and to the chart's own coordinates."""
    times = times_at(path, taus)
    scale = chart(path, times)[1]
    return sampler(Quick(MIXTURE, path), z * scale[0], times, **options) / scale[-1]


@on_every_path
def test_the_quick_denoiser_is_the_exact_one(path):
    x, t = normals(20), torch.full((20,), 0.3, dtype=F64)
    for quick, exact in zip(Quick(MIXTURE, path)(x, t, {}), ExactDenoiser(MIXTURE, path)(x, t, {}), strict=True):
        assert torch.allclose(quick, exact, atol=1e-10)


def test_every_sampler_has_its_facts():
    assert list(FACTS) == list(SAMPLERS)
    assert set(ODE) == {k for k in SAMPLERS if FACTS[k].order or k == "dopri5"}


# ------------------------------------------------------------------------------------------- the mixture
@lru_cache
def solution():
    """Rectified flow from tau = 0.98 to 0.02, written out, by torchdiffeq."""
    from torchdiffeq import odeint

    denoise = Quick(MIXTURE, Linear())

    def velocity(tau, u):
        x0, x1 = denoise(u, tau.expand(len(u)), {})
        return x1 - x0

    return odeint(velocity, normals(64), torch.tensor([0.98, 0.02], dtype=F64), rtol=1e-11, atol=1e-11)[-1]


def spaced(kind, n):
    ends = torch.tensor([0.98, 0.02], dtype=F64)
    if kind == "tau":
        return torch.linspace(*ends.tolist(), n + 1, dtype=F64)
    return torch.sigmoid(torch.linspace(*ends.logit().tolist(), n + 1, dtype=F64))


def orders(name, path, kind, **options):
    z, truth, ns = normals(64), solution(), (32, 64, 128)
    ends = [in_chart(SAMPLERS[name], path, z, spaced(kind, n), **options) for n in ns]
    errors = [float((x - truth).norm(dim=1).mean()) for x in ends]
    return [math.log2(a / b) for a, b in pairwise(errors)], errors


@pytest.mark.parametrize("path", [Linear(), VP()], ids=["Linear", "VP"])
@pytest.mark.parametrize("name", ORDERED)
def test_order_of_convergence(name, path):
    """Halving the step divides the error by 2^order, against torchdiffeq's solution (other paths: below)."""
    fact = FACTS[name]
    order, errors = orders(name, path, fact.spacing)
    assert order[-1] == pytest.approx(fact.order, abs=0.15), (order, errors)
    assert errors[-1] < {1.0: 0.02, 2.0: 1e-3, 3.0: 5e-5, 4.0: 2e-8}[fact.order]


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("heun", {"clock": "sigma"}, 2.0),
        ("unipc", {"variant": "bh1"}, 3.0),
        ("unipc", {"order": 1}, 2.0),
        ("unipc", {"order": 3}, 4.0),
        ("dpmpp_3m", {"curvature": 0.5}, 2.0),  # the authors' code and diffusers: the factor 2! is missing
        ("dpmpp_sde", {"eta": 0.0}, 2.0),
        ("sde", {"eta": 0.0}, 1.0),
    ],
)
def test_order_of_the_options(name, options, order):
    got, errors = orders(name, Linear(), "log-SNR", **options)
    assert got[-1] == pytest.approx(order, abs=0.2), (got, errors)


def test_dopri5_error_follows_its_tolerance():
    z, truth, calls, last = normals(64), solution(), [], 1.0
    for tolerance in (1e-3, 1e-5, 1e-7):
        denoise = Counted(Quick(MIXTURE, Linear()))
        x = dopri5(denoise, z, torch.tensor([0.98, 0.02]).double(), rtol=tolerance, atol=tolerance)
        error = float((x - truth).norm(dim=1).mean())
        assert error < min(3 * tolerance, last / 20)
        last = error
        calls.append(denoise.calls)
    assert calls == sorted(calls)
    assert calls[-1] < 250


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("rk4", 4)])
def test_order_to_the_data(name, order):
    """The last step, where nothing may be asked at its end, costs no order: its larger error is made once."""
    z, errors = normals(16), []
    truth = in_chart(dopri5, Linear(), z, torch.tensor([0.98, 0.0]).double(), rtol=1e-9, atol=1e-9, tau_min=1e-6)
    for n in (32, 64):
        x = in_chart(SAMPLERS[name], Linear(), z, torch.linspace(0.98, 0, n + 1, dtype=F64))
        errors.append(float((x - truth).norm(dim=1).mean()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3), errors


def test_dopri5_ends_by_one_step():
    """Its error is ``tau_min^2``."""
    ends, how = torch.tensor([0.98, 0.0]).double(), {"rtol": 1e-8, "atol": 1e-8}
    truth, *got = (in_chart(dopri5, Linear(), normals(16), ends, tau_min=tau, **how) for tau in (1e-6, 0.02, 0.01))
    errors = [float((x - truth).norm(dim=1).mean()) for x in got]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_sample_on_every_path(name):
    z, taus = normals(16), torch.linspace(0.98, 0.0, 13, dtype=F64)
    noise = lambda: Seeds(range(16), dtype=F64)  # noqa: E731
    first, *rest = [in_chart(SAMPLERS[name], path, z, taus, noise=noise()) for path in PATH_LIST]
    for other in rest:
        assert torch.allclose(other, first, atol=1e-10)
    # and from pure noise, on the two paths that have it
    first, second = [in_chart(SAMPLERS[name], p, z, taus / 0.98, noise=noise()) for p in PATH_LIST[:2]]
    assert torch.allclose(first, second, atol=1e-10)


@pytest.mark.parametrize("name", ["ddim", "ancestral", "heun", "rk4", "dopri5", "churn", "restart"])
def test_pure_noise_is_the_limit(name):
    """alpha(1) = 0 is where the log-SNR is infinite: starting a hair before it changes a hair."""
    z, taus = normals(16), torch.linspace(1, 0, 9, dtype=F64)
    near = torch.cat([torch.tensor([1 - 1e-9]).double(), taus[1:]])
    options = {"clock": "tau"} if name == "churn" else {}
    draw = lambda taus: in_chart(SAMPLERS[name], Linear(), z, taus, noise=Seeds(range(16), dtype=F64), **options)  # noqa: E731
    a, b = draw(taus), draw(near)
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "unipc", "sde", "dpmpp_sde"])
def test_the_first_step_from_pure_noise(name):
    """Exact for a constant x0, in lambda = -inf: DDIM's step, or fresh noise."""
    z, states = normals(16), []
    _, b = nodes(Linear(), torch.tensor([1.0, 0.7]))
    p = Quick(MIXTURE, Linear())(z, torch.ones(16, dtype=F64), {})
    SAMPLERS[name](Quick(MIXTURE, Linear()), z, torch.tensor([1.0, 0.7, 0.0], dtype=F64),
                   noise=lambda shape: normals(16, seed=5), callback=lambda i, x, p: states.append(x))  # fmt: skip
    x1 = normals(16, seed=5) if "sde" in name else p.x1
    assert torch.allclose(states[0], b.alpha * p.x0 + b.sigma * x1, atol=1e-7)


def test_infinite_log_snr_is_left_out_of_the_differences():
    """From pure noise the first two steps are of first order, the third of second, by the rules of the 2M."""

    def states(sampler):
        seen = []
        watch = lambda i, x, p: seen.append(x)  # noqa: E731
        sampler(Quick(MIXTURE, Linear()), normals(5), uniform(20)(Linear()), callback=watch)
        return seen

    first, second, third = states(ddim), states(dpmpp_2m), states(dpmpp_3m)
    assert torch.allclose(second[1], first[1], atol=1e-12)
    assert torch.allclose(third[2], second[2], atol=1e-12)
    assert not torch.allclose(third[3], second[3], atol=1e-4)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_from_pure_noise(order, variant):
    z, denoise = normals(16), Quick(MIXTURE, Linear())
    x = unipc(denoise, z, uniform(60)(Linear()), order=order, variant=variant)
    assert float((x - rk4(denoise, z, uniform(60)(Linear()))).norm(dim=1).mean()) < 0.01


def test_ddim_is_euler_of_rectified_flow():
    z, times = normals(8), torch.linspace(1, 0, 6, dtype=F64)
    denoise = ExactDenoiser(MIXTURE, Linear())
    u = z
    for a, b in pairwise(times):
        p = denoise(u, a.expand(8), {})
        u = u + (b - a) * (p.x1 - p.x0)
    assert torch.allclose(ddim(denoise, z, times), u, atol=1e-13)


@on_every_path
@pytest.mark.parametrize("name", SAMPLERS)
def test_first_two_moments(name, path):
    """20,000 samples have the mixture's mean and covariance; the noise of the estimate is about 0.01. (3,000 on the
    other paths, where the samples are the same but for the start.)"""
    n, loose = (20_000, 1) if path == Linear() else (3_000, 2.5)
    z, generator = normals(n), torch.Generator().manual_seed(1)
    noise = lambda shape: torch.randn(n, *shape, generator=generator, dtype=F64)  # noqa: E731
    x = bind(name, uniform(FACTS[name].steps))(Quick(MIXTURE, path))(z, {}, noise)
    assert torch.allclose(x.mean(0), MIXTURE.mean(), atol=0.025 * loose)
    assert torch.allclose(x.T.cov(), MIXTURE.cov(), atol=0.035 * loose)


@pytest.mark.parametrize("name", SAMPLERS)
def test_number_of_evaluations(name):
    denoise = Counted(Quick(MIXTURE, Linear()))
    bind(name, uniform(7))(denoise)(normals(3), {})
    assert denoise.rows == 3 * denoise.calls
    if FACTS[name].nfe is None:
        assert 20 < denoise.calls < 150
    else:
        assert denoise.calls == FACTS[name].nfe
        guided = Counted(ExactDenoiser(MIXTURE, Linear()))
        bind(name, uniform(7), classifier_free(2.0))(guided)(normals(3), {"label": torch.zeros(3, dtype=torch.long)})
        assert (guided.calls, guided.rows) == (FACTS[name].nfe, 6 * FACTS[name].nfe)


@pytest.mark.parametrize("name", SAMPLERS)
def test_never_at_t_zero_on_any_grid(name):
    """``Quick`` and ``Normal`` assert it. One step, two steps, many: each ends at finite data."""
    options = {"rtol": 0.1, "atol": 0.1} if name == "dopri5" else {}
    for kind, grid in GRIDS.items():
        for path in PATH_LIST if name != "dopri5" or kind == "uniform" else [Linear()]:
            for n in (2, 5) if kind == "leading" else (1, 2, 5):  # leading(1) is one step from t = 1 / 1000
                x = bind(name, grid(n), **options)(Quick(MIXTURE, path))(normals(2), {})
                assert x.shape == (2, 2)
                assert bool(x.isfinite().all()), (kind, path, n)


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_images_and_callback(name):
    seen = []
    generate = bind(name, uniform(6), callback=lambda i, x, p: seen.append((i, x, p)))(Normal(VP()))
    noise = Seeds(range(3))
    x = generate(noise((1, 4, 4)), {}, noise)
    assert x.shape == (3, 1, 4, 4)
    assert x.dtype == torch.float32
    assert [i for i, _, _ in seen] == list(range(len(seen)))
    assert len(seen) == 6 or name in ("dopri5", "restart")
    assert torch.equal(seen[-1][1], x)
    assert all(p.x0.shape == x.shape for _, _, p in seen)


# ------------------------------------------------------------------------------------- what noise must do
@on_every_path
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_sde_has_the_drift_and_diffusion_of_song(path, eta):
    """``dx = [f x - (1 + eta) / 2 g^2 score] dt + sqrt(eta) g dw`` with f, g of the path (Song et al. 2021, eq. 6 and
    appendix D.1): f = d log alpha / dt and g^2 = d sigma^2 / dt - 2 f sigma^2, by automatic differentiation."""
    t = torch.tensor([0.6031], dtype=F64, requires_grad=True)
    f = torch.autograd.grad(path.alpha(t).log().sum() + 0 * t.sum(), t)[0]
    g2 = torch.autograd.grad(path.sigma(t).square().sum(), t)[0] - 2 * f * path.sigma(t).detach() ** 2
    dt, x = 1e-6, normals(4)
    times, denoise = torch.tensor([0.6031, 0.6031 - dt], dtype=F64), Quick(MIXTURE, path)
    score = -denoise(x, t.detach().expand(4), {}).x1 / path.sigma(t).detach()
    still = sde(denoise, x, times, eta=eta, noise=lambda shape: torch.zeros(4, *shape).double())
    moved = sde(denoise, x, times, eta=eta, noise=lambda shape: torch.ones(4, *shape).double())
    assert torch.allclose((still - x) / -dt, f * x - (1 + eta) / 2 * g2 * score, rtol=2e-3, atol=1e-3)
    assert torch.allclose((moved - still) ** 2 / dt, (eta * g2).expand(4, 2), rtol=1e-3)


def test_sde_step_is_euler_maruyama():
    """In the chart: ``du = (x1 - x0 - g^2 / 2 score) dtau + g dw``, all of it at the step's beginning."""
    u, z, a, b = normals(4), normals(4, seed=1), 0.7, 0.5
    x0, x1 = Quick(MIXTURE, Linear())(u, torch.full((4,), a, dtype=F64), {})
    for eta in (0.4, 1.0):
        g2, score = eta * 2 * a / (1 - a), -x1 / a
        expected = u + (x1 - x0 - g2 / 2 * score) * (b - a) + math.sqrt(g2 * (a - b)) * z
        got = sde(Quick(MIXTURE, Linear()), u, torch.tensor([a, b], dtype=F64), eta=eta, noise=lambda shape: z)
        assert torch.allclose(got, expected, atol=1e-12)


def karras_algorithm_2(denoiser, x, sigmas, s_churn, s_tmin, s_tmax, s_noise, noise):
    """Karras et al. 2022, algorithm 2, in its own words: D(x, sigma) and levels t_0 > ... > t_N = 0."""
    n, states = len(sigmas) - 1, []
    for i in range(n):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= sigmas[i] <= s_tmax else 0
        hat = sigmas[i] + gamma * sigmas[i]
        x_hat = x
        if gamma > 0:
            x_hat = x + math.sqrt(hat**2 - sigmas[i] ** 2) * s_noise * noise(x.shape[1:])
        d = (x_hat - denoiser(x_hat, hat)) / hat
        x = x_hat + (sigmas[i + 1] - hat) * d
        if sigmas[i + 1] != 0:
            d_next = (x - denoiser(x, sigmas[i + 1])) / sigmas[i + 1]
            x = x_hat + (sigmas[i + 1] - hat) * (d + d_next) / 2
        states.append(x)
    return states


@pytest.mark.parametrize("s_churn", [0.0, 3.0, 40.0])
def test_churn_is_algorithm_2(s_churn):
    path, z = VE(), normals(5)
    grid = nodes(path, karras(12)(path))
    how = {"s_churn": s_churn, "s_tmin": 0.05, "s_tmax": 20.0, "s_noise": 1.003}

    def denoiser(x, sigma):
        (node,) = nodes_at(path, [sigma / (1 + sigma)])
        return Quick(MIXTURE, path)(x, torch.full((5,), node.t, dtype=F64), {}).x0

    states, x = [], grid[0].sigma * z
    theirs = karras_algorithm_2(denoiser, x, [n.sigma for n in grid], noise=Seeds(range(5), dtype=F64), **how)
    churn(Quick(MIXTURE, path), x, karras(12)(path), noise=Seeds(range(5), dtype=F64),
          callback=lambda i, x, p: states.append(x), **how)  # fmt: skip
    agree(states, theirs, 1e-7)


def test_churn_without_churn_is_heun():
    for path in (VP(), Linear()):
        z, times = normals(5), uniform(9)(path)
        for clock in ("tau", "sigma"):
            still = churn(Quick(MIXTURE, path), z, times, s_churn=0.0, clock=clock)
            assert torch.equal(still, heun(Quick(MIXTURE, path), z, times, clock=clock))


def test_restart_is_algorithm_1():
    """Xu et al. 2023, algorithm 1, on the VE path: down to t_min; K times up by noise and down by Heun; then on."""
    path, z, drawn = VE(), normals(5), normals(5, seed=3)
    denoise, times = Quick(MIXTURE, path), karras(9)(path)
    (low,) = nodes_at(path, [0.06 / 1.06])
    levels = torch.linspace(0.3 ** (1 / 7), 0.06 ** (1 / 7), 5, dtype=F64) ** 7
    inner = times_at(path, levels / (1 + levels))
    x = heun(denoise, 80 * z, torch.cat([times[times > low.t], torch.tensor([low.t]).double()]))
    for _ in range(2):
        x = heun(denoise, x + math.sqrt(0.3**2 - 0.06**2) * 1.01 * drawn, inner)
    x = heun(denoise, x, torch.cat([torch.tensor([low.t]).double(), times[times < low.t]]))
    got = restart(denoise, 80 * z, times, repeats=2, steps=4, s_noise=1.01, noise=lambda shape: drawn)
    assert torch.allclose(got, x, atol=1e-9)
    still = restart(denoise, 80 * z, times, repeats=0)
    once = torch.cat([times[times > low.t], torch.tensor([low.t]).double(), times[times < low.t]])
    assert torch.allclose(still, heun(denoise, 80 * z, once), atol=1e-9)


@pytest.mark.parametrize("path", [Linear(), VP()], ids=["Linear", "VP"])
@pytest.mark.parametrize("name", ["churn", "restart"])
def test_noise_put_in_is_taken_out(name, path):
    """From exact x_t at tau = 0.5 to 0.02, with the most noise: the marginal at the end is the path's own."""
    n, g = 10_000, torch.Generator().manual_seed(0)
    a, b = nodes_at(path, [0.5, 0.02])
    x = mix(path, MIXTURE.sample(n)[0], torch.randn(n, 2, generator=g, dtype=F64), torch.full((n,), a.t, dtype=F64))
    times = times_at(path, torch.linspace(0.5, 0.02, 25, dtype=F64))
    churned, restarted = {"s_churn": 1e9, "s_tmin": 0.0, "s_tmax": math.inf}, {"high": 0.9, "repeats": 3, "steps": 8}
    noise = lambda shape: torch.randn(n, *shape, generator=g, dtype=F64)  # noqa: E731
    y = SAMPLERS[name](Quick(MIXTURE, path), x, times, noise=noise, **(churned if name == "churn" else restarted))
    there = MIXTURE.noised(b.alpha, b.sigma)
    assert torch.allclose(y.mean(0), there.mean(), atol=0.03)
    assert torch.allclose(y.T.cov(), there.cov(), atol=0.05)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_noise_keeps_the_marginal(eta):
    """From exact x_t, a noisy step lands on the exact marginal at s if x0 is known: the variance is the posterior's."""
    path, n = VP(), 200_000
    (_, at, st_), (_, as_, ss) = nodes(path, torch.tensor([0.8, 0.5], dtype=F64))

    class Known:  # one data point, at 1
        def __init__(self):
            self.path = path

        def __call__(self, x, t, cond):
            return Prediction(torch.ones_like(x), (x - at) / st_)

    g = torch.Generator().manual_seed(0)
    x = at + st_ * torch.randn(n, 1, generator=g, dtype=F64)
    noise = lambda shape: torch.randn(n, *shape, generator=g, dtype=F64)  # noqa: E731
    y = ddim(Known(), x, torch.tensor([0.8, 0.5], dtype=F64), eta=eta, noise=noise)
    assert float(y.mean()) == pytest.approx(as_, abs=0.01)
    assert float(y.std()) == pytest.approx(ss, abs=0.01)
    # and the correlation with where it came from is that of the DDPM posterior (Ho et al. 2020, eq. 7)
    r = at / as_
    var = eta**2 * ss**2 * (1 - (r * ss / st_) ** 2)
    expected = math.sqrt(ss**2 - var) / ss
    assert float(torch.corrcoef(torch.stack([x[:, 0], y[:, 0]]))[0, 1]) == pytest.approx(expected, abs=0.01)


def test_ancestral_is_ddim_with_eta_one():
    z = normals(5)
    times = uniform(12)(VP())
    noise = [Seeds(range(5), dtype=F64) for _ in range(2)]
    denoise = ExactDenoiser(MIXTURE, VP())
    a = SAMPLERS["ancestral"](denoise, z, times, noise=noise[0])
    assert torch.allclose(a, ddim(denoise, z, times, eta=1.0, noise=noise[1]), atol=1e-12)


# ---------------------------------------------------------------------------------------------- diffusers
def epsilon(x, k):
    """A smooth stand-in for a network's output, at the integer time k."""
    return torch.tanh(x * 0.7 + k / 1000) * 0.9


class FromEpsilon:
    """The same stand-in as a denoiser; t = (k + 1) / 1000."""

    path = VP()

    def __call__(self, x, t, cond):
        eps = epsilon(x, t[0] * 1000 - 1)
        a, s = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        return Prediction((x - s * eps) / a, eps)


def theirs(scheduler, steps, x, **how):
    """Every state of a diffusers sampler, and the times that it visits, in our convention."""
    scheduler.set_timesteps(steps)
    states = []
    for k in scheduler.timesteps:
        x = scheduler.step(epsilon(x, k), k, x, **how).prev_sample
        states.append(x)
    times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1)])
    return states, times


def ours(sampler, x, times, **how):
    states = []
    sampler(FromEpsilon(), x, times, callback=lambda i, x, p: states.append(x), **how)
    return states


def agree(a, b, tolerance=1e-5):
    assert len(a) == len(b)
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        assert torch.allclose(p, q, atol=tolerance, rtol=tolerance), (i, float((p - q).abs().max()))


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_ddim_agrees_with_diffusers(steps):
    """ "leading" spacing, the only one whose previous step diffusers gets right (its issue 11347)."""
    from diffusers import DDIMScheduler

    s = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=0, timestep_spacing="leading")
    x = normals(6)
    states, times = theirs(s, steps, x)
    # their last step goes to k = 0, one step of the table short of the data; the others are ours
    agree(ours(ddim, x, times)[:-1], states[:-1])
    last = torch.cat([times[:-1], torch.tensor([1 / 1000])])
    if times[-2] > 1 / 1000:
        agree(ours(ddim, x, last)[-1:], states[-1:])


def test_ddim_eta_agrees_with_diffusers():
    from diffusers import DDIMScheduler

    s = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    s.set_timesteps(10)
    x, noise = normals(6), [normals(6, seed=k) for k in range(1, 11)]
    times = torch.cat([(s.timesteps.double() + 1) / 1000, torch.zeros(1)])
    given = iter(noise)
    mine = ours(ddim, x, times, eta=0.7, noise=lambda shape: next(given))
    for i, k in enumerate(s.timesteps[:-1]):  # at the last, theirs adds noise to the data
        x = s.step(epsilon(x, k), k, x, eta=0.7, variance_noise=noise[i]).prev_sample
        assert torch.allclose(mine[i], x, atol=1e-5)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("steps", [5, 20])
def test_ancestral_agrees_with_diffusers(variance, steps):
    from diffusers import DDPMScheduler

    s = DDPMScheduler(variance_type=f"fixed_{variance}", clip_sample=False, timestep_spacing="leading")
    s.set_timesteps(steps)
    x = normals(6)
    times = torch.cat([(s.timesteps.double() + 1) / 1000, torch.zeros(1)])
    noise = [normals(6, seed=k) for k in range(1, steps + 1)]
    given, states, y = iter(noise), [], x

    import diffusers.schedulers.scheduling_ddpm as module

    original, drawn = module.randn_tensor, iter(noise)
    module.randn_tensor = lambda *a, **k: next(drawn)
    try:
        for k in s.timesteps:
            y = s.step(epsilon(y, k), k, y).prev_sample
            states.append(y)
    finally:
        module.randn_tensor = original
    mine = ours(SAMPLERS["ancestral"], x, times, variance=variance, noise=lambda shape: next(given))
    agree(mine, states, 2e-5)


@pytest.mark.parametrize("steps", [5, 10, 25])
def test_dpmpp_2m_agrees_with_diffusers(steps):
    """Order tests cannot see a wrong step ratio (its error telescopes), so every state is compared."""
    from diffusers import DPMSolverMultistepScheduler

    s = DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="dpmsolver++", final_sigmas_type="zero", lower_order_final=True,
        timestep_spacing="linspace", euler_at_final=True,
    )  # fmt: skip
    x = normals(6)
    states, times = theirs(s, steps, x)
    agree(ours(dpmpp_2m, x, times), states)


def test_flow_samplers_agree_with_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    class Flow:
        path = Linear()

        def __call__(self, x, t, cond):
            v = epsilon(x, 1000 * t[0])
            return Prediction(x - t[:, None] * v, x + (1 - t[:, None]) * v)

    for scheduler, sampler in [
        (FlowMatchEulerDiscreteScheduler(), ddim),
        (FlowMatchHeunDiscreteScheduler(), heun),
    ]:
        scheduler.set_timesteps(10)
        x = y = normals(6)
        for k in scheduler.timesteps:
            y = scheduler.step(epsilon(y, k.double()), k, y).prev_sample
        mine = sampler(Flow(), x, scheduler.sigmas.double().unique().flip(0))
        assert torch.allclose(mine, y.double(), atol=1e-5), sampler.__name__


# ---------------------------------------------------------------------------------- more of diffusers
@pytest.mark.parametrize("steps", [3, 10, 14, 15, 25])
def test_dpmpp_3m_agrees_with_diffusers(steps):
    """With their second derivative, which lacks its factor 2! (so it is of second order: test_order_of_the_options)."""
    from diffusers import DPMSolverMultistepScheduler

    s = DPMSolverMultistepScheduler(
        solver_order=3, algorithm_type="dpmsolver++", final_sigmas_type="zero", timestep_spacing="linspace"
    )
    x = normals(6)
    states, times = theirs(s, steps, x)
    agree(ours(dpmpp_3m, x, times, curvature=0.5), states)
    if steps > 3:
        assert not torch.allclose(ours(dpmpp_3m, x, times)[-1], states[-1].double(), atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_unipc_agrees_with_diffusers(steps, variant, order):
    from diffusers import UniPCMultistepScheduler

    s = UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, final_sigmas_type="zero", timestep_spacing="linspace"
    )
    x = normals(6)
    states, times = theirs(s, steps, x)
    last = steps - (variant == "bh1")  # theirs is nan there: B = -h is infinite, times an empty sum
    agree(ours(unipc, x, times, order=order, variant=variant)[:last], states[:last])


@pytest.mark.parametrize("steps", [3, 10, 25])
def test_dpmpp_sde_agrees_with_diffusers(steps):
    from diffusers import DPMSolverMultistepScheduler

    s = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", final_sigmas_type="zero", timestep_spacing="linspace", euler_at_final=True
    )
    s.set_timesteps(steps)
    x = y = normals(6)
    times = torch.cat([(s.timesteps.double() + 1) / 1000, torch.zeros(1)])
    drawn = [normals(6, seed=k) for k in range(1, steps + 1)]
    states, noises = [], iter(drawn)
    for k, z in zip(s.timesteps, drawn, strict=True):
        y = s.step(epsilon(y, k), k, y, variance_noise=z).prev_sample
        states.append(y)
    agree(ours(dpmpp_sde, x, times, noise=lambda shape: next(noises)), states)


@pytest.mark.parametrize("steps", [2, 10])
def test_heun_agrees_with_diffusers(steps):
    """In Karras et al.'s clock, y = x / alpha against sigma / alpha. Two of their calls are one step, but the last."""
    from diffusers import HeunDiscreteScheduler

    s = HeunDiscreteScheduler(timestep_spacing="trailing", beta_start=1e-4, beta_end=0.02)
    s.set_timesteps(steps)
    x, path, states = normals(6), VP(), []
    times = torch.cat([(s.timesteps[:1].double() + 1) / 1000, (s.timesteps[1::2].double() + 1) / 1000, torch.zeros(1)])
    grid = nodes(path, times)
    y = x / grid[0].alpha
    for i, k in enumerate(s.timesteps):
        alpha = float(path.alpha((k.double()[None] + 1) / 1000))
        y = s.step(epsilon(y * alpha, k.double()), k, y).prev_sample
        if i % 2 == 1 or i == len(s.timesteps) - 1:
            states.append(y)
    assert len(states) == steps
    agree([x / n.alpha for x, n in zip(ours(heun, x, times, clock="sigma"), grid[1:], strict=True)], states)


class Stand(torch.nn.Module):
    """A network of EDM's: what it sees is c_in x and log(sigma) / 4."""

    def forward(self, x, label, cond):
        return torch.tanh(x * 0.9 + label[:, None] * 0.3)


def edm(scheduler, steps, x, drawn=()):
    import diffusers.schedulers.scheduling_edm_dpmsolver_multistep as module

    scheduler.set_timesteps(steps)
    original, states, noises, y = module.randn_tensor, [], iter(drawn), x * scheduler.sigmas[0]
    module.randn_tensor = lambda *a, **k: next(noises)
    try:
        for k in scheduler.timesteps:
            out = Stand()(scheduler.scale_model_input(y, k), k.expand(len(y)), {})
            y = scheduler.step(out, k, y).prev_sample
            states.append(y)
    finally:
        module.randn_tensor = original
    return states


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "dpmpp_3m", "dpmpp_sde"])
def test_edm_schedulers_of_diffusers(name):
    """Path, preconditioning, grid and sampler together: VE, Karras, karras. The churn of EDMEulerScheduler is left out:
    it asks the network before the noise is added, where algorithm 2 asks after (test_churn_is_algorithm_2)."""
    from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

    if name == "ddim":
        scheduler, options = EDMEulerScheduler(), {}
    else:
        kind = "sde-dpmsolver++" if name == "dpmpp_sde" else "dpmsolver++"
        order, options = (3, {"curvature": 0.5}) if name == "dpmpp_3m" else (2, {})
        scheduler = EDMDPMSolverMultistepScheduler(solver_order=order, algorithm_type=kind)
    x, steps, states = normals(6), 18, []
    drawn = [normals(6, seed=k) for k in range(1, steps + 1)]
    noises = iter(drawn)
    denoise = NetDenoiser(Stand(), VE(), Karras())
    generate = bind(name, karras(steps), callback=lambda i, x, p: states.append(x), **options)(denoise)
    generate(x, {}, lambda shape: next(noises))
    expected = edm(scheduler, steps, x, drawn)
    for mine, y in zip(states, expected, strict=True):
        assert torch.allclose(mine, y.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 250, 1000])
def test_discrete_grids_are_those_of_diffusers(spacing, steps):
    from diffusers import DDIMScheduler

    s = DDIMScheduler(timestep_spacing=spacing)
    s.set_timesteps(steps)
    grid = {"leading": leading, "trailing": trailing, "linspace": linspace}[spacing]
    times = grid(steps)(VP())
    assert float(times[-1]) == 0
    k = (times[:-1] * 1000).round().long() - 1
    if spacing == "linspace" and steps == 1:
        assert k.tolist() == [999]  # theirs is 0: a step from where there is no noise
    else:
        assert k.tolist() == s.timesteps.tolist()
    with pytest.raises(ValueError, match="allowed 1 … 1000"):
        grid(1001)
    assert (grid(4, timesteps=8)(VP()) * 8).tolist() == {
        "leading": [7, 5, 3, 1, 0], "trailing": [8, 6, 4, 2, 0], "linspace": [8, 6, 3, 1, 0]
    }[spacing]  # fmt: skip


# ------------------------------------------------------------------------------------- data -> noise -> data
@pytest.mark.parametrize("path", [Linear(), VP(), VE()], ids=["Linear", "VP", "VE"])
@pytest.mark.parametrize("name", ODE)
def test_inversion_then_sampling_returns_the_input(name, path):
    denoise, (x0, _) = Quick(MIXTURE, path), MIXTURE.sample(64, seed=2)
    times = (uniform(200) if name == "ddim" else logsnr(60) if name in ("dpmpp_3m", "unipc") else uniform(60))(path)
    x = invert(denoise, x0, times, sampler=name)
    back = ODE[name](denoise, x, times)
    assert float((back - x0).norm(dim=1).mean()) < (0.05 if name == "ddim" else 0.01)
    start = nodes(path, times)[0]
    assert float((x / start.sigma).mean()) == pytest.approx(0, abs=0.2)
    assert float((x / start.sigma).std()) == pytest.approx(1, abs=0.15)


def test_inversion_is_the_inverse_of_the_flow():
    """And not only of itself: noise -> data by a fine grid, data -> noise by inversion."""
    z = normals(64)
    for path in (Linear(), VP(), VE()):
        denoise, times = Quick(MIXTURE, path), uniform(64)(path)
        x0 = rk4(denoise, nodes(path, times)[0].sigma * z, times)
        for name, tolerance in {"heun": 2e-3, "rk4": 2e-3, "dopri5": 2e-3, "unipc": 5e-3}.items():
            x = invert(denoise, x0, times, sampler=name)
            assert float((x / nodes(path, times)[0].sigma - z).norm(dim=1).mean()) < tolerance, (name, path)


def test_inversion_of_a_part_of_the_path_and_of_labels():
    denoise, label = ExactDenoiser(MIXTURE, Linear()), {"label": torch.tensor([0, 1, 2])}
    x = normals(3)
    half = torch.linspace(0.7, 0.2, 65, dtype=F64)
    up = invert(denoise, x, half, label)
    assert torch.allclose(heun(denoise, up, half, label), x, atol=1e-4)
    assert not torch.allclose(invert(denoise, x, half), up, atol=1e-2)
    only = Quick(MIXTURE.component(1), Linear())
    assert torch.allclose(invert(only, x[1:2], half), up[1:2], atol=1e-10)


def test_inversion_costs_what_it_says():
    denoise = Counted(Quick(MIXTURE, Linear()))
    invert(denoise, normals(2), uniform(8)(Linear()), sampler="heun", refine=3)
    assert denoise.calls == 3 + 2 * 7
    alone = invert(denoise, normals(2), torch.tensor([0.25, 0.0]), refine=0)
    assert torch.allclose(alone, 0.75 * normals(2))
    with pytest.raises(ValueError, match="allowed for inversion: ddim"):
        invert(denoise, normals(2), uniform(8)(Linear()), sampler="ancestral")
    with pytest.raises(ValueError, match="refine: given -1"):
        invert(denoise, normals(2), uniform(8)(Linear()), refine=-1)


# -------------------------------------------------------------------------------------- seeds, grids, bind
@pytest.mark.parametrize("name", SAMPLERS)
@given(split=st.integers(1, 6))
def test_sample_i_is_the_same_for_any_batch_size(name, split):
    """dopri5's steps are shared by the batch: there, to its tolerance."""
    generate = bind(name, uniform(6))(Quick(MIXTURE, Linear()))

    def draw(seeds):
        noise = Seeds(seeds, dtype=F64)
        return generate(noise((2,)), {}, noise)

    together = draw(range(7))
    apart = torch.cat([draw(range(split)), draw(range(split, 7))])
    assert torch.allclose(together, apart, atol=1e-13 if name != "dopri5" else 2e-3)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddim", {"eta": -0.1}, "eta: given -0.1; allowed 0 … 1"),
        ("ddim", {"eta": 1.5}, "eta: given 1.5"),
        ("ancestral", {"variance": "huge"}, "variance: given 'huge'; allowed small, large, learned"),
        ("heun", {"clock": "t"}, "clock: given 't'"),
        ("heun", {"eta": 0.5}, "heun: has no option 'eta'; allowed: clock"),
        ("rk4", {"eta": 0.5}, "rk4: has no option 'eta'; allowed: none"),
        ("unipc", {"order": 4}, "order: given 4; allowed 1, 2, 3"),
        ("unipc", {"variant": "bh3"}, "variant: given 'bh3'"),
        ("dopri5", {"rtol": 0.0}, "rtol: given 0.0; allowed above 0"),
        ("dopri5", {"atol": -1e-3}, "atol: given -0.001"),
        ("dopri5", {"tau_min": 0.0}, "tau_min: given 0.0"),
        ("dopri5", {"tau_min": 1.0}, "tau_min: given 1.0"),
        ("churn", {"s_churn": -1.0}, "s_churn: given -1.0; allowed 0 or more"),
        ("churn", {"s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin, s_tmax"),
        ("churn", {"s_noise": 0.0}, "s_noise: given 0.0"),
        ("churn", {"clock": "t"}, "clock: given 't'"),
        ("sde", {"eta": -1.0}, "eta: given -1.0"),
        ("dpmpp_sde", {"eta": -1.0}, "eta: given -1.0"),
        ("restart", {"low": 0.3, "high": 0.1}, "0 < low < high"),
        ("restart", {"high": 1e9}, "within the grid's levels"),
        ("restart", {"repeats": -1}, "repeats: given -1"),
        ("restart", {"steps": 0}, "steps: given 0"),
        ("restart", {"s_noise": -1.0}, "s_noise: given -1.0"),
    ],
)
def test_senseless_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        bind(name, 5, **options)(Quick(MIXTURE, VE()))(normals(2), {})
    assert "\n" not in str(refused.value)


@on_every_path
def test_grids_by_noise_level(path):
    """Uniform in what they say, from the path's end or 80, whichever is lower, to 0.002, then 0; the first is t = 1."""
    for grid, measure in ((logsnr, math.log), (karras, lambda s: s ** (1 / 7))):
        got = nodes(path, grid(9)(path))
        assert len(got) == 10
        assert (got[0].t, got[-1].t) == (1, 0)
        assert got[8].level == pytest.approx(0.002)
        top = min(80.0, got[0].level)
        even = torch.tensor([measure(top), *(measure(n.level) for n in got[1:9])]).diff()
        assert torch.allclose(even, even[:1].expand(8), rtol=1e-4)
        assert len(grid(1)(path)) == 2
    rho3 = nodes(path, karras(5, low=0.01, high=10.0, rho=3.0)(path))
    assert [n.level ** (1 / 3) for n in rho3[1:5]] == pytest.approx(
        torch.linspace(10 ** (1 / 3), 0.01 ** (1 / 3), 5, dtype=F64)[1:].tolist()
    )


def test_senseless_levels_are_refused():
    with pytest.raises(ValueError, match="0 < low < high"):
        karras(5, low=1.0, high=0.5)
    with pytest.raises(ValueError, match=r"highest noise level, 0\.5"):
        logsnr(5, low=0.6)(VE(sigma_max=0.5))


@on_every_path
@given(tau=st.floats(1e-6, 0.98))
def test_nodes_at_inverts_the_chart(path, tau):
    one, two = nodes_at(path, [tau, tau / 2])
    assert one.tau == pytest.approx(tau, rel=1e-12)
    assert two.tau == pytest.approx(tau / 2, rel=1e-12)


def test_seeds_continue_each_stream():
    one, two = Seeds([5]), Seeds([4, 5])
    assert torch.equal(one((3,))[0], two((3,))[1])
    a, b = one((3,)), two((3,))
    assert torch.equal(a[0], b[1])
    assert not torch.equal(a, Seeds([5])((3,)))


@on_every_path
def test_uniform_grid_is_uniform_in_the_chart(path):
    tau = chart(path, uniform(7)(path))[0]
    assert torch.allclose(tau.diff(), tau.diff()[:1].expand(7), atol=1e-12)
    assert float(tau[-1]) == 0
    assert float(uniform(7)(path)[0]) == 1
    assert torch.allclose(trailing(4)(path), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=F64))


@pytest.mark.parametrize("times", [[], [1.0], [0.0, 1.0], [1.0, 1.0, 0.0], [1.2, 0.0], [0.5, -0.1], [[1.0, 0.0]]])
@pytest.mark.parametrize("name", SAMPLERS)
def test_senseless_grids_are_refused(name, times):
    with pytest.raises(ValueError, match="strictly falling"):
        SAMPLERS[name](ExactDenoiser(MIXTURE, Linear()), normals(2), torch.tensor(times))


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_must_be_positive(steps):
    for grid in GRIDS.values():
        with pytest.raises(ValueError, match="allowed 1 or more"):
            grid(steps)


def test_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="allowed: ddim"):
        bind("ddmi", 10)


def test_guidance_reaches_the_sampler():
    denoise = ExactDenoiser(MIXTURE, Linear())
    z, cond = normals(400), {"label": torch.zeros(400, dtype=torch.long)}
    plain = bind("heun", 30)(denoise)(z, cond)
    only = bind("heun", 30)(ExactDenoiser(MIXTURE.component(0), Linear()))(z, {})
    assert torch.allclose(plain, only, atol=1e-10)
    null = bind("heun", 30, classifier_free(0.0))(denoise)(z, cond)
    assert torch.allclose(null, bind("heun", 30)(denoise)(z, {}), atol=1e-10)
    strong = bind("heun", 30, classifier_free(3.0))(denoise)(z, cond)
    assert float(MIXTURE.component(0).log_prob(strong).mean()) > float(MIXTURE.component(0).log_prob(plain).mean())


# ------------------------------------------------------------------------------------------ learned variance
class FromBoth:
    """The stand-in of diffusers' tests as a model that learned its variance: w is another smooth function."""

    path = VP()

    def __call__(self, x, t, cond):
        return Learned.of(FromEpsilon()(x, t, cond), torch.sin(3 * x + t[0]))


@pytest.mark.parametrize("steps", [5, 20])
def test_learned_variance_agrees_with_diffusers(steps, monkeypatch):
    """Every state, strided chains included; their last step adds no noise, as ours."""
    import diffusers.schedulers.scheduling_ddpm as module

    s = module.DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="leading")
    s.set_timesteps(steps)
    x, noise = normals(6), [normals(6, seed=k) for k in range(1, steps + 1)]
    times = torch.cat([(s.timesteps.double() + 1) / 1000, torch.zeros(1)])
    drawn, states, y = iter(noise), [], x
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: next(drawn))
    for k in s.timesteps:
        out = torch.cat([epsilon(y, k), torch.sin(3 * y + (k + 1) / 1000)], 1)
        y = s.step(out, k, y).prev_sample
        states.append(y)
    for how in ({"variance": "learned"}, {}):
        mine, drawn_here = [], iter(noise)
        ancestral(FromBoth(), x, times, callback=lambda i, x, p, mine=mine: mine.append(x),
                  noise=lambda shape, drawn_here=drawn_here: next(drawn_here), **how)  # fmt: skip
        agree(mine, states, 1e-5)


@pytest.mark.parametrize("std", [0.3, 1.5])
def test_few_steps_of_the_learned_variance_have_the_right_moments(std):
    """With the true variance each step is exact: the spread at the last noisy node is that of the data there, after
    two steps; the fixed ones miss it by more than a tenth (Bao et al. 2022, theorem 1, has the same optimum)."""
    path, n = VP(), 40_000
    times = torch.tensor([1.0, 0.45, 0.15], dtype=F64)
    bell = Bell(path, 0.4, std, times)
    last = nodes(path, times)[-1]
    wanted = math.sqrt((last.alpha * std) ** 2 + last.sigma**2)
    spread = {}
    for variance in ("small", "large", "learned"):
        g = torch.Generator().manual_seed(5)
        z = torch.randn(n, 1, generator=g, dtype=F64)
        noise = lambda shape, g=g: torch.randn(n, *shape, generator=g, dtype=F64)  # noqa: E731
        x = ancestral(bell, z, times, variance=variance, noise=noise)
        spread[variance] = float(x.std()) / wanted
        assert float(x.mean()) == pytest.approx(last.alpha * 0.4, abs=0.02)
    assert spread["learned"] == pytest.approx(1, abs=0.01)
    assert spread["small"] < 0.97
    assert abs(spread["large"] - 1) > 0.03, spread


def test_the_width_of_a_step_survives_guidance_and_counting():
    """With classifier-free guidance it is the conditional model's; a model without one is told so."""
    z, cond, times = normals(4), {"label": torch.tensor([0, 1, 2, 0])}, uniform(4)(VP())

    class Labelled:
        path = VP()

        def __call__(self, x, t, cond):
            seen = cond["keep"] if "keep" in cond else torch.ones(len(x), dtype=torch.bool)
            return Learned.of(ExactDenoiser(MIXTURE, VP())(x, t, cond), torch.where(seen, 1.0, -1.0)[:, None] + 0 * x)

    for guide in (classifier_free(2.0), classifier_free(2.0, passes="apart"), clamp(-9, 9)):
        got = guide(Counted(Labelled()))(z, torch.full((4,), 0.5, dtype=F64), cond)
        assert torch.equal(width(got), torch.ones_like(z))
        assert torch.allclose(VP().alpha(torch.tensor(0.5)) * got.x0 + VP().sigma(torch.tensor(0.5)) * got.x1, z)
    learned, large = (ancestral(classifier_free(2.0)(Labelled()), z, times, cond, variance=v,
                                noise=Seeds(range(4), dtype=F64)) for v in ("learned", "large"))  # fmt: skip
    assert torch.allclose(learned, large, atol=1e-9)  # w = 1 is beta
    for variance in ("small", "large"):
        ancestral(Labelled(), z, times, variance=variance)
    with pytest.raises(ValueError, match="has learned none; allowed small, large"):
        ancestral(ExactDenoiser(MIXTURE, VP()), z, times, variance="learned")
