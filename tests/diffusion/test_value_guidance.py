"""Guidance by a value against tilted normals."""

import pytest
import torch

from genkit.diffusion.paths import VP, Linear, ODEOnlyPath
from genkit.diffusion.samplers import bind
from genkit.diffusion.value_guidance import value_guidance
from tests.support.exact import F64, ExactDenoiser, Mixture

MEAN, VAR = 0.7, 0.3


PATHS = [Linear(), VP()]


on_paths = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def bell(mean, var):
    return Mixture(torch.ones(1, dtype=F64), torch.tensor([[mean]], dtype=F64), torch.tensor([[[var]]], dtype=F64))


@on_paths
def test_a_linear_value_gives_the_tilted_law_exactly(path):
    """``N(m, v) exp(s g x)`` is ``N(m + s v g, v)``; the guided denoiser is that law's at every time."""
    slope, scale = -1.3, 0.8
    guided = value_guidance(lambda x, cond: slope * x[:, 0], scale, VAR)(ExactDenoiser(bell(MEAN, VAR), path))
    tilted = ExactDenoiser(bell(MEAN + scale * VAR * slope, VAR), path)
    x = torch.linspace(-3, 3, 12, dtype=F64)[:, None]
    t = torch.linspace(0.05, 1, 12, dtype=F64)
    got, want = guided(x, t, {}), tilted(x, t, {})
    assert torch.allclose(got.x0, want.x0, atol=1e-12)
    assert torch.allclose(got.x1, want.x1, atol=1e-12)


@on_paths
def test_a_quadratic_value_gives_the_tilted_law_after_some_rounds(path):
    """``N(m, v) exp(-s c (x - a)^2 / 2)`` has the precision ``1/v + s c``: a bandit whose best action is known."""
    aim, curve, scale = -1.0, 2.0, 1.2
    value = lambda x, cond: -curve * (x[:, 0] - aim) ** 2 / 2  # noqa: E731
    precise = 1 / VAR + scale * curve
    law = bell((MEAN / VAR + scale * curve * aim) / precise, 1 / precise)
    guided = value_guidance(value, scale, VAR, rounds=200)(ExactDenoiser(bell(MEAN, VAR), path))
    x = torch.linspace(-3, 3, 12, dtype=F64)[:, None]
    t = torch.linspace(0.05, 1, 12, dtype=F64)
    assert torch.allclose(guided(x, t, {}).x0, ExactDenoiser(law, path)(x, t, {}).x0, atol=1e-9)
    z = torch.special.ndtri((torch.arange(301, dtype=F64) + 0.5) / 301)[:, None]
    drawn = bind("heun", 40, value_guidance(value, scale, VAR, rounds=10))(ExactDenoiser(bell(MEAN, VAR), path))(z, {})
    assert float(drawn.mean()) == pytest.approx(float(law.means[0, 0]), abs=0.01)
    assert float(drawn.var()) == pytest.approx(1 / precise, rel=0.05)


def test_value_guidance_refuses_what_it_cannot_do():
    value = lambda x, cond: x.sum(1)  # noqa: E731
    with pytest.raises(ValueError, match="var: given 0; allowed above 0"):
        value_guidance(value, 1.0, 0)
    with pytest.raises(ValueError, match="rounds: given 0"):
        value_guidance(value, 1.0, rounds=0)
    with pytest.raises(ValueError, match="no diffusion"):
        value_guidance(value, 1.0)(ExactDenoiser(bell(0.0, 1.0), ODEOnlyPath(Linear())))
