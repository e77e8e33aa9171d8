"""What the methods share: experience, the networks that learn from it, the critic, and one step of an optimiser."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, NamedTuple, Protocol

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from genkit.backbones import MLP
from genkit.core import Batch, Cond, Denoiser, Objective, Spec, seed_of
from genkit.rl.finetune.chain import Chain, Walk, denoiser_of
from genkit.training.loop import State, update_ema

Demos = Callable[[int, int], Batch]  # (number of the draw, rows) -> demonstrations, in the model's own numbers


class Experience(NamedTuple):
    """M walks of the chain and what they were worth."""

    walk: Walk
    """``xs`` [K + 1, M, *S] and ``means`` [K, M, *S], as they were when they were drawn"""
    cond: Mapping[str, Tensor]
    """the conditions of each, [M, ...]"""
    advantages: Tensor
    """[M], in the units of the rewards"""
    returns: Tensor | None
    """[M], what the critic should have said; None where there is no critic"""
    logs: dict[str, float]
    used: Tensor | None = None
    """which numbers of a sample the world got to see, 1 or 0, [*S]; None: all"""
    before: Tensor | None = None
    """the steps' means by the model as it was before any reward, [K, M, *S]; None: not asked yet"""


class Task(Protocol):
    """Where rewards come from."""

    differentiable: ClassVar[bool]
    """whether :meth:`reward` exists"""

    def collect(self, learner: Learner, iteration: int) -> Experience: ...
    def begin(self, learner: Learner, iteration: int) -> None:
        """Start anew, by ``iteration`` alone: what a resumed run does, and one that was never stopped."""
        ...

    def draw(self, learner: Learner, iteration: int, n: int) -> tuple[Tensor, Cond]:
        """Normals ``[n, *S]`` and conditions to walk from."""
        ...

    def reward(self, x: Tensor, cond: Cond) -> Tensor:
        """What samples ``[B, *S]``, in the model's numbers, are worth: ``[B]``."""
        ...


class Critic(nn.Module):
    """What a state is worth: ``V(obs)`` [B] of ``obs`` [B, To, Do], as a multiple of the ``scale`` of returns."""

    scale: Tensor

    def __init__(self, spec: Spec, width: int = 128, depth: int = 2):
        super().__init__()
        self.net = MLP(width=width, depth=depth).decoder(Spec((1,), {"obs": spec.cond["obs"]}), (1,))
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, obs: Tensor) -> Tensor:
        """In units of ``scale``."""
        return self.net(obs.new_zeros(len(obs), 1), {"obs": obs})[:, 0]

    @torch.no_grad()
    def values(self, obs: Tensor) -> Tensor:
        """In the units of the rewards."""
        return self(obs) * self.scale

    def note(self, returns: Tensor) -> None:
        """The first returns set the scale, once: a task whose rewards are thousands trains like one of ones."""
        if float(self.scale) == 0:
            self.scale.fill_(max(1e-3, float((returns**2).mean().sqrt())))


@dataclass
class Learner:
    """The networks that improve, and what holds them: a frozen copy, demonstrations, a chain to walk along."""

    objective: Objective
    state: State
    chain: Chain
    spec: Spec
    demos: Demos
    seed: int
    critic: Critic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    noise_optimizer: torch.optim.Optimizer | None = None
    """of the chain's ``sigma``, where the noise is learned"""
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    draws: int = 0
    """batches of demonstrations that were drawn"""
    spread: float = 0.0
    """deviation of the first samples' rewards by a function: the unit in which such rewards are counted; 0: not yet"""

    def __post_init__(self) -> None:
        if not self.frozen:
            self.frozen = {k: copy.deepcopy(v).requires_grad_(False).eval() for k, v in self.state.nets.items()}
        for net in self.state.nets.values():
            net.eval()  # dropout would make the ratio of an unchanged network other than 1

    @property
    def phase(self) -> str:
        return self.objective.phases[0].name

    @property
    def device(self) -> torch.device:
        return next(self.state.nets["net"].parameters()).device

    @property
    def denoiser(self) -> Denoiser:
        return denoiser_of(self.objective, self.state.nets)

    @property
    def reference(self) -> Denoiser:
        """As it was before any reward."""
        return denoiser_of(self.objective, self.frozen)

    @property
    def beside(self) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """What learns along and is no part of the model, each with its optimiser."""
        sigma = self.chain.sigma
        found = {"critic": (self.critic, self.critic_optimizer),
                 "noise": (sigma if isinstance(sigma, nn.Module) else None, self.noise_optimizer)}  # fmt: skip
        return {name: (net, fit) for name, (net, fit) in found.items() if net is not None and fit is not None}

    def generator(self, *key: int) -> torch.Generator:
        """Random numbers of one use, on the CPU."""
        return torch.Generator().manual_seed(seed_of(self.seed, *key))

    def clone_loss(self, rows: int) -> Tensor:
        """The objective's own loss on demonstrations: behaviour cloning. The sum over a sample's numbers, as a
        log-probability is one: their weights then mean the same for long chunks and short ones."""
        each = self.objective.loss(self.phase, self.state.nets, self.next_demos(rows)).per_sample
        return each.mean() * math.prod(self.spec.shape)

    def next_demos(self, rows: int) -> Batch:
        self.draws += 1
        return self.demos(self.draws - 1, rows)

    def step(self, loss: Tensor, lr: float, clip: float = 1.0) -> bool:
        """One step of the optimiser and the averages; False, and nothing done, where the gradient is not finite."""
        optimizer = self.state.optimizers[self.phase]
        both = [optimizer] if self.noise_optimizer is None else [optimizer, self.noise_optimizer]
        for each in both:
            each.zero_grad(set_to_none=True)
        loss.backward()
        norms = [nn.utils.clip_grad_norm_([p for g in each.param_groups for p in g["params"]], clip) for each in both]
        if not all(bool(torch.isfinite(norm)) for norm in norms):
            self.state.skipped += 1
            return False
        for group in optimizer.param_groups:
            group["lr"] = lr
        for each in both:
            each.step()
        for decay, ema in self.state.emas.items():
            update_ema(ema, self.state.nets, decay, 1_000_000)  # it begins at the trained weights: nothing to forget
        return True

    def learn_values(self, obs: Tensor, returns: Tensor, generator: torch.Generator, epochs: int, batch: int) -> float:
        """Regress the critic onto ``returns`` [M]; the last epoch's mean squared error in units of its scale."""
        assert self.critic is not None and self.critic_optimizer is not None  # noqa: PT018
        target, total = returns / self.critic.scale, 0.0
        for _ in range(epochs):
            order, total = torch.randperm(len(obs), generator=generator), 0.0
            for rows in order.split(batch):
                loss = (self.critic(obs[rows]) - target[rows]).square().mean()
                self.critic_optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
                self.critic_optimizer.step()
                total += float(loss.detach()) * len(rows) / len(obs)
        return total


