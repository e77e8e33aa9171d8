"""Samplers against a closed-form mixture, and step by step against diffusers."""

import math
from functools import lru_cache

import pytest
import torch
from exact import F64, ExactDenoiser, three
from hypothesis import given
from hypothesis import strategies as st

from genkit.core import Prediction
from genkit.guidance import classifier_free
from genkit.paths import PATHS, VP, Linear, chart, times_at
from genkit.sampling import GRIDS, SAMPLERS, Seeds, bind, ddim, dpmpp_2m, heun, nodes, trailing, uniform

MIXTURE = three()
ORDER = {"ddim": 1.0, "heun": 2.0, "dpmpp_2m": 2.0}  # of the deterministic ones
DETERMINISTIC = list(ORDER)
STOCHASTIC = [k for k in SAMPLERS if k not in ORDER]
PATH_LIST = [cls() for cls in PATHS.values()]


def normals(n, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)


def in_chart(sampler, path, z, taus, **options):
    """Sample between the chart times ``taus``, from and to the chart's own coordinates."""
    times = times_at(path, taus)
    scale = chart(path, times)[1]
    return sampler(ExactDenoiser(MIXTURE, path), z * scale[0], times, **options) / scale[-1]


@lru_cache
def converged():
    return in_chart(heun, Linear(), normals(64), torch.linspace(0.98, 0.02, 2049, dtype=F64))


@pytest.mark.parametrize("path", PATH_LIST, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name, path):
    """Halving the step divides the error by 2^order, between tau = 0.98 and 0.02, against 2048 Heun steps."""
    z, truth, errors = normals(64), converged(), []
    for n in (64, 128, 256):
        got = in_chart(SAMPLERS[name], path, z, torch.linspace(0.98, 0.02, n + 1, dtype=F64))
        errors.append(float((got - truth).norm(dim=1).mean()))
    order = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert order[-1] == pytest.approx(ORDER[name], abs=0.15), (order, errors)
    assert errors[-1] < {1.0: 0.03, 2.0: 0.002}[ORDER[name]]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_same_sample_on_every_path(name):
    z, taus = normals(16), torch.linspace(0.98, 0.0, 13, dtype=F64)
    first, *rest = [in_chart(SAMPLERS[name], path, z, taus) for path in PATH_LIST]
    for other in rest:
        assert torch.allclose(other, first, atol=1e-12)


def test_ddim_is_euler_of_rectified_flow():
    z, times = normals(8), torch.linspace(1, 0, 6, dtype=F64)
    denoise = ExactDenoiser(MIXTURE, Linear())
    u = z
    for a, b in zip(times[:-1], times[1:], strict=True):
        p = denoise(u, a.expand(8), {})
        u = u + (b - a) * (p.x1 - p.x0)
    assert torch.allclose(ddim(denoise, z, times), u, atol=1e-13)


@pytest.mark.parametrize("path", PATH_LIST, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", SAMPLERS)
def test_first_two_moments(name, path):
    """20,000 samples have the mixture's mean and covariance; the noise of the estimate is about 0.01."""
    n = 20_000
    z, generator = normals(n), torch.Generator().manual_seed(1)
    noise = lambda shape: torch.randn(n, *shape, generator=generator, dtype=F64)  # noqa: E731
    steps = 100 if name in STOCHASTIC else 60
    x = bind(name, uniform(steps))(ExactDenoiser(MIXTURE, path))(z, {}, noise)
    assert torch.allclose(x.mean(0), MIXTURE.mean(), atol=0.04)
    assert torch.allclose(x.T.cov(), MIXTURE.cov(), atol=0.06)


def test_no_sampler_asks_about_t_zero():
    class Watch:
        path = Linear()

        def __call__(self, x, t, cond):
            assert float(t.min()) > 0
            return Prediction(x, x)

    for name, sampler in SAMPLERS.items():
        for grid in GRIDS.values():
            x = sampler(Watch(), normals(2), grid(5)(Linear()))
            assert x.shape == (2, 2), name


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_noise_keeps_the_marginal(eta):
    """From exact x_t, one noisy step lands on the exact marginal at s, if x0 is known: the variance is the posterior's."""
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
    """"leading" spacing, the only one whose previous step diffusers gets right (its issue 11347)."""
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


# -------------------------------------------------------------------------------------- seeds, grids, bind
@pytest.mark.parametrize("name", SAMPLERS)
@given(split=st.integers(1, 6))
def test_sample_i_is_the_same_for_any_batch_size(name, split):
    denoise = ExactDenoiser(MIXTURE, VP())
    generate = bind(name, uniform(6))(denoise)

    def draw(seeds):
        noise = Seeds(seeds, dtype=F64)
        return generate(noise((2,)), {}, noise)

    together = draw(range(7))
    apart = torch.cat([draw(range(split)), draw(range(split, 7))])
    assert torch.allclose(together, apart, atol=1e-13)
    assert not torch.allclose(together[0], together[1])


def test_seeds_continue_each_stream():
    one, two = Seeds([5]), Seeds([4, 5])
    assert torch.equal(one((3,))[0], two((3,))[1])
    a, b = one((3,)), two((3,))
    assert torch.equal(a[0], b[1])
    assert not torch.equal(a, Seeds([5])((3,)))


@pytest.mark.parametrize("path", PATH_LIST, ids=lambda p: type(p).__name__)
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
