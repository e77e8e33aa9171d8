"""What all reward methods share: experience, the networks that learn from it, the critic, and an optimizer step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from genkit.backbones import MLP
from genkit.core import Batch, Cond, Denoiser, Objective, Spec, seed_of
from genkit.rl.finetune.chain import Chain, DenoisingTrajectory, denoiser_of
from genkit.training.loop import State, update_ema

Demos = Callable[[int, int], Batch]  # (number of the draw, rows) -> demonstrations, in the model's units


class Experience(NamedTuple):
    """M trajectories of the chain, and how good they were."""

    trajectory: DenoisingTrajectory
    """``xs`` [K + 1, M, *S] and ``means`` [K, M, *S], as they were when drawn"""
    cond: Mapping[str, Tensor]
    """the conditions of each, [M, ...]"""
    advantages: Tensor
    """[M], in the units of the rewards"""
    returns: Tensor | None
    """[M], the critic's targets; None if there is no critic"""
    logs: dict[str, float]
    used: Tensor | None = None
    """1 for the numbers of a sample that the environment got to see, else 0, [*S]; None: all"""
    reference_means: Tensor | None = None
    """the steps' means under the model before any reward, [K, M, *S]; None: not computed yet"""


class Task(Protocol):
    """A source of rewards."""

    differentiable: ClassVar[bool]
    """whether :meth:`draw` and :meth:`reward` exist"""

    def collect(self, learner: Learner, iteration: int) -> Experience:
        """Draw trajectories with the learner's weights and score them."""
        ...

    def begin(self, learner: Learner, iteration: int) -> None:
        """Start afresh, as a function of ``iteration`` only: a resumed run and an uninterrupted one do the same."""
        ...

    def draw(self, learner: Learner, iteration: int, n: int) -> tuple[Tensor, Cond]:
        """Normals ``[n, *S]`` and conditions to start trajectories from."""
        ...

    def reward(self, x: Tensor, cond: Cond) -> Tensor:
        """The rewards ``[B]`` of samples ``[B, *S]`` in the model's units."""
        ...


class Critic(nn.Module):
    """A value function ``V(obs)`` [B] of ``obs`` [B, To, Do], in units of ``scale``, the size of the first returns."""

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

    def set_scale(self, returns: Tensor) -> None:
        """Set the scale from the first returns, once: rewards of thousands then train like rewards of order one."""
        if float(self.scale) == 0:
            self.scale.fill_(max(1e-3, float((returns**2).mean().sqrt())))


