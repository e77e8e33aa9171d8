"""Every sampler against a closed-form mixture: order, moments, seeds, paths, options.

The contract in ``tests/support/samplers.py`` is derived from ``SAMPLERS``: a new entry is tested without an edit here.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genkit.diffusion.guidance import classifier_free
from genkit.diffusion.paths import VE, VP, Linear
from genkit.diffusion.samplers import (
    SAMPLERS,
    CountingDenoiser,
    Seeds,
    bind,
    ddim,
    dopri5,
    dpmpp_2m,
    dpmpp_3m,
    nodes,
    ode_samplers,
    rk4,
    uniform,
    unipc,
)
from tests.support import samplers as contract
from tests.support.exact import F64, ExactDenoiser
from tests.support.samplers import MIXTURE, Quick, in_chart, normals, on_every_path, orders, solution

on_every_sampler = pytest.mark.parametrize("name", SAMPLERS)


# ------------------------------------------------------------------------------------------ the contract of all
@pytest.mark.parametrize("path", [Linear(), VP()], ids=["Linear", "VP"])
@pytest.mark.parametrize("name", [name for name, info in SAMPLERS.items() if info.order])
def test_order_of_convergence(name, path):
    contract.check_order(name, path)


@on_every_path
@on_every_sampler
def test_first_two_moments(name, path):
    contract.check_moments(name, path)


@on_every_sampler
def test_number_of_evaluations(name):
    contract.check_evaluations(name)


@on_every_sampler
def test_the_same_sample_on_every_path(name):
    contract.check_same_sample_on_every_path(name)


@on_every_sampler
def test_never_at_t_zero_on_any_grid(name):
    contract.check_never_at_zero(name)


@on_every_sampler
def test_float32_images_and_callback(name):
    contract.check_float32_images_and_callback(name)


@on_every_sampler
def test_only_stochastic_samplers_draw_noise(name):
    contract.check_noise_is_drawn_if_stochastic(name)


@on_every_sampler
@given(split=st.integers(1, 6))
def test_sample_i_is_the_same_for_any_batch_size(name, split):
    contract.check_seeds(name, split)


@pytest.mark.parametrize("times", contract.BAD_GRIDS)
@on_every_sampler
def test_senseless_grids_are_refused(name, times):
    contract.check_bad_grid_is_refused(name, times)


def test_ode_samplers_are_the_deterministic_ones():
    assert ode_samplers() == ("ddim", "heun", "rk4", "dpmpp_2m", "dpmpp_3m", "unipc", "dopri5")


# -------------------------------------------------------------------------------------------- single samplers


@on_every_path
def test_the_quick_denoiser_is_the_exact_one(path):
    x, t = normals(20), torch.full((20,), 0.3, dtype=F64)
    for quick, exact in zip(Quick(MIXTURE, path)(x, t, {}), ExactDenoiser(MIXTURE, path)(x, t, {}), strict=True):
        assert torch.allclose(quick, exact, atol=1e-10)


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
    got, errors = orders(name, Linear(), "logsnr", **options)
    assert got[-1] == pytest.approx(order, abs=0.2), (got, errors)


def test_dopri5_error_follows_its_tolerance():
    z, truth, calls, last = normals(64), solution(), [], 1.0
    for tolerance in (1e-3, 1e-5, 1e-7):
        denoise = CountingDenoiser(Quick(MIXTURE, Linear()))
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
        x = in_chart(SAMPLERS[name].function, Linear(), z, torch.linspace(0.98, 0, n + 1, dtype=F64))
        errors.append(float((x - truth).norm(dim=1).mean()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3), errors


def test_dopri5_ends_by_one_step():
    """Its error is ``tau_min^2``."""
    ends, how = torch.tensor([0.98, 0.0]).double(), {"rtol": 1e-8, "atol": 1e-8}
    truth, *got = (in_chart(dopri5, Linear(), normals(16), ends, tau_min=tau, **how) for tau in (1e-6, 0.02, 0.01))
    errors = [float((x - truth).norm(dim=1).mean()) for x in got]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("name", ["ddim", "ancestral", "heun", "rk4", "dopri5", "churn", "restart"])
def test_pure_noise_is_the_limit(name):
    """alpha(1) = 0 is where the log-SNR is infinite: starting a hair before it changes a hair."""
    z, taus = normals(16), torch.linspace(1, 0, 9, dtype=F64)
    near = torch.cat([torch.tensor([1 - 1e-9]).double(), taus[1:]])
    options = {"clock": "tau"} if name == "churn" else {}

    def draw(taus):
        return in_chart(SAMPLERS[name].function, Linear(), z, taus, noise=Seeds(range(16), dtype=F64), **options)

    a, b = draw(taus), draw(near)
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "unipc", "sde", "dpmpp_sde"])
def test_the_first_step_from_pure_noise(name):
    """Exact for a constant x0, in lambda = -inf: DDIM's step, or fresh noise."""
    z, states = normals(16), []
    _, b = nodes(Linear(), torch.tensor([1.0, 0.7]))
    p = Quick(MIXTURE, Linear())(z, torch.ones(16, dtype=F64), {})
    SAMPLERS[name].function(Quick(MIXTURE, Linear()), z, torch.tensor([1.0, 0.7, 0.0], dtype=F64),
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


def test_seeds_continue_each_stream():
    one, two = Seeds([5]), Seeds([4, 5])
    assert torch.equal(one((3,))[0], two((3,))[1])
    a, b = one((3,)), two((3,))
    assert torch.equal(a[0], b[1])
    assert not torch.equal(a, Seeds([5])((3,)))
