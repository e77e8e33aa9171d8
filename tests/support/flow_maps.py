"""Flow maps in closed form, as networks: of normal data, and of a mixture by integrating its ODE."""

import torch
from torch import nn

from genkit.core import Batch, Draw, expand
from genkit.diffusion.paths import chart, times_at
from tests.support.exact import F64, ExactDenoiser

STD = 0.5
"""standard deviation of the normal data"""


def spread(tau):
    """The standard deviation of ``(1 - tau) x0 + tau x1`` for normal data."""
    return ((1 - tau) ** 2 * STD**2 + tau**2).sqrt()


def normal_velocity(z, tau):
    return z * (tau - (1 - tau) * STD**2) / spread(tau) ** 2


def normal_average(z, tau_r, tau_t):
    """``(z - X) / (tau_t - tau_r)`` with ``X = z spread(r) / spread(t)``; the velocity where the times are the same."""
    gap = tau_t - tau_r
    jump = z * (1 - spread(tau_r) / spread(tau_t)) / torch.where(gap.abs() < 1e-9, 1.0, gap)
    return torch.where(gap.abs() < 1e-9, normal_velocity(z, tau_t), jump)


class MapNet(nn.Module):
    """The network that a flow map needs to have the average velocity ``average(z, tau_r, tau_t)``, times ``factor``.

    The network's output follows from the velocity, which every parametrisation makes an affine function of it.
    """

    def __init__(self, objective, average=normal_average):
        super().__init__()
        self.path, self.parametrization, self.average = objective.path, objective.parametrization, average
        self.rate = objective.label_rate
        self.factor = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x, label, cond):
        t = label / self.rate
        (tau_t, scale), tau_r = chart(self.path, t), chart(self.path, t - cond["span"])[0]
        u = self.average(x / expand(scale, x), expand(tau_r, x), expand(tau_t, x)) * self.factor
        at_zero, at_one = (self.parametrization.predict(self.path, x, t, v + 0 * x).velocity for v in (0.0, 1.0))
        return (u - at_zero) / (at_one - at_zero)


def mixture_average(mixture, path, steps=100):
    """``average`` of a mixture: the classical Runge-Kutta method through the velocity, which jvp passes through."""
    exact = ExactDenoiser(mixture, path)

    def velocity(u, tau):
        t = tau[:, 0]  # on the linear path
        return exact(u, t, {}).velocity

    def average(z, tau_r, tau_t):
        u, h = z, (tau_r - tau_t) / steps
        for i in range(steps):
            tau = tau_t + i * h
            k1 = velocity(u, tau)
            k2 = velocity(u + h / 2 * k1, tau + h / 2)
            k3 = velocity(u + h / 2 * k2, tau + h / 2)
            u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(u + h * k3, tau + h))
        gap = tau_t - tau_r
        return torch.where(gap == 0, velocity(z, tau_t), (z - u) / torch.where(gap == 0, 1.0, gap))

    return average


class Teacher:
    """A denoiser that has the exact velocity."""

    def __init__(self, path, velocity=lambda z, tau: normal_average(z, tau, tau)):
        self.path, self.velocity = path, velocity

    def __call__(self, x, t, cond):
        from genkit.diffusion.parametrization import Velocity

        tau, scale = (expand(v, x) for v in chart(self.path, t))
        return Velocity().predict(self.path, x, t, self.velocity(x / scale, tau))


def learned(objective, net, teacher=None, cond=None):
    return objective.learned_map(net, cond or {}, teacher)


def batch_of_normals(n, dim=2, seed=1):
    draw = Draw((seed,), 0, n)
    return Batch(STD * draw.normal(dim).double(), draw=draw)


def time_of(path, tau):
    return times_at(path, torch.as_tensor(tau, dtype=F64))
