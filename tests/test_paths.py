"""Paths: end points, the chart and its inverse, and the discrete DDPM tables."""

import math

import numpy as np
import pytest
import torch
from exact import F64
from hypothesis import given
from hypothesis import strategies as st

from genkit.paths import PATHS, VE, VP, Cosine, Linear, chart, mix, times_at

ALL = [cls() for cls in PATHS.values()] + [VP(betas="cosine"), VP(timesteps=37, beta_max=0.3), VE(0.01, 50.0)]
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


def test_mix_broadcasts_over_any_shape():
    x0, x1, t = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4), torch.tensor([0.0, 0.3, 1.0])
    x = mix(Linear(), x0, x1, t)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[2], x1[2])
    assert torch.allclose(x[1], 0.7 * x0[1] + 0.3 * x1[1])


@pytest.mark.parametrize(
    "make",
    [lambda: VE(-1.0, 80), lambda: VE(1.0, 0.5), lambda: VP(beta_min=0.5, beta_max=0.1), lambda: VP(beta_max=1.5)],
)
def test_senseless_schedules_are_refused(make):
    with pytest.raises(ValueError, match="allowed"):
        make()
