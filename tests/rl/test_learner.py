"""A gradient step: guarded against gradients that are not finite, for the model and its learned noise together."""

import dataclasses

import pytest
import torch
from torch import nn

from genkit.diffusion.paths import Linear
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.noise import LearnedNoise
from genkit.training.loop import Diverged
from tests.support.exact import F64, Constant
from tests.support.learning import make_learner


class Scale(nn.Module):
    """Noise of one learned size."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x, k, cond):
        return self.value.expand_as(x)


@pytest.mark.parametrize("bad", ["model", "noise"])
def test_neither_network_steps_if_a_gradient_is_not_finite(bad):
    net, sigma = Constant(0.5), Scale()
    chain = dataclasses.replace(Chain.on_grid(Linear(), 1, LearnedNoise()), sigma=sigma)
    learner = make_learner(net, chain, noise=torch.optim.SGD(sigma.parameters(), lr=0.1))
    factors = {"model": net.theta.new_ones(()), "noise": net.theta.new_ones(())}

    def loss(share):
        value = factors["model"] * net.theta + factors["noise"] * sigma.value
        return value, value

    rows = torch.arange(4)
    learner.gradient_step(rows, loss, lr=0.1)
    assert (float(net.theta.detach()), float(sigma.value.detach())) == (pytest.approx(0.4), pytest.approx(0.9))
    learner.refuse_divergence(3)
    factors[bad] = net.theta.new_tensor(float("nan"))
    for _ in range(3):
        learner.gradient_step(rows, loss, lr=0.1)
    assert (float(net.theta.detach()), float(sigma.value.detach())) == (pytest.approx(0.4), pytest.approx(0.9))
    with pytest.raises(Diverged, match="no finite gradient for 3 steps in a row"):
        learner.refuse_divergence(3)
    assert learner.state.skipped == 3
    factors[bad] = net.theta.new_ones(())
    learner.gradient_step(rows, loss, lr=0.1)
    learner.refuse_divergence(3)
    assert learner.state.skipped == 3