Share = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to learn from rewards: a frozen dataclass of its settings."""

    lr: Annotated[float, Gt(0)] = 1e-4
    """learning rate of the networks; ten times as much loses the variety of the demonstrations sooner (policy.md)"""
    gamma: Share = 0.99
    """discount from one decision to the next"""
    lam: Share = 0.95
    """of generalised advantages: 0 trusts the critic, 1 the returns"""
    critic_lr: Annotated[float, Gt(0)] = 1e-3
    """learning rate of the critic"""
    critic_epochs: Annotated[int, Ge(1)] = 5
    """passes over an iteration's decisions"""
    critic_batch: Annotated[int, Ge(1)] | None = None
    """rows of a gradient step of the critic; None: those of ``batch``"""
    batch: Annotated[int, Ge(1)] = 1024
    """rows of a gradient step"""
    clone_batch: Annotated[int, Ge(1)] = 256
    """demonstrations of a gradient step"""

    noisy: ClassVar[bool] = True
    """whether it needs a log-probability of every step"""

    def check(self, chain: Chain, task: Task) -> None:  # noqa: B027  (most have nothing to refuse)
        """``ValueError`` where it cannot learn from such a chain or task."""

    @abstractmethod
    def update(self, learner: Learner, task: Task, seen: Experience, iteration: int) -> dict[str, float]:
        """Learn from one iteration's experience; what to log."""

    def critic_update(self, learner: Learner, seen: Experience, iteration: int) -> dict[str, float]:
        if learner.critic is None or seen.returns is None:
            return {}
        g = learner.generator(iteration, 1)
        rows = self.critic_batch or self.batch
        error = learner.learn_values(seen.cond["obs"], seen.returns, g, self.critic_epochs, rows)
        left = seen.advantages.var(correction=0) / seen.returns.var(correction=0).clamp(min=1e-12)
        return {"critic_loss": error, "explained": 1 - float(left)}


def with_reference(learner: Learner, seen: Experience) -> tuple[Experience, dict[str, float]]:
    """What the model before any reward would have done, and how far these walks' law is from its: ``kl_reference``, in
    nats a walk, of the weights that drew them. Nothing is said of a chain with a step that has no noise."""
    before = means_of(learner.chain, learner.reference, seen)
    seen = seen._replace(before=before)
    if not all(link.std > 0 for link in learner.chain.links):
        return seen, {}
    return seen, {"kl_reference": float(divergence(learner.chain, seen.walk.means, before, stds=seen.walk.stds).mean())}


@torch.no_grad()
def means_of(chain: Chain, denoise: Denoiser, seen: Experience) -> Tensor:
    """The means that ``denoise`` gives the steps of these walks, ``[K, M, *S]``."""
    return torch.stack([chain.mean_std(denoise, seen.walk.xs[k], k, seen.cond)[0] for k in range(chain.steps)])


def divergence(
    chain: Chain, means: Tensor, others: Tensor, last: int | None = None, stds: Tensor | None = None
) -> Tensor:
    """KL divergence of the walks' laws in nats, ``[M]``, for means [K, M, *S] over the ``last`` steps (all).

    Both have the same deviations, ``stds`` [K, M, *S] or the chain's, so each step has
    ``|mean - other|^2 / (2 std^2)``. Along the walks that were drawn.
    """
    first = chain.first(last)
    at = chain.table(means)[3].reshape(-1, *(1,) * (means.ndim - 1)) if stds is None else stds
    return (((means - others) / at)[first:] ** 2).flatten(2).sum(2).sum(0) / 2


def apart(mean: Tensor, std: Tensor, other: Tensor, wide: Tensor) -> Tensor:
    """KL divergence of ``N(mean, std^2)`` from ``N(other, wide^2)`` in nats, ``[B]`` for ``[B, *S]``."""
    square = ((mean - other) / wide) ** 2 + (std / wide) ** 2
    return (0.5 * (square - 1) - (std / wide).log()).expand_as(mean).flatten(1).sum(1)
