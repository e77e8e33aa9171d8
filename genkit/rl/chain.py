"""A sampler as a Markov chain of Gaussian steps: what sampling, log-probabilities and training by reward share.

Step k goes from one node of the grid to the next. Its law is ``N(alpha x0 + kept x1, std^2)``, where x0 and x1 are what
the denoiser predicts at the node where it begins, alpha that of the node where it ends, and a :class:`Noising` says how
much of the predicted noise is kept and how much is drawn anew. So every sampler is two numbers a step, and no
log-probability can be taken on another grid than the sample was drawn on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, ClassVar, NamedTuple, Protocol

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from genkit.core import NO_COND, Cond, Denoiser, Generator, Noise, Objective, Path, expand
from genkit.paths import require_noise
from genkit.sampling import GRIDS
from genkit.sampling.ode import posterior_variance
from genkit.sampling.steps import Node, ask, fresh, land, nodes, require


class Noising(Protocol):
    """How a step from node ``a`` to node ``b`` is made noisy: ``(kept, std)``."""

    diffuses: ClassVar[bool]
    """whether it is right for diffusions only, whose expected noise says the score"""

    def __call__(self, a: Node, b: Node) -> tuple[float, float]: ...


@dataclass(frozen=True)
class DDIM:
    """DDIM (Song et al. 2021, eq. 12 and 16): of the noise, ``eta^2`` times the posterior's variance is drawn anew.

    1 is DDPM's ancestral sampling, 0 is deterministic. The last step, to the data, has no noise but the floor's.
    """

    eta: Annotated[float, Ge(0), Le(1)] = 1.0
    diffuses: ClassVar[bool] = True

    def __call__(self, a: Node, b: Node) -> tuple[float, float]:
        var = self.eta**2 * posterior_variance(a[1:], b[1:]) if self.eta else 0.0
        return (math.sqrt(max(0.0, b.sigma**2 - var)) if var else b.sigma), math.sqrt(var)


@dataclass(frozen=True)
class SDE:
    """The reverse SDE by Euler-Maruyama in the chart, as the sampler ``sde``: any ``eta`` keeps the marginals.

    On the linear path that is Flow-GRPO's (Liu et al. 2025) with ``eta = a^2 / 2``: their a = 0.7 is 0.245.
    """

    eta: Annotated[float, Ge(0)] = 0.25
    diffuses: ClassVar[bool] = True

    def __call__(self, a: Node, b: Node) -> tuple[float, float]:
        if not self.eta or b.sigma == 0:
            return b.sigma, 0.0
        if a.alpha == 0:  # the diffusion is infinite there: the step's limit draws all of the noise anew
            return 0.0, b.sigma
        k = self.eta * (a.tau - b.tau) / (1 - a.tau)
        return b.sigma - b.scale * k, b.scale * math.sqrt(2 * a.tau * k)


@dataclass(frozen=True)
class Fixed:
    """The ODE's step and noise of one size on top (ReinFlow, Zhang et al. 2025, with noise that is not learned).

    Right for every source, few steps and the last one too; the noise is meant to be left out once trained.
    """

    std: Annotated[float, Ge(0)] = 0.15
    diffuses: ClassVar[bool] = False

    def __call__(self, a: Node, b: Node) -> tuple[float, float]:
        return b.sigma, self.std


NOISES: Mapping[str, type] = {"fixed": Fixed, "ddim": DDIM, "sde": SDE}


class Link(NamedTuple):
    """One step: it begins at ``node`` and has the law ``N(alpha x0 + kept x1, std^2)``."""

    node: Node
    alpha: float
    kept: float
    std: float


class Walk(NamedTuple):
    """Samples with all that was on the way: ``xs`` [K + 1, B, *S] and the steps' means [K, B, *S]."""

    xs: Tensor
    means: Tensor


