"""The contract of objectives: ``tests/objectives`` runs it on ``OBJECTIVES``, ``tests/recipes`` on an added one."""

import torch

from genkit.backbones import MLP
from genkit.core import Batch, Draw, Label, Spec


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
