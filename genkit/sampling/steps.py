"""What every sampler needs of its grid: the nodes, as plain floats computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genkit.core import Cond, Denoiser, Noise, Path, Prediction

Callback = Callable[[int, Tensor, Prediction], None]  # (step, x after it, the prediction it used)


class Node(NamedTuple):
    t: float
    alpha: float
    sigma: float

    @property
    def scale(self) -> float:
        return self.alpha + self.sigma

    @property
    def tau(self) -> float:
        return self.sigma / (self.alpha + self.sigma)


def nodes(path: Path, times: Tensor) -> list[Node]:
    """The grid's coefficients in float64. ``ValueError`` unless times fall strictly from at most 1 to at least 0."""
    t = torch.as_tensor(times, dtype=torch.float64).cpu()
    if t.ndim != 1 or len(t) < 2 or not bool((t.diff() < 0).all()) or t[0] > 1 or t[-1] < 0:
        shown = ", ".join(f"{v:.3g}" for v in t.flatten()[:6].tolist()) + (", …" if t.numel() > 6 else "")
        raise ValueError(f"times: given [{shown}]; needs at least two, strictly falling, within 1 … 0")
    return [Node(*v) for v in zip(t.tolist(), path.alpha(t).tolist(), path.sigma(t).tolist(), strict=True)]


def ask(denoise: Denoiser, x: Tensor, node: Node, cond: Cond) -> Prediction:
    """The prediction at a node. Never at t = 0, where there is nothing left to predict and x1 is undetermined."""
    assert node.t > 0, "a sampler asked a denoiser about t = 0"
    return denoise(x, torch.full((len(x),), node.t, dtype=x.dtype, device=x.device), cond)


def fresh(x: Tensor) -> Noise:
    """Noise from torch's global generator, for a person at a prompt. :class:`Seeds` is what programs want."""
    return lambda shape: torch.randn(len(x), *shape, dtype=x.dtype, device=x.device)


class Seeds:
    """A generator for each sample: ``Seeds([7, 8])(shape)`` gives normals ``[2, *shape]``, row i from seed i alone.

    So image i is the same for any batch size, any number of ranks and any device (the numbers are drawn on the CPU;
    after Karras et al. 2022's per-image seeds). Each call continues every sample's own stream.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        self.device, self.dtype = torch.device(device), dtype

    def __call__(self, shape: Sequence[int]) -> Tensor:
        drawn = [torch.randn(*shape, generator=g, dtype=self.dtype) for g in self.generators]
        return torch.stack(drawn).to(self.device)
