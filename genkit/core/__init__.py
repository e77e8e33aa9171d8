"""The nouns of genkit. Nothing here computes; everything else speaks these words.

Conventions, for the whole package:

- Time ``t`` is a ``[B]`` tensor in [0, 1]; **t = 0 is data, t = 1 is noise** (the source). Other conventions are
  converted at the border where they come in.
- ``x0`` is data, ``x1`` the source (noise), ``x = alpha(t) x0 + sigma(t) x1`` a point of the path between them,
  ``tau = sigma / (alpha + sigma)`` its chart time, ``z`` a standard normal, ``cond`` the conditions.
- Images are float in [-1, 1] inside, uint8 (or [0, 1]) outside.
- A condition is a named tensor. Some names are reserved: ``cond["mask"]``, Bool ``[B, L]``, says which tokens exist;
  ``cond["keep"]``, Bool ``[B]``, says which *samples* see their conditions at all (False: the learned null), and
  ``cond["keep.NAME"]``, Bool ``[B]``, which of them see this one. A condition that is absent means null.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Cond = Mapping[str, Tensor]
NO_COND: Cond = {}


# --------------------------------------------------------------------------------------------------- data
@dataclass(frozen=True)
class Label:
    """A class index: ``cond[name]`` is Int ``[B]`` in [0, num).

    Where a class stands for a sample (the anchor that a chunk of actions is near), ``centers`` holds those samples, in
    the model's own numbers, one after the other.
    """

    num: int
    names: tuple[str, ...] = ()
    centers: tuple[float, ...] = ()

    def check(self, name: str, value: Tensor, batch: int) -> None:
        if value.shape != (batch,) or value.dtype.is_floating_point:
            raise ValueError(f"cond[{name!r}]: given {tuple(value.shape)} of {value.dtype}; needs [{batch}] integers")
        if batch and (int(value.min()) < 0 or int(value.max()) >= self.num):
            raise ValueError(f"{name}: given {int(value.min())}..{int(value.max())}; allowed 0..{self.num - 1}")


@dataclass(frozen=True)
class Vector:
    """Numbers without a picture's layout (an observation, an embedding): ``cond[name]`` is Float ``[B, *shape]``.

    They are given in the world's units: networks see ``(value - shift) / scale``, with one number for each of the last
    axis, () meaning as they are, and nothing that is further from 0 than ``limit`` (None: any number). Kept here, they
    go wherever the model goes, and nobody can forget them.
    """

    shape: tuple[int, ...]
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    limit: float | None = None

    def check(self, name: str, value: Tensor, batch: int) -> None:
        if value.shape != (batch, *self.shape):
            raise ValueError(f"cond[{name!r}]: given shape {tuple(value.shape)}; needs {(batch, *self.shape)}")


@dataclass(frozen=True)
class Image:
    """A picture of the sample's own size, concatenated to it: ``cond[name]`` is Float ``[B, channels, *size]``."""

    channels: int

    def check(self, name: str, value: Tensor, batch: int) -> None:
        if value.ndim < 3 or value.shape[:2] != (batch, self.channels):
            raise ValueError(f"cond[{name!r}]: given shape {tuple(value.shape)}; needs ({batch}, {self.channels}, ...)")


@dataclass(frozen=True)
class Tokens:
    """A sequence, seen by cross-attention: ``cond[name]`` Float ``[B, L, dim]``; ``cond["mask"]`` Bool ``[B, L]``.

    Where they are words as a frozen ``encoder`` says them (:mod:`genkit.data.text`), it is named here with the
    ``sha256`` of
    its weights, how many tokens it takes, and some captions of the data.
    """

    dim: int
    encoder: str = ""
    sha256: str = ""
    length: int = 0
    examples: tuple[str, ...] = ()

    def check(self, name: str, value: Tensor, batch: int) -> None:
        if value.ndim != 3 or value.shape[0] != batch or value.shape[2] != self.dim:
            raise ValueError(f"cond[{name!r}]: given shape {tuple(value.shape)}; needs ({batch}, length, {self.dim})")


