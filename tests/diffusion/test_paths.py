"""Paths: end points, the chart and its inverse, and the discrete DDPM tables."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genkit.diffusion.paths import PATHS, VE, VP, Cosine, Linear, Shifted, SubVP, chart, mix, times_at
from tests.support.exact import F64

ALL = [cls() for cls in PATHS.values()] + [VP(betas="cosine"), VP(timesteps=37, beta_max=0.3), VE(0.01, 50.0)]
ALL += [VP(zero_snr=True), VP(betas="cosine", timesteps=50, zero_snr=True), SubVP(0.5, 5.0)]
ALL += [
    Shifted(p, k) for p, k in [(VP(), 4.0), (SubVP(), 0.5), (Cosine(), 2.0), (VE(), 3.0), (Shifted(Linear(), 2.0), 3.0)]
]
IDS = [str(p) for p in ALL]
T = torch.linspace(0, 1, 1001, dtype=F64)


@pytest.mark.parametrize("path", ALL, ids=IDS)
def test_starts_at_the_data_and_loses_signal_against_noise(path):
    assert float(path.alpha(T[:1])) == 1
    assert float(path.sigma(T[:1])) == 0
    tau, scale = chart(path, T)
    assert bool((tau.diff() > 0).all())
    assert bool((scale > 0).all())
    assert torch.allclose(tau * scale, path.sigma(T))
    assert torch.allclose((1 - tau) * scale, path.alpha(T))


@pytest.mark.parametrize("path", ALL, ids=IDS)
@given(tau=st.floats(0, 1))
def test_times_at_inverts_the_chart(path, tau):
    end = float(chart(path, torch.ones(1, dtype=F64))[0])
    t = times_at(path, torch.tensor([tau], dtype=F64))
    assert 0 <= float(t) <= 1
    assert float(chart(path, t)[0]) == pytest.approx(min(tau, end), abs=1e-14)


def test_known_values():
    t = torch.tensor([0.25, 0.5, 1.0], dtype=F64)
    assert torch.allclose(Linear().alpha(t), torch.tensor([0.75, 0.5, 0.0], dtype=F64))
    assert torch.allclose(Cosine().sigma(t[1:2]), torch.tensor([math.sqrt(0.5)], dtype=F64))
    assert float(Linear().alpha(t[-1:])) == 0
    assert float(Cosine().alpha(t[-1:])) == 0
    # Karras et al. 2022, table 1: the VE noise ends at sigma_max; half way it is the geometric mean (less sigma_min)
    assert float(VE(0.002, 80).sigma(t[-1:])) == pytest.approx(math.sqrt(80**2 - 0.002**2))
    assert float(VE(0.01, 100).sigma(t[1:2])) == pytest.approx(math.sqrt(1 - 1e-4))


@pytest.mark.parametrize(("betas", "schedule"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_vp_is_the_discrete_table_of_ddpm(betas, schedule, steps):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=steps, beta_schedule=schedule).alphas_cumprod
    k = torch.arange(1, steps + 1, dtype=F64) / steps
    ours = VP(betas, steps)
    tolerance = 2e-5  # theirs is a float32 product
    assert torch.allclose(ours.alpha(k) ** 2, theirs.double(), rtol=tolerance, atol=1e-9)
    assert torch.allclose(ours.sigma(k) ** 2, 1 - theirs.double(), rtol=1e-4, atol=1e-6)
    # exactly, in float64 numpy
    if betas == "linear":
        product = np.cumprod(1 - np.linspace(1e-4, 0.02, steps))
        assert np.allclose((ours.alpha(k) ** 2).numpy(), product, rtol=1e-12)


@pytest.mark.parametrize("path", ALL, ids=IDS)
def test_float32_keeps_the_small_noise(path):
    t = torch.tensor([1e-4, 1e-3], dtype=F64)
    assert torch.allclose(path.sigma(t.float()).double(), path.sigma(t), rtol=1e-4)
    assert path.sigma(t.float()).dtype == torch.float32


def test_ve_knows_the_time_of_a_noise_level():
    path = VE(0.01, 50.0)
    assert torch.allclose(path.time_of(path.sigma(T)), T, atol=1e-12)
    assert float(path.time_of(torch.tensor(60.0))) == 1


def test_mix_broadcasts_over_any_shape():
    x0, x1, t = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4), torch.tensor([0.0, 0.3, 1.0])
    x = mix(Linear(), x0, x1, t)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[2], x1[2])
    assert torch.allclose(x[1], 0.7 * x0[1] + 0.3 * x1[1])


def test_sub_vp_is_song_et_al():
    """Song et al. 2021, eq. 29: mean exp(-B/2) x0 and deviation 1 - exp(-B), B the integral of beta from 0 to t."""
    t, path = torch.tensor([0.2, 0.7, 1.0], dtype=F64), SubVP()
    beta = torch.linspace(0, 1, 100_001, dtype=F64)[None] * t[:, None] * 19.9 + 0.1
    integral = torch.trapezoid(beta, dx=1e-5, dim=1) * t
    assert torch.allclose(path.alpha(t), (-integral / 2).exp())
    assert torch.allclose(path.sigma(t), 1 - (-integral).exp())


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 1000])
def test_zero_snr_is_algorithm_1(betas, steps):
    """Lin et al. 2024, algorithm 1, on the table k = 1 .. T; and diffusers' version of it."""
    from diffusers import DDPMScheduler

    k = torch.arange(1, steps + 1, dtype=F64) / steps
    old, path = VP(betas, steps).alpha(k), VP(betas, steps, zero_snr=True)
    expected = (old - old[-1]) * old[0] / (old[0] - old[-1])
    assert torch.allclose(path.alpha(k), expected, rtol=1e-12, atol=1e-15)
    assert float(path.alpha(k[-1:])) == 0
    assert float(path.sigma(k[-1:])) == 1
    assert torch.allclose(path.alpha(T) ** 2 + path.sigma(T) ** 2, torch.ones_like(T), rtol=1e-14)
    schedule = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[betas]
    theirs = DDPMScheduler(steps, beta_schedule=schedule, rescale_betas_zero_snr=True).alphas_cumprod.double()
    assert torch.allclose(path.alpha(k)[:-1] ** 2, theirs[:-1], rtol=1e-3, atol=1e-6)  # theirs: a float32 product


