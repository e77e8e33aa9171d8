"""Guidance: functions that turn a denoiser into another one. Samplers never hear of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.core import Cond, Denoiser, Guidance, Path, Prediction


def classifier_free(scale: float) -> Guidance:
    """``D = D(null) + scale (D(cond) - D(null))`` (Ho & Salimans 2022, eq. 6, with scale = 1 + w). Off at 1.

    Both passes run as one batch of twice the size; at scale 0 only the null one runs.
    """
    if scale == 1:
        return lambda denoise: denoise
    return lambda denoise: _ClassifierFree(denoise, scale)


@dataclass(frozen=True)
class _ClassifierFree:
    inner: Denoiser
    scale: float

    @property
    def path(self) -> Path:
        return self.inner.path

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        if not cond:
            raise ValueError("guidance: given no condition to guide by; name one (say --label), or use --guidance 1")
        n = len(x)
        seen = cond.get("keep", torch.ones(n, dtype=torch.bool, device=x.device))
        if self.scale == 0:
            return self.inner(x, t, {**cond, "keep": torch.zeros_like(seen)})
        both = {k: torch.cat([v, v]) for k, v in cond.items()} | {"keep": torch.cat([torch.zeros_like(seen), seen])}
        x0, x1 = self.inner(torch.cat([x, x]), torch.cat([t, t]), both)
        return Prediction(torch.lerp(x0[:n], x0[n:], self.scale), torch.lerp(x1[:n], x1[n:], self.scale))


def clamp(low: float = -1.0, high: float = 1.0) -> Guidance:
    """Keep the predicted data in a known range, with the noise that then explains ``x`` (Ho et al. 2020's code)."""
    return lambda denoise: _Clamp(denoise, low, high)


@dataclass(frozen=True)
class _Clamp:
    inner: Denoiser
    low: float
    high: float

    @property
    def path(self) -> Path:
        return self.inner.path

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        x0 = self.inner(x, t, cond).x0.clamp(self.low, self.high)
        alpha, sigma = (f(t).reshape(-1, *(1,) * (x.ndim - 1)) for f in (self.path.alpha, self.path.sigma))
        return Prediction(x0, (x - alpha * x0) / sigma)
