"""VAEs against the linear Gaussian model's closed form; likelihoods, autoencoders and codebooks against theirs."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import scipy.stats
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal, kl_divergence

from genkit.backbones import MLP, DiT, UNet
from genkit.cli import main as cli
from genkit.core import Batch, Draw, Label, Spec
from genkit.data import DATA
from genkit.diffusion.samplers import Seeds, dequantise
from genkit.evaluation.likelihoods import LATENT_KEY
from genkit.objectives import OBJECTIVES, VAE, VQ, Autoencoder
from genkit.objectives.autoencoders.autoencoder import Posterior, largest, sparseness
from genkit.objectives.autoencoders.likelihoods import LIKELIHOODS, Bernoulli, DiscretisedLogistic, Emission, Gaussian
from genkit.objectives.autoencoders.vq import Codebook, perplexity, straight_through
from genkit.training.directory import read_log
from genkit.training.loop import phase_parameters
from genkit.training.run import load_run
from tests.support.exact_latent import F64, Linear, LinearGaussian, principal

LATENT = 3


def batch_of(x, seed=0, **more):
    return Batch(x, draw=Draw((seed,), 0, len(x)), **more)


# ------------------------------------------------------------------------------------ the bound, in closed form
def test_the_elbo_is_the_evidence_under_the_true_posterior():
    """Every weight p(x | z) p(z) / q(z | x) is p(x) then: both bounds are exact for each sample, at any draw."""
    model = LinearGaussian.random(5, LATENT, 0.4, orthogonal=True)
    x = model.law().sample((50,))
    for samples in (1, 5):
        got = VAE(latent=(LATENT,)).bounds(model.networks(), batch_of(x), samples)
        assert torch.allclose(got.elbo, model.law().log_prob(x), atol=1e-10)
        assert torch.allclose(got.iwae, model.law().log_prob(x), atol=1e-10)


@pytest.mark.parametrize("how", [{}, {"shift": 0.3}, {"stretch": 1.5}])
def test_the_elbo_is_short_of_the_evidence_by_the_kl_of_the_posterior(how):
    model = LinearGaussian.random(5, LATENT, 0.4, orthogonal=False)
    x = model.law().sample((4,)).repeat_interleave(4000, 0)
    truth = model.law().log_prob(x[::4000]) - model.gap(x[::4000], **how)
    objective = VAE(latent=(LATENT,))
    loss = objective.loss(
        "vae", model.networks(**how), batch_of(x)
    ).per_sample  # nats a dimension, with the KL's formula
    for got in (objective.bounds(model.networks(**how), batch_of(x, 1), 2).elbo, -loss * 5):
        each = got.unflatten(0, (4, 4000))
        assert float(((each.mean(1) - truth) / (each.std(1) / math.sqrt(4000))).abs().max()) < 3.5
    assert float(model.gap(x[::4000], **how).min()) > 0.1


def test_the_importance_weighted_bound_rises_to_the_evidence():
    model = LinearGaussian.random(5, LATENT, 0.4, orthogonal=False)
    x = model.law().sample((400,))
    short = []
    for samples in (1, 4, 16, 64, 1000):
        got = VAE(latent=(LATENT,)).bounds(model.networks(stretch=1.3), batch_of(x), samples)
        assert bool((got.iwae >= got.elbo - 1e-12).all())
        short.append(float((model.law().log_prob(x) - got.iwae).mean()))
    assert all(a > 1.5 * b for a, b in pairwise(short)), short
    assert short[0] == pytest.approx(float(model.gap(x, stretch=1.3).mean()), rel=0.1)
    assert abs(short[-1]) < 0.02 * short[0]


def test_draws_depend_on_the_row_alone():
    model = LinearGaussian.random(5, LATENT, 0.4, orthogonal=False)
    x = model.law().sample((20,))
    whole = VAE(latent=(LATENT,)).bounds(model.networks(), batch_of(x), 20)
    part = VAE(latent=(LATENT,)).bounds(model.networks(), Batch(x[7:], draw=Draw((0,), 7, 20)), 20)
    assert torch.allclose(whole.iwae[7:], part.iwae)
    assert torch.allclose(whole.elbo[7:], part.elbo)


def train(objective, backbones, data, spec, steps, size=256, lr=1e-2, cond=None, seed=0, clip=math.inf):
    torch.manual_seed(seed)
    nets = objective.networks(backbones, spec)
    parameters = [p for phase in objective.phases for _, p in phase_parameters(phase, nets)]
    opt = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    g = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(data), (size,), generator=g)
        chosen = {k: v[rows] for k, v in (cond or {}).items()}
        batch = Batch(data[rows], chosen, draw=Draw((seed, step), 0, size), step=step)
        loss = objective.loss(objective.phases[0].name, nets, batch)
        opt.zero_grad()
        loss.per_sample.mean().backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        opt.step()
        schedule.step()
        objective.after_step(nets, step)
    return nets


def normal_data(n=20_000):
    """Normal in five dimensions, three of them wide and two narrow."""
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(4))).Q
    spread = torch.tensor([2.0, 1.5, 1.0, 0.4, 0.2])
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(5)) * spread @ turn.T


def test_a_linear_vae_learns_the_principal_components():
    """It reaches the likelihood and the noise of Tipping & Bishop's closed form (Lucas et al. 2019, theorem 1)."""
    x = normal_data()
    objective = VAE(latent=(3,), likelihood=Gaussian(std=1.0))
    nets = train(objective, Linear(), x, Spec((5,)), 600, lr=3e-2)
    std, evidence = principal(torch.cov(x.T).double(), 3)
    assert float(nets["decoder"](torch.zeros(1, 3)).log_scale.detach().exp().mean()) == pytest.approx(std, rel=0.03)
    assert float(objective.bounds(nets, batch_of(x), 4).elbo.mean()) == pytest.approx(evidence, abs=0.01)
    assert float(objective.loss("vae", nets, batch_of(x[:2000])).logs["active_units"]) == 3


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


