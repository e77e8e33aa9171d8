"""What can be measured: samples of a run, reconstructions by its code, a folder, a zip, an npz, a named data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from genkit import config
from genkit.config.paths import PathText
from genkit.core import Batch, Data, Denoiser, Draw, Label, Spec, spec_to_dict
from genkit.core.arrays import open_npz
from genkit.core.tensors import sha256
from genkit.data import DATA, DataSource, OnDisk, codecs, find_source
from genkit.data.images import Channels, Size
from genkit.data.source import Split
from genkit.diffusion.samplers import CountingDenoiser, Seeds
from genkit.evaluation.classes import proportional_classes
from genkit.training.run import Run, average_name, with_classes
from genkit.training.sampling import Sampling, sample_conditions

SPLITS = ("train", "test")
HASH_ROWS = 512  # samples hashed at a time
REFERENCE_SEED = 1_000_000_007  # added to the seed of a run that is the reference: no evaluated samples share its noise


class SampleRows(NamedTuple):
    """Some decoded samples, their classes, and what it took to draw them."""

    x: Tensor
    """``[B, *S]``"""
    labels: Tensor | None = None
    """``[B]``, the classes that the samples were conditioned on, or have"""
    evaluations: float = 0.0
    """evaluations of the denoiser (NFE), summed over the samples"""
    passes: float = 0.0
    """rows that went through the network: guidance evaluates two rows for each sample"""


class SampleSource(Protocol):
    """Samples that are addressed by row. The contract of everything that can be measured."""

    @property
    def spec(self) -> Spec:
        """Shape and conditions of the decoded samples."""
        ...

    @property
    def name(self) -> str:
        """What messages call the samples."""
        ...

    @property
    def limit(self) -> int | None:
        """The number of samples; None if it is unlimited."""
        ...

    @property
    def label(self) -> str | None:
        """The name of the condition that is a class, if there is one."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything that the rows depend on, ready for JSON."""
        ...

    def rows(self, first: int, last: int, n: int) -> SampleRows:
        """Samples ``first..last`` of the ``n`` that are measured. ``ValueError`` if one of them is not finite."""
        ...


def class_condition(spec: Spec) -> str | None:
    """The name of the first condition that is a class, if there is one."""
    return next((name for name, kind in spec.cond.items() if isinstance(kind, Label)), None)


