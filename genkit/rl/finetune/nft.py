"""DiffusionNFT (Zheng et al. 2025): the objective's own loss, towards good samples and away from bad ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genkit.config.numbers import Count, NonNegative, Positive
from genkit.core import Batch
from genkit.rl.finetune.advantages import normalize
from genkit.rl.finetune.experience import Experience, Task
from genkit.rl.finetune.learner import Learner, Share, random_states, restore_random_states
from genkit.rl.finetune.reward_method import RewardMethod


class Extrapolation(nn.Module):
    """``old + weight (new - old)`` of two networks' outputs; of the same shape, and linear in what they predict."""

    def __init__(self, old: nn.Module, new: nn.Module, weight: float):
        super().__init__()
        self.old, self.new, self.weight = old, new, weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            old = self.old(*args, **kwargs)
        return old + self.weight * (self.new(*args, **kwargs) - old)


@dataclass(frozen=True, kw_only=True)
class NFT(RewardMethod):
    """Negative-aware fine-tuning: with the probability r that a sample is good, its loss is ``r`` times that of the
    prediction ``old + beta (new - old)`` plus ``1 - r`` times that of ``old - beta (new - old)`` (eq. 5).

    ``old`` is the model that drew the samples. At the optimum the prediction is ``old + (1 / beta) E[(2 r - 1)
    (target - old) | x_t]``: towards the good samples and away from the bad by the same field (theorem 3.2). It needs
    no log-probabilities, so that samples may be drawn without exploration noise. The paper lets ``old`` follow slowly;
    here it is renewed in every iteration, as the old policy of PPO is.
    """

    lr: Positive = 1e-4
    """Learning rate of the networks."""
    batch: Count = 256
    """Rows of a gradient step."""
    epochs: Count = 1
    """Passes over the samples of an iteration."""
    beta: Positive = 1.0
    """Length of the step from the old prediction to the one that is trained; smaller moves the model further."""
    limit: Positive = 2.0
    """An advantage of so many standard deviations or more counts as certainly good, r = 1; minus as many as r = 0."""
    bc_coef: NonNegative = 0.0
    """Weight of the objective's own loss on demonstrations."""
    needs_log_prob: ClassVar[bool] = False

    def goodness(self, advantages: Tensor) -> Tensor:
        """The probability r in [0, 1] that each sample is good, ``[M]``; 1/2 for the average one."""
        return 0.5 + 0.5 * (normalize(advantages) / self.limit).clamp(-1, 1)

    def improve(self, learner: Learner, task: Task, experience: Experience, iteration: int) -> dict[str, float]:
        samples = Batch(experience.trajectory.xs[-1], experience.cond, self.goodness(experience.advantages))
        old = learner.copy_network("net")

        def loss(share: Share) -> tuple[Tensor, Tensor]:
            value = self.loss(learner, old, samples, share)
            bc_loss = share.bc_loss(self.bc_batch) / math.prod(learner.spec.shape) if self.bc_coef else 0.0
            return value + self.bc_coef * bc_loss, value

        return {"loss": self.learn_in_epochs(learner, len(samples.x), loss, iteration, self.epochs)}

    def loss(self, learner: Learner, old: nn.Module, samples: Batch, share: Share) -> Tensor:
        """The mean loss of the rows of ``samples``, whose weights are the probabilities r. A choice before the first
        step is made more likely by ``2 r - 1``, if that is positive."""
        rows = share.rows
        assert samples.weight is not None
        r, cond = samples.weight[rows], {k: v[rows] for k, v in samples.cond.items()}
        states, value = random_states(learner.device), torch.zeros((), device=learner.device)
        for sign, share_of_loss in ((1, r), (-1, 1 - r)):
            restore_random_states(learner.device, states)  # both at the same times and with the same noise
            net = Extrapolation(old, learner.state.nets["net"], sign * self.beta)
            batch = Batch(samples.x[rows], cond, draw=share.draw)
            loss = learner.objective.loss(learner.phase, {**learner.state.nets, "net": net}, batch)
            if loss.choice is None:
                value = value + (share_of_loss * loss.per_sample).mean()
            else:
                value = value + (share_of_loss * (loss.per_sample - loss.choice)).mean()
                if sign == 1:
                    value = value + ((2 * r - 1).clamp(min=0) * loss.choice).mean()
        return value
