"""Samplers that add noise: their step against the papers' algorithms, and what the noise leaves of the marginals."""

import math

import pytest
import torch

from genkit.core import Prediction
from genkit.diffusion.guidance import clamp, classifier_free
from genkit.diffusion.paths import VE, VP, Linear, mix, times_at
from genkit.diffusion.posterior import LearnedVariance, learned_variance
from genkit.diffusion.samplers import (
    SAMPLERS,
    CountingDenoiser,
    Seeds,
    ancestral,
    churn,
    ddim,
    heun,
    karras,
    nodes,
    restart,
    sde,
    uniform,
)
from genkit.diffusion.samplers.steps import nodes_at
from tests.support.exact import F64, Bell, ExactDenoiser
from tests.support.samplers import MIXTURE, Quick, agree, normals, on_every_path


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
    options = {"churn": {"s_churn": 1e9, "s_tmin": 0.0, "s_tmax": math.inf},
               "restart": {"high": 0.9, "repeats": 3, "steps": 8}}[name]  # fmt: skip

    def noise(shape):
        return torch.randn(n, *shape, generator=g, dtype=F64)

    y = SAMPLERS[name].function(Quick(MIXTURE, path), x, times, noise=noise, **options)
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
    a = ancestral(denoise, z, times, noise=noise[0])
    assert torch.allclose(a, ddim(denoise, z, times, eta=1.0, noise=noise[1]), atol=1e-12)


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
            return LearnedVariance.of(
                ExactDenoiser(MIXTURE, VP())(x, t, cond), torch.where(seen, 1.0, -1.0)[:, None] + 0 * x
            )

    for guide in (classifier_free(2.0), classifier_free(2.0, passes="apart"), clamp(-9, 9)):
        got = guide(CountingDenoiser(Labelled()))(z, torch.full((4,), 0.5, dtype=F64), cond)
        assert torch.equal(learned_variance(got), torch.ones_like(z))
        assert torch.allclose(VP().alpha(torch.tensor(0.5)) * got.x0 + VP().sigma(torch.tensor(0.5)) * got.x1, z)
    learned, large = (ancestral(classifier_free(2.0)(Labelled()), z, times, cond, variance=v,
                                noise=Seeds(range(4), dtype=F64)) for v in ("learned", "large"))  # fmt: skip
    assert torch.allclose(learned, large, atol=1e-9)  # w = 1 is beta
    for variance in ("small", "large"):
        ancestral(Labelled(), z, times, variance=variance)
    with pytest.raises(ValueError, match="has learned none; allowed small, large"):
        ancestral(ExactDenoiser(MIXTURE, VP()), z, times, variance="learned")
