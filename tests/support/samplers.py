"""The sampler contract: checks that every entry of ``SAMPLERS`` must pass, and the exact denoisers that they use.

Each ``check_*`` takes a sampler's name and raises ``AssertionError``. ``tests/diffusion/test_samplers.py`` runs them on
the registry and ``tests/recipes`` on a sampler that is added to it.
"""

import math
from functools import lru_cache
from itertools import pairwise

import pytest
import torch

from genkit.core import Prediction
from genkit.diffusion.guidance import classifier_free
from genkit.diffusion.paths import PATHS, VP, Linear, chart, times_at
from genkit.diffusion.samplers import GRIDS, SAMPLERS, CountingDenoiser, Seeds, bind, invert, logsnr, nodes, uniform
from tests.support.exact import F64, ExactDenoiser, three

MIXTURE = three()
PATH_LIST = [cls() for cls in PATHS.values()]
on_every_path = pytest.mark.parametrize("path", PATH_LIST, ids=lambda p: type(p).__name__)
TOLERANCES = {1.0: 0.02, 2.0: 1e-3, 3.0: 5e-5, 4.0: 2e-8}
"""largest error of 128 steps, by order"""


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
    if kind == "uniform":
        return torch.linspace(*ends.tolist(), n + 1, dtype=F64)
    return torch.sigmoid(torch.linspace(*ends.logit().tolist(), n + 1, dtype=F64))


def orders(name, path, kind, **options):
    z, truth, ns = normals(64), solution(), (32, 64, 128)
    ends = [in_chart(SAMPLERS[name].function, path, z, spaced(kind, n), **options) for n in ns]
    errors = [float((x - truth).norm(dim=1).mean()) for x in ends]
    return [math.log2(a / b) for a, b in pairwise(errors)], errors


def agree(a, b, tolerance=1e-5):
    assert len(a) == len(b)
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        assert torch.allclose(p, q, atol=tolerance, rtol=tolerance), (i, float((p - q).abs().max()))


def is_adaptive(name):
    return SAMPLERS[name].evaluations is None


def steps_for(name, evaluations):
    """The largest number of steps that costs at most this many evaluations."""
    if is_adaptive(name):
        return 1
    return max(n for n in range(1, evaluations + 1) if SAMPLERS[name].evaluations(n) <= evaluations)


# ---------------------------------------------------------------------------------------------------- the checks
def check_order(name, path):
    """Halving the step divides the error by 2^order, against torchdiffeq's solution."""
    info = SAMPLERS[name]
    order, errors = orders(name, path, info.order_grid)
    assert order[-1] == pytest.approx(info.order, abs=0.15), (order, errors)
    assert errors[-1] < TOLERANCES[info.order]


def check_moments(name, path):
    """20,000 samples have the mixture's mean and covariance; the noise of the estimate is about 0.01. (3,000 on the
    other paths, where the samples are the same except for the start.)"""
    n, loose = (20_000, 1) if path == Linear() else (3_000, 2.5)
    order = SAMPLERS[name].order
    steps = steps_for(name, 40 if order and order > 1 else 100)
    z, generator = normals(n), torch.Generator().manual_seed(1)

    def noise(shape):
        return torch.randn(n, *shape, generator=generator, dtype=F64)

    x = bind(name, uniform(steps))(Quick(MIXTURE, path))(z, {}, noise)
    assert torch.allclose(x.mean(0), MIXTURE.mean(), atol=0.025 * loose)
    assert torch.allclose(x.T.cov(), MIXTURE.cov(), atol=0.035 * loose)


def check_evaluations(name):
    """The registry's number, and under guidance twice the rows in as many calls."""
    denoise = CountingDenoiser(Quick(MIXTURE, Linear()))
    bind(name, uniform(7))(denoise)(normals(3), {})
    assert denoise.rows == 3 * denoise.calls
    if is_adaptive(name):
        assert 20 < denoise.calls < 150
        return
    expected = SAMPLERS[name].evaluations(7)
    assert denoise.calls == expected
    guided = CountingDenoiser(ExactDenoiser(MIXTURE, Linear()))
    bind(name, uniform(7), classifier_free(2.0))(guided)(normals(3), {"label": torch.zeros(3, dtype=torch.long)})
    assert (guided.calls, guided.rows) == (expected, 6 * expected)


