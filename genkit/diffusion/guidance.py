"""Guidance: functions that turn a denoiser into another one. Samplers need not know.

Guidance moves the predicted data; the predicted noise follows, so that ``x = alpha x0 + sigma x1`` stays true
(:func:`shift_data`). One scale extrapolates from a worse estimate to a better one. A :class:`Rule` says how (linear,
rescaled, projected), and a pair of denoisers says from what to what: from the null condition
(:func:`classifier_free`) or from a weaker model (:func:`autoguidance`). :func:`within` limits any guidance to an
interval of noise, and :func:`compose` chains several.

A guided denoiser may have state (APG's momentum), so it serves one trajectory; ``bind`` makes a new one for each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Protocol

import torch
from annotated_types import Gt, Le, Lt
from torch import Tensor

from genkit.config.numbers import NonNegative
from genkit.core import SCALE_INPUT, Cond, Denoiser, Guidance, Prediction, ProbabilityPath, expand
from genkit.diffusion.checks import require, require_finite
from genkit.diffusion.paths import coefficients, repeated, require_diffusion, whole_path, within_path
from genkit.diffusion.posterior import replace_endpoints, take

DenoiserPair = Callable[[Tensor, Tensor, Cond], tuple[Prediction, Prediction]]  # (x, t, cond) -> (better, worse)


def shift_data(p: Prediction, path: ProbabilityPath, t: Tensor, shift: Tensor) -> Prediction:
    """The prediction with its data moved by ``shift`` and its noise by ``-alpha / sigma shift``, so that x stays."""
    ratio = expand(path.alpha(t) / path.sigma(t), shift)
    return replace_endpoints(p, p.x0 + shift, p.x1 - ratio * shift)


def compose(*guidances: Guidance) -> Guidance:
    """Several guidances, applied in this order: the first is nearest to the network."""
    return lambda denoise: reduce(lambda d, guidance: guidance(d), guidances, denoise)


# ---------------------------------------------------------------------------------------------------- rules
class Rule(ABC):
    """How to extrapolate from a worse estimate of the data through a better one; ``scale`` 1 gives the better one."""

    @abstractmethod
    def __call__(self, good: Tensor, bad: Tensor, scale: float, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The guided x0 ``[B, *S]``, and the ``past`` that the next evaluation of this trajectory gets."""


