"""Chains against closed forms: linear-Gaussian denoisers, deterministic limits, moments."""

import dataclasses

import pytest
import torch

from genkit.core import Spec
from genkit.diffusion.paths import VP, Linear, ODEOnlyPath
from genkit.diffusion.samplers import ddim, sde, uniform
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.noise import NOISES, DDIMNoise, FixedNoise, LearnedNoise, SDENoise
from tests.support.exact import F64, ExactDenoiser, Mixture, three

PATHS = [Linear(), VP()]
QUIET = {"fixed": FixedNoise(0.0), "ddim": DDIMNoise(0.0), "sde": SDENoise(0.0), "learned": LearnedNoise(0.0)}
on_paths = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
all_noises = pytest.mark.parametrize("name", NOISES)
MEAN, VAR = 0.7, 0.3
BELL = Mixture(torch.ones(1, dtype=F64), torch.tensor([[MEAN]], dtype=F64), torch.tensor([[[VAR]]], dtype=F64))


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def affine(chain, k, denoise):
    """``(slope, intercept)`` of the mean of step k, for a denoiser that is linear in one number."""
    at = chain.mean_std(denoise, torch.tensor([[0.0], [1.0]], dtype=F64), k)[0].flatten().tolist()
    return at[1] - at[0], at[0]


def test_every_noise_has_a_quiet_limit_here():
    assert QUIET.keys() == NOISES.keys()


@on_paths
@all_noises
def test_without_noise_it_is_the_deterministic_sampler_to_the_last_bit(name, path):
    denoise, times, z = ExactDenoiser(three(), path), uniform(7)(path), normals(5, 2)
    chain = Chain.on_grid(path, 7, QUIET[name])
    trajectory = chain.sample(denoise, z)
    assert torch.equal(trajectory.xs[-1], ddim(denoise, z, times))
    assert torch.equal(trajectory.xs[1:], trajectory.means)
    tiny = dataclasses.replace(QUIET[name], **{dataclasses.fields(QUIET[name])[0].name: 1e-12})
    near = Chain.on_grid(path, 7, tiny).sample(denoise, z, noise=lambda shape: normals(5, *shape))
    assert torch.allclose(near.xs[-1], trajectory.xs[-1], atol=1e-4)


@on_paths
def test_noisy_chains_are_the_noisy_samplers(path):
    denoise, times, z = ExactDenoiser(three(), path), uniform(6)(path), normals(5, 2)
    for noise, sampler, eta in ((DDIMNoise(0.6), ddim, 0.6), (SDENoise(0.4), sde, 0.4)):
        g, h = (torch.Generator().manual_seed(1) for _ in range(2))
        trajectory = Chain.on_grid(path, 6, noise).sample(
            denoise, z, noise=lambda s, g=g: torch.randn(5, *s, generator=g, dtype=F64)
        )
        expected = sampler(denoise, z, times, eta=eta, noise=lambda s, h=h: torch.randn(5, *s, generator=h, dtype=F64))
        assert torch.allclose(trajectory.xs[-1], expected, atol=1e-13)


@on_paths
@all_noises
def test_log_probability_is_that_of_the_joint_normal(name, path):
    """The trajectory of a linear-Gaussian denoiser is a normal vector (x_1 .. x_K) given x_0, here by its covariance:
    one for each of two independent numbers."""
    steps, floor = 5, 0.05
    pair = Mixture(torch.ones(1, dtype=F64), torch.full((1, 2), MEAN, dtype=F64), VAR * torch.eye(2, dtype=F64)[None])
    chain, denoise = Chain.on_grid(path, steps, NOISES[name](), floor), ExactDenoiser(pair, path)
    trajectory = chain.sample(denoise, normals(4, 2), noise=lambda shape: normals(4, *shape, seed=3))
    # E[x0 | x] of a normal by conditioning, written out: mean + a var (x - a mean) / (a^2 var + s^2)
    grow, shift, std = [], [], []
    for link in chain.transitions:
        a, s = link.node.alpha, link.node.sigma
        gain = a * VAR / (a * a * VAR + s * s)
        slope0, at0 = gain, MEAN - gain * a * MEAN
        slope1, at1 = (1 - a * slope0) / s, -a * at0 / s
        grow.append(link.alpha * slope0 + link.kept * slope1)
        shift.append(link.alpha * at0 + link.kept * at1)
        std.append(link.std)
    # x_{k+1} - grow x_k = shift + std z: a unit triangular system
    inverse = torch.linalg.inv(torch.eye(steps, dtype=F64) - torch.diag(torch.tensor(grow[1:], dtype=F64), -1))
    cov = inverse @ torch.diag(torch.tensor(std, dtype=F64) ** 2) @ inverse.T
    want = torch.zeros(4, dtype=F64)
    for i in range(4):
        for d in range(2):
            right = torch.tensor(shift, dtype=F64)
            right[0] += grow[0] * trajectory.xs[0, i, d]
            law = torch.distributions.MultivariateNormal(inverse @ right, cov)
            want[i] += law.log_prob(trajectory.xs[1:, i, d])
    assert torch.allclose(chain.log_prob(denoise, trajectory.xs).sum(0), want, atol=1e-8)


