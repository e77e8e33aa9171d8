"""A sampler as a Markov chain of Gaussian steps: shared by sampling, log-probabilities and training by reward.

Step k goes from one node of the grid to the next. Its distribution is ``N(alpha x0 + kept x1, std^2)``: x0 and x1
are the denoiser's predictions at the node where it starts, alpha is that of the node where it ends, and an
:class:`~genkit.rl.finetune.noise.ExplorationNoise` gives ``kept`` and ``std``. So every sampler is two numbers a step,
and a log-probability cannot be taken on another grid than the sample was drawn on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genkit.core import NO_COND, Cond, Denoiser, Generator, Noise, Objective, ProbabilityPath, expand
from genkit.core.device import send
from genkit.diffusion.checks import require
from genkit.diffusion.flow_map import is_flow_map
from genkit.diffusion.paths import require_diffusion
from genkit.diffusion.samplers import GRIDS
from genkit.diffusion.samplers.steps import Node, default_noise, interpolate, nodes
from genkit.rl.finetune.noise import ExplorationNoise, FixedNoise, Sigma


class Transition(NamedTuple):
    """One step: it starts at ``node`` and has the distribution ``N(alpha x0 + kept x1, std^2)``."""

    node: Node
    alpha: float
    kept: float
    std: float


class DenoisingTrajectory(NamedTuple):
    """B samples and the way to them: points ``xs`` [K + 1, B, *S], means and deviations of the steps [K, B, *S]."""

    xs: Tensor
    means: Tensor
    stds: Tensor | None = None
    """None: those of the chain"""
    choice: Tensor | None = None
    """log-probabilities [1, B, A] of the A values of the choice that was made before the first step, such as an anchor;
    None: there was none, or it was given"""

    @classmethod
    def stacked(cls, parts: Sequence[DenoisingTrajectory]) -> DenoisingTrajectory:
        """Trajectories of one chain, stacked along a new second dimension."""
        xs, means, stds, choice = zip(*parts, strict=True)
        optional = [None if v[0] is None else torch.stack(v, 1) for v in (stds, choice)]
        return cls(torch.stack(xs, 1), torch.stack(means, 1), *optional)

    def map(self, function: Callable[[Tensor], Tensor]) -> DenoisingTrajectory:
        """The trajectory with ``function`` applied to each tensor."""
        optional = [None if v is None else function(v) for v in (self.stds, self.choice)]
        return DenoisingTrajectory(function(self.xs), function(self.means), *optional)


@dataclass(frozen=True)
class Chain:
    """``noise`` on the grid ``times``, which decreases from at most 1 to 0. ``min_std`` is the least std of any step.

    A step without noise has no log-probability, so ``min_std`` is what allows training the last step of ``ddim`` and
    ``sde`` (Ren et al. 2024 keep every std at 0.1 or more). It widens a step and leaves its mean unchanged. A ``sigma``
    multiplies the std of each step, down to ``min_std`` at least.
    """

    path: ProbabilityPath
    times: tuple[float, ...]
    noise: ExplorationNoise = field(default_factory=FixedNoise)
    min_std: float = 0.0
    sigma: Sigma | None = field(default=None, compare=False)
    from_noise: bool = False
    """whether samples start from the noise itself, as a pretrained pipeline's do, not from ``sigma(times[0])`` times
    it"""

    def __post_init__(self) -> None:
        require("min_std", self.min_std, "0 or more", self.min_std >= 0)
        if self.noise.needs_diffusion:
            require_diffusion(f"exploration_noise {self.noise.name}", self.path)

    @classmethod
    def on_grid(
        cls, path: ProbabilityPath, steps: int, noise: ExplorationNoise, min_std: float = 0.0, grid: str = "uniform"
    ) -> Chain:
        """The chain of ``steps`` steps on a named grid."""
        if grid not in GRIDS:
            raise ValueError(f"grid: given {grid!r}; allowed: {', '.join(GRIDS)}")
        return cls(path, tuple(GRIDS[grid](steps)(path).tolist()), noise, min_std)

    @property
    def steps(self) -> int:
        """K."""
        return len(self.times) - 1

    @property
    def transitions(self) -> Sequence[Transition]:
        """The K steps."""
        return _transitions(self)

    def mean_std(self, denoise: Denoiser, x: Tensor, k: int, cond: Cond = NO_COND) -> tuple[Tensor, float | Tensor]:
        """Mean ``[B, *S]`` and standard deviation of step k from ``x``; the latter is ``[B, *S]`` if it is learned."""
        step = self.transitions[k]
        end = Node(0.0, step.alpha, step.kept)
        mean = interpolate(end, denoise(x, step.node.time(x), cond))
        if self.sigma is None:
            return mean, step.std
        return mean, self.std_at(x, torch.full((len(x),), k, device=x.device), cond)

    def std_at(self, x: Tensor, k: Tensor, cond: Cond = NO_COND) -> Tensor:
        """Standard deviations of steps ``k`` ``[B]`` from ``x``: ``[B, 1, ...]``, or ``[B, *S]`` if learned."""
        std = expand(self.table(x)[3, k], x)
        return std if self.sigma is None else (std * self.sigma(x, k, cond)).clamp(min=self.min_std)

    def mean_at(self, denoise: Denoiser, x: Tensor, k: Tensor, cond: Cond = NO_COND) -> Tensor:
        """Means ``[B, *S]`` with every row at a step of its own, ``k`` Int [B]."""
        t, alpha, kept, _ = self.table(x)[:, k]
        p = denoise(x, t, cond)
        return expand(alpha, x) * p.x0 + expand(kept, x) * p.x1

    def table(self, like: Tensor) -> Tensor:
        """Rows t, alpha, kept, std, in the dtype and on the device of ``like``: ``[4, K]``."""
        return _table(self, like.dtype, like.device)

    def sample(
        self, denoise: Denoiser, x: Tensor, cond: Cond = NO_COND, noise: Noise | None = None
    ) -> DenoisingTrajectory:
        """Sample from ``x`` ``[B, *S]``, points at ``times[0]``. Gradients flow unless the caller disables them."""
        noise, xs, means, stds = noise or default_noise(x), [x], [], []
        for k in range(self.steps):
            mean, std = self.mean_std(denoise, xs[-1], k, cond)
            means.append(mean)
            stds.append(std)
            deterministic = isinstance(std, float) and std == 0
            xs.append(mean if deterministic else mean + std * noise(x.shape[1:]))
        return DenoisingTrajectory(
            torch.stack(xs), torch.stack(means), None if self.sigma is None else torch.stack(stds)
        )

    def log_prob(
        self, denoise: Denoiser, xs: Tensor, cond: Cond = NO_COND, last: int | None = None, used: Tensor | None = None
    ) -> Tensor:
        """``log p(x_{k+1} | x_k)`` of the ``last`` steps (None: all) of ``xs`` [K + 1, B, *S]: ``[last, B]``."""
        values = []
        for k in range(self.first_trained(last), self.steps):
            mean, std = self.mean_std(denoise, xs[k], k, cond)
            step = torch.full(xs.shape[1:2], k, device=xs.device)
            values.append(self.density(xs[k + 1], mean, step, used, std if isinstance(std, Tensor) else None))
        return torch.stack(values)

    def density(
        self, x: Tensor, mean: Tensor, k: Tensor, used: Tensor | None = None, std: Tensor | None = None
    ) -> Tensor:
        """``log N(x; mean, std^2)`` ``[B]`` with each row at its step ``k`` [B]; ``std`` None is the chain's own.

        ``used`` [*S] marks the entries of a sample that the environment receives (1, else 0); in the last step the
        others are left out. They had no effect, and their log-probability would only add noise to the gradient.
        """
        if std is None:
            std = expand(self.table(x)[3, k], x)
        each = -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        if used is not None:
            each = each * torch.where(expand(k == self.steps - 1, each), used.to(x), 1.0)
        return each.flatten(1).sum(1)

    def first_trained(self, last: int | None) -> int:
        """Index of the first of the ``last`` steps (None: all). ``ValueError`` if one of them has no noise."""
        last = self.steps if last is None else last
        require("ft_denoising_steps", last, f"1 … {self.steps}, the number of steps", 1 <= last <= self.steps)
        for k in range(self.steps - last, self.steps):
            if not self.transitions[k].std > 0:
                raise ValueError(
                    f"exploration_noise: step {k + 1} of {self.steps} has none, and so no log-probability; "
                    "allowed: exploration_noise fixed, or a min_std above 0"
                )
        return self.steps - last


@lru_cache(maxsize=64)
def _transitions(chain: Chain) -> tuple[Transition, ...]:
    grid = nodes(chain.path, torch.tensor(chain.times, dtype=torch.float64))
    steps = []
    for a, b in pairwise(grid):
        kept, std = chain.noise(a, b)
        steps.append(Transition(a, b.alpha, kept, max(std, chain.min_std)))
    return tuple(steps)


@lru_cache(maxsize=64)
def _table(chain: Chain, dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = [[step.node.t, step.alpha, step.kept, step.std] for step in chain.transitions]
    return send(torch.tensor(rows, dtype=torch.float64).T.to(dtype).contiguous(), device)


def seeded_noise(
    n: int,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rows: slice | Tensor | None = None,
) -> Noise:
    """Normals for ``rows`` (None: all) of ``n`` samples. All are drawn, on the CPU: a row's numbers depend neither on
    the device nor on which other rows are wanted."""

    def noise(shape: Sequence[int]) -> Tensor:
        normals = send(torch.randn(n, *shape, generator=generator), device).to(dtype)
        return normals if rows is None else normals[rows]

    return noise


class TrajectoryStart(NamedTuple):
    """The start of trajectories: the denoiser, points ``x`` at the chain's first time, and their conditions."""

    denoise: Denoiser
    x: Tensor
    cond: Cond


