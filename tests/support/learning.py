"""A learner of a tiny network, and a bandit whose policy gradient is known, for tests of reward methods."""

import math

import torch

from benchmarks.mixture import F64
from genkit.core import Batch, Spec
from genkit.diffusion.samplers import bind
from genkit.objectives import Flow
from genkit.rl.finetune.chain import DenoisingTrajectory
from genkit.rl.finetune.experience import Experience
from genkit.rl.finetune.learner import Learner
from genkit.training.state import State

PLAIN = Flow(prediction="x0", cond_dropout=0.0)
THETA, AIM, STD, COUNT = 0.3, 1.0, 2.0, 20_001  # the bandit's mean action, best action, noise and number of rows


def make_learner(
    nets, chain, spec=None, objective=PLAIN, demos=None, critic=None, optimizer=torch.optim.SGD, noise=None
):
    """A learner with a fused optimizer of learning rate 0.1, which a method replaces by its own."""
    nets = nets if isinstance(nets, dict) else {"net": nets}
    parameters = [p for net in nets.values() for p in net.parameters()]
    optimizers = {"denoise": optimizer(parameters, lr=0.1, fused=True)}
    critic_optimizer = None if critic is None else torch.optim.Adam(critic.parameters(), lr=1e-3)
    state = State(nets, {}, optimizers)
    return Learner(objective, state, chain, spec or Spec((1,)), demos, 0, critic, critic_optimizer, noise)


def steps_of(method, chain):
    """How a learner of this method draws samples: along the chain, or in as many steps that are differentiated."""
    return (
        chain
        if method.uses_chain
        else lambda nets: PLAIN.generator(nets, bind("ddim", chain.steps, differentiable=True))
    )


def constant_demos(value, dim=1, dtype=torch.float32):
    """Demonstrations that are all ``value``."""
    return lambda number, start, stop: Batch(torch.full((stop - start, dim), value, dtype=dtype))


def bandit():
    """One step, one number, action ``theta + std z``, reward ``-(a - aim)^2``; z are the quantiles of a normal, so
    that means over the rows are integrals."""
    z = torch.special.ndtri((torch.arange(COUNT, dtype=F64) + 0.5) / COUNT)[:, None]
    a = THETA + STD * z
    trajectory = DenoisingTrajectory(torch.stack([torch.zeros_like(a), a]), torch.full_like(a, THETA)[None])
    experience = Experience(trajectory, {}, -((a[:, 0] - AIM) ** 2), None, {})
    away = THETA - AIM
    slope = -2 * away  # of E[R] = -(theta - aim)^2 - std^2
    spread = math.sqrt(4 * away**2 * STD**2 + 2 * STD**4)  # the deviation of R
    return experience, slope / spread
