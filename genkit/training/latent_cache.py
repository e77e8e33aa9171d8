"""Caching the latents of a data set: :func:`encode`. ``--data=latents`` (``genkit.data.latents``) reads them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from genkit import config
from genkit.config import table
from genkit.config.blocks import find_name
from genkit.config.numbers import Count, Natural
from genkit.core import Batch, Data, Draw, pool_weight, spec_to_dict
from genkit.core.device import DeviceName, pick_device
from genkit.core.files import refuse_foreign
from genkit.core.progress import Progress, reporting
from genkit.data import DATA, DataSource, InLatents, InMemory, OnDisk
from genkit.data.captions import Captions
from genkit.data.image_files import ListedFile
from genkit.data.in_memory import random_flip
from genkit.data.latents import (
    CAPTIONS,
    CONDITION,
    INDEX,
    MARKS,
    PLACE_WEIGHT,
    find_digests,
    is_shard,
    note_digests,
    read_index,
    read_shard,
    write_captions,
    write_index,
    write_shard,
)
from genkit.data.source import Split
from genkit.data.stream import join_batches
from genkit.objectives.autoencoders.autoencoder import Posterior
from genkit.training.directory import find_run
from genkit.training.distributed import join_ranks
from genkit.training.first_stage import FirstStage, foreign_stage
from genkit.training.latent_statistics import LatentStatistics, compute_statistics, merge_all
from genkit.training.precision import Precision, require_precision, use_codec_precision
from genkit.training.ranks import Ranks, use_threads
from genkit.training.run import load_run, open_first_stage
from genkit.training.settings import stored_settings

BATCHES_AHEAD = 2  # that threads decode while one is encoded
MAX_ROUNDING = 0.01  # of a channel's standard deviation, by which bf16 may change the means


@dataclass(frozen=True, kw_only=True)
class TrainingData(DataSource):
    """The data that the run was trained on."""

    def load(self, split: Split = "train") -> Data:
        raise ValueError("data: stands for those of a run, which are not known here; name them")


SOURCES: dict[str, type[DataSource]] = {"same": TrainingData, **DATA}


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Which latents are cached, and how."""

    data: DataSource = table(
        "genkit.training.latent_cache:SOURCES",
        "same",
        kind="genkit.data:DataSource",
        fallback="genkit.data:find_source",
        adapt="genkit.data.torch_dataset:adapt",
    )
    """Data to encode: same, a NAME, or a path to a folder of images, a .zip or an .npz."""
    split: Literal["train", "test"] = "train"
    """Which samples. Both splits may be in one folder."""
    shard: Count = 4096
    """Samples of a file. Existing files of the same samples are kept, so an interrupted call can be repeated."""
    batch: Count = 256
    """Samples per batch."""
    workers: Natural = 2
    """Threads that read and decode samples from the disk while others are encoded."""
    precision: Precision = "fp32"
    """Arithmetic of the encoder: fp32, tf32 (matrix products and convolutions of a CUDA device) or bf16; fp16 means
    fp32 here, as common first stages exceed its range."""
    storage: Literal["fp32", "bf16"] = "fp32"
    """Type of the stored numbers. bf16 halves the files; it is refused where rounding changes a channel by more than a
    hundredth of its standard deviation."""
    device: DeviceName = "auto"
    """Device. auto: the machine's accelerator, or the CPU if it has none."""


@dataclass(frozen=True)
class LatentCache:
    """A split that has been cached completely."""

    path: Path
    """the folder, for ``--data=latents --data.root``"""
    split: str
    num_samples: int
    num_written: int
    """files that were written by this call; others existed"""
    shape: tuple[int, ...]
    """of a latent"""