@dataclass(frozen=True)
class Chain:
    """``noise`` on the grid ``times``, which falls from at most 1 to 0. ``floor`` is the least std of any step.

    A step without noise has no log-probability, so the floor is what trains the last step of ``ddim`` and ``sde``
    (Ren et al. 2024, who keep every std at 0.1 or more). It widens a step and leaves its mean where it was.
    """

    path: Path
    times: tuple[float, ...]
    noise: Noising = field(default_factory=Fixed)
    floor: float = 0.0

    def __post_init__(self) -> None:
        require("floor", self.floor, "0 or more", self.floor >= 0)
        if self.noise.diffuses:
            require_noise(f"noise {type(self.noise).__name__.lower()}", self.path)

    @classmethod
    def over(cls, path: Path, steps: int, noise: Noising, floor: float = 0.0, grid: str = "uniform") -> Chain:
        if grid not in GRIDS:
            raise ValueError(f"grid: given {grid!r}; allowed: {', '.join(GRIDS)}")
        return cls(path, tuple(GRIDS[grid](steps)(path).tolist()), noise, floor)

    @property
    def steps(self) -> int:
        """K."""
        return len(self.times) - 1

    @property
    def links(self) -> Sequence[Link]:
        return _links(self)

    def mean_std(self, denoise: Denoiser, x: Tensor, k: int, cond: Cond = NO_COND) -> tuple[Tensor, float]:
        """Mean ``[B, *S]`` and standard deviation of step k from ``x``."""
        link = self.links[k]
        end = Node(0.0, link.alpha, link.kept)
        return land(end, ask(denoise, x, link.node, cond)), link.std

    def mean_at(self, denoise: Denoiser, x: Tensor, k: Tensor, cond: Cond = NO_COND) -> Tensor:
        """Means ``[B, *S]`` where every row is at a step of its own, ``k`` Int [B]."""
        t, alpha, kept, _ = self.table(x)[:, k]
        p = denoise(x, t, cond)
        return expand(alpha, x) * p.x0 + expand(kept, x) * p.x1

    def table(self, like: Tensor) -> Tensor:
        """Rows t, alpha, kept, std: ``[4, K]``."""
        return _table(self, like.dtype, like.device)

    def sample(self, denoise: Denoiser, x: Tensor, cond: Cond = NO_COND, noise: Noise | None = None) -> Walk:
        """Walk from ``x`` ``[B, *S]``, a point at ``times[0]``. Gradients flow, unless the caller forbids them."""
        noise, xs, means = noise or fresh(x), [x], []
        for k in range(self.steps):
            mean, std = self.mean_std(denoise, xs[-1], k, cond)
            means.append(mean)
            xs.append(mean + std * noise(x.shape[1:]) if std else mean)
        return Walk(torch.stack(xs), torch.stack(means))

    def log_prob(
        self, denoise: Denoiser, xs: Tensor, cond: Cond = NO_COND, last: int | None = None, used: Tensor | None = None
    ) -> Tensor:
        """``log p(x_{k+1} | x_k)`` of the ``last`` steps (all) of walks ``xs`` [K + 1, B, *S]: ``[last, B]``."""
        first = self.first(last)
        found = []
        for k in range(first, self.steps):
            mean, _ = self.mean_std(denoise, xs[k], k, cond)
            found.append(self.density(xs[k + 1], mean, torch.full(xs.shape[1:2], k, device=xs.device), used))
        return torch.stack(found)

    def density(self, x: Tensor, mean: Tensor, k: Tensor, used: Tensor | None = None) -> Tensor:
        """``log N(x; mean, std_k^2)``, each row ``[B]`` at its step ``k``.

        ``used`` [*S] says which numbers of a sample (1, else 0) the world gets to see: of the last step the others are
        left out. What nobody saw had no effect, and its log-probability would be noise in the gradient alone.
        """
        std = self.table(x)[3, k]
        square = ((x - mean) ** 2).flatten(1)
        if used is not None:
            counted = torch.where(k[:, None] == self.steps - 1, used.flatten().to(x), 1.0)
            square, size = square * counted, counted.sum(1)
        else:
            size = square.shape[1]
        return -0.5 * square.sum(1) / std**2 - size * (std.log() + 0.5 * math.log(2 * math.pi))

    def first(self, last: int | None) -> int:
        """The number of the first of the ``last`` steps. ``ValueError`` where one of them has no noise."""
        last = self.steps if last is None else last
        require("last", last, f"1 … {self.steps}, the steps there are", 1 <= last <= self.steps)
        for k in range(self.steps - last, self.steps):
            if not self.links[k].std > 0:
                raise ValueError(
                    f"noise: step {k + 1} of {self.steps} has none, so that it has no log-probability; "
                    "allowed: noise fixed, or a floor above 0"
                )
        return self.steps - last


@lru_cache(maxsize=64)
def _links(chain: Chain) -> tuple[Link, ...]:
    grid = nodes(chain.path, torch.tensor(chain.times, dtype=torch.float64))
    found = []
    for a, b in pairwise(grid):
        kept, std = chain.noise(a, b)
        found.append(Link(a, b.alpha, kept, max(std, chain.floor)))
    return tuple(found)


@lru_cache(maxsize=64)
def _table(chain: Chain, dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = [[k.node.t, k.alpha, k.kept, k.std] for k in chain.links]
    return torch.tensor(rows, dtype=torch.float64).T.to(device, dtype).contiguous()


class Start(NamedTuple):
    """Where walks begin: the denoiser, points ``x`` at the first time, and the conditions that belong to them."""

    denoise: Denoiser
    x: Tensor
    cond: Cond


def start(
    objective: Objective, nets: Mapping[str, nn.Module], z: Tensor, cond: Cond, noise: Noise | None, chain: Chain
) -> Start:
    """The beginning that ``objective`` gives normals ``z`` ``[B, *S]``: its own source, its own choice of anchors."""
    first = chain.links[0].node.sigma
    found: list[Start] = []

    def sampling(denoise: Denoiser) -> Generator:
        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            found.append(Start(denoise, first * z, cond))
            return z

        return generate

    generator(objective, nets, sampling)(z, cond, noise)
    return found[0]


def denoiser_of(objective: Objective, nets: Mapping[str, nn.Module]) -> Denoiser:
    """What the chain walks with. ``ValueError`` for an objective that draws in one pass."""
    found: list[Denoiser] = []

    def sampling(denoise: Denoiser) -> Generator:
        found.append(denoise)
        return lambda z, cond, noise=None: z

    generator(objective, nets, sampling)
    return found[0]


def generator(
    objective: Objective, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator]
) -> Generator:
    if objective.sampler is None:
        raise ValueError(
            f"run: {type(objective).__name__} draws in one pass and has no chain of steps to train; allowed: runs of "
            "flow, ddpm, edm or anchored"
        )
    return objective.generator(nets, sampling)