@dataclass(frozen=True)
class Text:
    """Words, read byte by byte: ``cond[name]`` Int ``[B, L]`` with L up to ``length``, each UTF-8 byte plus 1, then 0.

    No byte of UTF-8 is above 244, so uint8 holds them. A row of zeros, the empty text, means null. ``examples`` are
    some captions of the data.
    """

    length: int
    examples: tuple[str, ...] = ()

    def check(self, name: str, value: Tensor, batch: int) -> None:
        if value.ndim != 2 or len(value) != batch or value.dtype.is_floating_point or value.dtype == torch.bool:
            given = f"{tuple(value.shape)} of {value.dtype}"
            raise ValueError(
                f"cond[{name!r}]: given {given}; needs [{batch}, length] integers (genkit.data.text.to_bytes)"
            )
        if value.shape[1] > self.length:
            raise ValueError(f"cond[{name!r}]: given {value.shape[1]} bytes of text; this model reads {self.length}")
        if value.numel() and (int(value.min()) < 0 or int(value.max()) > 256):
            raise ValueError(f"{name}: given {int(value.min())}..{int(value.max())}; allowed 0..256, a byte plus 1")


@dataclass(frozen=True)
class Frames:
    """Pictures of what is going on, the newest last: ``cond[name]`` is uint8 ``[B, *shape]``, shape = (To, C, H, W).

    Their size is their own, not the sample's: an encoder that is trained along makes numbers of them.
    """

    shape: tuple[int, ...]

    def check(self, name: str, value: Tensor, batch: int) -> None:
        if value.shape != (batch, *self.shape) or value.dtype != torch.uint8:
            given = f"{tuple(value.shape)} of {value.dtype}"
            raise ValueError(f"cond[{name!r}]: given {given}; needs {(batch, *self.shape)} of torch.uint8")


Condition = Label | Vector | Image | Tokens | Text | Frames
RESERVED = ("keep", "mask")


def keeps(name: str) -> str | None:
    """The condition that ``cond[name]`` says of who sees it, where ``name`` is ``keep.NAME``."""
    return name[5:] if name.startswith("keep.") else None


@dataclass(frozen=True)
class Spec:
    """What one sample looks like: ``shape`` is ``(D,)``, ``(C, T)`` or ``(C, H, W)``. Data tells, backbones listen."""

    shape: tuple[int, ...]
    cond: Mapping[str, Condition] = field(default_factory=dict)

    def check(self, cond: Cond, batch: int) -> None:
        """Raise ``ValueError`` where ``cond`` does not fit: an unknown name, a wrong shape, a label out of range."""
        for name, value in cond.items():
            if name == "keep" or keeps(name) in self.cond:
                if value.shape != (batch,) or value.dtype != torch.bool:
                    raise ValueError(
                        f"cond[{name!r}]: given {tuple(value.shape)} of {value.dtype}; needs [{batch}] bool"
                    )
            elif name == "mask":
                tokens = [k for k, kind in self.cond.items() if isinstance(kind, Tokens) and k in cond]
                if not tokens:
                    raise ValueError("cond['mask'] is given, but there are no tokens that it could mask")
                if value.shape != cond[tokens[0]].shape[:2] or value.dtype != torch.bool:
                    raise ValueError(
                        f"cond['mask']: given {tuple(value.shape)} of {value.dtype}; "
                        f"needs {list(cond[tokens[0]].shape[:2])} bool"
                    )
            elif name not in self.cond:
                raise ValueError(f"condition {name!r} is unknown here; allowed: {', '.join(self.cond) or 'none'}")
            else:
                self.cond[name].check(name, value, batch)


KINDS: Mapping[str, type] = {"label": Label, "vector": Vector, "image": Image, "tokens": Tokens, "text": Text,
                              "frames": Frames}  # fmt: skip


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """What JSON can hold of a spec; :func:`spec_from_dict` is the inverse."""
    names = {kind: name for name, kind in KINDS.items()}
    return {"shape": list(spec.shape), "cond": {k: {"kind": names[type(v)], **asdict(v)} for k, v in spec.cond.items()}}


def spec_from_dict(d: Mapping[str, Any]) -> Spec:
    def condition(v: Mapping[str, Any]) -> Any:
        values = {k: tuple(x) if isinstance(x, list) else x for k, x in v.items() if k != "kind"}
        return KINDS[v["kind"]](**values)

    return Spec(tuple(d["shape"]), {k: condition(v) for k, v in d["cond"].items()})


