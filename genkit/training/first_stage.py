"""Latent diffusion's codec: a trained first stage between the world's samples and the latents that a model learns.

Rombach et al. (2022). The weights of the first stage are copied into the folder of each run (and each cache) that uses
them, once, not into every checkpoint, and not by reference: so the folder still works when the first stage's own is
gone. What JSON can hold of it, with the sha256 of the weights, stands in every ``state.json``.

    codec/first-stage.safetensors
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from genkit import config
from genkit.config import table
from genkit.core import Backbone, Batch, Codec, Data, Draw, Objective, Spec, spec_from_dict, spec_to_dict
from genkit.core.files import atomic_write
from genkit.core.tensors import load_tensors, to_tensors
from genkit.data import codecs
from genkit.data.codecs import LearnedCodec, Standardize
from genkit.objectives.autoencoders.autoencoder import EncoderDecoder, Posterior, point_posterior

WEIGHTS = "first-stage.safetensors"
How = Literal["draw", "mean"]


# ------------------------------------------------------------------------------------------------- the first stage
class Stage(ABC):
    """Weights between the world's samples ``[B, *shape]`` and latents ``[B, *latent]``, never trained again."""

    name: str
    """for messages"""
    shape: tuple[int, ...]
    latent: tuple[int, ...]
    nets: Mapping[str, nn.Module]

    @abstractmethod
    def posterior(self, batch: Batch) -> Posterior:
        """Where the world's samples lie in the latent space."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """The world's samples that latents ``[B, *latent]`` stand for."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """All but the weights, ready for JSON; ``kind`` names it in ``STAGES``."""

    @staticmethod
    @abstractmethod
    def rebuild(about: Mapping[str, Any]) -> Stage:
        """The stage of :meth:`about`, without its weights."""

    @cached_property
    def stored(self) -> bytes:
        return safetensors.torch.save(to_tensors(self.nets))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.stored).hexdigest()

    def write(self, folder: Path) -> None:
        """Put a copy of the weights into ``folder``."""
        with atomic_write(folder / WEIGHTS) as part:
            part.write_bytes(self.stored)

    def to(self, device: torch.device) -> Stage:
        for net in self.nets.values():
            net.to(device).eval().requires_grad_(False)
        return self


@dataclass(frozen=True)
class Networks:
    """What a first stage's networks are made of."""

    objective: Objective = table("genkit.objectives:OBJECTIVES", "vae", kind="genkit.core:Objective")
    backbone: Backbone = table("genkit.backbones:BACKBONES", "unet", kind="genkit.core:Backbone")


class OfRun(Stage):
    """A finished run of ``--objective=vae``, ``ae``, ``vq`` or ``autoencoder``."""

    def __init__(
        self, name: str, objective: EncoderDecoder, backbone: Backbone, spec: Spec, base: Codec,
        nets: Mapping[str, nn.Module],
    ):  # fmt: skip
        self.name, self.objective, self.backbone, self.spec, self.base = name, objective, backbone, spec, base
        self.shape, self.latent = spec.shape, objective.latent
        self.nets = {k: nets[k] for k in objective.codec_networks}

    def posterior(self, batch: Batch) -> Posterior:
        seen = self.base.encode(replace(batch, cond={}))
        return self.objective.encode(self.nets, self.objective.encoder_input(seen))

    def decode(self, z: Tensor) -> Tensor:
        return self.base.decode(self.objective.decode(self.nets, self.objective.quantize(self.nets, z)))

    def about(self) -> dict[str, Any]:
        made = config.dump(Networks(self.objective, self.backbone))
        return {"kind": "run", "run": self.name, **made, **{"spec": spec_to_dict(self.spec)},
                "codec": codecs.to_dict(self.base)}  # fmt: skip

    @staticmethod
    def rebuild(about: Mapping[str, Any]) -> OfRun:
        made = config.from_dict(Networks, {k: about[k] for k in ("objective", "backbone")})
        objective, spec = cast(EncoderDecoder, made.objective), spec_from_dict(about["spec"])
        nets = objective.networks(made.backbone, spec)
        return OfRun(about["run"], objective, made.backbone, spec, codecs.from_dict(about["codec"]), nets)


def of_run(
    name: str, objective: Objective, backbone: Backbone, nets: Mapping[str, nn.Module], spec: Spec, codec: Codec
) -> OfRun:
    """The first stage that a run is. ``ValueError`` where it is none."""
    if not isinstance(objective, EncoderDecoder):
        kind = type(objective).__name__
        raise ValueError(f"codec: given {name}, a run of {kind}, which has no encoder; train one: --objective=vae")
    if told := objective.codec_spec(spec).cond:
        known = ", ".join(told)
        raise ValueError(f"codec: given {name}, which decodes only with {known}; train it with --data.labels=false")
    if isinstance(codec, LearnedCodec):
        raise ValueError(f"codec: given {name}, which is itself a model of latents; take a run on the samples")
    return OfRun(name, objective, backbone, spec, codec, nets)


