"""The contract of objectives (run on ``OBJECTIVES`` by ``tests/objectives`` and on an added one by ``tests/recipes``),
and
what their tests share."""

import math

import torch
from torch import nn

from genkit.backbones import MLP
from genkit.core import Batch, Draw, Label, Spec
from genkit.training.optimizers.groups import phase_parameters

PLANE = Spec((2,))


def batch_of(x, cond=None, seed=0, step=None):
    """Samples with conditions and random numbers of their own."""
    return Batch(x, cond or {}, draw=Draw((seed,), 0, len(x)), step=step)


def check_loss_does_not_depend_on_how_the_batch_is_cut(objective):
    """Each row's loss is the same in one batch as in three pieces: ranks and micro-batches change nothing."""
    anchor = {"anchor": Label(3, centers=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))} if hasattr(objective, "anchor") else {}
    spec = Spec((2,), {"label": Label(3), **anchor})
    nets = objective.networks(MLP(width=32), spec)
    x, label = torch.randn(40, 2), torch.arange(40) % 3
    cond = {name: label for name in spec.cond}

    def losses(a, b):
        batch = Batch(x[a:b], {k: v[a:b] for k, v in cond.items()}, draw=Draw((7, 1), a, b), x1=x[a:b].flip(1))
        return torch.stack([objective.loss(p.name, nets, batch).per_sample for p in objective.phases], 1)

    pieces = torch.cat([losses(0, 13), losses(13, 32), losses(32, 40)])
    assert torch.allclose(pieces, losses(0, 40), atol=1e-5)


class Shift(nn.Module):
    """A generator ``scale z + mean``; ``z`` as it is by default."""

    def __init__(self, mean=(0.0, 0.0), scale=(1.0, 1.0)):
        super().__init__()
        self.mean, self.scale = nn.Parameter(torch.tensor(mean)), torch.tensor(scale)

    def forward(self, z, cond):
        return self.scale * z + self.mean


def train(objective, backbones, data, spec, steps, size=256, lr=1e-2, cond=None, seed=0, clip=math.inf):
    torch.manual_seed(seed)
    nets = objective.networks(backbones, spec)
    parameters = [p for phase in objective.phases for _, p in phase_parameters(phase, nets)]
    opt = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    g = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(data), (size,), generator=g)
        chosen = {k: v[rows] for k, v in (cond or {}).items()}
        batch = Batch(data[rows], chosen, draw=Draw((seed, step), 0, size), step=step)
        loss = objective.loss(objective.phases[0].name, nets, batch)
        opt.zero_grad()
        loss.per_sample.mean().backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        opt.step()
        schedule.step()
        objective.after_step(nets, step)
    return nets


def normal_data(n=20_000):
    """Normal in five dimensions, three of them wide and two narrow."""
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(4))).Q
    spread = torch.tensor([2.0, 1.5, 1.0, 0.4, 0.2])
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(5)) * spread @ turn.T
