"""The order in which training sees its samples, a pure function of (step, draw, rows).

No call depends on earlier ones, so a resumed run, another number of ranks and another size of micro-batch all see the
same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from genkit.core import Batch, Data, Draw, seed_of
from genkit.data.buckets import BucketOrder
from genkit.data.images import OnDisk
from genkit.data.latents import InLatents
from genkit.data.text_states import pad_tokens

Rows = tuple[int, int, int]  # draw, start, stop

AUGMENTATION = 1  # last number of the key of the augmentation's draws, so that they do not shift the loss's


class Stream:
    """Batches without end: ``stream(step, draw, start, stop)`` returns rows ``start..stop`` of one global batch.

    Each ``draw`` (phases that repeat within a step count them up) is an endless stream of its own: row r of step s is
    its element ``s * batch_size + r``, and every ``len(data)`` elements are one epoch in its own order. Images in
    buckets have batches of one shape (:class:`~genkit.data.buckets.BucketOrder`). Samples are on ``device``, not yet
    encoded (uint8 images). ``workers`` threads read ahead from the disk; data in memory do not need them.
    """

    def __init__(
        self, data: Data, batch_size: int, seed: int, device: torch.device | str = "cpu", workers: int = 2
    ) -> None:
        if batch_size < 1 or not len(data):
            raise ValueError(
                f"a stream needs samples and a batch size of 1 or more; given {len(data)} and {batch_size}"
            )
        self.data, self.batch_size, self.seed, self.device = data, batch_size, seed, torch.device(device)
        buckets = data.buckets if isinstance(data, OnDisk) else None
        self.buckets = None if buckets is None else BucketOrder(buckets, batch_size, seed)
        self.order = lru_cache(maxsize=8)(self._order)
        on_disk = isinstance(data, OnDisk | InLatents)
        self.ahead = ReadAhead(self.read, data.rows_per_task, workers) if workers and on_disk else None

    def _order(self, draw: int, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self.seed, draw, epoch))
        starts, window = getattr(self.data, "shard_starts", None), getattr(self.data, "window", None)
        if starts is None or window is None:
            return torch.randperm(len(self.data), generator=generator)
        return shuffle_locally(starts, window, generator)

    def indices(self, step: int, draw: int, start: int, stop: int) -> Tensor:
        """The samples in these rows, ``[stop - start]``."""
        if self.buckets is not None:
            return self.buckets.indices(step, draw)[start:stop]
        n, first, last = len(self.data), step * self.batch_size + start, step * self.batch_size + stop
        epochs = range(first // n, (last - 1) // n + 1)
        return torch.cat([self.order(draw, e)[max(first - e * n, 0) : min(last - e * n, n)] for e in epochs])

    def read(self, step: int, draw: int, start: int, stop: int) -> Batch:
        """These rows, augmented, on the CPU."""
        read = self.data.training_batch if isinstance(self.data, OnDisk) else self.data.batch
        return read(self.indices(step, draw, start, stop), Draw((self.seed, step, draw, AUGMENTATION), start, stop))

    def __call__(self, step: int, draw: int, start: int, stop: int) -> Batch:
        assert step >= 0 and 0 <= start < stop <= self.batch_size, (step, start, stop, self.batch_size)  # noqa: PT018
        rows = (draw, start, stop)
        batch = self.read(step, *rows) if self.ahead is None else self.ahead.batch(step, rows)
        numbers = Draw((self.seed, step, draw), start, stop, self.device)
        return replace(batch.to(self.device), draw=numbers, step=step)


def shuffle_locally(starts: Tensor, window: int, generator: torch.Generator) -> Tensor:
    """All rows ``[N]``: the shards permuted, and the rows of ``window`` of them at a time permuted among each other.

    ``starts`` ``[shards + 1]`` are the first row of each shard, and N.
    """
    order = torch.randperm(len(starts) - 1, generator=generator)
    windows = []
    for shards in order.split(window):
        rows = torch.cat([torch.arange(int(starts[s]), int(starts[s + 1])) for s in shards.tolist()])
        windows.append(rows[torch.randperm(len(rows), generator=generator)])
    return torch.cat(windows)


class ReadAhead:
    """Threads that read the samples of the next steps, as predicted from the last ones.

    Rows that were requested at steps s and s + k are expected at s + 2k and s + 3k. A wrong prediction costs time but
    never changes a batch: what was not predicted is read on request, and what is not wanted is dropped.
    """

    DEPTH = 2  # steps

    def __init__(self, read: Callable[[int, int, int, int], Batch], rows_per_task: int, workers: int) -> None:
        self.read, self.rows_per_task = read, rows_per_task
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="genkit-read")
        self.tasks: dict[Rows, dict[int, list[Future[Batch]]]] = {}
        self.last: dict[Rows, int] = {}

    def submit(self, step: int, rows: Rows) -> list[Future[Batch]]:
        """Start to read these rows of ``step``, in parts that keep all threads busy."""
        draw, start, stop = rows
        firsts = range(start, stop, self.rows_per_task)
        return [self.pool.submit(self.read, step, draw, i, min(i + self.rows_per_task, stop)) for i in firsts]

    def batch(self, step: int, rows: Rows) -> Batch:
        """These rows of ``step``; reading of the predicted steps starts."""
        tasks = self.tasks.setdefault(rows, {})
        stride = step - self.last.get(rows, step - 1)
        predicted = [step + k * stride for k in range(self.DEPTH + 1)] if stride > 0 else [step]
        for s in tasks.keys() - set(predicted):
            for task in tasks.pop(s):
                task.cancel()
        for s in predicted:
            if s not in tasks:
                tasks[s] = self.submit(s, rows)
        self.last[rows] = step
        return join_batches([task.result() for task in tasks.pop(step)])


def join_batches(parts: Sequence[Batch]) -> Batch:
    """The samples, conditions and weights of places of several batches as one; shorter texts are padded."""
    cond = {k: torch.cat(pad_tokens(k, [b.cond[k] for b in parts])) for k in parts[0].cond}
    weights = [b.place_weight for b in parts if b.place_weight is not None]
    return Batch(torch.cat([b.x for b in parts]), cond, place_weight=torch.cat(weights) if weights else None)
