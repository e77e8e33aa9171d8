"""KL divergences of chains against torch's."""

import torch

from genkit.diffusion.paths import Linear
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.divergence import gaussian_kl, trajectory_kl
from genkit.rl.finetune.noise import SDENoise
from tests.support.exact import F64


def test_divergence_is_the_normals():
    chain = Chain.on_grid(Linear(), 3, SDENoise(0.5), min_std=0.2)
    a, b = torch.randn(2, 3, 4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    got = trajectory_kl(chain, a, b, 2)
    law = torch.distributions.Normal
    want = sum(
        torch.distributions.kl_divergence(law(a[k], chain.transitions[k].std), law(b[k], chain.transitions[k].std)).sum(
            1
        )
        for k in (1, 2)
    )
    assert torch.allclose(got, want)


def test_divergence_of_normals_of_two_widths():
    law = torch.distributions.Normal
    g = torch.Generator().manual_seed(0)
    mean, other = torch.randn(2, 4, 3, generator=g, dtype=F64)
    std, wide = torch.rand(2, 4, 3, generator=g, dtype=F64) + 0.1
    want = torch.distributions.kl_divergence(law(mean, std), law(other, wide)).sum(1)
    assert torch.allclose(gaussian_kl(mean, std, other, wide), want)
    assert torch.allclose(
        gaussian_kl(mean, std[:, :1], other, std[:, :1]), (((mean - other) / std[:, :1]) ** 2).sum(1) / 2
    )
