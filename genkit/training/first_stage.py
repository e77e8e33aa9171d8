"""First stages of latent diffusion (Rombach et al. 2022): a codec between samples and the latents that a model learns.

The weights of the first stage are copied into the folder of each run (and each cache) that uses them: once, not into
every checkpoint, and not by reference, so that the folder still works when the first stage is gone. Everything else
about it, with the SHA-256 of the weights, is in each ``state.json``.

    codec/first-stage.safetensors
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from genkit import config
from genkit.config import load_object, table
from genkit.config.trust import require_trust
from genkit.core import Backbone, Batch, Codec, Data, Draw, Objective, Spec, spec_from_dict, spec_to_dict
from genkit.core.files import atomic_write, refuse_foreign
from genkit.core.tensors import load_tensors, sha256, to_tensors
from genkit.data import codecs
from genkit.data.captions import Captions
from genkit.data.codecs import LearnedCodec, Standardize
from genkit.objectives.autoencoders.autoencoder import EncoderDecoder, Posterior
from genkit.objectives.autoencoders.vq import straight_through
from genkit.training.directory import find_run

WEIGHTS = "first-stage.safetensors"
PosteriorUse = Literal["draw", "mean"]
CHUNK_NUMBERS = 2**23  # of the samples that are encoded or decoded at once: 42 colour images of 256 x 256


# ------------------------------------------------------------------------------------------------- the first stage
class FirstStage(ABC):
    """Frozen networks between samples ``[B, *shape]`` and latents ``[B, *latent]``."""

    name: str
    """path or name, for messages"""
    shape: tuple[int, ...]
    latent: tuple[int, ...]
    nets: Mapping[str, nn.Module]

    @property
    def own_scaling(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of each channel that networks pretrained on these latents expect, if known."""
        return None

    @abstractmethod
    def posterior(self, batch: Batch) -> Posterior:
        """Return the posterior of the latents of raw samples."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Return the samples that latents ``[B, *latent]`` stand for."""

    @abstractmethod
    def decode_smoothly(self, z: Tensor) -> Tensor:
        """Return the same with a gradient, pictures in [0, 1] without rounding."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return everything but the weights, ready for JSON; ``kind`` selects the class in :func:`stage_class`."""

    @staticmethod
    @abstractmethod
    def from_dict(stored: Mapping[str, Any]) -> FirstStage:
        """Create the stage that :meth:`to_dict` describes, with untrained weights."""

    @cached_property
    def content(self) -> bytes:
        """The weights as a safetensors file."""
        return safetensors.torch.save(to_tensors(self.nets))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    def write(self, folder: Path) -> None:
        """Write a copy of the weights into ``folder``. ``ValueError`` if a file of other content has its name."""
        if (folder / WEIGHTS).exists():
            if (folder / WEIGHTS).is_file() and sha256(folder / WEIGHTS) == self.sha256:
                return
            refuse_foreign(folder / WEIGHTS)
        with atomic_write(folder / WEIGHTS) as part:
            part.write_bytes(self.content)

    def to(self, device: torch.device) -> FirstStage:
        """Move the networks to ``device``, in evaluation mode and without gradients."""
        for net in self.nets.values():
            net.to(device).eval().requires_grad_(False)
        return self


