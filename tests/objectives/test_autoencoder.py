"""Autoencoders: plain, denoising and sparse, against linear closed forms."""

import math

import pytest
import torch

from genkit.core import Spec
from genkit.objectives import Autoencoder
from genkit.objectives.autoencoders.autoencoder import keep_largest, sparseness
from tests.support.exact_latent import Linear
from tests.support.objectives import batch_of, normal_data, train


def test_a_linear_autoencoder_learns_the_principal_subspace():
    """What it misses are the eigenvalues left out (Baldi & Hornik 1989)."""
    x = normal_data()
    objective = Autoencoder(latent=(3,))
    nets = train(objective, Linear(), x, Spec((5,)), 500)
    rest = torch.linalg.eigvalsh(torch.cov(x.T))[:2].sum() / 5
    error = float(objective.loss("reconstruct", nets, batch_of(x)).logs["error"].detach())
    assert float(rest) * 0.98 < error < float(rest) * 1.05
    back = objective.reconstruct(nets, batch_of(x)).detach()
    assert float((back - x).square().mean()) == pytest.approx(error, rel=1e-5)


def test_a_denoising_autoencoder_sees_corrupted_samples_and_reconstructs_clean_ones():
    x = torch.ones(20_000, 4)
    noisy = Autoencoder(noise_std=0.5).corrupt(batch_of(x))
    assert float(noisy.std()) == pytest.approx(0.5, rel=0.02)
    assert float(noisy.mean()) == pytest.approx(1, abs=0.02)
    masked = Autoencoder(mask_prob=0.3).corrupt(batch_of(x))
    assert float((masked == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert set(masked.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(Autoencoder().corrupt(batch_of(x)), x)
    echo = {"encoder": lambda x, cond: x, "decoder": lambda z, cond: z}
    loss = Autoencoder(latent=(4,), noise_std=0.5).loss("reconstruct", echo, batch_of(x))
    assert float(loss.per_sample.mean()) == pytest.approx(0.25, rel=0.03)
    l1 = Autoencoder(latent=(4,), noise_std=0.5, reconstruction_loss="l1").loss("reconstruct", echo, batch_of(x))
    assert float(l1.per_sample.mean()) == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=0.03)


def test_a_linear_denoising_autoencoder_is_the_wiener_filter():
    """Its best map shrinks each principal direction by s^2 / (s^2 + noise^2); what is left, s^2 noise^2 / (s^2 +
    noise^2), is all that even a full code can do."""
    x = normal_data()
    nets = train(Autoencoder(latent=(5,), noise_std=0.5), Linear(), x, Spec((5,)), 400)
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    best = float((values * 0.25 / (values + 0.25)).mean())
    error = Autoencoder(latent=(5,), noise_std=0.5).loss("reconstruct", nets, batch_of(x, seed=9)).logs["error"]
    assert best * 0.98 < float(error.detach()) < best * 1.05


def test_sparse_codes():
    z = torch.tensor([[1.0, 1, 1, 1], [0, -3, 0, 0], [3, 4, 0, 0]])
    assert torch.allclose(sparseness(z), torch.tensor([0.0, 1.0, 2 - 1.4]))
    assert torch.allclose(sparseness(7 * z), sparseness(z))
    z = torch.tensor([[[1.0, -5.0], [3.0, 2.0]]])
    assert torch.equal(keep_largest(z, 2), torch.tensor([[[0.0, -5.0], [3.0, 0.0]]]))
    x = normal_data(2000)
    codes = {}
    for objective in (
        Autoencoder(latent=(8,)),
        Autoencoder(latent=(8,), sparsity_weight=1.0),
        Autoencoder(latent=(8,), top_k=2),
    ):
        nets = train(objective, Linear(), x, Spec((5,)), 200)
        codes[objective] = objective.encode(nets, x).mean.detach()
    plain, sparse, top = codes.values()
    assert float(sparseness(sparse).mean()) > float(sparseness(plain).mean()) + 0.2
    assert bool(((top != 0).sum(1) == 2).all())
