"""Closed-form truth for the tests: a Gaussian mixture, the denoiser that it makes on any path, exact reverse steps."""

import torch
from torch import nn

from benchmarks.mixture import F64, ExactDenoiser, Mixture, three
from genkit.core import Prediction
from genkit.diffusion.posterior import LearnedVariance, log_variance, reverse_step

__all__ = ["F64", "Bell", "ExactDenoiser", "Mixture", "three"]


class Bell:
    """Normal data ``N(mean, std^2)`` and the step's true variance ``posterior + pull^2 Var(x0 | x_t)`` on ``times``."""

    def __init__(self, path, mean, std, times):
        self.path, self.mean, self.std, self.times = path, mean, std, times

    def __call__(self, x, t, cond):
        a, sa = (c[:, None] for c in (self.path.alpha(t), self.path.sigma(t)))
        total = a**2 * self.std**2 + sa**2
        ends = Prediction(self.mean + a * self.std**2 / total * (x - a * self.mean), sa / total * (x - a * self.mean))
        s = self.times[self.times < t[0] - 1e-9].max().expand(len(t)).to(t)
        _, posterior, pull = (v[:, None] for v in reverse_step(self.path, t, s))
        true = (posterior + pull**2 * self.std**2 * sa**2 / total).log()
        low, high = (log_variance(self.path, t, s, v * torch.ones_like(x)) for v in (-1, 1))
        return LearnedVariance.of(ends, 2 * (true.expand_as(x) - low) / (high - low) - 1)


class Constant(nn.Module):
    """Says theta, whatever it sees."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=F64))

    def forward(self, x, t, cond):
        return self.theta.expand_as(x)