@dataclass(frozen=True)
class Extrapolate(Rule):
    """``bad + scale (good - bad)`` (Ho & Salimans 2022, eq. 6, with scale = 1 + w)."""

    def __call__(self, good: Tensor, bad: Tensor, scale: float, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.lerp(bad, good, scale), None


@dataclass(frozen=True)
class Rescale(Rule):
    """Linear extrapolation, then each sample's standard deviation is restored (Lin et al. 2024, section 3.4).

    It is the standard deviation of the predicted data, so the rule is the same for every parametrisation and path.
    """

    phi: Annotated[float, Gt(0), Le(1)] = 0.7
    """fraction of the change in standard deviation that is undone; 0.7 is the paper's choice"""

    def __post_init__(self) -> None:
        require("phi", self.phi, "above 0, up to 1", 0 < self.phi <= 1)

    def __call__(self, good: Tensor, bad: Tensor, scale: float, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if good[0].numel() < 2:
            raise ValueError("rescale: a sample of one number has no standard deviation; take the rule linear or apg")
        x0 = torch.lerp(bad, good, scale)
        before, after = (y.flatten(1).std(1, correction=0) for y in (good, x0))
        ratio = torch.where(after > 0, before / after, torch.ones_like(after))
        return x0 * expand(1 + self.phi * (ratio - 1), x0), None


@dataclass(frozen=True)
class APG(Rule):
    """Adaptive projected guidance (Sadat et al. 2025, algorithm 1): ``good + (scale - 1) D``.

    D is ``good - bad`` plus its momentum, with its norm limited and its part along ``good``, which saturates, weakened.
    """

    parallel: NonNegative = 0.0
    """factor of the part along the prediction (the paper's eta); 1: unchanged"""
    threshold: NonNegative = 0.0
    """largest norm of the difference over a whole sample (the paper's r); 0: no limit"""
    momentum: Annotated[float, Gt(-1), Lt(1)] = 0.0
    """weight of past differences; negative (the paper's beta, -0.5 or -0.75 there); 0: no memory"""

    def __post_init__(self) -> None:
        require("parallel", self.parallel, "0 or more", 0 <= self.parallel < math.inf)
        require("threshold", self.threshold, "0 (none) or more", 0 <= self.threshold < math.inf)
        require("momentum", self.momentum, "above -1, below 1", -1 < self.momentum < 1)

    def __call__(self, good: Tensor, bad: Tensor, scale: float, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        axes = tuple(range(1, good.ndim))
        difference = good - bad if past is None else good - bad + self.momentum * past
        memory = difference if self.momentum else None
        if self.threshold:
            norm = (difference**2).sum(axes, keepdim=True).sqrt()
            difference = difference * (self.threshold / norm.clamp(min=self.threshold))
        size = (good**2).sum(axes, keepdim=True)
        dot = (difference * good).sum(axes, keepdim=True)
        projection = good * torch.where(size > 0, dot / size, torch.zeros_like(size))
        return good + (scale - 1) * (difference + (self.parallel - 1) * projection), memory


RULES: Mapping[str, type[Rule]] = {"linear": Extrapolate, "rescale": Rescale, "apg": APG}
LINEAR = Extrapolate()


# ---------------------------------------------------------------------------------------------------- pairs
def one_pass(denoise: Denoiser) -> DenoiserPair:
    """With and without the conditions, as one batch of twice the size."""

    def predict_both(x: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Prediction]:
        n, kept = len(x), keep_mask(x, cond)
        doubled = {k: repeated(v, 2) for k, v in cond.items()} | {"keep": torch.cat([kept, torch.zeros_like(kept)])}
        p = denoise(torch.cat([x, x]), repeated(t, 2), doubled)
        return take(p, slice(n)), take(p, slice(n, None))

    return predict_both


def two_passes(denoise: Denoiser) -> DenoiserPair:
    """With the conditions, then without, in half the memory."""

    def predict_each(x: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Prediction]:
        return denoise(x, t, cond), unconditional(denoise)(x, t, cond)

    return predict_each


# measured on one CPU core: together is 1.3 to 1.5 times faster at 1 to 16 small samples, as fast at 64; apart is 1.1
# times faster at 16 samples of 3x32x32
PASSES: Mapping[str, Callable[[Denoiser], DenoiserPair]] = {"together": one_pass, "apart": two_passes}


def keep_mask(x: Tensor, cond: Cond) -> Tensor:
    """The samples that see their conditions, Bool ``[B]``: ``cond["keep"]``, or all."""
    return cond.get("keep", torch.ones(len(x), dtype=torch.bool, device=x.device))


def unconditional(denoise: Denoiser) -> Callable[[Tensor, Tensor, Cond], Prediction]:
    """The denoiser without the conditions."""
    return lambda x, t, cond: denoise(x, t, {**cond, "keep": torch.zeros_like(keep_mask(x, cond))})


@dataclass
class Guided:
    """A denoiser extrapolated by a rule from the worse prediction of a pair through the better one."""

    inner: Denoiser
    pair: DenoiserPair
    scale: float
    rule: Rule
    past: Tensor | None = None

    @property
    def path(self) -> ProbabilityPath:
        return self.inner.path

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        good, bad = self.pair(x, t, cond)
        x0, self.past = self.rule(good.x0, bad.x0, self.scale, self.past)
        return shift_data(good, self.path, t, x0 - good.x0)


def classifier_free(scale: float, rule: Rule = LINEAR, passes: str = "together") -> Guidance:
    """From the null condition through the given ones (Ho & Salimans 2022). Off at 1; at 0, the null pass alone."""
    require_finite("guidance", scale)
    if passes not in PASSES:
        raise ValueError(f"passes: given {passes!r}; allowed: {', '.join(PASSES)}")
    if scale == 1:
        return lambda denoise: denoise
    if scale == 0 and rule == LINEAR:
        return lambda denoise: Wrapped(denoise, unconditional(denoise))

    def guide(denoise: Denoiser) -> Denoiser:
        pair = PASSES[passes](denoise)

        def conditional(x: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Prediction]:
            if not cond:
                raise ValueError("guidance: given no condition to guide by; name one (say --label), or --guidance 1")
            return pair(x, t, cond)

        return Guided(denoise, conditional, scale, rule)

    return guide


def scale_input(scale: float, low: float, high: float, **inputs: float) -> Guidance:
    """Guidance by a network that takes the scale as an input, in one pass (Jensen et al. 2025). Off at 1.

    Further ``inputs`` are numbers by name. ``ValueError`` for a scale outside ``[low, high]``, which it has not
    learned.
    """
    require("guidance", scale, f"{low:g} to {high:g}, the scales that this model was trained for", low <= scale <= high)
    if scale == 1:
        return lambda denoise: denoise

    def guide(denoise: Denoiser) -> Denoiser:
        def guided(x: Tensor, t: Tensor, cond: Cond) -> Prediction:
            one = torch.ones_like(x.flatten(1)[:, 0])
            return denoise(x, t, {**cond, SCALE_INPUT: scale * one, **{k: v * one for k, v in inputs.items()}})

        return Wrapped(denoise, guided)

    return guide


def autoguidance(weak: Denoiser, scale: float, rule: Rule = LINEAR) -> Guidance:
    """From a weaker model of the same data through the better one (Karras et al. 2024, eq. 3). Off at 1.

    Both see the same conditions; a model without conditions can be guided too.
    """
    require_finite("guidance", scale)
    if scale == 1:
        return lambda denoise: denoise

    def guide(denoise: Denoiser) -> Denoiser:
        require_same_path("autoguide", weak.path, denoise.path)
        return Guided(denoise, lambda x, t, cond: (denoise(x, t, cond), weak(x, t, cond)), scale, rule)

    return guide


# ----------------------------------------------------------------------------------------------- classifiers
class NoisyClassifier(Protocol):
    """``log p(y | x_t)`` ``[B]`` for the label y in ``cond``, differentiable in x, on a path."""

    @property
    def path(self) -> ProbabilityPath: ...
    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor: ...


# at alpha(1) = 0 the gradient is 0 and ``sigma^2 / alpha`` infinite: the limit of their product is taken here
LAST = 0.999


def by_classifier(classify: NoisyClassifier, scale: float = 1.0) -> Guidance:
    """``score + scale grad_x log p(y | x_t)`` (Dhariwal & Nichol 2021, algorithm 1 and eq. 13), on any path.

    As ``score = -x1 / sigma``, the noise moves by ``-scale sigma grad``, the data by ``scale sigma^2 / alpha grad``.
    Samples that do not keep their conditions are not guided.
    """
    require_finite("classifier_scale", scale)

    def guide(denoise: Denoiser) -> Denoiser:
        require_diffusion("classifier", denoise.path)
        require_same_path("classifier", classify.path, denoise.path)
        path = denoise.path

        def predict(x: Tensor, t: Tensor, cond: Cond) -> Prediction:
            t_safe = within_path(path, t, LAST)
            with torch.enable_grad():
                x_grad = x.detach().requires_grad_()
                grad = torch.autograd.grad(classify(x_grad, t_safe, cond).sum(), x_grad)[0]
            weight = scale * path.sigma(t_safe) ** 2 / path.alpha(t_safe) * keep_mask(x, cond)
            return shift_data(denoise(x, t, cond), path, t, expand(weight, x) * grad)

        return Wrapped(denoise, predict)

    return guide


# ---------------------------------------------------------------------------------------------------- limits
def within(low: float, high: float, guidance: Guidance) -> Guidance:
    """Guide only at chart times in [low, high] (Kynkäänniemi et al. 2024, eq. 5); elsewhere the bare denoiser runs.

    ``tau = sigma / (alpha + sigma)`` is the same on every path; the paper's interval of noise levels sigma / alpha =
    tau / (1 - tau), (0.19, 1.61] for EDM2-XXL, is [0.16, 0.617] here.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"interval: given {low} .. {high}; allowed 0 <= low < high <= 1, in sigma / (alpha + sigma)")

    def guide(denoise: Denoiser) -> Denoiser:
        guided, path = guidance(denoise), denoise.path

        def predict(x: Tensor, t: Tensor, cond: Cond) -> Prediction:
            alpha, sigma = coefficients(path, t, x)
            above, below = low * (alpha + sigma) <= sigma, sigma <= high * (alpha + sigma)
            if isinstance(above, bool):  # samplers give every sample the same time
                return (guided if above and below else denoise)(x, t, cond)
            inside = above & below
            yes, no = guided(x, t, cond), denoise(x, t, cond)
            return replace_endpoints(yes, *(torch.where(inside, a, b) for a, b in zip(yes, no, strict=True)))

        return Wrapped(denoise, predict)

    return guide


def clamp(low: float = -1.0, high: float = 1.0) -> Guidance:
    """Keep the predicted data in a known range, with the noise that then explains ``x`` (Ho et al. 2020's code).

    Predictions are then bounded at every time, so the path need not be truncated
    (:func:`~genkit.diffusion.parametrization.usable_path`): samplers start at t = 1.
    """

    def guide(denoise: Denoiser) -> Denoiser:
        path = whole_path(denoise.path)

        def predict(x: Tensor, t: Tensor, cond: Cond) -> Prediction:
            p = denoise(x, t, cond)
            x0 = p.x0.clamp(low, high)
            return replace_endpoints(p, x0, (x - expand(path.alpha(t), x) * x0) / expand(path.sigma(t), x))

        return Clamped(denoise, predict)

    return guide


@dataclass(frozen=True)
class Wrapped:
    """A function in place of a denoiser, on its path."""

    inner: Denoiser
    function: Callable[[Tensor, Tensor, Cond], Prediction]

    @property
    def path(self) -> ProbabilityPath:
        return self.inner.path

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return self.function(x, t, cond)


class Clamped(Wrapped):
    """A denoiser whose predicted data are bounded, on the whole path."""

    @property
    def path(self) -> ProbabilityPath:
        return whole_path(self.inner.path)


def require_same_path(name: str, given: ProbabilityPath, needed: ProbabilityPath) -> None:
    """``ValueError`` if a second network was trained on another path than the model."""
    given, needed = whole_path(given), whole_path(needed)
    if given != needed:
        raise ValueError(f"{name}: given one trained on {given}; the model's path is {needed}; train one on that")