def check_same_sample_on_every_path(name):
    z, taus = normals(16), torch.linspace(0.98, 0.0, 13, dtype=F64)
    sampler = SAMPLERS[name].function
    first, *others = [in_chart(sampler, path, z, taus, noise=Seeds(range(16), dtype=F64)) for path in PATH_LIST]
    for other in others:
        assert torch.allclose(other, first, atol=1e-10)
    # and from pure noise, on the two paths that have it
    first, second = [in_chart(sampler, p, z, taus / 0.98, noise=Seeds(range(16), dtype=F64)) for p in PATH_LIST[:2]]
    assert torch.allclose(first, second, atol=1e-10)


def check_never_at_zero(name):
    """``Quick`` and ``Normal`` assert it. One step, two steps, many: each ends at finite data."""
    options = {"rtol": 0.1, "atol": 0.1} if "rtol" in SAMPLERS[name].options else {}
    for kind, grid in GRIDS.items():
        for path in PATH_LIST if not is_adaptive(name) or kind == "uniform" else [Linear()]:
            for n in (2, 5) if kind == "leading" else (1, 2, 5):  # leading(1) is one step from t = 1 / 1000
                x = bind(name, grid(n), **options)(Quick(MIXTURE, path))(normals(2), {})
                assert x.shape == (2, 2)
                assert bool(x.isfinite().all()), (kind, path, n)


def check_float32_images_and_callback(name):
    calls = []
    generate = bind(name, uniform(6), callback=lambda i, x, p: calls.append((i, x, p)))(Normal(VP()))
    noise = Seeds(range(3))
    x = generate(noise((1, 4, 4)), {}, noise)
    assert x.shape == (3, 1, 4, 4)
    assert x.dtype == torch.float32
    assert [i for i, _, _ in calls] == list(range(len(calls)))
    assert len(calls) >= 6 or is_adaptive(name)
    assert len(calls) == 6 or is_adaptive(name) or SAMPLERS[name].stochastic
    assert torch.equal(calls[-1][1], x)
    assert all(p.x0.shape == x.shape for _, _, p in calls)


def check_seeds(name, split):
    """Sample i is the same in any batch. (The steps of an adaptive sampler are shared: there, to its tolerance.)"""
    generate = bind(name, uniform(6))(Quick(MIXTURE, Linear()))

    def draw(seeds):
        noise = Seeds(seeds, dtype=F64)
        return generate(noise((2,)), {}, noise)

    together = draw(range(7))
    apart = torch.cat([draw(range(split)), draw(range(split, 7))])
    assert torch.allclose(together, apart, atol=2e-3 if is_adaptive(name) else 1e-13)
    assert not torch.allclose(together[0], together[1])


def check_noise_is_drawn_if_stochastic(name):
    """Deterministic samplers never call ``noise``; stochastic ones do."""
    calls = []

    def noise(shape):
        calls.append(shape)
        return torch.randn(3, *shape, dtype=F64)

    bind(name, uniform(6))(Quick(MIXTURE, Linear()))(normals(3), {}, noise)
    assert bool(calls) == SAMPLERS[name].stochastic


def check_inversion(name, path):
    """Data to noise and back, for samplers that solve the ODE."""
    info = SAMPLERS[name]
    denoise, (x0, _) = Quick(MIXTURE, path), MIXTURE.sample(64, seed=2)
    grid = uniform(200) if info.order == 1 else logsnr(60) if info.order_grid == "logsnr" else uniform(60)
    times = grid(path)
    x = invert(denoise, x0, times, sampler=name)
    back = info.function(denoise, x, times)
    assert float((back - x0).norm(dim=1).mean()) < (0.05 if info.order == 1 else 0.01)
    start = nodes(path, times)[0]
    assert float((x / start.sigma).mean()) == pytest.approx(0, abs=0.2)
    assert float((x / start.sigma).std()) == pytest.approx(1, abs=0.15)


def check_bad_grid_is_refused(name, times):
    with pytest.raises(ValueError, match="strictly falling"):
        SAMPLERS[name].function(ExactDenoiser(MIXTURE, Linear()), normals(2), torch.tensor(times))


BAD_GRIDS = [[], [1.0], [0.0, 1.0], [1.0, 1.0, 0.0], [1.2, 0.0], [0.5, -0.1], [[1.0, 0.0]]]


def check_all(name):
    """The whole contract."""
    info = SAMPLERS[name]
    for path in (Linear(), VP()):
        check_moments(name, path)
        if info.order:
            check_order(name, path)
        if not info.stochastic:
            check_inversion(name, path)
    for check in (check_evaluations, check_same_sample_on_every_path, check_never_at_zero,
                  check_float32_images_and_callback, check_noise_is_drawn_if_stochastic):  # fmt: skip
        check(name)
    for split in (1, 3, 6):
        check_seeds(name, split)
    for times in BAD_GRIDS:
        check_bad_grid_is_refused(name, times)
