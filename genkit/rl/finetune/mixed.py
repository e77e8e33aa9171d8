"""The sum ``L_diffusion + weight L_RL``: the objective's own loss on demonstrations, minus the expected reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genkit.config.numbers import Count, NonNegative, Positive
from genkit.core import Cond, Denoiser, Noise
from genkit.rl.finetune.advantages import normalize
from genkit.rl.finetune.chain import Chain, seeded_noise, start_trajectories
from genkit.rl.finetune.dppo import clipped_surrogate
from genkit.rl.finetune.experience import Experience, Task
from genkit.rl.finetune.learner import Learner, Share
from genkit.rl.finetune.noise import unlearned_noises
from genkit.rl.finetune.reward_method import RewardMethod


@dataclass(frozen=True, kw_only=True)
class Mixed(RewardMethod):
    """One pass over fresh trajectories, each gradient step on the sum of both losses."""

    weight: NonNegative = 1.0
    """Lambda: weight of minus the expected reward, in units of its standard deviation, beside the objective's loss."""
    gradient: Literal["ratio", "through"] = "ratio"
    """Gradient of the expected reward: by the likelihood ratio (Williams 1992), or by backpropagation through the chain
    if the reward is a differentiable function (Clark et al. 2024)."""
    clip: Positive = 0.2
    """Largest change of a step's ratio from 1 within an iteration. Without it, bad samples are pushed away the harder
    the further they are: on four ways the success rate fell from 0.72 to 0 within one iteration."""
    ft_denoising_steps: Count | None = None
    """Train only this many last steps; None: all. With gradient through, this is truncation (DRaFT-K)."""

    def check(self, chain: Chain, task: Task) -> None:
        if self.gradient == "ratio":
            chain.first_trained(self.ft_denoising_steps)
        elif not task.differentiable:
            raise ValueError("method.gradient: given through, but an environment has no gradient; allowed: ratio")
        elif chain.sigma is not None:
            raise ValueError(
                f"exploration_noise: {chain.noise.name} is trained by the likelihood ratio; with gradient through: "
                f"{unlearned_noises()}"
            )

    def improve(self, learner: Learner, task: Task, experience: Experience, iteration: int) -> dict[str, float]:
        if self.gradient == "ratio":
            return self.by_ratio(learner, experience, iteration)
        return self.by_backpropagation(learner, task, experience, iteration)

    def by_ratio(self, learner: Learner, experience: Experience, iteration: int) -> dict[str, float]:
        """Minus ``A p(x_{k+1} | x_k) / p_drawn(x_{k+1} | x_k)``, clipped as in PPO; at unchanged weights its gradient
        is that of ``A log p``. Rows are whole trajectories, each used once."""
        chain, trajectory = learner.chain, experience.trajectory
        advantages = normalize(experience.advantages)
        first = chain.first_trained(self.ft_denoising_steps)
        drawn = torch.stack([self.drawn_log_prob(chain, experience, k) for k in range(first, chain.steps)])
        if trajectory.choice is not None:
            drawn = torch.cat([learner.chosen(trajectory.choice[0], experience.cond)[None], drawn])
        order = torch.randperm(len(advantages), generator=learner.generator(iteration, 2))
        total, steps = 0.0, 0

        def loss(share: Share) -> tuple[Tensor, Tensor]:
            m = share.rows
            cond = {name: v[m] for name, v in experience.cond.items()}
            log_prob = learner.log_prob(
                trajectory.map(lambda v: v[:, m]), cond, self.ft_denoising_steps, experience.used
            )
            surrogate = clipped_surrogate((log_prob - drawn[:, m]).exp(), advantages[m], self.clip)
            bc_loss = share.bc_loss(self.bc_batch)
            # the mean over steps: lambda then means the same for chains of any length
            return bc_loss - self.weight * surrogate.mean(), bc_loss

        for rows in order.split(max(1, self.batch // chain.steps)):
            total += float(learner.gradient_step(rows, loss, self.lr))
            steps += 1
        return {"diffusion_loss": total / max(1, steps)}

    @staticmethod
    def drawn_log_prob(chain: Chain, experience: Experience, k: int) -> Tensor:
        """``log p`` of step k of every trajectory under the weights that drew it, ``[M]``."""
        trajectory = experience.trajectory
        step = torch.full((len(experience.advantages),), k, device=trajectory.xs.device)
        std = None if trajectory.stds is None else trajectory.stds[k]
        return chain.density(trajectory.xs[k + 1], trajectory.means[k], step, experience.used, std)

    def by_backpropagation(
        self, learner: Learner, task: Task, experience: Experience, iteration: int
    ) -> dict[str, float]:
        """Minus the reward of new trajectories, differentiated through the chain. A choice before the first step has no
        derivative: it follows the likelihood ratio, with the mean reward as the baseline."""
        count = experience.trajectory.xs.shape[1]
        reward_std = float(experience.advantages.std(correction=0).clamp(min=1e-8))
        total, steps = 0.0, 0
        for i, first in enumerate(range(0, count, self.batch)):
            z, cond = task.draw(learner, iteration * 1_000_003 + i, min(self.batch, count - first))

            def loss(share: Share, i: int = i, z: Tensor = z, cond: Cond = cond) -> tuple[Tensor, Tensor]:
                noise = seeded_noise(len(z), learner.generator(iteration, 3, i), z.device, z.dtype, share.rows)
                own_cond = {name: v[share.rows] for name, v in cond.items()}
                start = start_trajectories(
                    learner.objective, learner.state.nets, z[share.rows], own_cond, noise, learner.chain
                )
                x = sample_differentiably(
                    learner.chain, start.denoise, start.x, start.cond, noise, self.ft_denoising_steps
                )
                bc_loss, rewards = share.bc_loss(self.bc_batch), task.reward(x, start.cond)
                value = rewards.mean()
                if learner.objective.chosen_condition not in (None, *own_cond):
                    choice = learner.objective.choice_log_probs(learner.state.nets, start.cond, start.x)
                    advantages = rewards.detach() - experience.logs["reward"]
                    value = value + (advantages * learner.chosen(choice, start.cond)).mean()
                return bc_loss - self.weight * value / reward_std, bc_loss

            total += float(learner.gradient_step(torch.arange(len(z)), loss, self.lr))
            steps += 1
        return {"diffusion_loss": total / max(1, steps)}


def sample_differentiably(
    chain: Chain, denoise: Denoiser, x: Tensor, cond: Cond, noise: Noise, last: int | None = None, save: bool = True
) -> Tensor:
    """The end of trajectories from ``x``, ``[B, *S]``, with the gradient of the ``last`` steps (None: all).

    ``save`` keeps only the points and recomputes each step in the backward pass: the memory of a single step.
    """
    first = chain.steps - (chain.steps if last is None else last)
    if first < 0:
        raise ValueError(f"ft_denoising_steps: given {last}; allowed 1 … {chain.steps}, the number of steps")
    for k in range(chain.steps):

        def step_mean(x: Tensor, k: int = k) -> Tensor:
            return chain.mean_std(denoise, x, k, cond)[0]

        with torch.set_grad_enabled(k >= first):
            recompute = save and k >= first
            mean = checkpoint(step_mean, x, use_reentrant=False) if recompute else step_mean(x)
            assert isinstance(mean, Tensor)
            std = chain.transitions[k].std
            x = mean + std * noise(x.shape[1:]) if std else mean
    return x