@dataclass
class Learner:
    """The networks that improve, with everything they need: a frozen copy, demonstrations, a chain to sample along."""

    objective: Objective
    state: State
    chain: Chain
    spec: Spec
    demos: Demos
    seed: int
    critic: Critic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    noise_optimizer: torch.optim.Optimizer | None = None
    """optimizer of the chain's ``sigma``, if the noise is learned"""
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    """the networks before any reward"""
    draws: int = 0
    """number of batches of demonstrations drawn so far"""
    reward_std: float = 0.0
    """standard deviation of the first samples' rewards by a function, the unit of such rewards; 0: not known yet"""

    def __post_init__(self) -> None:
        if not self.frozen:
            self.frozen = {k: copy.deepcopy(v).requires_grad_(False).eval() for k, v in self.state.nets.items()}
        for net in self.state.nets.values():
            net.eval()  # with dropout the ratio of an unchanged network would not be 1

    @property
    def phase(self) -> str:
        """Name of the objective's phase that is trained."""
        return self.objective.phases[0].name

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return next(self.state.nets["net"].parameters()).device

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser with the current weights."""
        return denoiser_of(self.objective, self.state.nets)

    @property
    def reference(self) -> Denoiser:
        """The denoiser with the weights before any reward."""
        return denoiser_of(self.objective, self.frozen)

    @property
    def auxiliary(self) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """Networks that are trained along but are not part of the model, with their optimizers, by name."""
        networks = {}
        if self.critic is not None and self.critic_optimizer is not None:
            networks["critic"] = (self.critic, self.critic_optimizer)
        if isinstance(self.chain.sigma, nn.Module) and self.noise_optimizer is not None:
            networks["noise"] = (self.chain.sigma, self.noise_optimizer)
        return networks

    def generator(self, *key: int) -> torch.Generator:
        """Random numbers for one purpose, on the CPU."""
        return torch.Generator().manual_seed(seed_of(self.seed, *key))

    def bc_loss(self, rows: int) -> Tensor:
        """Behaviour cloning: the objective's own loss on ``rows`` demonstrations, a scalar.

        It is summed over the numbers of a sample, as a log-probability is, so that their relative weight is the same
        for long and short chunks.
        """
        per_sample = self.objective.loss(self.phase, self.state.nets, self.draw_demos(rows)).per_sample
        return per_sample.mean() * math.prod(self.spec.shape)

    def draw_demos(self, rows: int) -> Batch:
        """The next ``rows`` demonstrations."""
        self.draws += 1
        return self.demos(self.draws - 1, rows)

    def step(self, loss: Tensor, lr: float, clip: float = 1.0) -> bool:
        """One step of the optimizers and the averages; False, and no change, if the gradient is not finite."""
        optimizer = self.state.optimizers[self.phase]
        optimizers = [optimizer] if self.noise_optimizer is None else [optimizer, self.noise_optimizer]
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [[p for group in each.param_groups for p in group["params"]] for each in optimizers]
        norms = [nn.utils.clip_grad_norm_(each, clip) for each in parameters]
        if not all(bool(torch.isfinite(norm)) for norm in norms):
            self.state.skipped += 1
            return False
        for group in optimizer.param_groups:
            group["lr"] = lr
        for each in optimizers:
            each.step()
        for decay, ema in self.state.emas.items():
            update_ema(ema, self.state.nets, decay, 1_000_000)  # from trained weights on there is nothing to forget
        return True

    def fit_critic(self, obs: Tensor, returns: Tensor, generator: torch.Generator, epochs: int, batch: int) -> float:
        """Regress the critic onto ``returns`` [M]; the mean squared error of the last epoch, in units of its scale."""
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


def compare_with_reference(learner: Learner, experience: Experience) -> tuple[Experience, dict[str, float]]:
    """The experience with the reference model's means, and ``kl_reference``, the KL divergence from it in nats per
    trajectory, of the weights that drew them. It is not reported if a step of the chain has no noise."""
    reference = step_means(learner.chain, learner.reference, experience)
    experience = experience._replace(reference_means=reference)
    if not all(step.std > 0 for step in learner.chain.transitions):
        return experience, {}
    trajectory = experience.trajectory
    kl = trajectory_kl(learner.chain, trajectory.means, reference, stds=trajectory.stds)
    return experience, {"kl_reference": float(kl.mean())}


@torch.no_grad()
def step_means(chain: Chain, denoise: Denoiser, experience: Experience) -> Tensor:
    """The means that ``denoise`` gives to the steps of these trajectories, ``[K, M, *S]``."""
    xs, cond = experience.trajectory.xs, experience.cond
    return torch.stack([chain.mean_std(denoise, xs[k], k, cond)[0] for k in range(chain.steps)])


def trajectory_kl(
    chain: Chain, means: Tensor, others: Tensor, last: int | None = None, stds: Tensor | None = None
) -> Tensor:
    """KL divergence in nats, ``[M]``, between two laws of the ``last`` steps (None: all) with means [K, M, *S].

    Both have the same deviations, ``stds`` [K, M, *S] or the chain's, so each step contributes
    ``|mean - other|^2 / (2 std^2)``, evaluated along the given trajectories.
    """
    first = chain.first_trained(last)
    std = chain.table(means)[3].reshape(-1, *(1,) * (means.ndim - 1)) if stds is None else stds
    return (((means - others) / std)[first:] ** 2).flatten(2).sum(2).sum(0) / 2


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL divergence of ``N(mean, std^2)`` from ``N(other_mean, other_std^2)`` in nats, ``[B]`` for ``[B, *S]``."""
    square = ((mean - other_mean) / other_std) ** 2 + (std / other_std) ** 2
    return (0.5 * (square - 1) - (std / other_std).log()).expand_as(mean).flatten(1).sum(1)
