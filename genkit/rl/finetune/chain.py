"""A sampler as a Markov chain of Gaussian steps: what sampling, log-probabilities and training by reward share.

Step k goes from one node of the grid to the next. Its law is ``N(alpha x0 + kept x1, std^2)``, where x0 and x1 are what
the denoiser predicts at the node where it begins, alpha that of the node where it ends, and a :class:`Noising` says how
much of the predicted noise is kept and how much is drawn anew. So every sampler is two numbers a step, and no
log-probability can be taken on another grid than the sample was drawn on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, ClassVar, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from genkit.backbones import MLP
from genkit.core import NO_COND, Cond, Denoiser, Generator, Noise, Objective, ProbabilityPath, Spec, expand
from genkit.diffusion.paths import require_diffusion
from genkit.diffusion.samplers import GRIDS
from genkit.diffusion.samplers.ode import posterior_variance
from genkit.diffusion.samplers.steps import Node, default_noise, evaluate, interpolate, nodes, require

Sigma = Callable[[Tensor, Tensor, Cond], Tensor]  # (x [B, *S], k Int [B], cond) -> what multiplies the std, [B, *S]


class Noising(ABC):
    """How a step from node ``a`` to node ``b`` is made noisy: ``(kept, std)``."""

    diffuses: ClassVar[bool]
    """whether it is right for diffusions only, whose expected noise says the score"""

    @abstractmethod
    def __call__(self, a: Node, b: Node) -> tuple[float, float]: ...

    def network(self, spec: Spec, steps: int) -> nn.Module | None:
        """A :data:`Sigma` to be trained along; None where the noise is as it was given."""
        return None


@dataclass(frozen=True)
class DDIM(Noising):
    """DDIM (Song et al. 2021, eq. 12 and 16): of the noise, ``eta^2`` times the posterior's variance is drawn anew.

    1 is DDPM's ancestral sampling, 0 is deterministic. The last step, to the data, has no noise but the floor's.
    """

    eta: Annotated[float, Ge(0), Le(1)] = 1.0
    diffuses: ClassVar[bool] = True

    def __call__(self, a: Node, b: Node) -> tuple[float, float]:
        var = self.eta**2 * posterior_variance(a[1:], b[1:]) if self.eta else 0.0
        return (math.sqrt(max(0.0, b.sigma**2 - var)) if var else b.sigma), math.sqrt(var)


@dataclass(frozen=True)
class SDE(Noising):
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
class Fixed(Noising):
    """The ODE's step and noise of one size on top (ReinFlow, Zhang et al. 2025, with noise that is not learned).

    Right for every source, few steps and the last one too; the noise is meant to be left out once trained.
    """

    std: Annotated[float, Ge(0)] = 0.15
    diffuses: ClassVar[bool] = False

    def __call__(self, a: Node, b: Node) -> tuple[float, float]:
        return b.sigma, self.std


@dataclass(frozen=True)
class Learned(Noising):
    """The ODE's step and noise on top that a small network learns (ReinFlow, Zhang et al. 2025, section 4.1): a size
    for each number of the sample, step and condition, within ``spread`` times of ``std`` up and down.

    It begins at ``std`` exactly. It is bounded, so that it can neither die out, which would end the trying, nor hide
    the mean in noise; and it is left out once trained, as that of ``fixed`` is.
    """

    std: Annotated[float, Ge(0)] = 0.15
    spread: Annotated[float, Gt(1)] = 3.0
    """between std / spread and std * spread"""
    width: Annotated[int, Ge(1)] = 64
    """of the network"""
    diffuses: ClassVar[bool] = False

    def __call__(self, a: Node, b: Node) -> tuple[float, float]:
        return b.sigma, self.std

    def network(self, spec: Spec, steps: int) -> nn.Module:
        return SigmaNet(MLP(self.width, depth=1).denoiser(spec), self.spread, steps)


class SigmaNet(nn.Module):
    """``spread ^ tanh(net)``: a network whose last layer starts at zero makes it 1."""

    def __init__(self, net: nn.Module, spread: float, steps: int):
        super().__init__()
        self.net, self.spread, self.steps = net, spread, steps

    def forward(self, x: Tensor, k: Tensor, cond: Cond) -> Tensor:
        return self.spread ** self.net(x, 1 - k / self.steps, cond).tanh()


NOISES: Mapping[str, type] = {"fixed": Fixed, "ddim": DDIM, "sde": SDE, "learned": Learned}


class Link(NamedTuple):
    """One step: it begins at ``node`` and has the law ``N(alpha x0 + kept x1, std^2)``."""

    node: Node
    alpha: float
    kept: float
    std: float


class Walk(NamedTuple):
    """Samples with all that was on the way: ``xs`` [K + 1, B, *S], the steps' means and deviations [K, B, *S]."""

    xs: Tensor
    means: Tensor
    stds: Tensor | None = None
    """None: those of the chain"""

    @classmethod
    def joined(cls, walks: Sequence[Walk]) -> Walk:
        """Walks of one chain, side by side."""
        xs, means, stds = zip(*walks, strict=True)
        return cls(torch.cat(xs, 1), torch.cat(means, 1), None if stds[0] is None else torch.cat(stds, 1))


