"""Dropout whose masks depend on the row of the global batch, not on how the batch is cut."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014): zero entries with probability ``p``, scale the others by 1 / (1 - p).

    With ``keys``, one number a row, the mask of a row is a function of its key, of ``layer`` and of the position alone:
    two ranks, micro-batches, recomputed activations and all passes of one loss drop the same entries. Without, as
    outside the training loop, masks come from torch's global generator.
    """

    def __init__(self, p: float, layer: int = 0):
        super().__init__()
        self.p, self.layer = p, layer
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.p or not self.training:
            return x
        if self.keys is None or self.p == 1 or len(x) % len(self.keys):
            return F.dropout(x, self.p)
        keys = self.keys.repeat(len(x) // len(self.keys))  # several batches at once, such as real and generated ones
        return x * kept_entries(keys, self.layer, x, self.p) * (1 / (1 - self.p))


def kept_entries(keys: Tensor, layer: int, like: Tensor, p: float) -> Tensor:
    """True with probability 1 - p, in the shape of ``like``, by a hash of (key, layer, position).

    ``keys`` random, int64 ``[B]``. The hash multiplies by odd constants and folds upper bits into lower ones, modulo
    2^32. It needs no generator, so it can be compiled, and costs less than random numbers do.
    """
    rows = (keys + layer * 0x9E3779B97F) * -0x61C8864680B583EB
    rows = ((rows ^ (rows >> 31)) * -0x6B2FB644ECCEEE15 >> 32).int()[:, None]
    h = torch.arange(like[0].numel(), device=like.device, dtype=torch.int32) * -0x61C88647 ^ rows
    h.mul_(-0x7A143595)
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF)).mul_(-0x3D4D51CB)
    return (h >= round(p * 2**32) - 2**31).view_as(like)  # by the upper bits, which depend on all others


def install_dropout(nets: Mapping[str, nn.Module]) -> list[Dropout]:
    """Replace ``nn.Dropout`` by :class:`Dropout` in place, number the layers, and return them all.

    So the networks of other libraries, adapters and a user's own follow the rows too.
    """
    for net in nets.values():
        for module in list(net.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Dropout:
                    setattr(module, name, Dropout(child.p).train(child.training))
    layers = [m for net in nets.values() for m in net.modules() if isinstance(m, Dropout)]
    for number, layer in enumerate(layers):
        layer.layer = number
    return layers