def test_shifts_of_the_papers():
    t = torch.linspace(0.01, 1, 50, dtype=F64)
    m = 3 * t / (1 + 2 * t)  # Esser et al. 2024, eq. 23, sqrt(m / n) = 3
    assert torch.allclose(Shifted().sigma(t), m)
    assert torch.allclose(Shifted().alpha(t), 1 - m)
    snr = lambda p: 2 * (p.alpha(t) / p.sigma(t)).log()  # noqa: E731
    wide = Shifted(VP(), 256 / 64)  # Hoogeboom et al. 2023, section 3.1: logSNR + 2 log(64 / d)
    assert torch.allclose(snr(wide), snr(VP()) + 2 * math.log(64 / 256))
    assert torch.allclose(wide.alpha(t) ** 2 + wide.sigma(t) ** 2, torch.ones_like(t))
    assert torch.allclose(Shifted(VE(), 2.0).sigma(t), 2 * VE().sigma(t))
    assert torch.equal(Shifted(VE(), 2.0).alpha(t), torch.ones_like(t))
    less = Shifted(SubVP(), 2.0)
    assert torch.allclose(less.sigma(t), 1 - less.alpha(t) ** 2)
    again = Shifted(Shifted(Linear(), 2.0), 1.5)
    assert torch.allclose(again.sigma(t), Shifted().sigma(t))


@pytest.mark.parametrize(
    "make",
    [
        lambda: VE(-1.0, 80),
        lambda: VE(1.0, 0.5),
        lambda: VP(beta_min=0.5, beta_max=0.1),
        lambda: VP(beta_max=1.5),
        lambda: SubVP(2.0, 1.0),
        lambda: Shifted(Linear(), 0.0),
        lambda: VP(timesteps=1, zero_snr=True),
    ],
)
def test_senseless_schedules_are_refused(make):
    with pytest.raises(ValueError, match="allowed"):
        make()
