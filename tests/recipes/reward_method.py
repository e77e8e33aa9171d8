"""A reward method in one file and one line: REINFORCE (Williams 1992) on the denoising chain."""

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.rl.finetune.advantages import normalize
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.experience import Experience, Task
from genkit.rl.finetune.learner import Learner, Share
from genkit.rl.finetune.reward_method import RewardMethod


@dataclass(frozen=True, kw_only=True)
class Reinforce(RewardMethod):
    """Minimize ``-E[A sum_k log p(x_{k+1} | x_k)]`` (Williams 1992, eq. 4) by one gradient step an iteration.

    The gradient is unbiased under the weights that drew the trajectories only, so they are used once.
    """

    def check(self, chain: Chain, task: Task) -> None:
        chain.first_trained(None)  # refuses a step without noise, which has no log-probability

    def improve(self, learner: Learner, task: Task, experience: Experience, iteration: int) -> dict[str, float]:
        advantages = normalize(experience.advantages)

        def loss(share: Share) -> tuple[Tensor, Tensor]:
            trajectory = experience.trajectory.map(lambda v: v[:, share.rows])
            cond = {name: v[share.rows] for name, v in experience.cond.items()}
            log_prob = learner.log_prob(trajectory, cond, used=experience.used)
            value = -(advantages[share.rows] * log_prob.sum(0)).mean()
            return value, value

        return {"loss": float(learner.gradient_step(torch.arange(len(advantages)), loss, self.lr))}
