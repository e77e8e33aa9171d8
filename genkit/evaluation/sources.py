"""What can be measured: a run, drawn by seed, or what its code keeps of data; a folder, zip, npz or named data set, by
row; or stored statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from genkit.config import dump
from genkit.core import Data, Denoiser, Draw, Label, Spec, spec_to_dict
from genkit.core.tensors import sha256
from genkit.data import DATA, DataSource, codecs, find_source
from genkit.data.images import Channels, Size
from genkit.data.source import Split
from genkit.diffusion.samplers import CountingDenoiser, Seeds
from genkit.training.run import Run, with_classes
from genkit.training.sampling import Sampling, sample_conditions

SPLITS = ("train", "test")


class Rows(NamedTuple):
    """Some decoded samples, the classes they were asked to have, and what it took to draw them."""

    x: Tensor
    labels: Tensor | None = None
    calls: float = 0.0  # evaluations of the denoiser (NFE), summed over the samples
    passes: float = 0.0  # samples that went through the network: guidance asks it for two in one call


class Samples(Protocol):
    """A source of samples, addressed by row. ``identity`` is what its rows hang on, ready for JSON."""

    @property
    def spec(self) -> Spec: ...
    @property
    def name(self) -> str: ...
    @property
    def limit(self) -> int | None:
        """How many there are; None: as many as one likes."""
        ...

    @property
    def label(self) -> str | None:
        """The condition that is a class, if any."""
        ...

    def identity(self) -> dict[str, Any]: ...
    def rows(self, first: int, last: int, n: int) -> Rows:
        """Samples ``first..last`` of the ``n`` that are measured."""
        ...


def class_of(spec: Spec) -> str | None:
    return next((k for k, kind in spec.cond.items() if isinstance(kind, Label)), None)


# ------------------------------------------------------------------------------------------------ stored samples
@dataclass(frozen=True)
class Named:
    """Where named data sets lie, and how pictures are read."""

    root: str | None = None
    """The folder that cifar10, mnist ... lie in; None: data."""
    size: Size = None
    """None: as found. Otherwise the largest centred crop of this shape, resized to it (H, or H W)."""
    channels: Channels = None
    """None: as found."""


OPTIONS = {"named": Named}


@dataclass(eq=False)
class Given:
    """Samples that exist. Fewer than all are taken evenly from all, so that a folder sorted by class stays balanced."""

    data: Data
    name: str
    config: DataSource
    """of the source, whose training split may be asked for"""
    split: str = "train"
    hashed: str | None = None

    @property
    def spec(self) -> Spec:
        return self.data.spec

    @property
    def limit(self) -> int:
        return len(self.data)

    @property
    def label(self) -> str | None:
        return class_of(self.data.spec)

    def identity(self) -> dict[str, Any]:
        return {"data": self.name, "split": self.split, "sha256": self.hashed or self.hash()}

    def training(self) -> Data:
        """The training split of these samples, for a classifier to learn from."""
        return self.data if self.split == "train" else self.config.load("train")

    def hash(self, progress: Callable[[int], None] = lambda done: None) -> str:
        """sha256 of all samples and their classes. Reads every file, so a damaged one is found before the work."""
        digest = hashlib.sha256(str((tuple(self.spec.shape), len(self.data))).encode())
        for first in range(0, len(self.data), 512):
            batch = self._batch(torch.arange(first, min(first + 512, len(self.data))))
            digest.update(batch.x.contiguous().numpy().tobytes())
            if self.label:
                digest.update(batch.cond[self.label].contiguous().numpy().tobytes())
            progress(min(first + 512, len(self.data)))
        self.hashed = digest.hexdigest()
        return self.hashed

    def _batch(self, indices: Tensor):
        return self.data.batch(indices, Draw((0,), 0, len(indices)))

    def rows(self, first: int, last: int, n: int) -> Rows:
        batch = self._batch(torch.arange(first, last) * len(self.data) // n)
        return Rows(batch.x, batch.cond[self.label] if self.label else None)


def find_data(name: str, options: Named = Named()) -> Given:
    """``cifar10:test``, or the path of a folder, .zip or .npz, also with ``:train`` or ``:test`` behind it."""
    base, _, split = name.rpartition(":")
    base, split = (base, split) if split in SPLITS and base else (name, "train")
    kind, settings = find_source(base)
    given = DATA[kind].applicable({k: v for k, v in vars(options).items() if v is not None})
    if kind == "npz":
        refuse_stats(Path(base).expanduser())
    config = DATA[kind](**{**given, **settings}).unaugmented()
    return Given(config.load(split), base, config, split)


def data_of(run: Run, split: str = "train", options: Named = Named()) -> Given:
    """The data that a run was trained on, without augmentation, wherever ``options`` say that they lie now."""
    config = run.config.data.decoded_source().unaugmented().with_default_conditions()
    if options.root is not None:
        config = config.with_fields(root=options.root)
    name = next((k for k, v in DATA.items() if v is type(config)), type(config).__name__)
    return Given(config.load(cast(Split, split)), name, config, split)


def refuse_stats(path: Path) -> None:
    if is_stats(path):
        raise ValueError(f"{path}: holds statistics (mu, sigma), no samples; it can be a --reference only")


def is_stats(path: Path) -> bool:
    """Whether this is an .npz of ``mu`` and ``sigma``."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {"mu", "sigma"} <= set(stored.files)
    except Exception:  # not a zip, a pickle, truncated: whoever reads it as samples says so in one line
        return False


