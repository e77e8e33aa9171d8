"""Samplers of a network that is nearly right: its error must not grow with ``1 / alpha``.

An exact denoiser has no error to amplify, so a path that ends in a tiny alpha passes every test with it.
"""

import math

import pytest
import torch

from genkit.diffusion.guidance import clamp, compose, within
from genkit.diffusion.parametrization import (
    MIN_ALPHA,
    PARAMETRIZATIONS,
    Epsilon,
    NetDenoiser,
    refuse_singular,
    usable_path,
)
from genkit.diffusion.paths import BETAS, PATHS, VP, ODEOnlyPath, TruncatedPath, end_time, whole_path
from genkit.diffusion.samplers import GRIDS, SAMPLERS, Seeds, bind, invert, log_prob, nodes, uniform
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.noise import FixedNoise

MEAN, STD, ERROR, ROWS, SHAPE = 0.3, 0.5, 0.05, 256, (4,)
ALL_PATHS = {name: kind() for name, kind in PATHS.items() if name != "vp"} | {f"vp {b}": VP(b) for b in BETAS}


def allowed(path, kind):
    try:
        refuse_singular(kind(), path)
    except ValueError:
        return False
    return True


CASES = [(p, k) for p, path in ALL_PATHS.items() for k, kind in PARAMETRIZATIONS.items() if allowed(path, kind)]


def exact_network(path, parametrization, error):
    """What a network of N(MEAN, STD^2) should say, and beside it an error of that share of its size."""

    def net(x_in, label, cond):
        x, t = net.seen  # Karras' input and label are scaled
        a, s = (f(t.double())[:, None] for f in (path.alpha, path.sigma))
        x0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x.double() - a * MEAN)
        x1 = (x.double() - a * x0) / s
        out = parametrization.target(path, x0, x1, t.double())
        size = parametrization.target(path, 0 * x0, torch.ones_like(x1), t.double()).abs()
        size = torch.maximum(size, parametrization.target(path, torch.full_like(x0, STD), 0 * x1, t.double()).abs())
        return (out + error * size * torch.sin(5 * x.double() / (a + s) + 3)).to(x)

    return net


class Nearly(NetDenoiser):
    """A denoiser whose network also sees x and t as they are."""

    def __call__(self, x, t, cond):
        self.net.seen = x, t
        return super().__call__(x, t, cond)


def nearly(path, prediction, error=ERROR):
    parametrization = PARAMETRIZATIONS[prediction]()
    return Nearly(exact_network(path, parametrization, error), path, parametrization)


def draw(denoise, sampler, grid=None, guidance=None):
    noise = Seeds(range(ROWS), dtype=torch.float64)
    options = {"rtol": 0.01, "atol": 0.01} if sampler == "dopri5" else {}
    return bind(sampler, uniform(20) if grid is None else grid, guidance, **options)(denoise)(noise(SHAPE), {}, noise)


MARKED = [pytest.param(name, marks=pytest.mark.slow) if name == "dopri5" else name for name in SAMPLERS]


@pytest.mark.parametrize("sampler", MARKED)
def test_a_small_error_of_the_network_is_a_small_error_of_the_samples(sampler):
    """On every path, for every prediction: cosine betas end at alpha = 5e-5, where eps would give samples of 1000."""
    for p, k in CASES:
        x = draw(nearly(ALL_PATHS[p], k), sampler)
        assert abs(float(x.mean()) - MEAN) < 0.1, (p, k)
        assert 0.4 < float(x.std()) < 0.6, (p, k, float(x.std()))


@pytest.mark.parametrize("grid", GRIDS)
def test_on_every_grid(grid):
    for p, path in ALL_PATHS.items():
        for k in ("eps", "score") if allowed(path, Epsilon) else ("v",):
            x = draw(nearly(path, k), "heun", GRIDS[grid](20))
            assert abs(float(x.mean()) - MEAN) < 0.1, (p, k)
            assert 0.4 < float(x.std()) < 0.6, (p, k, float(x.std()))


def test_the_likelihood_and_the_inverse_too():
    z = torch.randn(16, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = MEAN + STD * z
    truth = (-(z**2) / 2 - math.log(STD * math.sqrt(2 * math.pi))).sum(1)
    for p, k in [c for c in CASES if c[1] in ("eps", "score", "velocity")]:
        denoise = nearly(ALL_PATHS[p], k, 0.01)
        times = uniform(40)(denoise.path)
        assert float((log_prob(denoise, x, times=times) - truth).abs().mean()) < 0.5, (p, k)
        start = invert(denoise, x, times) / nodes(denoise.path, times)[0].sigma
        assert 0.9 < float(start.std()) < 1.15, (p, k)


def test_a_chain_of_reinforcement_learning_too():
    denoise = nearly(VP("cosine"), "eps")
    chain = Chain.on_grid(denoise.path, 20, FixedNoise(0.05))
    z = Seeds(range(ROWS), dtype=torch.float64)(SHAPE)
    x = chain.sample(denoise, chain.transitions[0].node.sigma * z, {}).xs[-1]
    assert 0.4 < float(x.std()) < 0.6


# ------------------------------------------------------------------------------------------------ where samplers start
def test_only_predictions_of_the_noise_on_paths_with_a_tiny_end_are_truncated():
    truncated = {(p, k) for p, k in CASES if end_time(nearly(ALL_PATHS[p], k).path) < 1}
    assert truncated == {(p, k) for p in ("vp linear", "vp cosine", "sub-vp") for k in ("eps", "score")}
    path = usable_path(VP("cosine"), Epsilon())
    end = torch.tensor([end_time(path)], dtype=torch.float64)
    assert float(path.alpha(end)) == pytest.approx(MIN_ALPHA, rel=1e-9)
    assert usable_path(path, Epsilon()) == path, "twice is once"
    assert end_time(ODEOnlyPath(path)) == end_time(path)
    assert whole_path(ODEOnlyPath(path)) == ODEOnlyPath(VP("cosine"))


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_start_at_the_end_of_a_truncated_path(grid):
    path = TruncatedPath(VP("cosine"), 0.7505)
    for steps in (1, 2, 20, 750):
        times = GRIDS[grid](steps)(path)
        assert float(times[0]) <= path.end
        assert len(nodes(path, times)) == steps + 1
        if grid != "leading":
            assert float(times[0]) >= 0.75
    same = GRIDS[grid](20)(TruncatedPath(VP("cosine"), 1.0))
    assert torch.equal(same, GRIDS[grid](20)(VP("cosine")))


@pytest.mark.parametrize("grid", ["trailing", "leading", "linspace"])
def test_more_discrete_steps_than_there_are_are_refused(grid):
    with pytest.raises(ValueError, match=r"steps: given 751; allowed 1 … 750, because at later times"):
        GRIDS[grid](751)(TruncatedPath(VP("cosine"), 0.7505))


def test_clipped_data_need_no_truncation():
    """Then the whole schedule is used, as Ho et al. (2020) sample; given times are used as they are."""
    denoise, seen = nearly(VP("cosine"), "eps"), []

    def record(guided):
        seen.append(guided.path)
        return guided

    x = draw(denoise, "ancestral", GRIDS["trailing"](50), compose(clamp(), within(0, 1, clamp()), record))
    assert seen[0] == VP("cosine")
    assert float(x.abs().max()) < 1.1
    assert abs(float(x.mean()) - MEAN) < 0.1
    times = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert float(draw(denoise, "ddim", times).std()) > 10
