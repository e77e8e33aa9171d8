"""From samples to :class:`genkit.evaluation.metrics.Measured`: in fixed blocks of rows, shared by the ranks, and
resumable.

A block is drawn and looked at as a whole by one rank, so its numbers are bitwise the same on any number of ranks. Of
the features only sums stay, unless a metric needs the features themselves.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from genkit.core.files import atomic_write
from genkit.evaluation.metrics import Measured, Moments
from genkit.evaluation.metrics.features import Extractor, Seen, cache
from genkit.evaluation.sources import Given, Rows, Samples, split_rows

KEPT = ("features", "logits", "labels")
SAVE = 30.0  # seconds of work that a kill may cost
ASK = 8  # blocks after which ranks ask each other whether one has failed

Progress = Callable[[int], None]


def quiet(done: int) -> None: ...


def key_of(tree: Any) -> str:
    """sha256 of what JSON makes of ``tree``."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Ranks:
    """Which process of how many this is."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator) -> Ranks:
        return cls(accelerator.process_index, accelerator.num_processes)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, mine: Any) -> list[Any]:
        """What every rank holds, in their order, on every rank."""
        return gather_object([mine]) if self.world > 1 else [mine]

    def once(self, work: Callable[[], Any]) -> Any:
        """``work()`` of the main rank, on all of them; what it raises, all raise."""
        found, error = None, None
        if self.main:
            try:
                found = work()
            except (ValueError, OSError) as e:
                error = str(e)
        found, error = self.gather((found, error))[0]
        if error is not None:
            raise ValueError(error)
        return found


@dataclass
class Shard:
    """What one rank has measured so far."""

    moments: Moments | None = None
    kept: dict[str, list[Tensor]] = field(default_factory=lambda: {k: [] for k in KEPT})
    blocks: int = 0
    calls: float = 0.0
    passes: float = 0.0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        assert self.moments is not None
        arrays = {"mean": self.moments.mean, "scatter": self.moments.scatter}
        arrays |= {k: torch.cat(v) for k, v in self.kept.items() if v}
        counts = [self.moments.n, self.blocks, self.calls, self.passes, self.seconds]
        with atomic_write(path) as part, open(part, "wb") as f:
            np.savez(f, counts=np.array(counts, np.float64), **{k: v.cpu().numpy() for k, v in arrays.items()})  # type: ignore

    @classmethod
    def load(cls, path: Path) -> Shard:
        """What :meth:`save` wrote; a new one where there is none, or one that cannot be read."""
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {k: torch.from_numpy(file[k]) for k in file.files}
            n, blocks, calls, passes, seconds = found["counts"].tolist()
            moments = Moments(int(n), found["mean"], found["scatter"])
        except Exception:  # absent, or cut: the work is done again
            return cls()
        kept = {k: [found[k]] if k in found else [] for k in KEPT}
        return cls(moments, kept, int(blocks), calls, passes, seconds)


@dataclass(frozen=True)
class Found:
    """A set of samples, measured, and what that took."""

    measured: Measured
    nfe: float
    passes: float
    """samples that went through the network, for each that came out"""
    seconds: float
    """of all ranks together"""
    block: int
    """the effective batch"""


def measure(
    samples: Samples,
    extractor: Extractor,
    n: int,
    *,
    keep: frozenset[str] = frozenset(),
    batch: int = 64,
    ranks: Ranks = Ranks(),
    partial: Path | None = None,
    progress: Progress = quiet,
) -> Found:
    """The moments of the features of ``n`` samples, and of ``keep`` (features, logits, labels) the rows themselves.

    ``partial`` is a folder for what a kill shall not cost; what is found there under the same settings is taken up.
    On all ranks the answer is that of all samples. ``ValueError`` on all ranks where one of them finds a mistake.
    """
    if samples.limit is not None and n > samples.limit:
        raise ValueError(f"n: given {n}, but {samples.name} holds {samples.limit} samples; take --n {samples.limit}")
    blocks = split_rows(n, batch)
    mine = blocks[ranks.rank :: ranks.world]
    path = None
    if partial is not None:
        what = {"samples": samples.identity(), "features": dict(extractor.settings), "n": n, "block": len(blocks[0]),
                "keep": sorted(keep), "world": ranks.world}  # fmt: skip
        path = partial / f"{key_of(what)[:24]}-{ranks.rank}.npz"
    shard = Shard.load(path) if path else Shard()
    began, saved, error = time.perf_counter() - shard.seconds, time.perf_counter(), None
    rounds = -(-len(blocks) // ranks.world)
    for turn in range(shard.blocks if ranks.world == 1 else 0, rounds):
        try:
            if error is None and shard.blocks <= turn < len(mine):
                add(shard, samples, extractor, mine[turn], n, keep)
                progress(min(n, (turn + 1) * ranks.world * len(blocks[0])))
                now = time.perf_counter()
                shard.seconds = now - began
                if path and now - saved >= SAVE:
                    shard.save(path)
                    saved = time.perf_counter() + 20 * (time.perf_counter() - now)  # at most a twentieth of the time
        except (ValueError, OSError) as e:
            error = e
        if turn % ASK == ASK - 1 or turn == rounds - 1 or ranks.world == 1:
            stop_together(ranks, error)
    if path and ranks.world > 1 and shard.moments is not None:
        shard.save(path)
    if shard.moments is not None:
        shard.moments = shard.moments.to("cpu")
    found = combine(ranks.gather(shard), blocks, n, extractor)
    if path:
        path.unlink(missing_ok=True)
    return found


def stop_together(ranks: Ranks, error: Exception | None) -> None:
    """Raise the first rank's error on every rank, so that none waits for one that has gone."""
    for found in ranks.gather(None if error is None else str(error)):
        if found is not None:
            raise error if error is not None and ranks.world == 1 else ValueError(found)


