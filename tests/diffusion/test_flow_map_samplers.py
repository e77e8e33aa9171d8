"""Samplers that jump by a flow map: exact for any number of steps, and state by state those of diffusers."""

import math

import pytest
import torch

from genkit.core import Prediction
from genkit.diffusion.guidance import classifier_free, within
from genkit.diffusion.parametrization import NetDenoiser, Velocity
from genkit.diffusion.paths import PATHS, VP, Linear, Shifted
from genkit.diffusion.samplers import (
    FLOW_MAP_SAMPLERS,
    SAMPLERS,
    CountingDenoiser,
    Seeds,
    bind,
    consistency,
    flow_map,
    uniform,
)
from genkit.objectives import FlowMap
from genkit.objectives.flow_map.rules import Consistency
from tests.support.exact import F64
from tests.support.flow_maps import STD, MapNet, normal_average, spread, time_of
from tests.support.samplers import agree, normals

on_every_path = pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=PATHS)


def exact(path, rule=None, **settings):
    """The denoiser of the exact flow map of normal data."""
    objective = FlowMap(path=path, **({"rule": rule} if rule else {}), **settings)
    return objective.denoiser(MapNet(objective))


# ------------------------------------------------------------------------------------------------- exact sampling
@on_every_path
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_number_of_jumps_gives_the_exact_sample(path, steps):
    """The map of N(0, s^2) scales z by the ratio of standard deviations, whatever the grid."""
    z = normals(50)
    x = bind("flow_map", uniform(steps))(exact(path))(z, {})
    alpha, sigma = (float(f(torch.ones(1, dtype=F64))) for f in (path.alpha, path.sigma))
    start = sigma * z / (alpha + sigma)  # in the chart
    expected = start * STD / spread(torch.tensor(sigma / (alpha + sigma), dtype=F64))
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_noise_keeps_the_marginals(gamma):
    """Every node's standard deviation is the path's, for any share of noise."""
    n, stds = 40_000, []
    generator = torch.Generator().manual_seed(1)
    times = torch.tensor([1.0, 0.7, 0.35, 0.1, 0.0], dtype=F64)
    noise = lambda shape: torch.randn(n, *shape, generator=generator, dtype=F64)  # noqa: E731
    flow_map(
        exact(Linear()), normals(n), times, gamma=gamma, noise=noise, callback=lambda i, x, p: stds.append(x.std())
    )
    torch.testing.assert_close(torch.stack(stds), spread(times[1:]), rtol=0.01, atol=0)


def test_consistency_is_all_noise_and_flow_map_none():
    calls = []

    def noise(shape):
        calls.append(shape)
        return normals(3, seed=len(calls))

    for name, steps, drawn in (("flow_map", 4, 0), ("consistency", 4, 3), ("consistency", 1, 0)):
        calls.clear()
        bind(name, uniform(steps))(exact(Linear()))(normals(3), {}, noise)
        assert len(calls) == drawn == (steps - 1 if FLOW_MAP_SAMPLERS[name].stochastic else 0)


@pytest.mark.parametrize("name", FLOW_MAP_SAMPLERS)
def test_one_evaluation_a_step_and_a_seed_a_sample(name):
    class Counting(CountingDenoiser):
        is_flow_map = True

    denoise = Counting(exact(Linear()))
    generate = bind(name, uniform(5))(denoise)

    def draw(seeds):
        noise = Seeds(seeds, dtype=F64)
        return generate(noise((2,)), {}, noise)

    together = draw(range(7))
    assert denoise.calls == FLOW_MAP_SAMPLERS[name].evaluations(5) == 5
    torch.testing.assert_close(torch.cat([draw(range(3)), draw(range(3, 7))]), together)


@pytest.mark.parametrize("name", [name for name, info in SAMPLERS.items() if info.order])
def test_solvers_integrate_the_velocity_of_a_flow_map(name):
    """Not asked for a target, a flow map is the denoiser of its velocity: the ODE's solvers reach the same sample."""
    z = normals(20)
    grid = 200 if name == "ddim" else 40
    x = bind(name, uniform(grid))(exact(Linear()))(z, {})
    torch.testing.assert_close(x, STD * z, rtol=0.03 if name == "ddim" else 0.01, atol=1e-3)


def test_guidance_sees_the_target_too():
    """Two passes: with and without a condition that moves the data by 1, both for the same jump."""

    class Moved:
        path, is_flow_map = Linear(), True

        def __call__(self, x, t, cond):
            tau_t, tau_r = t[:, None], cond["target_time"][:, None]
            shift = 1.0 * cond.get("keep", torch.ones(len(x), dtype=torch.bool))[:, None]
            u = normal_average(x - (1 - tau_t) * shift, tau_r, tau_t) - shift
            return Velocity().predict(self.path, x, t, u)

    z, label = normals(6), {"label": torch.zeros(6, dtype=torch.long)}
    for guidance in (classifier_free(3.0), within(0.0, 1.0, classifier_free(3.0))):
        x = bind("flow_map", uniform(1), guidance)(Moved())(z, label)
        plain, null = (
            bind("flow_map", uniform(1))(Moved())(z, {**label, **keep})
            for keep in ({}, {"keep": torch.zeros(6, dtype=torch.bool)})
        )
        torch.testing.assert_close(x, null + 3 * (plain - null))


