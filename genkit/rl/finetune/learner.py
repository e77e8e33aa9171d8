"""What all reward methods share: the networks that learn, the critic, and gradient steps shared by ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from genkit.backbones import MLP
from genkit.core import Batch, Cond, Denoiser, Draw, Generator, Noise, Objective, Spec, seed_of
from genkit.core.device import send
from genkit.evaluation.metrics import Moments
from genkit.rl.finetune.chain import Chain, DenoisingTrajectory, find_denoiser, start_trajectories
from genkit.training.averages import Average
from genkit.training.distributed import sum_gradients
from genkit.training.loop import Diverged, copy_for_ema, optimizer_step, split_batch
from genkit.training.meter import SkippedSteps
from genkit.training.state import State

T = TypeVar("T")
# (number of the batch, start, stop) -> its rows start..stop, demonstrations in the model's units
Demos = Callable[[int, int, int], Batch]


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


class RowsDraw(Draw):
    """The random numbers of rows ``start..stop`` of ``total``, from torch's global generator.

    All rows are drawn and the others left out, so that the numbers of a row do not depend on how rows are shared.
    """

    def __init__(self, start: int, stop: int, total: int, device: torch.device):
        self.start, self.stop, self.total, self.device = start, stop, total, device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.total, *shape, device=self.device)[self.start : self.stop]

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.total, *shape, device=self.device)[self.start : self.stop]


@dataclass
class Demonstrations:
    """The demonstrations of one gradient step; a batch is counted once, whoever takes a part of it."""

    learner: Learner
    number: int | None = None

    def count(self) -> int:
        """The number of the batch. Ranks without a row of it count it too, or the next batches would differ."""
        if self.number is None:
            self.number = self.learner.draws
            self.learner.draws += 1
        return self.number

    def rows(self, start: int, stop: int) -> Batch:
        """Rows ``start..stop`` of the batch."""
        return self.learner.demos(self.count(), start, stop)


@dataclass(frozen=True)
class Share:
    """The rows of a gradient step that a rank computes in one forward pass: positions ``start..stop`` of ``total``."""

    rows: Tensor
    """Int [stop - start], on the learner's device"""
    start: int
    stop: int
    total: int
    learner: Learner
    demos: Demonstrations
    counted: bool = True
    """False on a rank that has no rows of its own, and repeats one"""

    @property
    def fraction(self) -> float:
        """The fraction of the step's rows."""
        return (self.stop - self.start) / self.total

    @property
    def weight(self) -> float:
        """The weight of this share in the step's mean."""
        return self.fraction if self.counted else 0.0

    @property
    def draw(self) -> Draw:
        """The random numbers of these rows, for a :class:`Batch`."""
        return RowsDraw(self.start, self.stop, self.total, self.learner.device)

    def bc_loss(self, n: int) -> Tensor:
        """Behaviour cloning: the objective's own loss on this share of ``n`` demonstrations, a scalar whose mean over
        the shares, by their ``weight``, is the mean over the demonstrations.

        It is summed over the entries of a sample, as a log-probability is, so that their relative weight is the same
        for long and short chunks. The cross-entropy of a choice is a log-probability already.
        """
        learner = self.learner
        first, last = (round(n * i / self.total) for i in (self.start, self.stop))
        self.demos.count()
        if first == last:
            return torch.zeros((), device=learner.device)
        batch = self.demos.rows(first, last)
        loss, entries = learner.objective.loss(learner.phase, learner.state.nets, batch), math.prod(learner.spec.shape)
        value = loss.per_sample.mean() * entries
        if loss.choice is not None:
            value = value - loss.choice.mean() * (entries - 1)
        return value * ((last - first) / (n * self.fraction))