def add(shard: Shard, samples: Samples, extractor: Extractor, rows: range, n: int, keep: frozenset[str]) -> None:
    """Measure one block."""
    drawn: Rows = samples.rows(rows.start, rows.stop, n)
    with torch.no_grad():
        seen = extractor(drawn.x)
    found = shard.moments or Moments.zeros(seen.features.shape[1])
    shard.moments = found.to(seen.features.device)
    shard.moments.add(seen.features)
    if "logits" in keep:
        require_logits(seen, extractor)
    for name, value in {"features": seen.features, "logits": seen.logits, "labels": drawn.labels}.items():
        if name in keep and value is not None:
            shard.kept[name].append(value.cpu())
    shard.blocks, shard.calls, shard.passes = shard.blocks + 1, shard.calls + drawn.calls, shard.passes + drawn.passes


def require_logits(seen: Seen, extractor: Extractor) -> None:
    if seen.logits is None:
        name = extractor.settings.get("name", "these")
        raise ValueError(f"metrics: {name} features have no scores of classes, which is and accuracy need; "
                         "take --features inception or classifier")  # fmt: skip


def combine(shards: Sequence[Shard], blocks: Sequence[range], n: int, extractor: Extractor) -> Found:
    """The shards of all ranks as one: moments merged in float64, rows put back into their order."""
    moments = [s.moments for s in shards if s.moments is not None]
    whole = moments[0]
    for other in moments[1:]:
        whole = whole.merge(other)
    kept: dict[str, Tensor] = {}
    world = len(shards)
    for name in KEPT:
        if not shards[0].kept[name]:
            continue
        pieces: dict[int, Tensor] = {}
        for rank, shard in enumerate(shards):
            if shard.kept[name]:
                places = range(rank, len(blocks), world)
                parts = torch.cat(shard.kept[name]).split([len(blocks[i]) for i in places])
                pieces.update(zip(places, parts, strict=True))
        kept[name] = torch.cat([pieces[i] for i in range(len(blocks))])
    measured = Measured(whole, **kept, settings=extractor.settings)
    calls, passes, seconds = (sum(getattr(s, k) for s in shards) for k in ("calls", "passes", "seconds"))
    return Found(measured, calls / n, passes / n, seconds, len(blocks[0]))


def reference(
    given: Given,
    extractor: Extractor,
    n: int,
    *,
    keep: frozenset[str] = frozenset(),
    batch: int = 64,
    ranks: Ranks = Ranks(),
    progress: Progress = quiet,
) -> Measured:
    """:func:`measure` of stored samples, remembered below :func:`cache` by the hash of pixels and of the features."""
    key = key_of({"samples": given.hashed, "features": dict(extractor.settings), "n": n})
    path = cache() / "reference" / f"{key[:24]}.npz"
    stored = ranks.once(lambda: Shard.load(path))
    if stored.moments is not None and all(stored.kept[k] for k in keep):
        return Measured(stored.moments, **{k: stored.kept[k][0] for k in keep}, settings=extractor.settings)
    how: dict[str, Any] = {"keep": keep, "batch": batch, "ranks": ranks, "progress": progress}
    measured = measure(given, extractor, n, partial=cache() / "partial", **how).measured
    kept = {k: [v] if (v := getattr(measured, k)) is not None else [] for k in KEPT}
    ranks.once(lambda: Shard(measured.moments, kept).save(path))
    return measured