@dataclass(frozen=True)
class Chain:
    """``noise`` on the grid ``times``, which falls from at most 1 to 0. ``floor`` is the least std of any step.

    A step without noise has no log-probability, so the floor is what trains the last step of ``ddim`` and ``sde``
    (Ren et al. 2024, who keep every std at 0.1 or more). It widens a step and leaves its mean where it was. A ``sigma``
    multiplies the std of a step by what it says of the row; the floor holds all the same.
    """

    path: ProbabilityPath
    times: tuple[float, ...]
    noise: Noising = field(default_factory=Fixed)
    floor: float = 0.0
    sigma: Sigma | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        require("floor", self.floor, "0 or more", self.floor >= 0)
        if self.noise.diffuses:
            require_diffusion(f"noise {type(self.noise).__name__.lower()}", self.path)

    @classmethod
    def over(
        cls, path: ProbabilityPath, steps: int, noise: Noising, floor: float = 0.0, grid: str = "uniform"
    ) -> Chain:
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

    def mean_std(self, denoise: Denoiser, x: Tensor, k: int, cond: Cond = NO_COND) -> tuple[Tensor, float | Tensor]:
        """Mean ``[B, *S]`` and standard deviation of step k from ``x``; that is ``[B, *S]`` where it is learned."""
        link = self.links[k]
        end = Node(0.0, link.alpha, link.kept)
        mean = interpolate(end, evaluate(denoise, x, link.node, cond))
        if self.sigma is None:
            return mean, link.std
        return mean, self.std_at(x, torch.full((len(x),), k, device=x.device), cond)

    def std_at(self, x: Tensor, k: Tensor, cond: Cond = NO_COND) -> Tensor:
        """Standard deviations of steps ``k`` ``[B]`` from ``x``: ``[B, 1, ...]``, or ``[B, *S]`` where learned."""
        std = expand(self.table(x)[3, k], x)
        return std if self.sigma is None else (std * self.sigma(x, k, cond)).clamp(min=self.floor)

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
        noise, xs, means, stds = noise or default_noise(x), [x], [], []
        for k in range(self.steps):
            mean, std = self.mean_std(denoise, xs[-1], k, cond)
            means.append(mean)
            stds.append(std)
            quiet = isinstance(std, float) and std == 0
            xs.append(mean if quiet else mean + std * noise(x.shape[1:]))
        return Walk(torch.stack(xs), torch.stack(means), None if self.sigma is None else torch.stack(stds))

    def log_prob(
        self, denoise: Denoiser, xs: Tensor, cond: Cond = NO_COND, last: int | None = None, used: Tensor | None = None
    ) -> Tensor:
        """``log p(x_{k+1} | x_k)`` of the ``last`` steps (all) of walks ``xs`` [K + 1, B, *S]: ``[last, B]``."""
        first = self.first(last)
        found = []
        for k in range(first, self.steps):
            mean, std = self.mean_std(denoise, xs[k], k, cond)
            at = torch.full(xs.shape[1:2], k, device=xs.device)
            found.append(self.density(xs[k + 1], mean, at, used, std if isinstance(std, Tensor) else None))
        return torch.stack(found)

    def density(
        self, x: Tensor, mean: Tensor, k: Tensor, used: Tensor | None = None, std: Tensor | None = None
    ) -> Tensor:
        """``log N(x; mean, std^2)``, each row ``[B]`` at its step ``k``; ``std`` None is the chain's own of that step.

        ``used`` [*S] says which numbers of a sample (1, else 0) the world gets to see: of the last step the others are
        left out. What nobody saw had no effect, and its log-probability would be noise in the gradient alone.
        """
        if std is None:
            std = expand(self.table(x)[3, k], x)
        each = -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        if used is not None:
            each = each * torch.where(expand(k == self.steps - 1, each), used.to(x), 1.0)
        return each.flatten(1).sum(1)

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
