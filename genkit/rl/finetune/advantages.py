"""Advantages: how much better a decision was than expected; credit over environment steps and over denoising steps."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    ended: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, eq. 16) of T decisions in N environments, ``[T, N]``.

    ``values`` are those of the observations decided on, ``next_values`` those of the observations that followed,
    *before* any reset: if a time limit cut an episode (``ended`` but not ``terminated``), its last state still has a
    value to bootstrap from (Pardo et al. 2018); if it terminated, it has none. Nothing is carried over an ``ended``
    row, since the next decision belongs to another episode. The last decision is bootstrapped from ``next_values``.
    """
    future = next_values * (1 - terminated.to(next_values))
    delta = rewards + gamma * future - values
    continues = 1 - ended.to(next_values)
    advantages, following = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        following = delta[t] + gamma * gae_lambda * continues[t] * following
        advantages[t] = following
    return advantages


def denoising_discounts(last: int, gamma: float) -> Tensor:
    """``gamma^(K - 1 - k)`` for the ``last`` of K denoising steps, float64 ``[last]``: earlier steps matter less for
    the outcome (Ren et al. 2024)."""
    return gamma ** torch.arange(last - 1, -1, -1, dtype=torch.float64)


def normalize(advantages: Tensor, min_std: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1; equal advantages become 0."""
    centred = advantages - advantages.mean()
    return centred / centred.std(correction=0).clamp(min=min_std)


def clip_quantiles(advantages: Tensor, quantile: float) -> Tensor:
    """Clip to the range from ``quantile`` to ``1 - quantile`` (0: unchanged), as DPPO's code does (Ren et al. 2024):
    otherwise one failed episode in a hundred decisions sets the scale of all the others."""
    if not quantile:
        return advantages
    low, high = torch.quantile(advantages, torch.tensor([quantile, 1 - quantile]).to(advantages))
    return advantages.clamp(low, high)


def group_advantages(rewards: Tensor, groups: Tensor, min_std: float = 1e-8) -> Tensor:
    """``(R - mean) / std`` within each group of samples of one condition (GRPO: Shao et al. 2024).

    ``rewards`` and ``groups`` (Int, from 0) are ``[B]``. A group of equal rewards gives 0: it teaches nothing.
    """
    num = int(groups.max()) + 1
    count = torch.bincount(groups, minlength=num).to(rewards)
    mean = torch.zeros(num).to(rewards).index_add(0, groups, rewards) / count.clamp(min=1)
    centred = rewards - mean[groups]
    var = torch.zeros(num).to(rewards).index_add(0, groups, centred**2) / count.clamp(min=1)
    return centred / var.sqrt().clamp(min=min_std)[groups]