# ------------------------------------------------------------------------------------------------------- a run
@dataclass(eq=False)
class Drawn:
    """Samples of a model: row i has seed ``seed + i``, and the classes in turn.

    A model that needs more than a class takes the conditions of its training data in turn. ``how`` goes to
    :meth:`genkit.training.run.Run.generator`.
    """

    run: Run
    how: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    weights_sha256: str = ""
    """of the file, or of what the file would be"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """``how`` as a card tells it"""
    conditions: Data | None = None

    def __post_init__(self) -> None:
        if not self.run.objective.is_generative:
            kind = type(self.run.objective).__name__
            raise ValueError(
                f"run: given one of {kind}, which draws no samples; evaluate a generative model; "
                "of a code, what it keeps: --rebuild test"
            )
        if "sampling" not in self.how:
            settings = dict(self.how)
            opened = {role: settings.pop(role) for role in ("weak", "classifier") if role in settings}
            self.how = {"sampling": Sampling(**settings), **opened}
        self.asked: list[CountingDenoiser] = []
        self.classifier: Run | None = self.how.get("classifier")
        mine = self.run.data_spec
        self.spec_asked = self.run.spec if self.classifier is None else with_classes(mine, self.classifier)
        self.generate = self.run.generator(**self.how, inner=None if self.one_pass else self._count)
        if any(not isinstance(kind, Label) for kind in self.spec_asked.cond.values()) and self.conditions is None:
            source = self.run.config.data.unaugmented()
            self.conditions = (source.with_labels() if source.captions_from_labels else source).load("train")
        seen = {} if self.conditions is None else self.conditions.spec.cond
        known = self.spec_asked.cond
        self.classes = {k: kind for k, kind in seen.items() if isinstance(kind, Label) and k not in known}

    @property
    def limit(self) -> None:
        return None

    @property
    def one_pass(self) -> bool:
        return self.run.objective.sampler is None

    def _count(self, denoise: Denoiser) -> Denoiser:
        self.asked.append(CountingDenoiser(denoise))
        return self.asked[-1]

    @property
    def spec(self) -> Spec:
        return replace(self.run.data_spec, cond={**self.run.data_spec.cond, **self.classes})

    @property
    def name(self) -> str:
        return str(self.run.directory)

    @property
    def label(self) -> str | None:
        return class_of(self.spec_asked) or next(iter(self.classes), None)

    def identity(self) -> dict[str, Any]:
        how = {k: told(v) for k, v in self.how.items()}
        codec = codecs.to_dict(self.run.codec)
        return {"weights_sha256": self.weights_sha256, "seed": self.seed, "how": how, "codec": codec,
                "spec": spec_to_dict(self.run.spec), "objective": repr(self.run.objective),
                "backbone": repr(self.run.config.backbone)}  # fmt: skip

    def cond(self, rows: range) -> dict[str, Tensor]:
        if self.conditions is None:
            return {k: v[rows.start :] for k, v in sample_conditions(self.spec_asked, rows.stop).items()}
        batch = self.conditions.batch(torch.tensor(rows) % len(self.conditions), Draw((0,), rows.start, rows.stop))
        return dict(self.conditions.codec.encode(batch).cond)

    def rows(self, first: int, last: int, n: int) -> Rows:
        """``ValueError`` where a sample is not finite."""
        run, rows = self.run, range(first, last)
        noise = Seeds([self.seed + i for i in rows], run.device)
        cond = self.cond(rows)
        self.asked.clear()
        given = {k: v.to(run.device) for k, v in cond.items() if k not in self.classes}
        with torch.no_grad():
            x = self.generate(noise(run.objective.noise_shape(run.spec)), given, noise)
            run.require_finite(x, first)
            x = run.codec.decode(x)
        calls = sum(a.calls for a in self.asked) if self.asked else 1
        passes = sum(a.rows for a in self.asked) if self.asked else len(rows)
        return Rows(x, cond[self.label].cpu() if self.label else None, float(calls * len(rows)), float(passes))


@dataclass(eq=False)
class Rebuilt:
    """Samples of a run's data after the way through its code and back: what a model of its latents could do at best."""

    run: Run
    given: Given
    weights_sha256: str = ""

    @property
    def spec(self) -> Spec:
        return self.given.spec

    @property
    def name(self) -> str:
        return f"{self.run.directory}'s reconstructions"

    @property
    def limit(self) -> int:
        return self.given.limit

    @property
    def label(self) -> str | None:
        return self.given.label

    def identity(self) -> dict[str, Any]:
        run = self.run
        return {"rebuilt": self.given.identity(), "weights_sha256": self.weights_sha256,
                "codec": codecs.to_dict(run.codec), "objective": repr(run.objective),
                "backbone": repr(run.config.backbone)}  # fmt: skip

    def rows(self, first: int, last: int, n: int) -> Rows:
        """``ValueError`` where the run has no code."""
        indices = torch.arange(first, last) * self.limit // n
        batch = self.given.data.batch(indices, Draw((0,), first, last))
        draw = Draw((0, 1), first, last, self.run.device)
        label = batch.cond[self.label].cpu() if self.label else None
        return Rows(self.run.reconstruct(replace(batch.to(self.run.device), draw=draw)), label)


