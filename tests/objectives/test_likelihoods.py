"""Laws of a sample given a decoder's output, against torch's and scipy's."""

import math

import pytest
import scipy.stats
import torch
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal

from genkit.backbones import MLP
from genkit.core import Spec
from genkit.objectives.autoencoders.likelihoods import Bernoulli, DecoderOutput, DiscretisedLogistic, Gaussian
from tests.support.exact_latent import F64
from tests.support.objectives import batch_of


def test_the_gaussian_likelihood_is_torch_s():
    at, x = torch.randn(2, 3, 1, 4, 4, dtype=F64)
    for log_scale in (torch.full((1, 1, 4, 4), -0.7, dtype=F64), torch.tensor(0.3, dtype=F64), torch.randn_like(at)):
        truth = Normal(at, log_scale.exp().expand_as(at)).log_prob(x).sum((1, 2, 3))
        assert torch.allclose(Gaussian().log_prob(DecoderOutput(at, log_scale), x), truth)


def test_the_bernoulli_likelihood_is_torch_s():
    logits, pixel = 3 * torch.randn(5, 1, 4, 4, dtype=F64), (torch.rand(5, 1, 4, 4) < 0.5).to(F64)
    out = DecoderOutput(logits, torch.zeros(()))
    truth = TorchBernoulli(logits=logits)
    assert torch.allclose(Bernoulli().log_prob(out, 2 * pixel - 1), truth.log_prob(pixel).sum((1, 2, 3)))
    assert torch.allclose((Bernoulli().mean(out) + 1) / 2, truth.mean)


@pytest.mark.parametrize("std", [0.004, 0.05, 1.0])
def test_the_discretised_logistic_is_a_law_of_256_levels(std):
    """Its 256 masses sum to 1 and are differences of scipy's distribution function, also far from the location."""
    levels = (torch.arange(256, dtype=F64) / 127.5 - 1)[:, None]
    for at in (-1.3, -1.0, 0.1234, 0.9):
        out = DecoderOutput(torch.full_like(levels, at), torch.tensor(std, dtype=F64).log())
        log_p = DiscretisedLogistic().log_prob(out, levels)
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)
        edges = torch.cat([torch.tensor([-math.inf]), (torch.arange(255, dtype=F64) + 0.5) / 127.5 - 1, torch.tensor(
            [math.inf])])  # fmt: skip
        below, above = (scipy.stats.logistic(at, std).cdf(e.numpy()) for e in (edges[:-1], edges[1:]))
        assert torch.allclose(log_p.exp(), torch.as_tensor(above - below), atol=1e-13)
        # in the tails the distribution function is 0 or 1 to the last bit; the law is exponential there
        if std < 0.1:
            slope = log_p[250:253].diff() if at < 0 else log_p[3:6].diff()
            assert torch.allclose(slope.abs(), torch.full((2,), 2 / 255 / std, dtype=F64), rtol=1e-6)


def test_grey_pixels_are_made_black_or_white():
    grey = torch.tensor([-1.0, -0.5, 0.0, 0.6, 1.0]).expand(40_000, 1, 1, 5)
    drawn = Bernoulli().target(batch_of(grey))
    assert sorted(drawn.unique().tolist()) == [-1, 1]
    share = (drawn > 0).float().mean((0, 1, 2))
    assert torch.allclose(share, torch.tensor([0.0, 0.25, 0.5, 0.8, 1.0]), atol=0.01)
    assert share[0] == 0
    assert share[4] == 1
    sharp = Bernoulli("threshold").target(batch_of(grey))
    assert torch.equal(sharp[0].flatten(), torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0]))


@pytest.mark.parametrize("scale", ["fixed", "shared", "each"])
def test_a_scale_has_its_initial_value_and_learns_if_it_may(scale):
    for law in (Gaussian(0.3, scale), DiscretisedLogistic(0.3, scale)):
        net = law.decoder_head(MLP(width=8), Spec((2, 4, 4)), (3,))
        out = net(torch.randn(6, 3))
        assert out.location.shape == (6, 2, 4, 4)
        assert float(out.log_scale.detach().exp().mean()) == pytest.approx(0.3, rel=0.2 if scale == "each" else 0.02)
        law.log_prob(out, torch.zeros(6, 2, 4, 4)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        assert (net.log_scale is not None) == (scale == "shared")
    big = net(1000 * torch.randn(6, 3))
    assert float(big.log_scale.detach().exp().min()) >= 1 / 255 * 0.999
