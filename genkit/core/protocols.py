"""Interfaces of paths, networks, denoisers, objectives, codecs and data."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from genkit.core.batch import Batch, Draw
from genkit.core.conditions import Cond, Spec

Direction = Literal["lower", "higher"]  # which values of a metric are better


class Prediction:
    """A denoiser's estimate of both endpoints, ``[B, *S]`` each, of the path ``x = alpha(t) x0 + sigma(t) x1``."""

    x0: Tensor
    x1: Tensor

    def __init__(self, x0: Tensor, x1: Tensor):
        self.x0, self.x1 = x0, x1

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x0, self.x1))

    def at(self, alpha: float, sigma: float) -> Tensor:
        """``alpha x0 + sigma x1``: the point of the path at another time, given its coefficients."""
        return torch.add(alpha * self.x0, self.x1, alpha=sigma)

    @property
    def velocity(self) -> Tensor:
        """``x1 - x0``, the velocity in the chart."""
        return self.at(-1.0, 1.0)


class Loss(NamedTuple):
    """``per_sample`` ``[B]`` is minimised (its weighted mean); ``logs`` are scalars for the log."""

    per_sample: Tensor
    logs: dict[str, Tensor]
    choice: Tensor | None = None
    """the part of ``per_sample`` that is the cross-entropy of a choice, in nats ``[B]``, and no mean over the entries
    of a sample; None: there is none"""


@dataclass(frozen=True)
class Phase:
    """One optimizer step: the networks it trains, its repeats, and the interval in training steps (``every``)."""

    name: str
    trains: tuple[str, ...]
    repeats: int = 1
    every: int = 1


