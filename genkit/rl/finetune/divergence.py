"""KL divergences between a model before and after a change, along the denoising chain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkit.core import Denoiser
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.experience import Experience
from genkit.rl.finetune.learner import Learner


def compare_with_reference(learner: Learner, experience: Experience) -> tuple[Experience, dict[str, float]]:
    """The experience with the reference model's means and choice, and numbers for the log.

    These are ``kl_reference``, the KL divergence from it in nats per trajectory, of the weights that drew them, unless
    a step of the chain has no noise; and of a choice before the first step its part of that, ``kl_choice``, and its
    mean entropy, ``choice_entropy_bits``.
    """
    own = learner.own_rows(len(experience.advantages))
    with learner.autocast():
        means = step_means(learner.chain, learner.reference, experience, own)
        choice = reference_choice(learner, experience, own)
    reference = learner.gather(means, 1)
    experience = experience._replace(reference_means=reference)
    trajectory, logs = experience.trajectory, {}
    kl = torch.zeros_like(experience.advantages)
    if trajectory.choice is not None and choice is not None:
        experience = experience._replace(reference_choice=learner.gather(choice, 1))
        kl = categorical_kl(trajectory.choice[0], learner.gather(choice, 1)[0])
        entropy_bits = float(categorical_entropy(trajectory.choice[0]).mean()) / math.log(2)
        logs = {"kl_choice": float(kl.mean()), "choice_entropy_bits": entropy_bits}
    if all(step.std > 0 for step in learner.chain.transitions):
        kl = kl + trajectory_kl(learner.chain, trajectory.means, reference, stds=trajectory.stds)
        logs = {"kl_reference": float(kl.mean()), **logs}
    return experience, logs


@torch.no_grad()
def reference_choice(learner: Learner, experience: Experience, rows: slice = slice(None)) -> Tensor | None:
    """Log-probabilities ``[1, M, A]`` of the choice before the first step under the model before any reward, of some
    ``rows``; None if there is none."""
    if experience.trajectory.choice is None:
        return None
    cond = {k: v[rows] for k, v in experience.cond.items()}
    return learner.objective.choice_log_probs(learner.frozen, cond, experience.trajectory.xs[0, rows])[None]


@torch.no_grad()
def step_means(chain: Chain, denoise: Denoiser, experience: Experience, rows: slice = slice(None)) -> Tensor:
    """The means that ``denoise`` gives to the steps of these trajectories, or of some ``rows``: ``[K, M, *S]``."""
    xs, cond = experience.trajectory.xs[:, rows], {k: v[rows] for k, v in experience.cond.items()}
    return torch.stack([chain.mean_std(denoise, xs[k], k, cond)[0] for k in range(chain.steps)])


def trajectory_kl(
    chain: Chain, means: Tensor, others: Tensor, last: int | None = None, stds: Tensor | None = None
) -> Tensor:
    """KL divergence in nats, ``[M]``, of two distributions of the ``last`` steps (None: all) with means [K, M, *S].

    Both have the same deviations, ``stds`` [K, M, *S] or the chain's, so each step contributes
    ``|mean - other|^2 / (2 std^2)``, evaluated along the given trajectories.
    """
    first = chain.first_trained(last)
    std = chain.table(means)[3].reshape(-1, *(1,) * (means.ndim - 1)) if stds is None else stds
    return (((means - others) / std)[first:] ** 2).flatten(2).sum(2).sum(0) / 2


def categorical_kl(log_probs: Tensor, others: Tensor) -> Tensor:
    """KL divergence in nats, ``[B]``, of choices with log-probabilities ``log_probs`` [B, A] from ``others``."""
    return (log_probs.exp() * (log_probs - others)).sum(1)


def categorical_entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats, ``[B]``, of choices with log-probabilities ``log_probs`` [B, A]."""
    return -(log_probs.exp() * log_probs).sum(1)


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL divergence of ``N(mean, std^2)`` from ``N(other_mean, other_std^2)`` in nats, ``[B]`` for ``[B, *S]``."""
    square = ((mean - other_mean) / other_std) ** 2 + (std / other_std) ** 2
    return (0.5 * (square - 1) - (std / other_std).log()).expand_as(mean).flatten(1).sum(1)