def test_kl_is_that_of_torch():
    q = Posterior(torch.randn(4, 2, 3, dtype=F64), torch.randn(4, 2, 3, dtype=F64))
    prior = Normal(torch.zeros(4, 2, 3, dtype=F64), 1.0)
    assert torch.allclose(q.kl(), kl_divergence(Normal(q.mean, (q.log_var / 2).exp()), prior))
    z = torch.randn(4, 2, 3, dtype=F64)
    assert torch.allclose(q.draw(z), q.mean + z * q.log_var.exp().sqrt())


# -------------------------------------------------------------------------------------------------- likelihoods
def test_the_gaussian_likelihood_is_torch_s():
    at, x = torch.randn(2, 3, 1, 4, 4, dtype=F64)
    for log_scale in (torch.full((1, 1, 4, 4), -0.7, dtype=F64), torch.tensor(0.3, dtype=F64), torch.randn_like(at)):
        truth = Normal(at, log_scale.exp().expand_as(at)).log_prob(x).sum((1, 2, 3))
        assert torch.allclose(Gaussian().log_prob(Emission(at, log_scale), x), truth)


def test_the_bernoulli_likelihood_is_torch_s():
    logits, pixel = 3 * torch.randn(5, 1, 4, 4, dtype=F64), (torch.rand(5, 1, 4, 4) < 0.5).to(F64)
    said = Emission(logits, torch.zeros(()))
    truth = TorchBernoulli(logits=logits)
    assert torch.allclose(Bernoulli().log_prob(said, 2 * pixel - 1), truth.log_prob(pixel).sum((1, 2, 3)))
    assert torch.allclose((Bernoulli().mean(said) + 1) / 2, truth.mean)


@pytest.mark.parametrize("std", [0.004, 0.05, 1.0])
def test_the_discretised_logistic_is_a_law_of_256_levels(std):
    """Its 256 masses sum to 1 and are differences of scipy's distribution function, also far from the location."""
    levels = (torch.arange(256, dtype=F64) / 127.5 - 1)[:, None]
    for at in (-1.3, -1.0, 0.1234, 0.9):
        said = Emission(torch.full_like(levels, at), torch.tensor(std, dtype=F64).log())
        log_p = DiscretisedLogistic().log_prob(said, levels)
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)
        edges = torch.cat([torch.tensor([-math.inf]), (torch.arange(255, dtype=F64) + 0.5) / 127.5 - 1, torch.tensor(
            [math.inf])])  # fmt: skip
        below, above = (scipy.stats.logistic(at, std).cdf(e.numpy()) for e in (edges[:-1], edges[1:]))
        assert torch.allclose(log_p.exp(), torch.as_tensor(above - below), atol=1e-13)
        # in the tails the distribution function is 0 or 1 to the last bit; the law is exponential there
        if std < 0.1:
            slope = log_p[250:253].diff() if at < 0 else log_p[3:6].diff()
            assert torch.allclose(slope.abs(), torch.full((2,), 2 / 255 / std, dtype=F64), rtol=1e-6)