def start_trajectories(
    objective: Objective, nets: Mapping[str, nn.Module], z: Tensor, cond: Cond, noise: Noise | None, chain: Chain
) -> TrajectoryStart:
    """The start that ``objective`` makes of normals ``z`` ``[B, *S]``, with its own source and choice of anchors."""
    first = 1.0 if chain.from_noise else chain.transitions[0].node.sigma
    captured: list[TrajectoryStart] = []

    def sampling(denoise: Denoiser) -> Generator:
        def generate(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
            captured.append(TrajectoryStart(denoise, first * z, cond))
            return z

        return generate

    bind_generator(objective, nets, sampling)(z, cond, noise)
    return captured[0]


def find_denoiser(objective: Objective, nets: Mapping[str, nn.Module]) -> Denoiser:
    """The denoiser that the objective's sampler would call. ``ValueError`` for an objective that draws in one pass."""
    captured: list[Denoiser] = []

    def sampling(denoise: Denoiser) -> Generator:
        captured.append(denoise)
        return lambda z, cond, noise=None: z

    bind_generator(objective, nets, sampling)
    if is_flow_map(captured[0]):
        raise ValueError(
            "run: is a flow map, whose jumps are not the steps of a chain; allowed: runs of flow, ddpm, edm or "
            "anchored; for a differentiable reward try --method direct"
        )
    return captured[0]


def bind_generator(
    objective: Objective, nets: Mapping[str, nn.Module], sampling: Callable[[Denoiser], Generator]
) -> Generator:
    """The objective's generator with this sampler. ``ValueError`` for an objective that draws in one pass."""
    if objective.sampler is None:
        raise ValueError(
            f"run: {type(objective).__name__} draws in one pass and has no chain of steps to train; allowed: runs of "
            "flow, ddpm, edm or anchored; for a differentiable reward try --method direct"
        )
    return objective.generator(nets, sampling)