def random_states(device: torch.device) -> list[Tensor]:
    """The states of torch's global generators, of the CPU and of ``device``."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state()]


def restore_random_states(device: torch.device, states: Sequence[Tensor]) -> None:
    """Set what :func:`random_states` returned."""
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])


ShareLoss = Callable[[Share], tuple[Tensor, Tensor]]  # the mean loss of a share, and means to log, [n] or a scalar


@dataclass
class Learner:
    """The networks that improve, with everything they need: a frozen copy, demonstrations, a way to draw samples."""

    objective: Objective
    state: State
    steps: Chain | Callable[[Mapping[str, nn.Module]], Generator]
    """the chain to sample along or, for a method that needs none, a function from networks to their generator"""
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
    population: Moments | None = None
    """moments of the features of recent samples, if a distance of distributions is the reward"""
    accelerator: Accelerator | None = None
    """the ranks that share the work; None: this process alone"""
    micro_batch: int | None = None
    """rows of a forward pass of a gradient step; None: all of a rank's"""
    bf16: bool = False
    """whether forward passes run in bfloat16"""

    def __post_init__(self) -> None:
        if not self.frozen:
            self.frozen = {k: copy_for_ema(v).requires_grad_(False).eval() for k, v in self.state.nets.items()}
        for net in self.state.nets.values():
            net.eval()  # with dropout the ratio of an unchanged network would not be 1
        self.averages = [Average(decay, ema, self.state.nets) for decay, ema in self.state.emas.items()]
        self.skipped = SkippedSteps(self.device)

    @property
    def phase(self) -> str:
        """Name of the objective's phase that is trained."""
        return self.objective.generator_phase

    @property
    def chain(self) -> Chain:
        """The chain to sample along."""
        assert isinstance(self.steps, Chain)
        return self.steps

    @property
    def generate(self) -> Generator:
        """The generator with the current weights, through which gradients pass."""
        assert not isinstance(self.steps, Chain)
        return self.steps(self.state.nets)

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return next(p for net in self.state.nets.values() for p in net.parameters()).device

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser with the current weights."""
        return find_denoiser(self.objective, self.state.nets)

    @property
    def reference(self) -> Denoiser:
        """The denoiser with the weights before any reward."""
        return find_denoiser(self.objective, self.frozen)

    @property
    def auxiliary(self) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """Networks that are trained along but are not part of the model, with their optimizers, by name."""
        networks = {}
        if self.critic is not None and self.critic_optimizer is not None:
            networks["critic"] = (self.critic, self.critic_optimizer)
        if self.noise_optimizer is not None and isinstance(self.chain.sigma, nn.Module):
            networks["noise"] = (self.chain.sigma, self.noise_optimizer)
        return networks

    # ----------------------------------------------------------------------------------------------- trajectories
    @torch.no_grad()
    def draw_trajectories(self, z: Tensor, cond: Cond, noise: Noise | None) -> tuple[DenoisingTrajectory, Cond]:
        """Trajectories from normals ``z`` ``[B, *S]``, and their conditions, with what was chosen before the first
        step."""
        nets = self.state.nets
        with self.autocast():
            start = start_trajectories(self.objective, nets, z, cond, noise, self.chain)
            trajectory = self.chain.sample(start.denoise, start.x, start.cond, noise)
            if self.objective.chosen_condition not in (None, *cond):
                choice = self.objective.choice_log_probs(nets, start.cond, z)
                trajectory = trajectory._replace(choice=choice[None])
        return trajectory, start.cond

    def log_prob(
        self, trajectory: DenoisingTrajectory, cond: Cond, last: int | None = None, used: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities under the current weights of the choice before the first step, if there was one, and of the
        ``last`` steps (None: all): ``[choices + last, B]``. For ``used`` see :meth:`Chain.density`."""
        steps = self.chain.log_prob(self.denoiser, trajectory.xs, cond, last, used)
        if trajectory.choice is None:
            return steps
        log_probs = self.objective.choice_log_probs(self.state.nets, cond, trajectory.xs[0])
        return torch.cat([self.chosen(log_probs, cond)[None], steps])

    def chosen(self, log_probs: Tensor, cond: Cond) -> Tensor:
        """Of ``log_probs`` [B, A] those of the values that were chosen, ``[B]``."""
        assert self.objective.chosen_condition is not None
        return log_probs.gather(1, cond[self.objective.chosen_condition][:, None])[:, 0]

    def generator(self, *key: int) -> torch.Generator:
        """Random numbers for one purpose, on the CPU, the same on every rank."""
        return torch.Generator().manual_seed(seed_of(self.seed, *key))

    def draw_demos(self, n: int) -> Batch:
        """The next ``n`` demonstrations."""
        return Demonstrations(self).rows(0, n)

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    # ------------------------------------------------------------------------------------------------------ ranks
    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.accelerator.num_processes if self.accelerator else 1

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return self.accelerator.process_index if self.accelerator else 0

    def own_rows(self, n: int) -> slice:
        """This rank's share of ``n`` rows; ``n`` is a multiple of the number of ranks."""
        return slice(n // self.world * self.rank, n // self.world * (self.rank + 1))

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """The shares of all ranks, in order, along ``dim``."""
        if self.accelerator is None or self.world == 1:
            return x
        gathered = self.accelerator.gather(x.movedim(dim, 0).contiguous())
        assert isinstance(gathered, Tensor)
        return gathered.movedim(0, dim)

    def gather_objects(self, values: list[T]) -> list[T]:
        """The lists of all ranks as one, in order."""
        return gather_object(values) if self.world > 1 else values

    def sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks."""
        if self.accelerator is None or self.world == 1:
            return x
        total = self.accelerator.reduce(x, "sum")
        assert isinstance(total, Tensor)
        return total

    def shares(self, rows: Tensor) -> list[Share]:
        """This rank's part of ``rows``, in micro-batches."""
        demos, total = Demonstrations(self), len(rows)
        first, last = (total * r // self.world for r in (self.rank, self.rank + 1))
        counted = last > first
        if not counted:  # fewer rows than ranks: take part in the collective calls all the same
            first, last = min(first, total - 1), min(first, total - 1) + 1
        bounds = [(first + a, first + b) for a, b in split_batch(last - first, self.micro_batch)]
        return [Share(send(rows[a:b], self.device), a, b, total, self, demos, counted) for a, b in bounds]

    # --------------------------------------------------------------------------------------------------- learning
    def gradient_step(self, rows: Tensor, loss: ShareLoss, lr: float, clip: float = 1.0) -> Tensor:
        """One step of the optimizers and the averages on the mean of ``loss`` over ``rows``, Int [B].

        ``loss`` is called for each :class:`Share` of the rows. A gradient that is not finite skips the step. Returns
        the means that the losses report, over all rows and ranks, float64 on the CPU.
        """
        optimizer = self.state.optimizers[self.phase]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        noise = self.noise_optimizer
        noise_parameters = [p for group in noise.param_groups for p in group["params"]] if noise else []
        for p in [*parameters, *noise_parameters]:
            p.grad = None

        def cast_loss(share: Share) -> tuple[Tensor, Tensor]:
            with self.autocast():
                return loss(share)

        means = self.backward(self.shares(rows), cast_loss)

        # both networks step, or neither does
        bad = None
        norm = None
        if self.state.sharding:
            trains = next(phase.trains for phase in self.objective.phases if phase.name == self.phase)
            parameters, norm = self.state.sharding.take_gradients(self.state.nets, trains)
            norm = norm * self.world  # the shares' losses are parts of a sum, not terms of a mean
            for p in parameters:
                p.grad = None if p.grad is None else p.grad * self.world
        elif self.accelerator is not None:
            sum_gradients(parameters, self.accelerator)
        if noise and self.accelerator is not None:
            sum_gradients(noise_parameters, self.accelerator)
        if noise:
            bad = (~torch.isfinite(nn.utils.clip_grad_norm_(noise_parameters, clip))).float()
        _, bad = optimizer_step(optimizer, parameters, lr, clip, bad, norm)
        if noise and not bool(bad):
            noise.step()
        self.skipped.add(bad)
        for average in self.averages:
            average.update(1_000_000)  # from trained weights on there is nothing to forget
        return means

    def backward(self, shares: Sequence[Share], loss: ShareLoss) -> Tensor:
        """Accumulate the gradient of ``shares``; the means that the losses report, over all ranks."""
        states = random_states(self.device)
        total = torch.zeros((), dtype=torch.float64)
        for share in shares:
            restore_random_states(self.device, states)  # every share draws the numbers of all rows, and leaves some out
            value, means = loss(share)
            (value * share.weight).backward()
            total = total + means.detach().cpu().double() * share.weight
        return total if self.world == 1 else self.sum(total.to(self.device)).cpu()

    def gather_state(self) -> State:
        """The state with whole networks, also if ranks share them; all ranks call it."""
        self.drop_gathered()
        return self.state.gather(all_averages=True)

    def copy_network(self, name: str) -> nn.Module:
        """A frozen copy of a network, whole also if ranks share its weights; all ranks call it."""
        self.drop_gathered()
        net, sharding = self.state.nets[name], self.state.sharding
        copied = sharding.gather_network(name, net) if sharding else copy_for_ema(net)
        return copied.requires_grad_(False).eval()

    def drop_gathered(self) -> None:
        """Drop the weights that passes have gathered, if ranks share them."""
        if self.state.sharding:
            self.state.sharding.drop_gathered(self.state.nets)

    def refuse_divergence(self, limit: int) -> None:
        """Count the skipped steps; raise :class:`Diverged` after ``limit`` of them in a row."""
        self.state.skipped += self.skipped.take()
        streak = int(self.skipped.streak)
        if streak >= limit:
            raise Diverged(f"no finite gradient for {streak} steps in a row (try a lower --method.lr)")

    def fit_critic(self, obs: Tensor, returns: Tensor, generator: torch.Generator, epochs: int, batch: int) -> float:
        """Regress the critic onto ``returns`` [M]; the mean squared error of the last epoch, in units of its scale."""
        assert self.critic is not None and self.critic_optimizer is not None  # noqa: PT018
        critic, parameters = self.critic, list(self.critic.parameters())
        target, total = returns / critic.scale, 0.0

        def loss(share: Share) -> tuple[Tensor, Tensor]:
            error = (critic(obs[share.rows]) - target[share.rows]).square().mean()
            return error, error

        for _ in range(epochs):
            order, total = torch.randperm(len(obs), generator=generator), 0.0
            for rows in order.split(batch):
                self.critic_optimizer.zero_grad(set_to_none=True)
                error = self.backward(self.shares(rows), loss)
                if self.accelerator is not None:
                    sum_gradients(parameters, self.accelerator)
                nn.utils.clip_grad_norm_(parameters, 1.0)
                self.critic_optimizer.step()
                total += float(error) * len(rows) / len(obs)
        return total