class Draw:
    """The random numbers of rows ``start..stop`` of one global batch.

    They depend on ``key`` and on the row alone: two ranks with half the rows each, or four micro-batches, draw what
    one rank with one batch draws. One generator serves ``BLOCK`` rows, so a step costs a few generators, not one a row.
    """

    BLOCK = 16

    def __init__(self, key: Sequence[int], start: int, stop: int, device: torch.device | str = "cpu"):
        self.start, self.stop, self.device = start, stop, torch.device(device)
        self.blocks = range(start // self.BLOCK, -(-stop // self.BLOCK))
        self.generators = [torch.Generator(self.device).manual_seed(seed_of(*key, b)) for b in self.blocks]

    def _rows(self, function: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        drawn = [function(self.BLOCK, *shape, generator=g, device=self.device) for g in self.generators]
        first = self.start - self.blocks.start * self.BLOCK
        return torch.cat(drawn)[first : first + self.stop - self.start]

    def normal(self, *shape: int) -> Tensor:
        """Standard normals, ``[rows, *shape]``."""
        return self._rows(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), ``[rows, *shape]``."""
        return self._rows(torch.rand, shape)


def seed_of(*key: int) -> int:
    """One 63-bit seed from several integers (FNV-1a over their bytes), the same on every machine."""
    h = 0xCBF29CE484222325
    for k in key:
        for byte in (k & (2**64 - 1)).to_bytes(8, "little"):
            h = ((h ^ byte) * 0x100000001B3) & (2**64 - 1)
    return h >> 1


@dataclass(frozen=True)
class Batch:
    """Some samples: ``x`` ``[B, *shape]``, their conditions, optional loss weights ``[B]`` and their random numbers.

    ``draw`` None means fresh numbers from torch's global generator, which is what a person at a prompt wants.
    ``x1`` is the source that belongs to each sample, in the model's own numbers, where the data come in such pairs.
    ``step`` counts the steps of training before this one, for losses that change on the way (a KL term that rises, a
    discriminator that comes late); None, outside training, means as at its end.
    """

    x: Tensor
    cond: Cond = field(default_factory=dict)
    weight: Tensor | None = None
    draw: Draw | None = None
    x1: Tensor | None = None
    step: int | None = None

    def __len__(self) -> int:
        return len(self.x)

    def normal(self, *shape: int) -> Tensor:
        """Standard normals ``[B, *shape]``, device and floating dtype as ``x``; in its shape if none is named."""
        shape = shape or tuple(self.x.shape[1:])
        drawn = self.draw.normal(*shape) if self.draw else torch.randn(len(self), *shape, device=self.x.device)
        return drawn.to(self.x) if self.x.is_floating_point() else drawn

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), ``[B, *shape]``, in the dtype of ``x`` where that is floating."""
        drawn = self.draw.uniform(*shape) if self.draw else torch.rand(len(self), *shape, device=self.x.device)
        return drawn.to(self.x) if self.x.is_floating_point() else drawn

    def drop(self, probability: float, each: float = 0.0) -> Cond:
        """The conditions, dropped for each *sample* with ``probability`` (Ho & Salimans 2022, Algorithm 1).

        Each one is also dropped alone, whatever becomes of the others, with probability ``each``: so that any part of
        them can be given, or guided by (Brooks et al. 2023, section 3.2.1).
        """
        dropped = dict(self.cond)
        if self.cond and probability > 0:
            dropped["keep"] = self.uniform() >= probability
        names = sorted(k for k in self.cond if k not in RESERVED and keeps(k) is None)
        if names and each > 0:
            stay = self.uniform(len(names)) >= each
            dropped |= {f"keep.{name}": stay[:, i] for i, name in enumerate(names)}
        return dropped

    def to(self, device: torch.device | str) -> Batch:
        move = lambda v: v.to(device, non_blocking=True)  # noqa: E731
        return replace(
            self,
            x=move(self.x),
            cond={k: move(v) for k, v in self.cond.items()},
            weight=None if self.weight is None else move(self.weight),
            x1=None if self.x1 is None else move(self.x1),
        )


# ------------------------------------------------------------------------------------------------- models
class Prediction:
    """A denoiser's estimate of both ends of the path through ``x``: ``x = alpha(t) x0 + sigma(t) x1``."""

    x0: Tensor
    x1: Tensor

    def __init__(self, x0: Tensor, x1: Tensor):
        self.x0, self.x1 = x0, x1

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x0, self.x1))

    def mix(self, a: float, b: float) -> Tensor:
        """``a x0 + b x1``: with the coefficients of another time, the point of the path there."""
        return torch.add(a * self.x0, self.x1, alpha=b)

    @property
    def slope(self) -> Tensor:
        """``x1 - x0``, the velocity in the chart."""
        return self.mix(-1.0, 1.0)