class ProbabilityPath(Protocol):
    """A noise schedule: the coefficients in ``x = alpha(t) x0 + sigma(t) x1``, functions of time ``[B] -> [B]``."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...


class Parametrization(Protocol):
    """The meaning of a network's input, output and regression target."""

    divides_by_alpha: ClassVar[bool]
    """Whether the output says nothing about the data at alpha = 0."""
    predicts_noise: ClassVar[bool]
    """Whether the data follow from the output by ``x0 = (x - sigma x1) / alpha``, with its error amplified."""

    def inputs(self, path: ProbabilityPath, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input: ``(x_in [B, *S], time label [B])``."""
        ...

    def target(self, path: ProbabilityPath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """The regression target ``[B, *S]``."""
        ...

    def predict(self, path: ProbabilityPath, x: Tensor, t: Tensor, out: Tensor) -> Prediction:
        """Both endpoints, from the network's output ``out`` ``[B, *S]``."""
        ...


class Denoiser(Protocol):
    """``(x, t, cond)`` to :class:`Prediction`, on a path; all that samplers and guidance use of a model."""

    @property
    def path(self) -> ProbabilityPath: ...
    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction: ...


Noise = Callable[[Sequence[int]], Tensor]  # shape of one sample -> [B, *shape]: new normals from each sample's own seed
Guidance = Callable[[Denoiser], Denoiser]
Sampler = Callable[..., Tensor]  # (denoise, x, times, cond, *, noise, callback) -> x


class Generator(Protocol):
    """``(z, cond) -> x``: a sampler bound to a denoiser, a GAN's generator, or a VAE's decoder.

    ``noise`` supplies the further random numbers of stochastic samplers; one-pass models ignore it.
    """

    def __call__(self, z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor: ...


class Backbone:
    """A family of networks: a frozen dataclass of hyperparameters that makes up to three networks of the same blocks.

    Class attributes declare what the family can do, and tests check it. Two fields are optional, and have the
    same meaning in every family: ``dropout``, a probability in [0, 1), acts in training only and is 0 by default;
    ``checkpoint`` recomputes activations in the backward pass and is off by default.

    A method raises ``ValueError`` if the family cannot serve the spec (a U-Net asked for vectors, say).
    """

    cuts: ClassVar[tuple[str, ...]] = ()
    """The networks that it makes: those of denoiser, encoder and decoder that a class defines, unless it says so."""
    routes: ClassVar[tuple[str, ...]] = ("global", "channels", "tokens")
    """How it takes conditions: "global", added to the embedding that modulates every block (Label, Vector, Frames);
    "channels", concatenated to the sample (Image); "tokens", by cross-attention, or averaged (Tokens, Text)."""
    axes: ClassVar[tuple[int, ...]] = (1, 2)
    """The allowed numbers of axes after the first: 0 for vectors, 1 for signals, 2 for images."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Published networks: the settings that the name in a field ``preset`` stands for, where none are given."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "cuts" not in vars(cls):
            names = ("denoiser", "encoder", "decoder")
            cls.cuts = tuple(name for name in names if getattr(cls, name) is not getattr(Backbone, name))

    def denoiser(self, spec: Spec) -> nn.Module:
        """A network ``(x [B, *S], time label [B], cond) -> [B, *S]``.

        One that has a ``feature_dim`` hands out the features in which it sees a sample, ``[B, feature_dim]``, in place
        of its output if it is called with ``features=True``.
        """
        raise self._missing("denoiser")

    def encoder(self, spec: Spec, out: tuple[int, ...]) -> nn.Module:
        """A network ``(x [B, *S], cond) -> [B, *out]``, out = (D,) or (C, h, w)."""
        raise self._missing("encoder")

    def decoder(self, spec: Spec, inp: tuple[int, ...]) -> nn.Module:
        """A network ``(z [B, *inp], cond) -> [B, *S]``."""
        raise self._missing("decoder")

    def notes(self, spec: Spec) -> Sequence[str]:
        """Remarks for the first lines of training, such as settings that have no effect on samples of this shape."""
        return ()

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """Scales of guidance that its networks take as an input, if they were pretrained with one."""
        return None

    def _missing(self, cut: str) -> ValueError:
        name = type(self).__name__
        return ValueError(f"{name}: has no {cut}, only {', '.join(self.cuts)}; choose another --backbone, say unet")


class Objective(ABC):
    """What is learned, and how samples are drawn: a frozen dataclass of configuration, without weights."""

    sampler: ClassVar[str | None]
    """name of the default sampler; None for a one-pass model, which needs none"""
    is_generative: ClassVar[bool] = True
    """whether it draws samples; a classifier, which guides other models, does not"""
    likelihood_method: ClassVar[str | None] = None
    """how ``genkit likelihood`` scores samples: "ode" along the flow, "iwae" for :class:`HasELBO`; None: it cannot"""
    usage: ClassVar[str] = "genkit sample {run}{label} --n 16"
    """the command that uses a trained run, or two, in which ``{run}`` is its directory, ``{runs}`` the one above,
    ``{label}`` the options that ask for a class and a caption, and ``{path}`` the name of the objective's path"""
    rows_interact: ClassVar[bool] = False
    """whether a sample's loss depends on the others of its micro-batch, and so on how a batch is split"""
    replaces_weights: ClassVar[bool] = False
    """whether :meth:`after_step` puts other weights into a network that is trained, which an optimizer with an average
    of its own (schedule-free) would not learn of"""
    needs_whole_networks: ClassVar[bool] = False
    """whether its loss differentiates a gradient, or reads a weight outside of a pass: sharded networks then stay whole
    from the first pass of a step to its last"""
    policy_sampler: ClassVar[str] = "ddim"
    """sampler of a policy's actions, unless another is asked for: one evaluation a step"""
    policy_steps: ClassVar[int] = 4
    """sampler steps for each chunk of a policy's actions, unless another number is asked for"""
    default_settings: ClassVar[Mapping[str, Any]] = {}
    """training settings that replace the usual defaults (:class:`genkit.training.settings.TrainSettings`)"""
    open_settings: ClassVar[tuple[str, ...]] = ()
    """fields that :meth:`decide` sets if they are None; a run's config.yaml has what was decided"""
    starts_from: ClassVar[Mapping[str, str | None]] = {}
    """networks that begin as a copy of another one of the run that training starts from (``--init``), or as new ones
    (None); an objective that names any learns from such a run, and needs it"""
    validation_metrics: ClassVar[Mapping[str, Direction]] = {"loss": "lower"}
    """the numbers that :meth:`validate` returns, and which values are better; {} if no loss means anything on held-out
    samples"""

    @property
    @abstractmethod
    def phases(self) -> Sequence[Phase]:
        """The optimizer steps that make up a training step, in order."""

    @property
    def generator_phase(self) -> str:
        """Name of the phase that trains the networks which samples are drawn from."""
        return self.phases[0].name

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """Scales of guidance that the network takes as an input, so that one pass does; None: guidance takes two."""
        return None

    @abstractmethod
    def networks(self, backbone: Backbone, spec: Spec) -> dict[str, nn.Module]:
        """New networks by name. ``ValueError`` if they cannot serve the spec."""

    def setup(self, spec: Spec) -> None:  # noqa: B027  # most need nothing
        """Called before training. ``ValueError`` if something that only training needs, such as a file, is missing."""

    def decide(self, data_std: Callable[[], float], data_radius: Callable[[], float] = lambda: math.inf) -> Objective:
        """This objective with its ``open_settings`` decided, when a run begins.

        ``data_std()`` measures the standard deviation of the training data in the model's units, ``data_radius()`` the
        largest root mean square of one sample (infinite: not known).
        """
        return self

    def notes(self) -> Sequence[str]:
        """Remarks for the first lines of training: settings that are allowed, but rarely meant."""
        return ()

    def check(self, nets: Mapping[str, nn.Module]) -> None:  # noqa: B027  # most need nothing
        """Called on the networks before the first step. ``ValueError`` if this objective cannot train them."""

    @abstractmethod
    def loss(self, phase: str, nets: Mapping[str, nn.Module], batch: Batch) -> Loss:
        """The loss of one phase. Random numbers come from ``batch`` only."""

    @property
    def chosen_condition(self) -> str | None:
        """The condition that the generator chooses a value of before its first step, unless it is given; None: none."""
        return None

    def choice_log_probs(self, nets: Mapping[str, nn.Module], cond: Cond, like: Tensor) -> Tensor:
        """Log-probabilities ``[B, A]`` of the A values of the :attr:`chosen_condition`, given the other conditions, for
        as many rows as ``like`` [B, *S] has, on its device."""
        raise NotImplementedError

    def validate(self, nets: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        """The ``validation_metrics`` of held-out samples, ``[B]`` each, without a gradient and with nets in evaluation
        mode.

        They are those of the end of training (``batch.step`` is None), and a fixed function of the networks, the
        samples and the batch's random numbers: nothing in them depends on how far training is, and nothing is changed.
        """
        return {"loss": self.loss(self.phases[0].name, nets, batch).per_sample}

    def level_errors(self, nets: Mapping[str, nn.Module], batch: Batch, levels: Sequence[float]) -> Tensor:
        """The mean squared error ``[K, B]`` of the predicted velocity ``x1 - x0`` at K noise ``levels``
        sigma / (alpha + sigma), with all conditions.

        On the chart this is one quantity for all paths and predictions, whatever the times, weights and spaces of their
        losses, so models can be compared by it. ``ValueError`` for an objective without a path.
        """
        raise ValueError(f"val_levels: {type(self).__name__} has no noise levels; leave --val-levels out")

    def preservation_loss(
        self, nets: Mapping[str, nn.Module], batch: Batch, original: Callable[[], AbstractContextManager[Any]]
    ) -> Tensor:
        """How far the networks are from what they are in the context ``original()``, ``[B]``.

        ``ValueError`` for an objective that does not say.
        """
        raise ValueError(f"prior.preserve: {type(self).__name__} has no prediction to preserve; leave it out")

    @abstractmethod
    def generator(
        self, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator] | None = None
    ) -> Generator:
        """The generator of these networks. ``ValueError`` if ``sampling`` is missing, or would have no effect."""

    @property
    def weighs_places(self) -> bool:
        """Whether its loss weighs the places of a sample by ``Batch.place_weight``."""
        return False

    @property
    def knows_null(self) -> bool:
        """Whether the learned null embedding of conditions means something, as far as the objective can tell."""
        return True

    @property
    def reference_runs(self) -> Mapping[str, str]:
        """Runs besides ``--init`` whose predictions it learns from, by the setting that names them. Training refuses
        those of other samples."""
        return {}

    @property
    def needs_pairs(self) -> bool:
        """Whether it learns from pairs (source, sample), ``Batch.x1``, which only some data provide."""
        return False

    def refuse_init(self, other: Objective) -> None:  # noqa: B027  # most take any weights that fit
        """Called before training starts from weights that ``other`` trained. ``ValueError`` if they mean another thing
        here, although they fit."""

    def reconstruct(self, nets: Mapping[str, nn.Module], batch: Batch) -> Tensor | None:
        """``batch.x`` encoded and decoded again, ``[B, *S]``; None for a model without an encoder."""
        return None

    def noise_shape(self, spec: Spec) -> tuple[int, ...]:
        """The shape of one ``z`` that the generator starts from: a sample's own, or that of a latent."""
        return spec.shape

    def after_step(self, nets: Mapping[str, nn.Module], step: int) -> None:  # noqa: B027  # most need nothing
        """Called on every rank after training step ``step``, before the averaged weights are updated.

        Update here what changes without a gradient, such as the running means of a codebook. The loss only accumulates
        into buffers, so that the result does not depend on how a batch is split into micro-batches and ranks.
        """

    def warning(self, record: Mapping[str, Any]) -> str | None:
        """A one-line warning about a line of the log, such as a collapsed posterior; None if all is well."""
        return None


class ELBO(NamedTuple):
    """Lower bounds of ``log p(x)`` (given the conditions) in nats per sample, float64 ``[B]``."""

    elbo: Tensor
    iwae: Tensor


class HasELBO(Protocol):
    """An objective with a latent variable, whose likelihood is bounded by sampling it."""

    @property
    def is_discrete(self) -> bool:
        """Whether the bounds are of probabilities of pixels rather than of a density."""
        ...

    def bounds(self, nets: Mapping[str, nn.Module], batch: Batch, samples: int) -> ELBO:
        """The bounds with ``samples`` latents per sample."""
        ...


class Codec(Protocol):
    """Converts between the data's samples (uint8 pixels, actions in metres) and the model's units, of order one."""

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