class OfDiffusers(Stage):
    """An autoencoder that diffusers saved, for pictures of one ``shape``. Its ``scaling_factor`` is not used: mean and
    deviation are measured."""

    def __init__(self, name: str, kind: str, settings: Mapping[str, Any], shape: tuple[int, ...], net: nn.Module):
        self.name, self.kind, self.settings, self.shape = name, kind, dict(settings), tuple(shape)
        self.nets = {"net": net.eval()}
        with torch.no_grad():
            blank = torch.zeros(1, *shape, device=next(net.parameters()).device)
            mean = self.moments(blank).mean
            back = net.decode(mean).sample  # type: ignore[operator]
        if back.shape != blank.shape:
            raise ValueError(f"codec: {name} makes {list(back.shape[1:])} of pictures {list(shape)}; "
                             "choose a size that it halves evenly, with --data.size")  # fmt: skip
        self.latent = tuple(mean.shape[1:])

    def moments(self, x: Tensor) -> Posterior:
        out: Any = self.nets["net"].encode(x)  # type: ignore[operator]
        return SPREAD[self.kind](out)

    def posterior(self, batch: Batch) -> Posterior:
        return self.moments(codecs.Pixels().encode(batch).x)

    def decode(self, z: Tensor) -> Tensor:
        return codecs.Pixels().decode(self.nets["net"].decode(z).sample)  # type: ignore[operator]

    def about(self) -> dict[str, Any]:
        return {"kind": "diffusers", "run": self.name, "class": self.kind, "config": self.settings,
                "shape": list(self.shape)}  # fmt: skip

    @staticmethod
    def rebuild(about: Mapping[str, Any]) -> OfDiffusers:
        net = diffusers_class(about["class"], about["run"]).from_config(about["config"])
        return OfDiffusers(about["run"], about["class"], about["config"], tuple(about["shape"]), net)

    @staticmethod
    def open(where: str, shape: tuple[int, ...], device: torch.device) -> OfDiffusers:
        """The model in a local folder, or in the folder ``vae`` of a pipeline. ``ValueError`` where there is none."""
        folder = Path(where).expanduser()
        folder = folder / "vae" if (folder / "model_index.json").is_file() else folder
        if not (folder / "config.json").is_file():
            raise ValueError(f"codec: diffusers:{where} holds no config.json; needs a local folder of save_pretrained")
        settings = json.loads((folder / "config.json").read_text())
        kind = settings.get("_class_name", "")
        model = diffusers_class(kind, str(folder))
        settings = {k: v for k, v in settings.items() if not k.startswith("_")}
        channels = settings.get("in_channels", 3)
        if len(shape) != 3 or shape[0] != channels:
            raise ValueError(f"codec: {folder} is for pictures of {channels} channels; the data are {list(shape)}; "
                             f"grey and colour are changed by --data.channels={channels}")  # fmt: skip
        try:
            net = model.from_pretrained(folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False)
        except (OSError, ValueError, RuntimeError) as e:
            raise ValueError(f"codec: {folder} cannot be read: {' '.join(str(e).split())[:200]}") from e
        return OfDiffusers(str(folder), kind, settings, shape, net.float().to(device))


SPREAD: Mapping[str, Callable[[Any], Posterior]] = {  # what diffusers' encoders answer
    "AutoencoderKL": lambda out: Posterior(out.latent_dist.mean, out.latent_dist.logvar),
    "AutoencoderTiny": lambda out: point_posterior(out.latents),
    "VQModel": lambda out: point_posterior(out.latents),
}


def diffusers_class(kind: str, where: str) -> Any:
    if kind not in SPREAD:
        raise ValueError(f"codec: {where} holds a {kind or 'model without a class'}; allowed: {', '.join(SPREAD)}")
    import diffusers  # takes seconds

    return getattr(diffusers, kind)


STAGES: dict[str, type[Stage]] = {"run": OfRun, "diffusers": OfDiffusers}
Opener = Callable[[str, tuple[int, ...], torch.device], Stage]
OPEN: dict[str, Opener] = {"diffusers": OfDiffusers.open}  # kinds of --codec KIND:WHERE, besides a run's folder