def test_grey_pixels_are_made_black_or_white():
    grey = torch.tensor([-1.0, -0.5, 0.0, 0.6, 1.0]).expand(40_000, 1, 1, 5)
    drawn = Bernoulli().prepare(batch_of(grey))
    assert sorted(drawn.unique().tolist()) == [-1, 1]
    share = (drawn > 0).float().mean((0, 1, 2))
    assert torch.allclose(share, torch.tensor([0.0, 0.25, 0.5, 0.8, 1.0]), atol=0.01)
    assert share[0] == 0
    assert share[4] == 1
    sharp = Bernoulli("threshold").prepare(batch_of(grey))
    assert torch.equal(sharp[0].flatten(), torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0]))


@pytest.mark.parametrize("scale", ["fixed", "shared", "each"])
def test_a_scale_starts_where_it_is_told_and_learns_where_it_may(scale):
    for law in (Gaussian(0.3, scale), DiscretisedLogistic(0.3, scale)):
        net = law.emitter(MLP(width=8), Spec((2, 4, 4)), (3,))
        said = net(torch.randn(6, 3))
        assert said.at.shape == (6, 2, 4, 4)
        assert float(said.log_scale.detach().exp().mean()) == pytest.approx(0.3, rel=0.2 if scale == "each" else 0.02)
        law.log_prob(said, torch.zeros(6, 2, 4, 4)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        assert (net.log_scale is not None) == (scale == "shared")
    big = net(1000 * torch.randn(6, 3))
    assert float(big.log_scale.detach().exp().min()) >= 1 / 255 * 0.999


# ------------------------------------------------------------------------------------------------ what it pays
def losses(objective, step=None, n=40):
    torch.manual_seed(0)
    nets = objective.networks(MLP(width=16, depth=1), Spec((4,)))
    return objective.loss("vae", nets, batch_of(torch.randn(n, 4), step=step)), nets


def test_beta_weighs_the_kl_term_and_rises():
    base, _ = losses(VAE(beta=0))
    for beta, anneal, step, share in [
        (1, 0, 0, 1),
        (3, 0, None, 3),
        (1, 100, 0, 0),
        (2, 100, 25, 0.5),
        (2, 100, 400, 2),
    ]:
        loss, _ = losses(VAE(beta=beta, anneal=anneal), step)
        assert float((loss.per_sample - base.per_sample).detach().mean()) * 4 == pytest.approx(
            share * float(base.logs["kl"].detach()), abs=1e-5
        )
        assert float(loss.logs["neg_elbo"].detach()) == pytest.approx(
            float((base.logs["kl"] + base.logs["reconstruction"]).detach()), abs=1e-5
        )
    assert torch.equal(losses(VAE(anneal=50))[0].per_sample, losses(VAE())[0].per_sample)  # outside training: the end


def test_free_bits_cost_nothing_and_pull_at_nothing():
    free, nets = losses(VAE(beta=1, free_bits=50.0))
    base, _ = losses(VAE(beta=0))
    assert torch.allclose(free.per_sample, base.per_sample + 50 * 16 / 4)
    slope = torch.autograd.grad(free.per_sample.sum(), nets["encoder"].last.weight)[0]
    alone, nets = losses(VAE(beta=0))
    assert torch.allclose(slope, torch.autograd.grad(alone.per_sample.sum(), nets["encoder"].last.weight)[0])
    part, _ = losses(VAE(free_bits=0.05))
    assert bool((part.per_sample >= losses(VAE())[0].per_sample).all())


def test_collapse_is_seen_and_said():
    class Net(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x, cond=()):
            mean = torch.cat([x * self.scale, torch.zeros(len(x), 3)], 1)
            return torch.cat([mean, torch.zeros_like(mean)], 1)

    objective = VAE(latent=(5,))
    decoder = objective.likelihood.emitter(MLP(width=8), Spec((2,)), (5,))
    for scale, units in ((1.0, 2), (0.05, 0), (0.2, 2)):  # means of variance 0.01 and less are not active
        logs = objective.loss("vae", {"encoder": Net(scale), "decoder": decoder}, batch_of(torch.randn(3000, 2))).logs
        assert float(logs["active_units"]) == units
        record = {"step": 600, "vae/kl": float(logs["kl"]), "vae/active_units": float(logs["active_units"])}
        said = objective.warning(record)
        assert (said is not None) == (units == 0)
        assert objective.warning({**record, "step": 100}) is None
    objective = replace(objective, anneal=1000)
    assert objective.warning({"step": 600, "vae/kl": 0.0, "vae/active_units": 0.0}) is None
    assert "collapse" in objective.warning({"step": 1600, "vae/kl": 0.0, "vae/active_units": 0.0})


def test_a_heavy_kl_term_collapses_a_real_training():
    x = normal_data(2000)
    nets = {b: train(VAE(latent=(3,), beta=b), Linear(), x, Spec((5,)), 150) for b in (1.0, 300.0)}
    logs = {b: VAE(latent=(3,), beta=b).loss("vae", n, batch_of(x)).logs for b, n in nets.items()}
    assert float(logs[1.0]["active_units"]) == 3
    assert float(logs[300.0]["active_units"]) == 0


# --------------------------------------------------------------------------------------------- networks, shapes
@pytest.mark.parametrize("latent", [(6,), (4, 4, 4)])
@pytest.mark.parametrize("backbone", [MLP(width=16), UNet(width=8), DiT(width=16, depth=1)])
@pytest.mark.parametrize("name", ["vae", "ae", "vq"])
def test_latents_are_vectors_or_maps_on_every_family(name, backbone, latent):
    """And a phase's gradient reaches all of its networks, and nothing else."""
    spec = Spec((1, 8, 8), {"label": Label(3)})
    objective = OBJECTIVES[name](latent=latent)
    nets = objective.networks(backbone, spec)
    cond = {"label": torch.arange(4) % 3}
    batch = batch_of(torch.rand(4, 1, 8, 8) * 2 - 1, cond=cond)
    objective.loss(objective.phases[0].name, nets, batch).per_sample.mean().backward()
    trained = {n for n, _ in phase_parameters(objective.phases[0], nets)}
    for net, module in nets.items():
        for key, p in module.named_parameters(prefix=net):
            if "null" not in key:
                assert (p.grad is not None) == (key in trained), key
    q = objective.encode(nets, batch.x, cond)
    assert q.mean.shape == (4, *latent) == (4, *objective.noise_shape(spec))
    assert objective.decode(nets, q.mean, cond).shape == (4, 1, 8, 8)
    if objective.is_generative:
        assert objective.generator(nets)(torch.randn(4, *latent), cond).shape == (4, 1, 8, 8)


def test_both_ends_see_the_conditions():
    spec = Spec((4,), {"label": Label(3)})
    objective = VAE(latent=(2,))
    torch.manual_seed(0)
    nets = objective.networks(MLP(width=16), spec)
    for net in nets.values():
        for p in net.parameters():
            nn.init.normal_(p, std=0.3)
    x, z = torch.randn(5, 4), torch.randn(5, 2)
    one, two = ({"label": torch.full((5,), k)} for k in (0, 1))
    assert not torch.allclose(objective.encode(nets, x, one).mean, objective.encode(nets, x, two).mean, atol=1e-3)
    assert not torch.allclose(objective.generator(nets)(z, one), objective.generator(nets)(z, two), atol=1e-3)


# ------------------------------------------------------------------------------------------------- autoencoders
def test_a_denoising_autoencoder_sees_spoiled_samples_and_is_judged_by_clean_ones():
    x = torch.ones(20_000, 4)
    noisy = Autoencoder(noise=0.5).spoil(batch_of(x))
    assert float(noisy.std()) == pytest.approx(0.5, rel=0.02)
    assert float(noisy.mean()) == pytest.approx(1, abs=0.02)
    masked = Autoencoder(mask=0.3).spoil(batch_of(x))
    assert float((masked == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert set(masked.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(Autoencoder().spoil(batch_of(x)), x)
    echo = {"encoder": lambda x, cond: x, "decoder": lambda z, cond: z}
    loss = Autoencoder(latent=(4,), noise=0.5).loss("reconstruct", echo, batch_of(x))
    assert float(loss.per_sample.mean()) == pytest.approx(0.25, rel=0.03)
    l1 = Autoencoder(latent=(4,), noise=0.5, error="l1").loss("reconstruct", echo, batch_of(x))
    assert float(l1.per_sample.mean()) == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=0.03)


def test_a_linear_denoising_autoencoder_is_the_wiener_filter():
    """Its best map shrinks each principal direction by s^2 / (s^2 + noise^2); what is left, s^2 noise^2 / (s^2 +
    noise^2), is all that even a full code can do."""
    x = normal_data()
    nets = train(Autoencoder(latent=(5,), noise=0.5), Linear(), x, Spec((5,)), 400)
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    best = float((values * 0.25 / (values + 0.25)).mean())
    error = Autoencoder(latent=(5,), noise=0.5).loss("reconstruct", nets, batch_of(x, 9)).logs["error"]
    assert best * 0.98 < float(error.detach()) < best * 1.05


def test_sparse_codes():
    z = torch.tensor([[1.0, 1, 1, 1], [0, -3, 0, 0], [3, 4, 0, 0]])
    assert torch.allclose(sparseness(z), torch.tensor([0.0, 1.0, 2 - 1.4]))
    assert torch.allclose(sparseness(7 * z), sparseness(z))
    z = torch.tensor([[[1.0, -5.0], [3.0, 2.0]]])
    assert torch.equal(largest(z, 2), torch.tensor([[[0.0, -5.0], [3.0, 0.0]]]))
    x = normal_data(2000)
    codes = {}
    for objective in (Autoencoder(latent=(8,)), Autoencoder(latent=(8,), sparse=1.0), Autoencoder(latent=(8,), top=2)):
        nets = train(objective, Linear(), x, Spec((5,)), 200)
        codes[objective] = objective.encode(nets, x).mean.detach()
    plain, sparse, top = codes.values()
    assert float(sparseness(sparse).mean()) > float(sparseness(plain).mean()) + 0.2
    assert bool(((top != 0).sum(1) == 2).all())


# -------------------------------------------------------------------------------------------------------- codes
def test_the_gradient_goes_straight_through():
    z, code = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    out = straight_through(z, code)
    assert torch.allclose(out, code)
    way = torch.randn(6, 3)
    assert torch.equal(torch.autograd.grad((out * way).sum(), z)[0], way)


def test_the_encoder_learns_from_the_decoder_at_the_code():
    """d loss / d z is that of the reconstruction at the code, and the pull to the code: by finite differences of the
    decoder at the code, where the true derivative by z is 0."""
    objective = VQ(latent=(3,), codes=8, commit=0.7)
    torch.manual_seed(1)
    nets = {k: v.double() for k, v in objective.networks(MLP(width=16), Spec((4,))).items()}
    nets["codebook"].codes.normal_()
    x, z = torch.randn(5, 4, dtype=F64), torch.randn(5, 3, dtype=F64, requires_grad=True)
    loss = objective.loss("vq", {**nets, "encoder": lambda x, cond: z}, batch_of(x)).per_sample
    got = torch.autograd.grad(loss.sum(), z)[0]
    code = nets["codebook"](z.detach()).code.requires_grad_()
    through = torch.autograd.grad((nets["decoder"](code) - x).square().mean(1).sum(), code)[0]
    pull = 0.7 * 2 * (z - code).detach() / 3
    assert torch.allclose(got, through + pull)


def test_codes_are_the_nearest():
    book = Codebook(20, 3)
    z = torch.randn(7, 3, 4, 5)
    found = book(z)
    away = (z.movedim(1, -1)[..., None, :] - book.codes).square().sum(-1)
    assert torch.equal(found.entry, away.argmin(-1))
    assert torch.equal(found.code, book.codes[found.entry].movedim(-1, 1))


def test_the_codebook_follows_running_means():
    """van den Oord et al. 2017, eq. 6-8, written out; and micro-batches make no difference."""
    torch.manual_seed(0)
    books = [Codebook(6, 2) for _ in range(2)]
    start = torch.randn(6, 2)
    for book in books:
        book.codes.copy_(start)
        book.counts.fill_(1.0)
        book.sums.copy_(start)
    count, total, codes = torch.ones(6), start.clone(), start.clone()
    for step in range(5):
        z, luck = torch.randn(40, 2), 1 - Draw((step,), 0, 40).uniform()
        entry = books[0](z).entry
        books[0].gather(z, entry, luck)
        for a, b in ((0, 13), (13, 14), (14, 40)):
            books[1].gather(z[a:b], entry[a:b], luck[a:b])
        for book in books:
            book.after_step(0.9, 0.0)
        hot = nn.functional.one_hot(entry, 6).float()
        count, total = 0.9 * count + 0.1 * hot.sum(0), 0.9 * total + 0.1 * hot.T @ z
        codes = total / count[:, None]
        assert torch.allclose(books[0].codes, codes, atol=1e-5)
        assert torch.allclose(books[1].codes, codes, atol=1e-5)


def test_dead_entries_come_alive_and_find_all_clusters():
    """Sixteen clusters, all entries far from them at the start: without revival one entry takes everything."""
    centres = torch.cartesian_prod(*2 * [torch.tensor([-3.0, -1.0, 1.0, 3.0])])
    used = {}
    for revive in (0.0, 0.05):
        book = Codebook(16, 2)
        torch.manual_seed(0)
        book.codes.copy_(torch.tensor([30.0, 30.0]) + torch.randn(16, 2))
        for step in range(200):
            z = centres[torch.randint(16, (128,))] + 0.1 * torch.randn(128, 2)
            found = book(z)
            book.gather(z, found.entry, 1 - Draw((step,), 0, 128).uniform())
            book.after_step(0.9, revive)
        used[revive] = float(perplexity(book(centres).entry.bincount(minlength=16).float()))
    assert used[0.0] < 3
    assert used[0.05] > 11
    assert float(torch.cdist(centres, book.codes).min(1).values.median()) < 0.1


def test_what_is_not_finite_does_not_enter_the_codebook():
    book = Codebook(4, 2)
    z, luck = torch.randn(10, 2), torch.full((10,), 0.5)
    z[3], luck[3] = math.nan, 1.0
    book.codes[1:] = 100.0  # dead, so that the luckiest vectors stand in
    book.gather(z, torch.zeros(10, dtype=torch.long), luck)
    book.after_step(0.5, 0.1)
    assert float(book.sums[0].sum() / book.counts[0]) == pytest.approx(float(z.nansum() / 9), rel=1e-5)
    assert all(bool((z == code).all(1).any()) for code in book.codes[1:])


def test_perplexity():
    assert float(perplexity(torch.tensor([5.0, 5, 5, 5]))) == pytest.approx(4)
    assert float(perplexity(torch.tensor([7.0, 0, 0]))) == pytest.approx(1)
    assert VQ().warning({"step": 600, "vq/perplexity": 1.2}) is not None
    assert VQ().warning({"step": 600, "vq/perplexity": 40.0}) is None


def test_evaluation_leaves_the_codebook_alone():
    objective = VQ(latent=(2,), codes=4)
    nets = objective.networks(MLP(width=8), Spec((2,)))
    for training in (False, True):
        nets["codebook"].train(training)
        objective.loss("vq", nets, batch_of(torch.randn(30, 2)))
        assert (float(nets["codebook"].new_counts.sum()) == 30) == training


def rank(number, where, answers):
    """Half of the rows of three steps, on one of two ranks."""
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=number, world_size=2)
    answers[number] = three_steps(slice(40 * number, 40 * number + 40))
    dist.destroy_process_group()


def three_steps(rows):
    torch.manual_seed(3)
    book = Codebook(32, 2)
    for step in range(3):
        z, luck = torch.randn(80, 2), 1 - Draw((step,), 0, 80).uniform()
        book.gather(z[rows], book(z[rows]).entry, luck[rows])
        book.after_step(0.9, 0.2)
    return book.codes


def test_two_ranks_have_the_codebook_of_one(tmp_path):
    with mp.Manager() as manager:
        answers = manager.dict()
        mp.start_processes(rank, (str(tmp_path / "store"), answers), nprocs=2, start_method="fork")
        one, two = answers[0], answers[1]
    assert torch.equal(one, two)
    assert torch.allclose(one, three_steps(slice(0, 80)), atol=1e-6)


# ----------------------------------------------------------------------------------------------- classes, misuse
def test_a_conditional_vae_draws_the_class_asked_for():
    """A small one on the digits; a classifier of real digits knows 95 % of its samples, and all classes come."""
    from sklearn.linear_model import LogisticRegression

    data = DATA["digits"]().load("train")
    x, y = data.x.float() / 127.5 - 1, data.cond["label"]
    judge = LogisticRegression(max_iter=300).fit(x.flatten(1).numpy(), y.numpy())
    test = DATA["digits"]().load("test")
    assert judge.score((test.x.float() / 127.5 - 1).flatten(1).numpy(), test.cond["label"].numpy()) > 0.94
    objective = VAE(latent=(8,), likelihood=Gaussian(std=0.3))
    nets = train(objective, MLP(width=64, depth=1), x, data.spec, 400, size=128, lr=4e-3, cond=data.cond, clip=1.0)
    asked = torch.arange(500) % 10
    drawn = objective.generator(nets)(torch.randn(500, 8), {"label": asked}).detach()
    seen = torch.from_numpy(judge.predict(drawn.flatten(1).numpy()))
    assert float((seen == asked).float().mean()) >= 0.95
    assert len(seen[seen == asked].unique()) == 10


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: VAE(beta=-1.0), "beta: given -1.0; allowed from 0"),
        (lambda: VAE(beta=math.nan), "beta: given nan"),
        (lambda: VAE(anneal=-1), "anneal: given -1"),
        (lambda: VAE(latent=()), r"latent: given \(\)"),
        (lambda: VAE(latent=(4, 0, 4)), r"latent: given \(4, 0, 4\)"),
        (lambda: VAE(likelihood=Gaussian(std=0.0)), "std: given 0.0"),
        (lambda: VQ(codes=0), "codes: given 0; a codebook needs 2"),
        (lambda: VQ(decay=1.0), "decay 1.0"),
        (lambda: Autoencoder(top=16), r"top: given 16; allowed 1\.\.15"),
        (lambda: Autoencoder(mask=1.0), "mask 1.0"),
        (lambda: Autoencoder(latent=(1,), sparse=0.1), "a code of one number"),
        (lambda: VAE(latent=(4, 5, 5)).networks(UNet(), Spec((1, 8, 8))), r"UNet: given a code of size \(5, 5\)"),
        (lambda: VQ(latent=(4, 7, 7)).networks(DiT(), Spec((1, 8, 8))), r"DiT: given a code of size \(7, 7\)"),
        (lambda: VAE(likelihood=Bernoulli()).networks(MLP(), Spec((2,))), "bernoulli is a law of pixels"),
        (lambda: VAE().generator({}, lambda denoise: denoise), "sampler: has no effect on VAE"),
        (lambda: VQ().generator({}), "vq: draws nothing"),
        (lambda: Autoencoder().generator({}), "ae: draws nothing"),
    ],
)
def test_mistakes_are_said_in_one_line(make, reason):
    with pytest.raises(ValueError, match=reason) as e:
        make()
    assert "\n" not in str(e.value)


