"""Advantages by hand: over environment steps, denoising steps, groups and quantiles."""

import math

import numpy as np
import pytest
import torch

from genkit.rl.finetune.advantages import clip_quantiles, denoising_discounts, gae, group_advantages, normalize
from tests.support.exact import F64


def t(*rows):
    return torch.tensor(rows, dtype=F64)


def test_gae_by_hand():
    """Three worlds of three decisions; gamma 0.5, lambda 0.5. Deltas written out, then summed by hand."""
    rewards = t([1, 1, 1], [2, 2, 2], [4, 4, 4])
    values = t([1, 1, 1], [2, 2, 2], [3, 3, 3])
    after = t([2, 8, 8], [3, 3, 3], [4, 4, 4])
    ended = t([0, 1, 1], [0, 0, 0], [0, 0, 0]).bool()
    terminated = t([0, 1, 0], [0, 0, 0], [0, 0, 0]).bool()
    got = gae(rewards, values, after, terminated, ended, 0.5, 0.5)
    # deltas: third 4 + 2 - 3 = 3; second 2 + 1.5 - 2 = 1.5; first 1 + 1 - 1 = 1, or 0 terminated, or 1 + 4 - 1 cut
    second = 1.5 + 0.25 * 3
    assert torch.equal(got[2], t(3, 3, 3))
    assert torch.equal(got[1], t(second, second, second))
    assert torch.equal(got[0], t(1 + 0.25 * second, 0, 4))


def test_nothing_leaks_across_a_reset():
    g = torch.Generator().manual_seed(0)
    r, v, w = (torch.randn(6, 3, generator=g, dtype=F64) for _ in range(3))
    ended = torch.zeros(6, 3, dtype=torch.bool)
    ended[2] = True
    other = r.clone()
    other[3:] += 100
    for terminated in (ended, torch.zeros_like(ended)):
        a, b = (gae(x, v, w, terminated, ended, 0.9, 0.9) for x in (r, other))
        assert torch.equal(a[:3], b[:3])
        assert not torch.equal(a[3:], b[3:])


def test_lambda_one_is_the_discounted_sum():
    g = torch.Generator().manual_seed(0)
    r, v = (torch.randn(5, 2, generator=g, dtype=F64) for _ in range(2))
    none = torch.zeros(5, 2, dtype=torch.bool)
    last = torch.randn(1, 2, generator=g, dtype=F64)
    got = gae(r, v, torch.cat([v[1:], last]), none, none, 0.9, 1.0)
    powers = 0.9 ** torch.arange(5, dtype=F64)[:, None]
    assert torch.allclose(got[0], (powers * r).sum(0) + 0.9**5 * last[0] - v[0])


def test_denoising_steps_are_discounted_from_the_last():
    assert torch.equal(denoising_discounts(3, 0.5), t(0.25, 0.5, 1))


def test_advantages_are_normalized_over_all_and_within_groups():
    x = t(1, 2, 3, 6)
    assert math.isclose(float(normalize(x).mean()), 0, abs_tol=1e-15)
    assert math.isclose(float(normalize(x).std(correction=0)), 1)
    assert torch.equal(normalize(t(2, 2)), t(0, 0))
    got = group_advantages(t(1, 10, 3, 10, 5), torch.tensor([0, 1, 0, 1, 0]))
    assert torch.allclose(got, t(-1, 0, 0, 0, 1) * 1.5**0.5)


def test_rare_advantages_are_clipped_to_the_quantiles():
    a = torch.cat([torch.linspace(-1, 1, 201, dtype=F64), torch.tensor([-500.0], dtype=F64)])
    cut = clip_quantiles(a, 0.05)
    low, high = np.quantile(a.numpy(), [0.05, 0.95])
    assert cut.numpy() == pytest.approx(a.numpy().clip(low, high))
    assert float(normalize(cut).max()) > 1.4  # beside the fall, uncut: 0.08
    assert clip_quantiles(a, 0.0) is a
