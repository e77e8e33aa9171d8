"""Every parametrisation on every path: targets lead back to the end points."""

import pytest
import torch

from genkit.core import Prediction, expand
from genkit.diffusion.parametrization import (
    PARAMETRIZATIONS,
    Epsilon,
    Karras,
    NetDenoiser,
    Score,
    V,
    Velocity,
    refuse_singular,
)
from genkit.diffusion.paths import PATHS, VE, VP, Cosine, Linear, mix
from tests.support.exact import F64

PAIRS = [(p(), q()) for p in PATHS.values() for q in PARAMETRIZATIONS.values()]


@pytest.mark.parametrize(("path", "parametrization"), PAIRS, ids=lambda v: type(v).__name__)
def test_round_trip(path, parametrization):
    """predict(target(x0, x1)) == (x0, x1), and the pair always lies on the path through x."""
    t = torch.tensor([0.01, 0.3, 0.5, 0.8, 0.97], dtype=F64)
    x0, x1 = torch.randn(2, 5, 3, 4, 2, dtype=F64)
    x = mix(path, x0, x1, t)
    got = parametrization.predict(path, x, t, parametrization.target(path, x0, x1, t))
    assert torch.allclose(got.x0, x0, atol=1e-9)
    assert torch.allclose(got.x1, x1, atol=1e-9)
    wrong = parametrization.predict(path, x, t, torch.randn_like(x))
    on_path = expand(path.alpha(t), x) * wrong.x0 + expand(path.sigma(t), x) * wrong.x1
    assert torch.allclose(on_path, x, atol=1e-9)


@pytest.mark.parametrize(("path", "parametrization"), PAIRS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_a_solver_makes_of_both_ends_is_their_sum(path, parametrization, rows):
    """Computed at once from what the network saw and said, with one time for all (numbers) or many (tensors)."""
    t = torch.tensor([0.3, 0.6, 0.9], dtype=F64)[:rows]
    x, out = torch.randn(2, rows, 4, dtype=F64)
    got = parametrization.predict(path, x, t, out)
    ends = Prediction(*got)
    assert torch.allclose(got.at(0.7, -1.3), 0.7 * got.x0 - 1.3 * got.x1, atol=1e-9)
    assert torch.allclose(ends.at(0.7, -1.3), 0.7 * got.x0 - 1.3 * got.x1, atol=1e-9)
    for p in (got, ends):
        assert torch.allclose(p.velocity, got.x1 - got.x0, atol=1e-9)


@pytest.mark.parametrize("kind", [Epsilon, Score, Karras])
@pytest.mark.parametrize("path", [Linear(), Cosine()])
def test_what_divides_by_alpha_is_refused_where_no_signal_is_left(kind, path):
    with pytest.raises(ValueError, match=r"alpha\(1\) = 0"):
        refuse_singular(kind(), path)
    refuse_singular(kind(), VP())
    refuse_singular(Velocity(), path)


@pytest.mark.parametrize("name", ["velocity", "x0", "v"])
@pytest.mark.parametrize("path", [Linear(), Cosine()])
def test_the_others_are_finite_at_pure_noise(name, path):
    one, x, out = torch.ones(2, dtype=F64), torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    for part in PARAMETRIZATIONS[name]().predict(path, x, one, out):
        assert bool(torch.isfinite(part).all())


def test_v_on_a_vp_path_is_salimans_and_ho():
    """x0 = alpha x - sigma v (Salimans & Ho 2022, appendix D)."""
    t, x, v = torch.tensor([0.4], dtype=F64), torch.randn(1, 3, dtype=F64), torch.randn(1, 3, dtype=F64)
    path = VP()
    assert torch.allclose(V().predict(path, x, t, v).x0, path.alpha(t) * x - path.sigma(t) * v)


def test_karras_is_table_1():
    """c_skip, c_out, c_in, c_noise of Karras et al. 2022, table 1, on the VE path where sigma is the noise level."""
    path, t, data = VE(), torch.tensor([0.5], dtype=F64), 0.5
    s = path.sigma(t)
    x, out = torch.randn(1, 3, dtype=F64), torch.randn(1, 3, dtype=F64)
    x_in, label = Karras(data).inputs(path, x, t)
    assert torch.allclose(x_in, x / (s**2 + data**2).sqrt())
    assert torch.allclose(label, s.log() / 4)
    c_skip, c_out = data**2 / (s**2 + data**2), s * data / (s**2 + data**2).sqrt()
    assert torch.allclose(Karras(data).predict(path, x, t, out).x0, c_skip * x + c_out * out)


def test_a_network_becomes_a_denoiser():
    seen = {}

    def net(x, label, cond):
        seen.update(label=label, cond=cond)
        return 2 * x

    x, t = torch.randn(2, 3), torch.tensor([0.25, 0.5])
    got = NetDenoiser(net, Linear(), Velocity())(x, t, {"label": torch.tensor([1, 2])})
    assert torch.equal(seen["label"], t)
    assert "label" in seen["cond"]
    assert torch.allclose(got.x1 - got.x0, 2 * x)