def encode(
    stage: str,
    settings: EncodeSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> LatentCache:
    """Encode a data set by a first stage, and cache its latents.

    ``stage`` is a run with a code (of vae, ae, vq or autoencoder), or KIND:WHERE such as ``diffusers:DIR``. ``out`` is
    the folder; None: latents in the run's folder. ``changes`` are settings by name: ``encode(run, split="test")``.
    Under a launcher all ranks call this together: they share the files, which are those of one process, and each gets
    the cache. ``ValueError`` if the stage does not fit the data, or the folder holds latents of others.
    """
    settings = config.override(settings or EncodeSettings(), **changes)
    source, foreign = settings.data, foreign_stage(stage)[0]
    if foreign and (isinstance(source, TrainingData) or not out):
        raise ValueError(f"encode: {stage} is no run, and has no data or folder of its own; give --data and --out")
    if isinstance(source, TrainingData):
        source = load_run(stage, device="cpu").config.data
    source = source.with_absolute_root()  # the cache is read in other folders too
    folder = Path(out) if out else find_run(stage) / "latents"
    require_precision(settings.precision, pick_device(settings.device))
    accelerator = join_ranks(pick_device(settings.device))
    ranks = Ranks.of(accelerator)
    with accelerator.main_process_first():
        data = source.load(settings.split)
        if isinstance(data, InLatents):
            raise ValueError(f"data: {folder} would be latents of latents; name the samples themselves")
        if getattr(data, "buckets", None) is not None:
            raise ValueError(
                "data.bucket: latents in several shapes cannot be cached; leave it out, or train on images"
            )
        first_stage = open_first_stage(stage, data.spec.shape, accelerator.device)
    threads = None if foreign else stored_settings(find_run(stage)).threads
    with reporting(progress, ranks.is_main) as report, use_threads(threads):
        return write_split(folder, first_stage, source, data, settings, ranks, report)


class EncodedShard(NamedTuple):
    """What a rank knows of a shard."""

    name: str
    sha256: str
    statistics: LatentStatistics
    is_new: bool
    """whether this call wrote it"""


def write_split(
    folder: Path,
    stage: FirstStage,
    source: DataSource,
    data: Data,
    settings: EncodeSettings,
    ranks: Ranks,
    progress: Progress,
) -> LatentCache:
    """Write the shards of a split that are missing, then its entry in the index. Ranks take shards in turn."""
    ranks.once(open_index, folder, stage, source)
    count, samples = -(-len(data) // settings.shard), SampleHashes.of(data)
    views = 1 + int(source.random_flip)
    own: list[EncodedShard] = []
    progress("encoding", 0, len(data))
    for turn in range(-(-count // ranks.world)):
        k, error = turn * ranks.world + ranks.rank, None
        try:
            if k < count:
                own.append(write_rows(folder, stage, samples, settings, views, k, count))
        except (ValueError, OSError) as e:
            error = e
        ranks.raise_together(error)
        progress("encoding", min((turn + 1) * ranks.world * settings.shard, len(data)), len(data))
    shards = sorted((shard for part in ranks.gather(own) for shard in part), key=lambda shard: shard.name)
    digests = {shard.name: shard.sha256 for shard in shards}
    captions = getattr(data, "captions", None)
    texts = ranks.once(write_captions, folder, settings.split, captions) if captions else {}
    entry = {
        "n": len(data),
        "views": views,
        "spec": spec_to_dict(replace(data.spec, shape=tuple(stage.latent))),
        "shards": digests,
        "statistics": merge_all(shard.statistics for shard in shards).to_dict(),
        **({"texts": texts} if texts else {}),
    }
    if ranks.is_main:
        note_digests(folder, {**digests, **texts})
        index = read_index(folder)  # another process may have added the other split meanwhile
        index["splits"][settings.split] = entry
        write_index(folder, index)
    ranks.gather(None)  # nobody returns before the index is there
    return LatentCache(folder, settings.split, len(data), sum(s.is_new for s in shards), tuple(stage.latent))


@dataclass(frozen=True)
class SampleHashes:
    """What samples are known by: a shard that was made from others is encoded again."""

    data: Data
    listing: Sequence[ListedFile]
    """the files of images on disk; () for samples in memory"""

    @staticmethod
    def of(data: Data) -> SampleHashes:
        """Those of ``data``, whose files are listed."""
        return SampleHashes(data, data.files.listing() if isinstance(data, OnDisk) else ())

    def sha256(self, rows: range) -> str:
        """SHA-256 of the samples ``rows`` and their conditions but captions: of the content if it is in memory, else of
        the names, sizes and times of change of the files."""
        digest = hashlib.sha256()
        if isinstance(self.data, OnDisk):
            each = len(self.listing) == len(self.data)  # else they are shards
            digest.update(json.dumps(self.listing[rows.start : rows.stop] if each else self.listing).encode())
            cond = {name: value[rows.start : rows.stop] for name, value in self.data.cond.items()}
        else:
            batch = without_captions(self.data).batch(torch.tensor(rows), FixedFlip(rows, 1.0))
            weight = {} if batch.place_weight is None else {PLACE_WEIGHT: batch.place_weight}
            cond = {"": batch.x, **batch.cond, **weight}
        for name, value in sorted(cond.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()


def write_rows(
    folder: Path, stage: FirstStage, samples: SampleHashes, settings: EncodeSettings, views: int, k: int, count: int
) -> EncodedShard:
    """Write shard ``k`` of ``count``, unless it is there already."""
    data = samples.data
    rows = range(k * settings.shard, min((k + 1) * settings.shard, len(data)))
    path = folder / f"{settings.split}-{k:05d}-of-{count:05d}.safetensors"
    origin = {"rows": f"{rows.start}-{rows.stop}", "views": str(views), "sha256": stage.sha256}
    origin["samples"] = samples.sha256(rows)
    origin |= {k: v for k, v in (("precision", settings.precision), ("storage", settings.storage)) if v != "fp32"}
    captions: Captions | None = getattr(data, "captions", None)
    if captions:
        origin["captions"] = sample_rows_sha256(captions.rows[rows.start : rows.stop])
    missing = not is_shard(path, origin)
    refuse_foreign(folder / MARKS)
    if missing:
        refuse_foreign(path)
        content = encode_rows(stage, without_captions(data), rows, views, settings)
        if captions:
            content[CAPTIONS] = captions.rows[rows.start : rows.stop]
        if settings.storage == "bf16":
            content = round_moments(content, stage.name)
        write_shard(path, content, origin)
    statistics = compute_statistics([shard_posterior(read_shard(path))])
    return EncodedShard(path.name, find_digests(folder, [path.name])[path.name], statistics, missing)


def without_captions(data: Data) -> Data:
    """``data`` without captions in its batches."""
    if getattr(data, "captions", None) is None:
        return data
    plain = copy.copy(data)
    plain.captions = None  # type: ignore[attr-defined]  # it has some
    return plain


def sample_rows_sha256(rows: Tensor) -> str:
    """SHA-256 of the captions' rows of some samples."""
    return hashlib.sha256(rows.long().contiguous().numpy().tobytes()).hexdigest()


def open_index(folder: Path, stage: FirstStage, source: DataSource) -> dict[str, Any]:
    """The index of ``folder``, begun if there is none. ``ValueError`` if it is of another stage or other data."""
    data = {"name": find_name({"table": "genkit.data:DATA"}, type(source)), **config.dump(source)}
    index: dict[str, Any] = {"stage": {**stage.to_dict(), "sha256": stage.sha256}, "data": data, "splits": {}}
    if not (folder / INDEX).is_file():
        stage.write(folder / "codec")
        write_index(folder, index)
        return index
    stored = read_index(folder)
    for part, given in json.loads(json.dumps(index)).items():
        if part != "splits" and {**stored[part], "run": None} != {**given, "run": None}:
            raise ValueError(f"{folder}: holds latents of another {part}; name another folder with --out")
    stage.write(folder / "codec")  # unless it is there already
    return stored


def shard_posterior(shard: Mapping[str, Tensor]) -> Posterior:
    """The posterior of all samples and views of a shard."""
    mean = shard["mean"].float().flatten(0, 1)
    log_var = shard["log_var"].float().flatten(0, 1) if "log_var" in shard else torch.full_like(mean, -torch.inf)
    return Posterior(mean, log_var)


class FixedFlip(Draw):
    """Random numbers for which an augmentation mirrors every image (``number`` 1), or none (0)."""

    def __init__(self, rows: range, number: float):
        super().__init__((0,), rows.start, rows.stop)
        self.number = number

    def uniform(self, *shape: int) -> Tensor:
        return super().uniform(*shape) if shape else torch.full((self.stop - self.start,), self.number)


def read_ahead(data: Data, rows: range, views: int, batch: int, workers: int) -> Iterator[tuple[range, list[Batch]]]:
    """The samples ``rows`` in batches: a range of rows, and a batch for each view (as stored, and mirrored).

    Samples on disk are decoded once for both views, by ``workers`` threads that are ``BATCHES_AHEAD`` batches ahead.
    """
    per_task = getattr(data, "rows_per_task", 0) if workers else 0

    def read(chunk: range) -> list[Batch]:
        stored = data.batch(torch.tensor(chunk), FixedFlip(chunk, 1.0))
        if views == 1:
            return [stored]
        if isinstance(data, InMemory | OnDisk):
            return [stored, random_flip(stored, data.spec, FixedFlip(chunk, 0.0))]
        return [stored, data.batch(torch.tensor(chunk), FixedFlip(chunk, 0.0))]

    with ThreadPoolExecutor(max(1, workers)) as pool:
        pending: deque[tuple[range, list[Future[list[Batch]]]]] = deque()
        chunks = (range(first, min(first + batch, rows.stop)) for first in range(rows.start, rows.stop, batch))
        try:
            for chunk in chunks:
                if not per_task:
                    yield chunk, read(chunk)
                    continue
                tasks = (chunk[i : i + per_task] for i in range(0, len(chunk), per_task))
                pending.append((chunk, [pool.submit(read, task) for task in tasks]))
                if len(pending) > BATCHES_AHEAD:
                    yield collect(*pending.popleft())
            while pending:
                yield collect(*pending.popleft())
        finally:
            for _, tasks in pending:
                for task in tasks:
                    task.cancel()


def collect(rows: range, tasks: Sequence[Future[list[Batch]]]) -> tuple[range, list[Batch]]:
    """The parts of a batch that threads have read, as one batch for each view."""
    return rows, [join_batches(parts) for parts in zip(*(task.result() for task in tasks), strict=True)]


def encode_rows(stage: FirstStage, data: Data, rows: range, views: int, settings: EncodeSettings) -> dict[str, Tensor]:
    """The content of one shard: ``mean`` and ``log_var`` ``[rows, views, C, ...]``, the conditions and weights
    of places.

    ``log_var`` is left out if all posteriors are deterministic. ``ValueError`` if the stage yields NaN.
    """
    device = next((p.device for net in stage.nets.values() for p in net.parameters()), torch.device("cpu"))
    parts: list[dict[str, Tensor]] = []
    for chunk, batches in read_ahead(data, rows, views, settings.batch, settings.workers):
        draws = [Draw((0,), chunk.start, chunk.stop, device) for _ in batches]
        with torch.no_grad(), use_codec_precision(settings.precision, device):
            posteriors = [stage.posterior(replace(b.to(device), draw=d)) for b, d in zip(batches, draws, strict=True)]
        part = {
            "mean": torch.stack([q.mean for q in posteriors], 1).float().cpu(),
            "log_var": torch.stack([q.log_var for q in posteriors], 1).float().cpu(),
        }
        weights = [b.place_weight for b in batches if b.place_weight is not None]
        if weights:
            part[PLACE_WEIGHT] = torch.stack([pool_weight(w, part["mean"][:, 0]) for w in weights], 1)
        parts.append({**part, **{CONDITION + k: v for k, v in batches[0].cond.items()}})
    content = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    if bool((content["log_var"] == -torch.inf).all()):
        del content["log_var"]
    for name, value in content.items():
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise ValueError(f"codec: {stage.name} gives a {name} that is not a number; the run has diverged")
    return content


def round_moments(content: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The content of a shard with moments in bf16.

    ``ValueError`` if that moves the means of a channel by more than ``MAX_ROUNDING`` of the standard deviation of its
    latents (root mean square).
    """
    rounded = {k: v.bfloat16() if k in ("mean", "log_var") else v for k, v in content.items()}
    change = (rounded["mean"].double() - content["mean"].double()).flatten(0, 1).movedim(1, 0).flatten(1)
    std = compute_statistics([shard_posterior(content)]).std("draw")
    share = float((change.square().mean(1).sqrt() / std.clamp(min=torch.finfo(std.dtype).tiny)).max())
    if share > MAX_ROUNDING:
        raise ValueError(
            f"storage: bf16 changes a channel of the latents of {name} by {share:.1%} of its standard deviation; "
            f"allowed {MAX_ROUNDING:.0%}; take --storage fp32"
        )
    return rounded
