"""What samplers share: the nodes of a grid as plain floats, noise by seed, and a denoiser that counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from genkit.core import Cond, Denoiser, Noise, Prediction, ProbabilityPath, seed_of
from genkit.core.device import send
from genkit.diffusion.paths import shared_time, times_at

Callback = Callable[[int, Tensor, Prediction], None]  # (step, x after it, the prediction it used)


class Node(NamedTuple):
    """A time of a sampler's grid and the path's coefficients there."""

    t: float
    alpha: float
    sigma: float

    def time(self, x: Tensor) -> Tensor:
        """The time ``[B]`` of samples ``x`` ``[B, *S]``, for a denoiser.

        Never at t = 0, where nothing is left to predict and x1 is undetermined.
        """
        assert self.t > 0, "a sampler evaluated a denoiser at t = 0"
        return shared_time(self.t, len(x), x.dtype, x.device)

    @property
    def scale(self) -> float:
        """``alpha + sigma``, so that ``u = x / scale`` in the chart."""
        return self.alpha + self.sigma

    @property
    def tau(self) -> float:
        """Chart time ``sigma / (alpha + sigma)``."""
        return self.sigma / (self.alpha + self.sigma)

    @property
    def level(self) -> float:
        """The noise level ``sigma / alpha`` (EDM's sigma); infinite in pure noise."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def half_log_snr(self) -> float:
        """``log(alpha / sigma)``, the lambda of DPM-Solver; infinite in pure noise and in pure data."""
        if self.alpha > 0 and self.sigma > 0:
            return math.log(self.alpha / self.sigma)
        return math.inf if self.alpha > 0 else -math.inf


def nodes(path: ProbabilityPath, times: Tensor) -> Sequence[Node]:
    """The nodes of a grid, computed in float64. ``ValueError`` unless times fall strictly, within 1 and 0."""
    t = times.flatten().tolist()
    if times.ndim != 1 or len(t) < 2 or any(not a > b for a, b in pairwise(t)) or t[0] > 1 or t[-1] < 0:
        shown = ", ".join(f"{v:.3g}" for v in t[:6]) + (", …" if len(t) > 6 else "")
        raise ValueError(f"times: given [{shown}]; needs at least two, strictly falling, within 1 … 0")
    return _nodes(path, tuple(t))


def nodes_at(path: ProbabilityPath, taus: Sequence[float]) -> Sequence[Node]:
    """The nodes at these chart times, in any order."""
    return _nodes(path, tuple(times_at(path, torch.tensor(taus, dtype=torch.float64)).tolist()))


@lru_cache(maxsize=64)  # every batch of a run has the same grid
def _nodes(path: ProbabilityPath, times: tuple[float, ...]) -> tuple[Node, ...]:
    t = torch.tensor(times, dtype=torch.float64)
    return tuple(Node(*v) for v in zip(times, path.alpha(t).tolist(), path.sigma(t).tolist(), strict=True))


def interpolate(node: Node, p: Prediction) -> Tensor:
    """The point of the path between the predicted ends, ``alpha x0 + sigma x1``."""
    return p.at(node.alpha, node.sigma)


def renoise(x: Tensor, low: Node, high: Node, z: Tensor) -> Tensor:
    """Noise ``x`` from one node to a noisier one, ``q(x_high | x_low)`` (Ho et al. 2020, eq. 2, between any two)."""
    r = high.alpha / low.alpha
    return r * x + math.sqrt(max(0.0, high.sigma**2 - (r * low.sigma) ** 2)) * z


def default_noise(x: Tensor) -> Noise:
    """Noise from torch's global generator, for interactive use. Programs should use :class:`Seeds`."""
    return lambda shape: torch.randn(len(x), *shape, dtype=x.dtype, device=x.device)


class Seeds:
    """A random generator for each sample: ``Seeds([7, 8])(shape)`` draws normals ``[2, *shape]``, row i from seed i.

    So image i is the same for any batch size, any number of ranks and any device (the numbers are drawn on the CPU;
    after Karras et al. 2022's per-image seeds). Each call continues every sample's own stream.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.generators = [seeded_generator(int(seed)) for seed in seeds]
        self.device, self.dtype = torch.device(device), dtype

    def __call__(self, shape: Sequence[int]) -> Tensor:
        normals = [torch.randn(*shape, generator=g, dtype=self.dtype) for g in self.generators]
        return send(torch.stack(normals), self.device)

    def select(self, rows: Iterable[int]) -> Seeds:
        """These samples alone: what they draw here continues their streams."""
        part = Seeds((), self.device, self.dtype)
        part.generators = [self.generators[row] for row in rows]
        return part

    def restart(self, rows: Iterable[int], seeds: Sequence[int]) -> None:
        """Let ``rows`` draw from new seeds from now on."""
        for row, seed in zip(rows, seeds, strict=True):
            self.generators[row] = seeded_generator(int(seed))


def seeded_generator(seed: int) -> torch.Generator:
    """A generator on the CPU, which reads 32 bits of its seed: larger ones are hashed, or they would repeat smaller
    ones."""
    return torch.Generator().manual_seed(seed if seed < 2**32 else seed_of(seed))


class CountingDenoiser:
    """A denoiser that counts its evaluations: ``calls`` (NFE), and ``rows``, the samples in all of them.

    Wrap the network's denoiser *before* guidance: classifier-free guidance then has twice the rows in as many calls.
    """

    def __init__(self, inner: Denoiser):
        self.inner, self.calls, self.rows = inner, 0, 0

    @property
    def path(self) -> ProbabilityPath:
        return self.inner.path

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.inner(x, t, cond)
