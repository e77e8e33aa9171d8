"""How much better a decision was than what was expected: credit over environment steps and over denoising steps."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, after: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantages (Schulman et al. 2016, eq. 16) of T decisions in N worlds; all are ``[T, N]``.

    ``values`` are those of the observations decided on, ``after`` those of what came of it, *before* any reset: where
    a time limit cut an episode (``ended`` but not ``terminated``) its last state still has a value, and is
    bootstrapped from (Pardo et al. 2018); where it terminated, it has none. Nothing is carried over an ``ended`` row,
    whose next decision belongs to another episode. The last decision is bootstrapped from ``after`` too.
    """
    future = after * (1 - terminated.to(after))
    delta = rewards + gamma * future - values
    goes_on = 1 - ended.to(after)
    found, carried = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        carried = delta[t] + gamma * lam * goes_on[t] * carried
        found[t] = carried
    return found


def over_steps(last: int, gamma: float) -> Tensor:
    """``gamma^(K - 1 - k)`` of the ``last`` of K denoising steps, ``[last]``: earlier ones have less to do with what
    came of it (Ren et al. 2024)."""
    return gamma ** torch.arange(last - 1, -1, -1, dtype=torch.float64)


def normalised(advantages: Tensor, least: float = 1e-8) -> Tensor:
    """Mean 0 and deviation 1, over all of them; those that are all alike become 0."""
    centred = advantages - advantages.mean()
    return centred / centred.std(correction=0).clamp(min=least)


def trimmed(advantages: Tensor, share: float) -> Tensor:
    """Those beyond the ``share`` and ``1 - share`` quantiles become these: an episode that is lost, once in a hundred
    decisions, would set the unit of all others (DPPO's code, Ren et al. 2024, cuts at quantiles too). 0: as they are.
    """
    if not share:
        return advantages
    low, high = torch.quantile(advantages, torch.tensor([share, 1 - share]).to(advantages))
    return advantages.clamp(low, high)


def of_groups(rewards: Tensor, groups: Tensor, least: float = 1e-8) -> Tensor:
    """``(R - mean) / std`` within each group of samples of one condition (GRPO: Shao et al. 2024).

    ``rewards`` and ``groups`` (Int, from 0) are ``[B]``. A group whose rewards are alike teaches nothing: 0.
    """
    num = int(groups.max()) + 1
    count = torch.bincount(groups, minlength=num).to(rewards)
    mean = torch.zeros(num).to(rewards).index_add(0, groups, rewards) / count.clamp(min=1)
    away = rewards - mean[groups]
    var = torch.zeros(num).to(rewards).index_add(0, groups, away**2) / count.clamp(min=1)
    return away / var.sqrt().clamp(min=least)[groups]