def how_of(samples: Samples) -> dict[str, Any]:
    """How samples came about, for their card: of a run its weights and settings, of data their hash."""
    if isinstance(samples, Rebuilt):
        return {**weights_of(samples.run, samples.weights_sha256), "rebuilt": samples.given.identity()}
    if not isinstance(samples, Drawn):
        return {"samples": samples.identity()}
    run = samples.run
    others = {"autoguide": samples.how.get("weak"), "classifier": samples.how.get("classifier")}
    return {
        **weights_of(run, samples.weights_sha256),
        **samples.settings,
        **{k: told(v) for k, v in others.items()},
        "sampler": samples.how["sampling"].sampler or run.objective.sampler,
        "seed": samples.seed,
    }


def weights_of(run: Run, sha256: str) -> dict[str, Any]:
    """Which weights a card is of."""
    return {
        "run": run.directory.name,
        "step": run.step,
        "ema": Path(run.weights).stem.removeprefix("ema-").replace("nets", "none"),
        "weights": run.weights,
        "weights_sha256": sha256,
    }


def told(value: Any) -> Any:
    """A setting of sampling as JSON holds it; of a second model, its weights."""
    if isinstance(value, Sampling):
        return dump(value)
    if isinstance(value, Run):
        return {"run": value.directory.name, "weights_sha256": weights_sha256(value)}
    return list(value) if isinstance(value, tuple) else value if isinstance(value, (int, str, float, bool)) else (
        None if value is None else repr(value))  # fmt: skip


def weights_sha256(run: Run) -> str:
    """Of the file that the networks came from."""
    return sha256(run.directory / run.weights)


def split_rows(n: int, batch: int, least: int = 16) -> Sequence[range]:
    """Fixed blocks of the rows 0..n: they hang on n and ``batch`` alone, so that any number of ranks draws the same.

    Few samples are cut into ``least`` blocks, so that no rank is left without one.
    """
    size = max(1, min(batch, -(-n // least)))
    return [range(i, min(i + size, n)) for i in range(0, n, size)]