def test_unused_numbers_are_left_out_of_the_last_step():
    """Of two numbers the second is not used: at the last step the density is that of the first alone."""
    chain = Chain.on_grid(Linear(), 3, FixedNoise(0.2))
    xs, means = normals(4, 5, 2), normals(3, 5, 2, seed=1)
    for k in range(3):
        at = torch.full((5,), k)
        got = chain.density(xs[k + 1], means[k], at, torch.tensor([1.0, 0.0]))
        one = chain.density(xs[k + 1][:, :1], means[k][:, :1], at)
        assert torch.allclose(got, one if k == 2 else chain.density(xs[k + 1], means[k], at))


@on_paths
@pytest.mark.parametrize("noise", [SDENoise(0.25), SDENoise(1.0), DDIMNoise(0.5), DDIMNoise(1.0)], ids=str)
def test_marginals_are_kept(noise, path):
    """The law of a normal's chain, step by step in closed form: mean and variance end at the data's, to first order."""
    denoise, off = ExactDenoiser(BELL, path), []
    for steps in (50, 100):
        chain = Chain.on_grid(path, steps, noise)
        a, s = chain.transitions[0].node.alpha, chain.transitions[0].node.sigma
        mean, var = a * MEAN, a * a * VAR + s * s
        for k, link in enumerate(chain.transitions):
            slope, at = affine(chain, k, denoise)
            mean, var = slope * mean + at, slope**2 * var + link.std**2
        off.append((abs(mean - MEAN), abs(var - VAR)))
    assert max(off[0]) < 0.05
    assert all(b < 0.6 * a or b < 1e-9 for a, b in zip(*off, strict=True))


@on_paths
@all_noises
def test_ratio_is_one_before_the_first_update(name, path):
    """By every way to a log-probability: step by step, the stored means, and rows at steps of their own."""
    chain, denoise = Chain.on_grid(path, 6, NOISES[name](), min_std=0.03), ExactDenoiser(three(), path)
    trajectory = chain.sample(denoise, normals(5, 2), noise=lambda shape: normals(5, *shape, seed=2))
    k = torch.arange(6).repeat_interleave(5)
    x, after = trajectory.xs[:-1].flatten(0, 1), trajectory.xs[1:].flatten(0, 1)
    old = chain.density(after, trajectory.means.flatten(0, 1), k)
    new = chain.density(after, chain.mean_at(denoise, x, k), k)
    assert torch.allclose((new - old).exp(), torch.ones_like(old), atol=1e-9, rtol=0)
    assert torch.allclose(chain.log_prob(denoise, trajectory.xs).flatten(), old, atol=1e-9)
    assert torch.allclose(chain.log_prob(denoise, trajectory.xs, last=2).flatten(), old[-10:], atol=1e-9)


def moved(steps, min_std=0.03, std=0.2):
    """A chain whose learned noise is anywhere."""
    torch.manual_seed(0)
    noise = LearnedNoise(std, spread=4.0, width=8)
    net = noise.network(Spec((2,)), steps).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return dataclasses.replace(Chain.on_grid(Linear(), steps, noise, min_std), sigma=net.requires_grad_(False))