def read_stage(about: Mapping[str, Any], folder: Path, device: torch.device) -> Stage:
    """The stage that :meth:`Stage.write` put into ``folder``. ``ValueError`` where it is absent or another."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; it holds the first stage, without which nothing is decoded")
    stored = path.read_bytes()
    if hashlib.sha256(stored).hexdigest() != about["sha256"]:
        raise ValueError(f"{path}: is damaged or another first stage's (another sha256 than recorded)")
    stage = STAGES[about["kind"]].rebuild(about)
    load_tensors(stage.nets, safetensors.torch.load(stored), path)
    return stage.to(device)


# ---------------------------------------------------------------------------------------------------- the codec
class Latent(LearnedCodec):
    """A first stage, and latents of mean 0 and deviation 1 in every channel."""

    def __init__(self, stage: Stage, mean: tuple[float, ...], std: tuple[float, ...], posterior: How = "draw"):
        self.stage, self.scaling, self.shape = stage, Standardize(tuple(mean), tuple(std)), stage.shape
        self.posterior: How = posterior

    def encode(self, batch: Batch) -> Batch:
        """The posterior's draw, by the batch's own random numbers, or its mean; normalised."""
        with torch.no_grad():
            return self.drawn(self.stage.posterior(batch), batch)

    def drawn(self, q: Posterior, batch: Batch) -> Batch:
        z = q.sample(batch.normal(*q.mean.shape[1:])) if self.posterior == "draw" else q.mean
        return self.scaling.encode(replace(batch, x=z))

    def decode(self, x: Tensor) -> Tensor:
        return self.stage.decode(self.scaling.decode(x.float()))

    def to_dict(self) -> dict[str, Any]:
        scaling = {"mean": list(self.scaling.mean), "std": list(self.scaling.std)}
        return {"name": "latent", "stage": {**self.stage.about(), "sha256": self.stage.sha256}, **scaling,
                "posterior": self.posterior}  # fmt: skip


class OfCache(Latent):
    """The same, for samples that a cache holds as moments: mean and log variance, one after the other."""

    def encode(self, batch: Batch) -> Batch:
        return self.drawn(Posterior(*batch.x.chunk(2, 1)), batch)


def from_dict(stored: Mapping[str, Any], folder: Path, device: torch.device) -> Codec:
    """The codec of ``codecs.to_dict``, with the weights in ``folder`` where it has some."""
    if stored.get("name") != "latent":
        return codecs.from_dict(stored)
    stage = read_stage(stored["stage"], folder, device)
    return Latent(stage, tuple(stored["mean"]), tuple(stored["std"]), stored["posterior"])


@dataclass(eq=False)
class Encoded:
    """Data as a model of latents sees them: the samples of ``data``, with the codec and the shape of latents."""

    data: Data
    spec: Spec
    codec: Codec

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        return self.data.batch(indices, draw)


# ---------------------------------------------------------------------------------------------------- statistics
class Statistics(NamedTuple):
    """Of ``n`` numbers in each of C channels: the mean of the posteriors' means, their variance, and the mean of the
    posteriors' own variances; float64 ``[C]``. Of draws the variance is the sum of both."""

    n: float
    mean: Tensor
    between: Tensor
    within: Tensor

    def std(self, posterior: How) -> Tensor:
        return (self.between + self.within if posterior == "draw" else self.between).sqrt()

    def to_dict(self) -> dict[str, Any]:
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in self._asdict().items()}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Statistics:
        tensor = lambda k: torch.tensor(stored[k], dtype=torch.float64)  # noqa: E731
        return Statistics(stored["n"], tensor("mean"), tensor("between"), tensor("within"))


def statistics(posteriors: Iterable[Posterior]) -> Statistics:
    """Of all latents, in one pass: means and variances of the parts are merged (Chan et al. 1979, eq. 2.1)."""
    total: Statistics | None = None
    for q in posteriors:
        mean, var = (v.double().movedim(1, 0).flatten(1).cpu() for v in (q.mean, q.log_var.exp()))
        here = Statistics(mean.shape[1], mean.mean(1), mean.var(1, correction=0), var.mean(1))
        total = here if total is None else merged(total, here)
    if total is None:
        raise ValueError("codec: there are no samples to measure the latents of")
    return total


def merged(a: Statistics, b: Statistics) -> Statistics:
    n = a.n + b.n
    share = b.n / n
    mix = lambda x, y: x + (y - x) * share  # noqa: E731
    between = mix(a.between, b.between) + (b.mean - a.mean) ** 2 * share * (1 - share)
    return Statistics(n, mix(a.mean, b.mean), between, mix(a.within, b.within))


def measure(
    stage: Stage,
    data: Data,
    device: torch.device,
    most: int = 10_000,
    batch: int = 256,
    progress: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Of the latents of ``data``, evenly taken where there are more than ``most``, as the first stage sees them."""
    n = min(most, len(data))

    def each() -> Iterable[Posterior]:
        for first in range(0, n, batch):
            rows = range(first, min(first + batch, n))
            yield posterior_of(stage, data, torch.tensor(rows) * len(data) // n, rows, device)
            progress(rows.stop)

    return statistics(each())


def posterior_of(stage: Stage, data: Data, indices: Tensor, rows: range, device: torch.device) -> Posterior:
    """Of the samples at ``indices``, with the random numbers of ``rows``, where the first stage needs some."""
    batch = data.batch(indices, Draw((0, 1), rows.start, rows.stop)).to(device)
    with torch.no_grad():
        return stage.posterior(replace(batch, draw=Draw((0,), rows.start, rows.stop, device)))


def require_fit(stage: Stage, shape: tuple[int, ...]) -> None:
    """``ValueError`` where the samples are not those that the first stage is for."""
    if tuple(stage.shape) != tuple(shape):
        raise ValueError(f"codec: {stage.name} encodes samples {list(stage.shape)}; the data are {list(shape)}")