# ------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("name", FLOW_MAP_SAMPLERS)
def test_a_model_without_a_flow_map_is_refused(name):
    plain = NetDenoiser(torch.nn.Identity(), Linear(), Velocity())
    with pytest.raises(ValueError, match=r"no flow map; take one of ddim.*--objective=flow-map"):
        bind(name, 4)(plain)


def test_a_model_of_jumps_to_the_data_says_which_sampler_to_use():
    denoise = exact(Linear(), Consistency(), time_rate=1.0)
    x = bind("consistency", 3)(denoise)(normals(4), {}, lambda shape: normals(4, seed=9))
    assert bool(x.isfinite().all())
    torch.testing.assert_close(bind("flow_map", 1)(denoise)(normals(4), {}), STD * normals(4))
    for name in ("flow_map", "heun"):
        with pytest.raises(ValueError, match=r"jumps to the data only .*--sampler consistency"):
            bind(name, 3)(denoise)(normals(4), {})


def test_gamma_is_a_share():
    with pytest.raises(ValueError, match="gamma"):
        bind("flow_map", 2, gamma=1.5)(exact(Linear()))(normals(2), {})


# ------------------------------------------------------------------------------------- diffusers, state by state
def output(x, t, r):
    """A smooth stand-in for a network's output, for the jump from t to r."""
    return torch.tanh(0.7 * x + t - 0.5 * r) * 0.9


class StandIn:
    is_flow_map = True

    def __init__(self, path, predict):
        self.path, self.predict = path, predict

    def __call__(self, x, t, cond):
        return self.predict(self.path, x, t, output(x, t[:, None], cond["target_time"][:, None]))


def from_noise(path, x, t, eps):
    a, s = path.alpha(t)[:, None], path.sigma(t)[:, None]
    return Prediction((x - s * eps) / a, eps)


def states(sampler, denoise, x, times, **how):
    found = []
    sampler(denoise, x, times, callback=lambda i, x, p: found.append(x), **how)
    return found


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_map_agrees_with_diffusers(shift):
    from diffusers import FlowMapEulerDiscreteScheduler

    scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(5)
    sigmas, x, found = scheduler.sigmas.double(), normals(6), []
    for k, t, r in zip(scheduler.timesteps, sigmas, sigmas[1:], strict=False):
        x = scheduler.step(output(x, t, r), k, x).prev_sample
        found.append(x)
    ours = states(flow_map, StandIn(Linear(), Velocity().predict), normals(6), sigmas)
    agree(ours, found)
    # our own grid for such a shift is that of the shifted path
    along = states(flow_map, exact(Shifted(shift=shift)), normals(6), torch.linspace(1, 0, 6, dtype=F64))
    agree(along, states(flow_map, exact(Linear()), normals(6), sigmas))


def table(cls, **settings):
    """A scheduler whose table, like ours, has the data at index 0: beta_0 = 0, then DDPM's."""
    betas = [0.0, *torch.linspace(1e-4, 0.02, 1000, dtype=F64)[:999].tolist()]
    return cls(trained_betas=betas, clip_sample=False, **settings)


def with_noise(monkeypatch, module, noises):
    drawn = iter(noises)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: next(drawn))


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_gamma_agrees_with_diffusers_tcd(gamma, monkeypatch):
    import diffusers.schedulers.scheduling_tcd as module

    scheduler = table(module.TCDScheduler)
    steps = [800, 600, 400, 200]
    scheduler.set_timesteps(timesteps=steps)
    noises = [normals(6, seed=k) for k in range(1, 4)]
    with_noise(monkeypatch, module, noises)
    x, found = normals(6), []
    for k, following in zip(steps, [*steps[1:], 0], strict=True):
        r = torch.tensor((1 - gamma) * following / 1000, dtype=F64)
        x = scheduler.step(output(x, torch.tensor(k / 1000, dtype=F64), r), k, x, eta=gamma).prev_sample
        found.append(x)
    given = iter(noises)
    times = torch.tensor([*steps, 0], dtype=F64) / 1000
    ours = states(flow_map, StandIn(VP(), from_noise), normals(6), times, gamma=gamma, noise=lambda shape: next(given))
    agree(ours, found, 2e-5)


def test_consistency_agrees_with_diffusers_lcm(monkeypatch):
    import diffusers.schedulers.scheduling_lcm as module

    scheduler = table(module.LCMScheduler, timestep_scaling=1e6)  # so that its skip connection is 0
    steps = [800, 600, 400, 200]
    scheduler.set_timesteps(timesteps=steps)
    noises = [normals(6, seed=k) for k in range(1, 4)]
    with_noise(monkeypatch, module, noises)
    x, found, zero = normals(6), [], torch.zeros((), dtype=F64)
    for k in steps:
        x = scheduler.step(output(x, torch.tensor(k / 1000, dtype=F64), zero), k, x).prev_sample
        found.append(x)
    given = iter(noises)
    times = torch.tensor([*steps, 0], dtype=F64) / 1000
    ours = states(consistency, StandIn(VP(), from_noise), normals(6), times, noise=lambda shape: next(given))
    agree(ours, found, 2e-5)


def test_the_support_inverts_a_paths_time():
    assert float(time_of(Linear(), 0.3)) == pytest.approx(0.3)
    assert math.isclose(float(spread(torch.tensor(1.0))), 1.0)
