"""Where the steps of a sampler lie."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genkit.diffusion.paths import VE, chart
from genkit.diffusion.samplers import GRIDS, karras, logsnr, nodes, trailing, uniform
from genkit.diffusion.samplers.steps import nodes_at
from tests.support.exact import F64
from tests.support.samplers import on_every_path


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


@on_every_path
def test_uniform_grid_is_uniform_in_the_chart(path):
    tau = chart(path, uniform(7)(path))[0]
    assert torch.allclose(tau.diff(), tau.diff()[:1].expand(7), atol=1e-12)
    assert float(tau[-1]) == 0
    assert float(uniform(7)(path)[0]) == 1
    assert torch.allclose(trailing(4)(path), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=F64))


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_must_be_positive(steps):
    for grid in GRIDS.values():
        with pytest.raises(ValueError, match="allowed 1 or more"):
            grid(steps)
