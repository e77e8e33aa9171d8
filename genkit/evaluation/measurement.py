"""From samples to the statistics of their features, in fixed blocks of rows that ranks share and that can be resumed.

One rank draws and extracts a whole block, so its numbers are bitwise the same on any number of ranks. Only the sums of
the features are kept, unless a metric needs the features themselves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
from genkit.evaluation.sources import DatasetSamples, SampleRows, SampleSource, split_into_blocks
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

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays, for an npz."""
        assert self.moments is not None
        arrays = {"mean": self.moments.mean, "scatter": self.moments.scatter}
        arrays |= {name: torch.cat(parts) for name, parts in self.tensors.items() if parts}
        counts = [self.moments.n, self.blocks, self.evaluations, self.passes, self.seconds]
        counts.append(self.draw_cpu_seconds)
        return {"counts": np.array(counts, np.float64), **{k: v.cpu().numpy() for k, v in arrays.items()}}

    def save(self, path: Path) -> None:
        """Write an npz, atomically."""
        save_shards(path, [self])

    @classmethod
    def load(cls, path: Path) -> Shard:
        """What :meth:`save` wrote; an empty shard if the file is missing or damaged."""
        return load_shards(path, 1)[0]

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor]) -> Shard:
        """What :meth:`arrays` gave. ``KeyError`` or ``ValueError`` if something is missing."""
        n, blocks, evaluations, passes, seconds, draw = arrays["counts"].tolist()
        moments = Moments(int(n), arrays["mean"], arrays["scatter"])
        tensors = {name: [arrays[name]] if name in arrays else [] for name in TENSORS}
        return cls(moments, tensors, int(blocks), evaluations, passes, seconds, draw)


def save_shards(path: Path, shards: Sequence[Shard]) -> None:
    """Write shards of the same samples in several features to one npz, atomically; the first has plain names."""
    save_npz(path, {f"{i}." * (i > 0) + k: v for i, shard in enumerate(shards) for k, v in shard.arrays().items()})


def load_shards(path: Path, count: int) -> list[Shard]:
    """What :func:`save_shards` wrote; empty shards if the file is missing or damaged: the work is done again."""
    try:
        with open_npz(path) as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files}
        shards = []
        for i in range(count):
            prefix = f"{i}." * (i > 0)
            own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            shards.append(Shard.of(own))
        return shards
    except Exception:
        return [Shard() for _ in range(count)]


@dataclass(frozen=True)
class Space:
    """A feature space that samples are measured in."""

    extractor: Extractor
    keep: frozenset[str] = frozenset()
    """of features, logits and labels, the tensors whose rows are kept"""


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

    See :func:`measure_spaces`.
    """
    spaces = [Space(extractor, keep)]
    options: dict[str, Any] = {"batch": batch, "ranks": ranks, "partial": partial, "progress": progress, "task": task}
    return measure_spaces(samples, spaces, n, **options)[0]


def measure_spaces(
    samples: SampleSource,
    spaces: Sequence[Space],
    n: int,
    *,
    batch: int = 64,
    ranks: Ranks = SINGLE,
    partial: Path | None = None,
    progress: Progress = silent,
    task: str = "samples",
) -> list[Measurement]:
    """The statistics of ``n`` samples in each of several feature spaces, from one pass over the samples.

    The ranks share the work, and each gets the statistics of all samples. ``partial`` is a folder for intermediate
    results: a killed measurement continues from there if it is repeated with the same settings. ``ValueError`` on all
    ranks if one of them fails, or if there are fewer than ``n`` samples.
    """
    if samples.limit is not None and n > samples.limit:
        raise ValueError(f"n: given {n}, but {samples.name} has {samples.limit} samples; take --n {samples.limit}")
    blocks = split_into_blocks(n, batch)
    path = None
    if partial is not None:
        first, *further = spaces
        settings = {"samples": samples.identity(), "features": dict(first.extractor.settings), "n": n,
                    "block": len(blocks[0]), "keep": sorted(first.keep), "world": ranks.world}  # fmt: skip
        if further:
            settings["further"] = [(dict(space.extractor.settings), sorted(space.keep)) for space in further]
        path = partial / f"{hash_json(settings)[:24]}-{ranks.rank}.npz"
    shards = load_shards(path, len(spaces)) if path else [Shard() for _ in spaces]
    shard = shards[0]
    start, saved, error = time.perf_counter() - shard.seconds, time.perf_counter(), None
    own_blocks = blocks[ranks.rank :: ranks.world]
    turns = -(-len(blocks) // ranks.world)
    progress(task, 0, n)
    # with several ranks every rank takes part in every turn, even if it has resumed further: they check for errors
    for turn in range(shard.blocks if ranks.world == 1 else 0, turns):
        try:
            if error is None and shard.blocks <= turn < len(own_blocks):
                add_block(shards, samples, spaces, own_blocks[turn], n)
                progress(task, min(n, (turn + 1) * ranks.world * len(blocks[0])), n)
                now = time.perf_counter()
                for part in shards:
                    part.seconds = now - start
                if path and now - saved >= SAVE_SECONDS:
                    save_shards(path, shards)
                    saved = time.perf_counter() + 20 * (time.perf_counter() - now)  # at most a twentieth of the time
        except (ValueError, OSError) as e:
            error = e
        if turn % ERROR_CHECK_BLOCKS == ERROR_CHECK_BLOCKS - 1 or turn == turns - 1 or ranks.world == 1:
            ranks.raise_together(error)
    # a rank may be killed while others still gather, so its share is kept until all have it
    if path and ranks.world > 1 and shard.moments is not None:
        save_shards(path, shards)
    measurements = []
    for part, space in zip(shards, spaces, strict=True):
        if part.moments is not None:
            part.moments = part.moments.to("cpu")
        measurements.append(merge_shards(ranks.gather(part), blocks, n, space.extractor))
    if path:
        path.unlink(missing_ok=True)
    return measurements


def add_block(shards: Sequence[Shard], samples: SampleSource, spaces: Sequence[Space], rows: range, n: int) -> None:
    """Draw the samples ``rows`` of ``n``, extract their features in each space and add them to its shard."""
    begun = time.process_time()
    block = samples.rows(rows.start, rows.stop, n)
    seconds = time.process_time() - begun
    for shard, space in zip(shards, spaces, strict=True):
        add_features(shard, block, space.extractor, space.keep)
        shard.draw_cpu_seconds += seconds


def add_features(shard: Shard, block: SampleRows, extractor: Extractor, keep: frozenset[str]) -> None:
    """Extract the features of a block of samples and add them to ``shard``."""
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
