"""Rewards of models of latents: they see decoded samples, and their gradient goes through the decoder."""

import pytest
import torch
from torch import nn

from genkit import finetune, train
from genkit.backbones import MLP
from genkit.core import Batch, Spec
from genkit.data.codecs import Identity, Pixels, decode_smoothly
from genkit.evaluation.metrics import Moments, frechet_distance
from genkit.evaluation.metrics.frechet import frechet_contributions
from genkit.evaluation.trained_features import trained_features
from genkit.objectives import VQ, Autoencoder
from genkit.rl.finetune.direct import Direct
from genkit.rl.finetune.frechet_reward import FrechetReward, load_frechet
from genkit.rl.finetune.settings import FinetuneSettings
from genkit.rl.finetune.setup import build_learner, build_steps
from genkit.rl.finetune.tasks import FunctionTask
from genkit.training.first_stage import LatentCodec, run_stage
from genkit.training.latent_cache import encode
from tests.support.exact import F64

SMALL = {"name": "mlp", "width": 16, "depth": 1}


class Rotation(nn.Module):
    """``z`` to ``z W^T``, orthonormal."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(4))).Q)

    def forward(self, z, cond=None):
        return z @ self.weight.T


def rotated(dim, mean, std):
    """A codec of latents whose decoder is a rotation."""
    nets = {"encoder": nn.Identity(), "decoder": Rotation(dim)}
    return LatentCodec(
        run_stage("rotation", Autoencoder(latent=(dim,)), None, nets, Spec((dim,)), Identity()), mean, std
    )


def test_the_distance_and_its_gradient_are_those_of_unscaled_latents_if_the_decoder_is_a_rotation():
    """The Fréchet distance does not change by a rotation of both sides."""
    mean, std = (0.5, -1.0, 2.0), (2.0, 0.5, 1.5)
    codec = rotated(3, mean, std)
    g = torch.Generator().manual_seed(0)
    real = torch.randn(400, 3, generator=g) @ torch.randn(3, 3, generator=g) + 1
    z = torch.randn(50, 3, generator=g).requires_grad_()
    reward = FrechetReward(nn.Flatten(), Moments.of(codec.stage.decode(real)))
    task = FunctionTask(reward, "frechet", codec, 50, 1)
    total = task.reward(z, {}).mean()
    (gradient,) = torch.autograd.grad(total, z)
    w = z.detach().to(F64).requires_grad_()
    expected = -frechet_contributions(w * torch.tensor(std, dtype=F64) + torch.tensor(mean, dtype=F64),
                                      Moments.of(real.to(F64))).mean()  # fmt: skip
    (closed,) = torch.autograd.grad(expected, w)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert torch.allclose(gradient.to(F64), closed, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["ae", "vq"])
def test_pictures_are_decoded_without_rounding_and_with_a_gradient(kind):
    torch.manual_seed(0)
    objective = Autoencoder(latent=(3, 2, 2)) if kind == "ae" else VQ(latent=(3, 2, 2), codebook_size=9)
    spec, backbone = Spec((1, 8, 8)), MLP(width=16, depth=1)
    nets = objective.networks(backbone, spec)
    for p in nets["decoder"].parameters():
        nn.init.normal_(p, std=0.3)
    codec = LatentCodec(run_stage("stage", objective, backbone, nets, spec, Pixels()), (0.0,) * 3, (1.0,) * 3)
    z = torch.randn(5, 3, 2, 2).requires_grad_()
    smooth, exact = decode_smoothly(codec, z), codec.decode(z.detach())
    assert exact.dtype == torch.uint8
    assert 10 < float(exact.float().std()) < 120  # neither all grey nor all clipped
    assert torch.equal((smooth.detach() * 255).round().to(torch.uint8), exact)
    (gradient,) = torch.autograd.grad(smooth.sum(), z)
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
    x = torch.tensor([[-2.0, 0.0, 1.0]])
    assert decode_smoothly(Pixels(), x).tolist() == [[0.0, 0.5, 1.0]]
    assert decode_smoothly(Identity(), x) is x


QUIET = {"workers": 0, "tensorboard": False, "sample_every": 0, "ema": (0.9,), "backbone": SMALL, "batch": 64}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A VAE of the digits."""
    return train(objective={"name": "vae", "latent": (3, 2, 2), "beta": 0.1}, data={"name": "digits", "labels": False},
                 steps=60, lr=3e-3, out=str(tmp_path_factory.mktemp("stage")), **QUIET)  # fmt: skip


@pytest.fixture(scope="module")
def latent_map(stage, tmp_path_factory):
    """A flow map on its latents."""
    return train(objective="flow-map", data="digits", codec=str(stage.directory), steps=40,
                 out=str(tmp_path_factory.mktemp("map")), **QUIET)  # fmt: skip


def test_decoded_samples_of_latents_come_nearer_to_the_data(latent_map, tmp_path):
    base = latent_map
    run = finetune(base, reward="frechet:raw", method={"lr": 3e-3, "population": 512}, samples=128, iterations=25,
                   eval_samples=200, tensorboard=False, out=str(tmp_path), ema=0.0)  # fmt: skip
    real = Moments.of(base.config.data.load("train").x.float().flatten(1) / 255)
    before, after = (
        frechet_distance(Moments.of(r.sample(500, seed=10**6).x.float().flatten(1) / 255), real) for r in (base, run)
    )
    assert after < 0.88 * before, (before, after)
    assert trained_features(run.directory) == ["raw"]
    assert run.codec.stage.sha256 == base.codec.stage.sha256
    assert "precision" in run.after  # of decoded pictures, which the data have a classifier for


@pytest.mark.slow
def test_cached_latents_are_rewarded_and_rehearsed_as_the_samples_that_they_are_of(stage, latent_map, tmp_path):
    encode(str(stage.directory), out=tmp_path / "cache", data="digits")
    cached = train(objective="flow-map", data={"name": "latents", "root": str(tmp_path / "cache")}, steps=1,
                   out=str(tmp_path), **QUIET)  # fmt: skip
    one, other = (load_frechet("frechet:raw", run).reference for run in (latent_map, cached))
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.scatter, other.scatter)
    for run in (latent_map, cached):
        settings = FinetuneSettings(reward="frechet:raw", method=Direct())
        learner = build_learner(settings, run, build_steps(settings, run), needs_critic=False)
        rows = learner.draw_demos(64)
        assert isinstance(rows, Batch)
        assert rows.x.shape == (64, 3, 2, 2)
        assert 0.7 < float(rows.x.std()) < 1.3
