"""From samples to the statistics of their features, in fixed blocks of rows that ranks share and that can be resumed.

One rank draws and extracts a whole block, so its numbers are bitwise the same on any number of ranks. Only the sums of
the features are kept, unless a metric needs the features themselves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.core.arrays import open_npz, save_npz
from genkit.core.progress import Progress, silent
from genkit.core.tensors import cache_folder
from genkit.evaluation.cards import hash_json
from genkit.evaluation.metrics import Moments, SampleStatistics
from genkit.evaluation.metrics.features import Extraction, Extractor
from genkit.evaluation.sources import DatasetSamples, SampleSource, split_into_blocks
from genkit.training.ranks import SINGLE, Ranks

TENSORS = ("features", "logits", "labels")
SAVE_SECONDS = 30.0  # of work that a killed process may lose
ERROR_CHECK_BLOCKS = 8  # blocks after which the ranks ask each other whether one has failed


@dataclass
class Shard:
    """What one rank has measured so far."""

    moments: Moments | None = None
    tensors: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in TENSORS})
    blocks: int = 0
    evaluations: float = 0.0
    passes: float = 0.0
    seconds: float = 0.0
    draw_cpu_seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write an npz, atomically."""
        assert self.moments is not None
        arrays = {"mean": self.moments.mean, "scatter": self.moments.scatter}
        arrays |= {name: torch.cat(parts) for name, parts in self.tensors.items() if parts}
        counts = [self.moments.n, self.blocks, self.evaluations, self.passes, self.seconds]
        counts.append(self.draw_cpu_seconds)
        save_npz(path, {"counts": np.array(counts, np.float64), **{k: v.cpu().numpy() for k, v in arrays.items()}})

    @classmethod
    def load(cls, path: Path) -> Shard:
        """What :meth:`save` wrote; an empty shard if the file is missing or damaged."""
        try:
            with open_npz(path) as file:
                arrays = {key: torch.from_numpy(file[key]) for key in file.files}
            n, blocks, evaluations, passes, seconds, draw = arrays["counts"].tolist()
            moments = Moments(int(n), arrays["mean"], arrays["scatter"])
        except Exception:  # missing, or cut off: the work is done again
            return cls()
        tensors = {name: [arrays[name]] if name in arrays else [] for name in TENSORS}
        return cls(moments, tensors, int(blocks), evaluations, passes, seconds, draw)


@dataclass(frozen=True)
class Measurement:
    """The statistics of a set of samples, and what it took to get them."""

    statistics: SampleStatistics
    nfe: float
    """network evaluations per sample"""
    passes: float
    """rows that went through the network per sample: guidance can double them"""
    seconds: float
    """of all ranks together"""
    draw_cpu_seconds: float
    """CPU seconds of drawing the samples or reading them, without their features; of all ranks together"""
    block: int
    """samples drawn and extracted at a time"""