def split_into_blocks(n: int, batch: int, least: int = 16) -> Sequence[range]:
    """Fixed blocks of the rows 0..n. They depend on ``n`` and ``batch`` only, so any number of ranks draws the same.

    Few samples are cut into ``least`` blocks, so that no rank is left without one.
    """
    size = max(1, min(batch, -(-n // least)))
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


# ------------------------------------------------------------------------------------------------ stored samples
@dataclass(frozen=True)
class DataOptions:
    """Where named data sets are stored, and how images are read."""

    root: PathText | None = None
    """The folder of cifar10, mnist ...; None: data."""
    size: Size = None
    """Resize the largest centred crop of this shape (H, or H W) to it; None: keep the size."""
    channels: Channels = None
    """Convert to this number of channels; None: keep them."""
    full_hash: bool = False
    """Identify images that do not fit into memory by the content of all of them, rather than by the names and sizes of
    their files."""


@dataclass(eq=False)
class DatasetSamples:
    """Samples that are stored. If fewer than all are measured, they are spread evenly, which keeps classes balanced."""

    data: Data
    name: str
    config: DataSource
    """which can load the other split"""
    split: str = "train"
    content_hash: str | None = None
    class_counts: Tensor | None = None
    """``[K]``, the number of samples of each class; known once the content has been hashed"""
    full_hash: bool = False
    """read all images on disk for their hash, instead of listing their files"""
    last_change: int = 0
    """time of the last change of a file that was listed, in nanoseconds"""

    @property
    def spec(self) -> Spec:
        """Shape and conditions of the samples."""
        return self.data.spec

    @property
    def limit(self) -> int:
        """The number of samples."""
        return len(self.data)

    @property
    def label(self) -> str | None:
        """The name of the condition that is a class."""
        return class_condition(self.data.spec)

    def identity(self) -> dict[str, Any]:
        """Name, split and hash: of the content, or of the listing."""
        key = "listing_sha256" if self.is_listed else "sha256"
        return {"data": self.name, "split": self.split, key: self.content_hash or self.hash()}

    @property
    def is_listed(self) -> bool:
        """Whether the samples are identified by the names and sizes of their files, which are too many to read."""
        return isinstance(self.data, OnDisk) and not self.full_hash

    def training_split(self) -> Data:
        """The training split of the same source, from which a classifier may learn."""
        return self.data if self.split == "train" else self.config.load("train")

    def hash(self) -> str:
        """The sha256 of all samples and classes. It reads every file, so damaged ones are found before the work.

        Images that are decoded when they are needed are not read: names and sizes of their files stand for them.
        """
        return self.scan()[0]

    def scan(self) -> tuple[str, Tensor | None]:
        """:meth:`hash`, and the number of samples of each class ``[K]`` if there are classes."""
        if isinstance(self.data, OnDisk) and not self.full_hash:
            return self.scan_listing(self.data)
        digest = hashlib.sha256(str((tuple(self.spec.shape), len(self.data))).encode())
        kind = self.spec.cond[self.label] if self.label else None
        counts = torch.zeros(kind.num, dtype=torch.int64) if isinstance(kind, Label) else None
        for first in range(0, len(self.data), HASH_ROWS):
            batch = self._batch(torch.arange(first, min(first + HASH_ROWS, len(self.data))))
            digest.update(batch.x.contiguous().numpy().tobytes())
            if self.label and counts is not None:
                digest.update(batch.cond[self.label].contiguous().numpy().tobytes())
                counts += torch.bincount(batch.cond[self.label].flatten().long(), minlength=len(counts))
        self.content_hash, self.class_counts = digest.hexdigest(), counts
        return self.content_hash, counts

    def scan_listing(self, data: OnDisk) -> tuple[str, Tensor | None]:
        """:meth:`scan` without reading an image."""
        listed = data.files.listing()
        settings = (tuple(self.spec.shape), len(data), data.size, data.channels)
        digest = hashlib.sha256(json.dumps([settings, [(f.name, f.size, f.checksum) for f in listed]]).encode())
        kind = self.spec.cond[self.label] if self.label else None
        counts = None
        if self.label and isinstance(kind, Label):
            label = data.cond[self.label]
            digest.update(label.contiguous().numpy().tobytes())
            counts = torch.bincount(label.flatten().long(), minlength=kind.num)
        self.content_hash, self.class_counts = digest.hexdigest(), counts
        self.last_change = max((f.changed for f in listed), default=0)
        return self.content_hash, counts

    def _batch(self, indices: Tensor) -> Batch:
        return self.data.batch(indices, Draw((0,), 0, len(indices)))

    def rows(self, first: int, last: int, n: int) -> SampleRows:
        """Rows ``first..last`` of ``n`` that are spread evenly over all samples."""
        batch = self._batch(torch.arange(first, last) * len(self.data) // n)
        return SampleRows(batch.x, batch.cond[self.label] if self.label else None)


def open_data(name: str, options: DataOptions = DataOptions()) -> DatasetSamples:
    """Stored samples by name: ``cifar10:test``, or the path of a folder, .zip or .npz, also with ``:train``/``:test``.

    ``ValueError`` if there is no such source.
    """
    base, _, split = name.rpartition(":")
    if not base or split not in SPLITS:
        base, split = name, "train"
    kind, settings = find_source(base)
    given = DATA[kind].applicable({key: value for key, value in vars(options).items() if value is not None})
    if kind == "npz" and is_statistics_file(path := Path(base).expanduser()):
        raise ValueError(f"{path}: has statistics (mu, sigma) and no samples; it can only be a --reference")
    source = DATA[kind](**{**given, **settings}).unaugmented()
    return DatasetSamples(source.load(cast(Split, split)), base, source, split, full_hash=options.full_hash)


def open_run_data(run: Run, split: str = "train", options: DataOptions = DataOptions()) -> DatasetSamples:
    """The data that a run was trained on, without augmentation, with the conditions that they have by default.

    ``options.root`` says where they are stored now.
    """
    source = run.config.data.decoded_source().unaugmented().with_default_conditions()
    if options.root is not None:
        source = source.with_fields(root=options.root)
    name = next((name for name, kind in DATA.items() if kind is type(source)), type(source).__name__)
    return DatasetSamples(source.load(cast(Split, split)), name, source, split, full_hash=options.full_hash)


def is_statistics_file(path: Path) -> bool:
    """Whether this is an .npz with ``mu`` and ``sigma``."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with open_npz(path) as stored:
            return {"mu", "sigma"} <= set(stored.files)
    except Exception:  # not a zip, a pickle, truncated: whoever reads it as samples raises a one-line error
        return False


# ------------------------------------------------------------------------------------------------ samples of a run
@dataclass(eq=False)
class ModelSamples:
    """Samples of a model. Row i has seed ``sampling.seed + i``; classes come in turn, or as ``class_counts`` has them.

    A model with more conditions than a class takes those of its training data in turn.
    """

    run: Run
    sampling: Sampling = field(default_factory=Sampling)
    weights_sha256: str = ""
    """of the weights' file, or of what the file would be"""
    conditions: Data | None = None
    class_counts: Tensor | None = None
    """``[K]``, proportions of the classes; None: equal ones"""

    def __post_init__(self) -> None:
        if not self.run.objective.is_generative:
            kind = type(self.run.objective).__name__
            raise ValueError(
                f"run: given one of {kind}, which draws no samples; evaluate a generative model; "
                "of an autoencoder, its reconstructions: --reconstruct test"
            )
        self.counters: list[CountingDenoiser] = []
        self.other_models = self.run.open_references(self.sampling)
        weak, classifier = self.other_models.get("weak"), self.other_models.get("classifier")
        counter = None if self.one_pass else self._count
        self.generate = self.run.generator(self.sampling, weak=weak, classifier=classifier, inner=counter)
        self.model_spec = self.run.spec if classifier is None else with_classes(self.run.data_spec, classifier)
        conditions = self.model_spec.cond
        if any(not isinstance(kind, Label) for kind in conditions.values()) and self.conditions is None:
            source = self.run.config.data.unaugmented()
            self.conditions = (source.with_labels() if source.captions_from_labels else source).load("train")
        # classes that the data have and the model is not conditioned on: its captions may tell them
        in_data = {} if self.conditions is None else self.conditions.spec.cond
        self.extra_classes = {k: kind for k, kind in in_data.items() if isinstance(kind, Label) and k not in conditions}

    def _count(self, denoise: Denoiser) -> Denoiser:
        self.counters.append(CountingDenoiser(denoise))
        return self.counters[-1]

    @property
    def one_pass(self) -> bool:
        """Whether the model draws in one pass, without a sampler."""
        return self.run.objective.sampler is None

    @property
    def limit(self) -> None:
        """A model draws any number of samples."""
        return None

    @property
    def spec(self) -> Spec:
        """Shape and conditions of the decoded samples."""
        return replace(self.run.data_spec, cond={**self.run.data_spec.cond, **self.extra_classes})

    @property
    def name(self) -> str:
        """The run's directory."""
        return str(self.run.directory)

    @property
    def label(self) -> str | None:
        """The name of the condition that is a class."""
        return class_condition(self.model_spec) or next(iter(self.extra_classes), None)

    def identity(self) -> dict[str, Any]:
        """Weights, sampling, codec, objective and backbone."""
        proportions = {} if self.class_counts is None else {"class_counts": self.class_counts.tolist()}
        return {
            **proportions,
            "weights_sha256": self.weights_sha256,
            "sampling": sampling_settings(self),
            "codec": codecs.to_dict(self.run.codec),
            "spec": spec_to_dict(self.run.spec),
            "objective": repr(self.run.objective),
            "backbone": repr(self.run.config.backbone),
        }

    def cond(self, rows: range) -> dict[str, Tensor]:
        """The conditions of some rows, on the CPU."""
        if self.conditions is None:
            cond = {name: v[rows.start :] for name, v in sample_conditions(self.model_spec, rows.stop).items()}
            if self.class_counts is not None and self.label is not None:
                cond[self.label] = proportional_classes(self.class_counts, rows.stop)[rows.start :]
            return cond
        batch = self.conditions.batch(torch.tensor(rows) % len(self.conditions), Draw((0,), rows.start, rows.stop))
        return dict(self.conditions.codec.encode(batch).cond)

    def rows(self, first: int, last: int, n: int) -> SampleRows:
        """Draw rows ``first..last``. ``ValueError`` if a sample is not finite."""
        run, rows = self.run, range(first, last)
        noise = Seeds([self.sampling.seed + i for i in rows], run.device)
        cond = self.cond(rows)
        self.counters.clear()
        model_cond = {name: v.to(run.device) for name, v in cond.items() if name not in self.extra_classes}
        with torch.no_grad():
            x = self.generate(noise(run.objective.noise_shape(run.spec)), model_cond, noise)
            run.require_finite(x, first)
            x = run.decode(x, self.sampling.precision)
        calls = sum(counter.calls for counter in self.counters) if self.counters else 1
        passes = sum(counter.rows for counter in self.counters) if self.counters else len(rows)
        labels = cond[self.label].cpu() if self.label else None
        return SampleRows(x, labels, float(calls * len(rows)), float(passes))


@dataclass(eq=False)
class Reconstructions:
    """A run's data after encoding and decoding: the best that a model of its latents could achieve."""

    run: Run
    dataset: DatasetSamples
    weights_sha256: str = ""

    @property
    def spec(self) -> Spec:
        """Shape and conditions of the samples."""
        return self.dataset.spec

    @property
    def name(self) -> str:
        """What messages call the samples."""
        return f"{self.run.directory}'s reconstructions"

    @property
    def limit(self) -> int:
        """The number of samples."""
        return self.dataset.limit

    @property
    def label(self) -> str | None:
        """The name of the condition that is a class."""
        return self.dataset.label

    def identity(self) -> dict[str, Any]:
        """Data, weights, codec, objective and backbone."""
        return {
            "reconstructed": self.dataset.identity(),
            "weights_sha256": self.weights_sha256,
            "codec": codecs.to_dict(self.run.codec),
            "objective": repr(self.run.objective),
            "backbone": repr(self.run.config.backbone),
        }

    def rows(self, first: int, last: int, n: int) -> SampleRows:
        """Reconstruct rows ``first..last`` of ``n``. ``ValueError`` if the run has no code."""
        indices = torch.arange(first, last) * self.limit // n
        batch = self.dataset.data.batch(indices, Draw((0,), first, last))
        draw = Draw((0, 1), first, last, self.run.device)
        labels = batch.cond[self.label].cpu() if self.label else None
        return SampleRows(self.run.reconstruct(replace(batch.to(self.run.device), draw=draw)), labels)


# ------------------------------------------------------------------------------------------------ settings for cards
def source_settings(samples: SampleSource) -> dict[str, Any]:
    """How samples were made, for their card: a run's weights and sampling, or a data set's hash."""
    if isinstance(samples, Reconstructions):
        return {**weights_settings(samples.run, samples.weights_sha256), "reconstructed": samples.dataset.identity()}
    if not isinstance(samples, ModelSamples):
        return {"samples": samples.identity()}
    return {**weights_settings(samples.run, samples.weights_sha256), **sampling_settings(samples)}


def weights_settings(run: Run, weights_sha256: str) -> dict[str, Any]:
    """Which weights a card is about."""
    return {
        "run": run.directory.name,
        "step": run.step,
        "ema": average_name(run.weights),
        "weights": run.weights,
        "weights_sha256": weights_sha256,
        **({"adapter": adapter} if (adapter := run.describe_adapter()) else {}),
    }


def sampling_settings(samples: ModelSamples) -> dict[str, Any]:
    """How a model's samples are drawn: all settings but ``batch`` and ``compile``, other models as hashes."""
    settings = config.dump(samples.sampling)
    del settings["batch"], settings["compile"]  # which change the last digits only
    names = {"autoguide": "weak", "classifier": "classifier"}
    for name, role in names.items():
        other = samples.other_models.get(role)
        if other is not None:
            settings[name] = {"run": other.directory.name, "weights_sha256": hash_weights(other)}
    settings |= samples.sampling.resolved(samples.run)
    if samples.class_counts is not None:
        settings["classes"] = "in the proportions of the reference"
    return settings


def reference_settings(reference: SampleSource) -> dict[str, Any]:
    """What a reference is, for the card: a data set's name and hash, or a run's weights and sampling."""
    if isinstance(reference, DatasetSamples):
        return reference.identity()
    return source_settings(reference)


def hash_weights(run: Run) -> str:
    """The sha256 of the file that a run's networks were loaded from; with an adapter, of both."""
    digest = sha256(run.directory / run.weights)
    adapter = run.describe_adapter()
    return hashlib.sha256(f"{digest} {adapter}".encode()).hexdigest() if adapter else digest
