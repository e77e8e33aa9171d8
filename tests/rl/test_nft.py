"""DiffusionNFT against the optimum of its loss in closed form."""

import pytest
import torch
from torch import nn

from benchmarks.mixture import F64
from genkit.core import Batch
from genkit.diffusion.paths import Linear
from genkit.objectives import Flow
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.nft import NFT
from genkit.rl.finetune.noise import FixedNoise
from tests.support.learning import make_learner


class Constant(nn.Module):
    """Predicts the same x0 everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=F64))

    def forward(self, x, label, cond):
        return torch.zeros_like(x) + self.value


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_the_optimum_is_the_old_prediction_and_a_step_towards_the_good_samples(beta):
    """``old + (1 / beta) E[(2 r - 1) (x0 - old)]`` (Zheng et al. 2025, theorem 3.2), here a constant."""
    torch.manual_seed(0)
    x, method = torch.randn(500, 1, dtype=F64) + 0.4, NFT(beta=beta)
    r = method.goodness(x[:, 0].sin())
    assert 0 <= float(r.min()) < 0.1 < 0.7 < float(r.max()) <= 1
    extremes = NFT(limit=1.0).goodness(torch.tensor([-9.0, 0, 0, 9]))  # at 1.41 standard deviations
    assert extremes.tolist() == [0, 0.5, 0.5, 1]
    old = Constant(0.7)
    step = float(((2 * r - 1) * (x[:, 0] - 0.7)).mean()) / beta
    gradients = []
    for value in (0.7, 0.7 + step, 0.7 - step):
        net = Constant(value)
        objective = Flow(prediction="x0", loss_space="x0", cond_dropout=0.0)
        learner = make_learner(net, Chain.on_grid(Linear(), 1, FixedNoise(0.0)), objective=objective)
        method.loss(learner, old, Batch(x, {}, r), learner.shares(torch.arange(len(x)))[0]).backward()
        assert all(p.grad is None for p in old.parameters())
        gradients.append(float(net.value.grad))
    assert gradients[0] == pytest.approx(-2 * beta**2 * step, rel=1e-5)
    assert abs(gradients[1]) < 1e-5 * abs(gradients[0])  # noise is float32
    assert gradients[2] == pytest.approx(2 * gradients[0], rel=1e-5)


def test_at_unchanged_weights_both_terms_have_the_same_times_and_noise():
    """So that the loss is the objective's own, whatever the probabilities."""
    torch.manual_seed(0)
    x, net = torch.randn(64, 1, dtype=F64), Constant(0.7)
    learner = make_learner(net, Chain.on_grid(Linear(), 1, FixedNoise(0.0)), objective=Flow(cond_dropout=0.0))
    share = learner.shares(torch.arange(64))[0]
    torch.manual_seed(5)
    plain = learner.objective.loss("denoise", {"net": net}, Batch(x, draw=share.draw)).per_sample.mean()
    samples = Batch(x, {}, torch.rand(64, dtype=F64))
    torch.manual_seed(5)
    mixed = NFT().loss(learner, Constant(0.7), samples, share)
    assert float(mixed) == pytest.approx(float(plain), rel=1e-6)