def measure(
    samples: SampleSource,
    extractor: Extractor,
    n: int,
    *,
    keep: frozenset[str] = frozenset(),
    batch: int = 64,
    ranks: Ranks = SINGLE,
    partial: Path | None = None,
    progress: Progress = silent,
    task: str = "samples",
) -> Measurement:
    """The moments of the features of ``n`` samples and, of ``keep`` (features, logits, labels), the rows themselves.

    The ranks share the work, and each gets the statistics of all samples. ``partial`` is a folder for intermediate
    results: a killed measurement continues from there if it is repeated with the same settings. ``ValueError`` on all
    ranks if one of them fails, or if there are fewer than ``n`` samples.
    """
    if samples.limit is not None and n > samples.limit:
        raise ValueError(f"n: given {n}, but {samples.name} has {samples.limit} samples; take --n {samples.limit}")
    blocks = split_into_blocks(n, batch)
    path = None
    if partial is not None:
        settings = {"samples": samples.identity(), "features": dict(extractor.settings), "n": n,
                    "block": len(blocks[0]), "keep": sorted(keep), "world": ranks.world}  # fmt: skip
        path = partial / f"{hash_json(settings)[:24]}-{ranks.rank}.npz"
    shard = Shard.load(path) if path else Shard()
    start, saved, error = time.perf_counter() - shard.seconds, time.perf_counter(), None
    own_blocks = blocks[ranks.rank :: ranks.world]
    turns = -(-len(blocks) // ranks.world)
    progress(task, 0, n)
    # with several ranks every rank takes part in every turn, even if it has resumed further: they check for errors
    for turn in range(shard.blocks if ranks.world == 1 else 0, turns):
        try:
            if error is None and shard.blocks <= turn < len(own_blocks):
                add_block(shard, samples, extractor, own_blocks[turn], n, keep)
                progress(task, min(n, (turn + 1) * ranks.world * len(blocks[0])), n)
                now = time.perf_counter()
                shard.seconds = now - start
                if path and now - saved >= SAVE_SECONDS:
                    shard.save(path)
                    saved = time.perf_counter() + 20 * (time.perf_counter() - now)  # at most a twentieth of the time
        except (ValueError, OSError) as e:
            error = e
        if turn % ERROR_CHECK_BLOCKS == ERROR_CHECK_BLOCKS - 1 or turn == turns - 1 or ranks.world == 1:
            ranks.raise_together(error)
    # a rank may be killed while others still gather, so its share is kept until all have it
    if path and ranks.world > 1 and shard.moments is not None:
        shard.save(path)
    if shard.moments is not None:
        shard.moments = shard.moments.to("cpu")
    measurement = merge_shards(ranks.gather(shard), blocks, n, extractor)
    if path:
        path.unlink(missing_ok=True)
    return measurement


def add_block(
    shard: Shard, samples: SampleSource, extractor: Extractor, rows: range, n: int, keep: frozenset[str]
) -> None:
    """Draw the samples ``rows`` of ``n``, extract their features and add them to ``shard``."""
    begun = time.process_time()
    block = samples.rows(rows.start, rows.stop, n)
    shard.draw_cpu_seconds += time.process_time() - begun
    with torch.no_grad():
        extraction = extractor(block.x)
    moments = shard.moments or Moments.zeros(extraction.features.shape[1])
    shard.moments = moments.to(extraction.features.device)
    shard.moments.add(extraction.features)
    if "logits" in keep:
        require_logits(extraction, extractor)
    tensors = {"features": extraction.features, "logits": extraction.logits, "labels": block.labels}
    for name, tensor in tensors.items():
        if name in keep and tensor is not None:
            shard.tensors[name].append(tensor.cpu())
    shard.blocks += 1
    shard.evaluations += block.evaluations
    shard.passes += block.passes


def require_logits(extraction: Extraction, extractor: Extractor) -> None:
    """``ValueError`` if the extractor gives no class scores."""
    if extraction.logits is None:
        name = extractor.settings.get("name", "these")
        raise ValueError(f"metrics: {name} features have no class scores, which is and accuracy need; "
                         "take --features inception or classifier")  # fmt: skip


def merge_shards(shards: Sequence[Shard], blocks: Sequence[range], n: int, extractor: Extractor) -> Measurement:
    """The shards of all ranks as one measurement: moments merged in float64, rows in their original order."""
    moments = [shard.moments for shard in shards if shard.moments is not None]
    merged = moments[0]
    for other in moments[1:]:
        merged = merged.merge(other)
    tensors = {name: merge_rows(shards, blocks, name) for name in TENSORS if shards[0].tensors[name]}
    statistics = SampleStatistics(merged, **tensors, settings=extractor.settings)
    evaluations = sum(shard.evaluations for shard in shards)
    passes = sum(shard.passes for shard in shards)
    seconds = sum(shard.seconds for shard in shards)
    draw_cpu_seconds = sum(shard.draw_cpu_seconds for shard in shards)
    return Measurement(statistics, evaluations / n, passes / n, seconds, draw_cpu_seconds, len(blocks[0]))


def merge_rows(shards: Sequence[Shard], blocks: Sequence[range], name: str) -> Tensor:
    """The tensor ``name`` of all shards, with the blocks in their order. Rank r has the blocks r, r + world, ..."""
    pieces: dict[int, Tensor] = {}
    for rank, shard in enumerate(shards):
        if shard.tensors[name]:
            places = range(rank, len(blocks), len(shards))
            parts = torch.cat(shard.tensors[name]).split([len(blocks[i]) for i in places])
            pieces.update(zip(places, parts, strict=True))
    return torch.cat([pieces[i] for i in range(len(blocks))])


def measure_reference(
    reference: SampleSource,
    extractor: Extractor,
    n: int,
    *,
    keep: frozenset[str] = frozenset(),
    batch: int = 64,
    ranks: Ranks = SINGLE,
    progress: Progress = silent,
) -> SampleStatistics:
    """:func:`measure` of a reference, remembered in genkit's cache by the hash of its content and the features."""
    content = reference.content_hash if isinstance(reference, DatasetSamples) else hash_json(reference.identity())
    identity = {"samples": content, "features": dict(extractor.settings), "n": n}
    if isinstance(reference, DatasetSamples) and reference.is_listed:
        identity["changed"] = reference.last_change
    key = hash_json(identity)
    path = cache_folder() / "reference" / f"{key[:24]}.npz"
    stored = ranks.once(Shard.load, path)
    if stored.moments is not None and all(stored.tensors[name] for name in keep):
        kept = {name: stored.tensors[name][0] for name in keep}
        return SampleStatistics(stored.moments, **kept, settings=extractor.settings)
    options: dict[str, Any] = {"keep": keep, "batch": batch, "ranks": ranks, "progress": progress}
    partial = cache_folder() / "partial"
    statistics = measure(reference, extractor, n, partial=partial, task="reference", **options).statistics
    tensors = {name: getattr(statistics, name) for name in TENSORS}
    shard = Shard(statistics.moments, {name: [] if v is None else [v] for name, v in tensors.items()})
    ranks.once(shard.save, path)
    return statistics
