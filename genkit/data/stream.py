"""The order in which training sees its samples, as a pure function of (step, draw, rows).

Nothing is remembered from one call to the next that could change an answer, so a resumed run, another number of ranks
and another size of micro-batch all see the same numbers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from genkit.core import Batch, Data, Draw, seed_of

AUGMENT = 1  # the last number of the key of the augmentation's draws: they never shift the loss's


class Stream:
    """Batches without end: ``stream(step, draw, start, stop)`` are rows ``start..stop`` of one global batch.

    Each ``draw`` (phases that repeat within a step count them up) is an endless stream of its own: row r of step s is
    its element ``s * batch_size + r``, and every ``len(data)`` elements are one epoch, in an order of its own. Samples
    leave as the codec takes them (uint8 pictures), on ``device``.
    """

    def __init__(
        self, data: Data, batch_size: int, seed: int, device: torch.device | str = "cpu", workers: int = 2
    ) -> None:
        if batch_size < 1 or not len(data):
            raise ValueError(
                f"a stream needs samples and a batch size of 1 or more; given {len(data)} and {batch_size}"
            )
        self.data, self.batch_size, self.seed, self.device = data, batch_size, seed, torch.device(device)
        self.order = lru_cache(maxsize=8)(self._order)

    def _order(self, draw: int, epoch: int) -> Tensor:
        return torch.randperm(len(self.data), generator=torch.Generator().manual_seed(seed_of(self.seed, draw, epoch)))

    def indices(self, step: int, draw: int, start: int, stop: int) -> Tensor:
        """Which samples these rows are, ``[stop - start]``."""
        n, first = len(self.data), step * self.batch_size + start
        last = step * self.batch_size + stop
        epochs = range(first // n, (last - 1) // n + 1)
        return torch.cat([self.order(draw, e)[max(first - e * n, 0) : min(last - e * n, n)] for e in epochs])

    def __call__(self, step: int, draw: int, start: int, stop: int) -> Batch:
        assert 0 <= start < stop <= self.batch_size, (start, stop, self.batch_size)
        augment = Draw((self.seed, step, draw, AUGMENT), start, stop)
        batch = self.data.batch(self.indices(step, draw, start, stop), augment)
        if self.device.type == "cuda":
            batch = replace(batch, x=batch.x.pin_memory(), cond={k: v.pin_memory() for k, v in batch.cond.items()})
        return replace(batch.to(self.device), draw=Draw((self.seed, step, draw), start, stop, self.device))