SMALL = ["--data=digits", "--backbone=mlp", "--backbone.width=16", "--batch=32", "--tensorboard=false", "--device=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the command line, of some steps, for each law of pixels."""
    out, made = tmp_path_factory.mktemp("runs"), {}
    for name in LIKELIHOODS:
        args = [*SMALL, f"--out={out}", "--steps=10", "--sample-every=10", f"--objective.likelihood={name}"]
        assert cli.main(["train", "--objective=vae", "--objective.latent", "5", *args]) == 0
        made[name] = (out / "latest").resolve()
    return made


def test_a_trained_vae_draws_and_refuses_samplers(trained, tmp_path, capsys):
    run = trained["bernoulli"]
    assert (run / "samples" / "step-0000010.png").is_file()
    loaded = load_run(run)
    whole, cond = loaded.sample(9)
    later, _ = loaded.sample(3, seed=6, cond={"label": cond["label"][6:9]}, batch=2)
    assert (whole[6:].int() - later.int()).abs().max() <= 1
    assert len(whole.unique(dim=0)) == 9
    assert cli.main(["sample", str(run), "--n=4", f"--out={tmp_path / 'four.png'}"]) == 0
    assert json.loads((tmp_path / "four.json").read_text())["nfe"] == 1
    for flags, name in ((["--sampler=heun"], "sampler"), (["--guidance=2"], "guidance"), (["--clip"], "clip")):
        capsys.readouterr()
        assert cli.main(["sample", str(run), "--n=4", f"--out={tmp_path / 'no.png'}", *flags]) == 2
        assert f"genkit: {name}: has no effect on VAE" in capsys.readouterr().err


def test_settings_out_of_range_are_refused_by_the_command_line(tmp_path, capsys):
    for flags, reason in (
        (["--objective=vae", "--objective.beta=-1"], "beta"),
        (["--objective=vq", "--objective.codes=0"], "codes"),
        (["--objective=vae", "--objective.latent", "4", "3", "3", "--backbone=unet"], "code of size"),
    ):
        assert cli.main(["train", *flags, "--data=digits", f"--out={tmp_path}", "--steps=1"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert reason in said
    assert not list(tmp_path.iterdir())


def test_the_loop_lends_the_step_and_settles_the_codebook(tmp_path):
    """A KL term that has hardly begun to rise after ten steps; a codebook that follows the encoder's answers."""
    args = [*SMALL, f"--out={tmp_path}", "--steps=10", "--sample-every=0", "--log-every=10"]
    assert cli.main(["train", "--objective=vae", "--objective.anneal=1000000", *args]) == 0
    record = read_log(tmp_path / "latest")[-1]
    assert record["vae/loss"] * 64 == pytest.approx(record["vae/reconstruction"], abs=1e-3)
    assert record["vae/kl"] > 0.01
    assert cli.main(["train", "--objective=vq", "--objective.latent", "4", "--objective.codes=8", *args]) == 0
    assert not (tmp_path / "latest" / "samples").exists()
    assert cli.main(["train", "--resume", str(tmp_path / "latest"), "--steps=12", "--sample-every=12"]) == 0
    picture = Image.open(tmp_path / "latest" / "samples" / "step-0000012.png")  # 32 samples above, 32 answers below
    assert picture.width == picture.height
    run = load_run(tmp_path / "latest")
    book = run.nets["codebook"]
    assert float(book.counts.sum()) == pytest.approx(32 * (1 - 0.99**12), rel=0.2)  # revived entries count as average
    assert torch.allclose(book.codes[book.counts > 0], (book.sums / book.counts[:, None])[book.counts > 0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "vq"])
def test_training_on_two_ranks_is_training_on_one(tmp_path, name):
    """The codebook too, although neither rank sees the whole batch."""
    args = ["--data=moons", "--backbone.width=16", f"--objective={name}", "--objective.latent", "4", "--batch=32",
            "--device=cpu", "--tensorboard=false", "--steps=6", "--sample-every=0", "--clip=0"]  # fmt: skip
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "-m",
        "genkit",
        "train",
        *args,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, f"--out={tmp_path}/two"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert cli.main(["train", *args, "--micro-batch=5", f"--out={tmp_path}/one"]) == 0
    one, two = (load_file(tmp_path / k / "latest" / "latest" / "nets.safetensors") for k in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=2e-5), key


def told(capsys, *argv):
    capsys.readouterr()
    assert cli.main(["likelihood", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("law", LIKELIHOODS)
def test_the_command_tells_the_bounds(trained, capsys, law):
    """As the objective has them for the same rows, whatever the batch; bits of masses, or of a density of pixels."""
    found = told(capsys, trained[law], "--n=20", "--draws=5")
    cut = told(capsys, trained[law], "--n=20", "--draws=5", "--batch=7")
    assert found["iwae_nats"] == pytest.approx(cut["iwae_nats"], rel=1e-6)
    assert found["iwae_nats"]["value"] > -found["neg_elbo_nats"]["value"]
    assert found["neg_elbo_nats"]["stderr"] > 0
    assert (found["draws"], found["settings"]["bound"], found["settings"]["n"]) == (5, "iwae", 20)
    density = law == "gaussian"
    bits = -found["iwae_nats"]["value"] / (64 * math.log(2)) + (math.log2(127.5) if density else 0)
    assert found["bits_per_dim"]["value"] == pytest.approx(bits, rel=1e-9)
    run = load_run(trained[law])
    data = run.config.data.load("test")
    x = data.x[:20].float() / 127.5 - 1
    if density:
        x = dequantise(data.x[:20], Seeds(range(20)))
    batch = Batch(x, {"label": data.cond["label"][:20]}, draw=Draw((0, LATENT_KEY), 0, 20))
    assert found["iwae_nats"]["value"] == pytest.approx(
        float(run.objective.bounds(run.nets, batch, 5).iwae.mean()), rel=1e-6
    )
    more = told(capsys, trained[law], "--n=20", "--draws=60")
    assert more["iwae_nats"]["value"] > found["iwae_nats"]["value"]


def test_the_command_refuses_what_has_no_meaning(trained, tmp_path, capsys):
    flow, code = tmp_path / "flow", tmp_path / "ae"
    tiny = ["--backbone.width=8", "--steps=1", "--sample-every=0", "--tensorboard=false", "--device=cpu"]
    assert cli.main(["train", "--data=moons", *tiny, f"--out={flow}"]) == 0
    assert cli.main(["train", "--data=moons", "--objective=ae", *tiny, f"--out={code}"]) == 0
    for argv, reason in (
        ([trained["bernoulli"], "--steps=8"], "steps: given 8, which is for a path to noise"),
        ([trained["bernoulli"], "--probes=2"], "probes: given 2, which is for the ODE"),
        ([trained["bernoulli"], "--bound=ode"], "needs a model whose path ends in standard normal noise"),
        ([flow / "latest", "--bound=iwae"], "bound: given iwae, but Flow has no latent; allowed: ode, vlb"),
        ([flow / "latest", "--draws=8"], "draws: given 8, which is for a VAE; allowed with --bound iwae"),
        ([code / "latest"], "likelihood: Autoencoder has none; needs a flow, a diffusion or a VAE"),
    ):
        capsys.readouterr()
        assert cli.main(["likelihood", *map(str, argv), "--n=2"]) == 2
        said = capsys.readouterr().err
        assert reason in said
        assert said.count("\n") == 1