def chunk_size(shape: tuple[int, ...]) -> int:
    """The number of samples of ``shape`` that a first stage encodes or decodes at once."""
    return max(1, CHUNK_NUMBERS // math.prod(shape))


def encode_in_chunks(encode: Callable[[Tensor], Posterior], x: Tensor) -> Posterior:
    """``encode(x)``, ``CHUNK_NUMBERS`` of the numbers of ``x`` ``[B, *S]`` at a time."""
    parts = [encode(rows) for rows in x.split(chunk_size(tuple(x.shape[1:])))]
    return Posterior(*(torch.cat(part) for part in zip(*parts, strict=True)))


class ForeignStage(FirstStage):
    """A first stage in another library's format, an entry of ``FOREIGN_STAGES``: ``--codec KIND:LOCATION``."""

    @staticmethod
    @abstractmethod
    def open(location: str, shape: tuple[int, ...], device: torch.device) -> ForeignStage:
        """Open the stage at ``location`` for samples of ``shape``. Raises ``ValueError`` if none fits."""


@dataclass(frozen=True)
class Networks:
    """The settings that determine a first stage's networks."""

    objective: Objective = table("genkit.objectives:OBJECTIVES", "vae", kind="genkit.core:Objective")
    backbone: Backbone = table("genkit.backbones:BACKBONES", "unet", kind="genkit.core:Backbone")


class RunStage(FirstStage):
    """A run of ``--objective=vae``, ``ae``, ``vq`` or ``autoencoder``."""

    def __init__(
        self,
        name: str,
        objective: EncoderDecoder,
        backbone: Backbone,
        spec: Spec,
        base: Codec,
        nets: Mapping[str, nn.Module],
    ):
        self.name, self.objective, self.backbone, self.spec, self.base = name, objective, backbone, spec, base
        self.shape, self.latent = spec.shape, objective.latent
        self.nets = {k: nets[k] for k in objective.codec_networks}

    def posterior(self, batch: Batch) -> Posterior:
        encoded = self.base.encode(replace(batch, cond={}))
        return encode_in_chunks(lambda x: self.objective.encode(self.nets, x), self.objective.encoder_input(encoded))

    def decode(self, z: Tensor) -> Tensor:
        return self.base.decode(self.objective.decode(self.nets, self.objective.quantize(self.nets, z)))

    def decode_smoothly(self, z: Tensor) -> Tensor:
        nearest = straight_through(z, self.objective.quantize(self.nets, z))
        return codecs.decode_smoothly(self.base, self.objective.decode(self.nets, nearest))

    def to_dict(self) -> dict[str, Any]:
        networks = config.dump(Networks(self.objective, self.backbone))
        base = {"spec": spec_to_dict(self.spec), "codec": codecs.to_dict(self.base)}
        return {"kind": "run", "run": self.name, **networks, **base}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> RunStage:
        require_trust(Networks, stored, "codec")
        networks = config.from_dict(Networks, {k: stored[k] for k in ("objective", "backbone")})
        objective, spec = cast(EncoderDecoder, networks.objective), spec_from_dict(stored["spec"])
        nets = objective.networks(networks.backbone, spec)
        return RunStage(stored["run"], objective, networks.backbone, spec, codecs.from_dict(stored["codec"]), nets)


def run_stage(
    name: str, objective: Objective, backbone: Backbone, nets: Mapping[str, nn.Module], spec: Spec, codec: Codec
) -> RunStage:
    """Return a run as a first stage.

    Raises ``ValueError`` if it has no encoder, needs conditions or is itself a latent model.
    """
    if not isinstance(objective, EncoderDecoder):
        kind = type(objective).__name__
        raise ValueError(f"codec: given {name}, a run of {kind}, which has no encoder; train one: --objective=vae")
    if conditions := objective.codec_spec(spec).cond:
        names = ", ".join(conditions)
        raise ValueError(f"codec: given {name}, which decodes only with {names}; train it with --data.labels=false")
    if isinstance(codec, LearnedCodec):
        raise ValueError(f"codec: given {name}, which is itself a model of latents; take a run on the samples")
    return RunStage(name, objective, backbone, spec, codec, nets)


FOREIGN_STAGES = {  # KIND of --codec KIND:LOCATION -> "module:Class" of a higher room, imported on demand
    "diffusers": "genkit.integrations.diffusers_stage:DiffusersStage",
}


def foreign_stage(name: str) -> tuple[type[ForeignStage] | None, str]:
    """Return the class and location of ``--codec KIND:LOCATION``, or ``(None, name)`` for a run directory."""
    kind, colon, location = name.partition(":")
    return (load_object(FOREIGN_STAGES[kind]), location) if colon and kind in FOREIGN_STAGES else (None, name)


def canonical_first_stage(name: str) -> str:
    """``--codec`` as config.yaml stores it: independent of the working directory."""
    foreign, where = foreign_stage(name)
    if not foreign:
        return str(find_run(name))
    folder = Path(where).expanduser()
    return f"{name.removesuffix(where)}{folder.resolve()}" if folder.is_dir() else name


def stage_class(kind: str) -> type[FirstStage]:
    """Return the class of a stored stage."""
    return RunStage if kind == "run" else load_object(FOREIGN_STAGES[kind])


def read_stage(stored: Mapping[str, Any], folder: Path, device: torch.device) -> FirstStage:
    """Read a stage and the weights that :meth:`FirstStage.write` wrote to ``folder``.

    Raises ``ValueError`` if they are missing or not the recorded ones.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; it holds the first stage, which is needed to decode latents")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != stored["sha256"]:
        raise ValueError(f"{path}: is damaged, or of another first stage: its sha256 is not the recorded one")
    stage = stage_class(stored["kind"]).from_dict(stored)
    load_tensors(stage.nets, safetensors.torch.load(content), path)
    return stage.to(device)


def require_fit(stage: FirstStage, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` if the first stage does not encode samples of ``shape``."""
    if tuple(stage.shape) != tuple(shape):
        raise ValueError(f"codec: {stage.name} encodes samples {list(stage.shape)}; the data are {list(shape)}")


# ---------------------------------------------------------------------------------------------------- the codec
class LatentCodec(LearnedCodec):
    """A first stage whose latents are scaled: in every channel to mean 0 and standard deviation 1, as they were
    ``measured``, or by the numbers that the weights of ``--init`` expect."""

    def __init__(
        self,
        stage: FirstStage,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        posterior: PosteriorUse = "draw",
        measured: bool = True,
    ):
        self.measured = measured
        self.stage, self.scaling, self.shape = stage, Standardize(tuple(mean), tuple(std)), stage.shape
        self.posterior: PosteriorUse = posterior

    def encode(self, batch: Batch) -> Batch:
        """Encode to scaled latents: a draw from the posterior with the batch's own random numbers, or its mean."""
        with torch.no_grad():
            return self.encode_posterior(self.stage.posterior(batch), batch)

    def encode_posterior(self, q: Posterior, batch: Batch) -> Batch:
        """Return ``batch`` with scaled latents, float32, from posterior ``q``."""
        q = Posterior(q.mean.float(), q.log_var.float())
        z = q.sample(batch.normal(*q.mean.shape[1:])) if self.posterior == "draw" else q.mean
        return self.scaling.encode(replace(batch, x=z))

    def decode(self, x: Tensor) -> Tensor:
        """Decode latents to samples, ``CHUNK_NUMBERS`` of their numbers at a time."""
        return self.decode_in_chunks(x, self.stage.decode)

    def decode_smoothly(self, x: Tensor) -> Tensor:
        return self.decode_in_chunks(x, self.stage.decode_smoothly)

    def decode_in_chunks(self, x: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a decoder of unscaled latents, ``CHUNK_NUMBERS`` of the samples' numbers at a time."""
        parts = self.scaling.decode(x.float()).split(chunk_size(self.shape))
        samples = torch.cat([decode(z) for z in parts])
        return samples.float() if samples.dtype in (torch.bfloat16, torch.float16) else samples

    def to_dict(self) -> dict[str, Any]:
        stage = {**self.stage.to_dict(), "sha256": self.stage.sha256}
        scaling = {"mean": list(self.scaling.mean), "std": list(self.scaling.std)}
        origin = {} if self.measured else {"measured": False}
        return {"name": "latent", "stage": stage, **scaling, "posterior": self.posterior, **origin}


class CachedLatentCodec(LatentCodec):
    """A latent codec for samples that a cache stores as moments: mean and log variance, concatenated."""

    def encode(self, batch: Batch) -> Batch:
        return self.encode_posterior(Posterior(*batch.x.chunk(2, 1)), batch)


def codec_from_dict(stored: Mapping[str, Any], folder: Path, device: torch.device) -> Codec:
    """Return the codec that ``codecs.to_dict`` describes, with the weights in ``folder`` if it has any."""
    if stored.get("name") != "latent":
        return codecs.from_dict(stored)
    stage = read_stage(stored["stage"], folder, device)
    scaling = tuple(stored["mean"]), tuple(stored["std"])
    return LatentCodec(stage, *scaling, stored["posterior"], stored.get("measured", True))


@dataclass(eq=False)
class LatentData:
    """Data for a latent model: the samples of ``data``, with the codec and the spec of their latents."""

    data: Data
    spec: Spec
    codec: Codec

    def __len__(self) -> int:
        return len(self.data)

    @property
    def captions(self) -> Captions | None:
        """The captions of the samples, if they have any."""
        return getattr(self.data, "captions", None)

    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        return self.data.batch(indices, draw)