class Loss(NamedTuple):
    """``per_sample`` ``[B]`` is what the optimiser sees (its weighted mean); ``logs`` are scalars for the log."""

    per_sample: Tensor
    logs: dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """One optimiser step: which networks it trains, how often a step repeats it, and every how many steps it comes."""

    name: str
    trains: tuple[str, ...]
    repeats: int = 1
    every: int = 1


class Path(Protocol):
    """A noise schedule: two functions of time, ``[B] -> [B]``."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...


class Parametrization(Protocol):
    """What a network's input, output and regression target mean."""

    def inputs(self, path: Path, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees: ``(x_in [B, *S], time label [B])``."""
        ...

    def target(self, path: Path, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor: ...
    def predict(self, path: Path, x: Tensor, t: Tensor, out: Tensor) -> Prediction: ...


class Denoiser(Protocol):
    """Anything with a path that answers ``(x, t, cond) -> Prediction``. Samplers and guidance know nothing more."""

    @property
    def path(self) -> Path: ...
    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction: ...


Noise = Callable[[Sequence[int]], Tensor]  # shape of one sample -> [B, *shape]: fresh normals of each sample's own seed
Guidance = Callable[[Denoiser], Denoiser]
Sampler = Callable[..., Tensor]  # (denoise, x, times, cond, *, noise, callback) -> x


class Generator(Protocol):
    """``(z, cond) -> x``: a sampler bound to a denoiser, a GAN's generator, a VAE's decoder.

    ``noise`` gives the further random numbers of stochastic samplers; one-pass models have no use for it.
    """

    def __call__(self, z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor: ...


class Backbones(ABC):
    """A family of networks: a frozen dataclass of hyperparameters that makes up to three networks of the same blocks.

    Class attributes declare what the family can do, and tests hold it to that. Two fields are optional, and have the
    same meaning in every family: ``dropout``, a probability in [0, 1), acts in training only and is 0 by default;
    ``checkpoint`` recomputes activations in the backward pass and is off by default.

    A method raises ``ValueError`` if the family cannot serve the spec (a U-Net asked for vectors, say).
    """

    cuts: ClassVar[tuple[str, ...]] = ("denoiser", "encoder", "decoder")
    """The networks that it makes."""
    routes: ClassVar[tuple[str, ...]] = ("global", "channels", "tokens")
    """How it takes conditions: "global", added to the embedding that modulates every block (Label, Vector, Frames);
    "channels", concatenated to the sample (Image); "tokens", by cross-attention (Tokens, Text)."""
    axes: ClassVar[tuple[int, ...]] = (1, 2)
    """The numbers of axes after the first that samples may have: 0 for vectors, 1 for signals, 2 for images."""

    @abstractmethod
    def denoiser(self, spec: Spec) -> nn.Module:
        """A network ``(x [B, *S], time label [B], cond) -> [B, *S]``."""

    def encoder(self, spec: Spec, out: tuple[int, ...]) -> nn.Module:
        """A network ``(x [B, *S], cond) -> [B, *out]``, out = (D,) or (C, h, w)."""
        raise self._missing("encoder")

    def decoder(self, spec: Spec, inp: tuple[int, ...]) -> nn.Module:
        """A network ``(z [B, *inp], cond) -> [B, *S]``."""
        raise self._missing("decoder")

    def _missing(self, cut: str) -> ValueError:
        name = type(self).__name__
        return ValueError(f"{name}: has no {cut}, only {', '.join(self.cuts)}; choose another --backbone, say unet")


class Objective(ABC):
    """What is learned, and how a sample is drawn from it. A frozen dataclass: fields are configuration, no weights."""

    sampler: ClassVar[str | None]
    """the name of its usual sampler; None for a one-pass model, which needs none"""
    draws: ClassVar[bool] = True
    """whether it draws samples; a classifier, which guides other models, does not"""
    evidence: ClassVar[str | None] = None
    """how ``genkit likelihood`` scores samples: "ode" along the flow, "iwae" for :class:`Bounded`; None: it cannot"""
    use: ClassVar[str] = "genkit sample {run}{label} --n 16"
    """what a person does with a trained run; ``{label}`` is --label 1 where the data has classes"""
    suits: ClassVar[Mapping[str, Any]] = {}
    """settings of ``genkit.TrainSettings`` that it needs, where a person gives none; of those that follow it"""

    @property
    @abstractmethod
    def phases(self) -> Sequence[Phase]: ...

    @abstractmethod
    def networks(self, backbones: Backbones, spec: Spec) -> dict[str, nn.Module]: ...

    def prepare(self, spec: Spec) -> None:  # noqa: B027  (most need nothing)
        """Called before training. ``ValueError`` where what only training needs, such as a file, is not here."""

    @abstractmethod
    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss: ...

    @abstractmethod
    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        """The generator of these networks. ``ValueError`` where ``sampling`` is missing, or would have no effect."""

    @property
    def paired(self) -> bool:
        """Whether it learns from pairs (source, sample), ``Batch.x1``, which only some data hold."""
        return False

    def reconstruct(self, nets: Mapping[str, nn.Module], batch: Batch) -> Tensor | None:
        """The samples of a batch after the way through a code and back, ``[B, *S]``; None where there is no code."""
        return None

    def noise_shape(self, spec: Spec) -> tuple[int, ...]:
        """The shape of one ``z`` that the generator starts from: a sample's own, or that of a latent."""
        return spec.shape

    def settle(self, nets: Mapping[str, nn.Module], step: int) -> None:  # noqa: B027  (most have nothing to settle)
        """Called on every rank when the optimisers have made step ``step``, before the averages.

        Here is the place of what changes without a gradient, such as the running means of a codebook. The loss only
        gathers (into buffers), so that the answer does not depend on how a batch is cut into micro-batches and ranks.
        """

    def remark(self, record: Mapping[str, Any]) -> str | None:
        """What a person should hear about a line of the log, in one line: that a posterior has collapsed, say."""
        return None


class Bounds(NamedTuple):
    """Lower bounds of ``log p(x)`` (given the conditions) in nats a sample, float64 ``[B]``."""

    elbo: Tensor
    iwae: Tensor


class Bounded(Protocol):
    """An objective with a latent, whose evidence is bounded by draws of it."""

    @property
    def mass(self) -> bool:
        """whether the bounds are of probabilities of pixels, not of a density of continuous numbers"""
        ...

    def bounds(self, nets: Mapping[str, nn.Module], batch: Batch, samples: int) -> Bounds: ...


class Codec(Protocol):
    """Between the world's samples (uint8 pixels, actions in metres) and the model's (numbers of order one)."""

    def encode(self, batch: Batch) -> Batch: ...
    def decode(self, x: Tensor) -> Tensor: ...


class Data(Protocol):
    """Loaded samples, addressed by index."""

    spec: Spec
    codec: Codec

    def __len__(self) -> int: ...
    def batch(self, indices: Tensor, draw: Draw) -> Batch:
        """The samples at ``indices`` ``[B]`` as the codec takes them (uint8 images), augmented by ``draw``."""
        ...


class Evaluator(Protocol):
    def __call__(self, generate: Generator, data: Iterable[Batch]) -> dict[str, float]: ...


# ------------------------------------------------------------------------------------------------- shapes
def expand(v: Tensor, like: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1, ..., 1]`` with as many dimensions as ``like``."""
    return v.reshape(-1, *(1,) * (like.ndim - 1))


def mean_flat(x: Tensor) -> Tensor:
    """The mean over all but the batch dimension, ``[B, *S] -> [B]``."""
    return x.flatten(1).mean(1)