def test_learned_noise_begins_as_fixed_noise():
    net = LearnedNoise(0.2).network(Spec((2,)), 6).double()
    chain, denoise, z = Chain.on_grid(Linear(), 6, LearnedNoise(0.2)), ExactDenoiser(three(), Linear()), normals(5, 2)
    fixed = Chain.on_grid(Linear(), 6, FixedNoise(0.2)).sample(denoise, z, noise=lambda s: normals(5, *s, seed=1))
    learned = dataclasses.replace(chain, sigma=net).sample(denoise, z, noise=lambda s: normals(5, *s, seed=1))
    assert torch.equal(learned.xs, fixed.xs)
    assert fixed.stds is None
    assert torch.equal(learned.stds, torch.full((6, 5, 2), 0.2, dtype=F64))


def test_learned_noise_has_the_density_of_its_normals_within_its_bounds():
    """Where the network says anything: sizes of each number, row and step, whose densities torch knows too."""
    chain = moved(6, min_std=0.06)
    denoise = ExactDenoiser(three(), Linear())
    trajectory = chain.sample(denoise, normals(50, 2), noise=lambda s: normals(50, *s, seed=2))
    low, high = float(trajectory.stds.min()), float(trajectory.stds.max())
    assert 0.06 <= low < 0.1 < 0.4 < high <= 0.8
    law = torch.distributions.Normal(trajectory.means, trajectory.stds)
    want = law.log_prob(trajectory.xs[1:])
    assert torch.allclose(chain.log_prob(denoise, trajectory.xs), want.sum(2))
    used = torch.tensor([1.0, 0.0])
    assert torch.allclose(chain.log_prob(denoise, trajectory.xs, last=1, used=used), want[-1:, :, 0])


def test_ratio_is_one_with_learned_noise_too():
    chain = moved(6)
    denoise = ExactDenoiser(three(), Linear())
    trajectory = chain.sample(denoise, normals(5, 2), noise=lambda s: normals(5, *s, seed=2))
    k = torch.arange(6).repeat_interleave(5)
    x, after = trajectory.xs[:-1].flatten(0, 1), trajectory.xs[1:].flatten(0, 1)
    old = chain.density(after, trajectory.means.flatten(0, 1), k, std=trajectory.stds.flatten(0, 1))
    new = chain.density(after, chain.mean_at(denoise, x, k), k, std=chain.std_at(x, k))
    assert torch.allclose((new - old).exp(), torch.ones_like(old), atol=1e-9, rtol=0)


def test_learned_noise_that_is_none_is_the_deterministic_sampler():
    """Whatever the network says: bounds are multiples of the std, so they close in on it."""
    denoise, z = ExactDenoiser(three(), Linear()), normals(5, 2)
    want = ddim(denoise, z, uniform(6)(Linear()))
    for std, near in ((0.0, 0.0), (1e-12, 1e-4)):
        chain = moved(6, min_std=0.0, std=std)
        assert torch.allclose(chain.sample(denoise, z, noise=lambda s: normals(5, *s)).xs[-1], want, atol=near, rtol=0)


def test_min_std_widens_narrower_steps():
    free, widened = (Chain.on_grid(Linear(), 5, DDIMNoise(), min_std) for min_std in (0.0, 0.2))
    assert [k.std for k in widened.transitions] == [max(k.std, 0.2) for k in free.transitions]
    assert [k.kept for k in widened.transitions] == [k.kept for k in free.transitions]
    assert free.transitions[-1].std == 0
    with pytest.raises(ValueError, match="step 5 of 5 has none"):
        free.first_trained(None)
    with pytest.raises(ValueError, match="ft_denoising_steps: given 6; allowed 1 … 5"):
        widened.first_trained(6)


def test_min_std_holds_for_learned_noise_too():
    chain = dataclasses.replace(Chain.on_grid(Linear(), 2, FixedNoise(0.15), min_std=0.1), sigma=lambda x, k, cond: x)
    x = torch.tensor([[0.01], [2.0]], dtype=F64)  # a hundredth of 0.15, twice as much
    torch.testing.assert_close(chain.std_at(x, torch.tensor([0, 1])), torch.tensor([[0.1], [0.3]], dtype=F64))


def test_diffusion_noise_is_refused_where_there_is_no_score():
    with pytest.raises(ValueError, match="no diffusion"):
        Chain.on_grid(ODEOnlyPath(Linear()), 4, SDENoise())
    Chain.on_grid(ODEOnlyPath(Linear()), 4, FixedNoise())
