"""GAN losses, gradient penalties, spectral norm and augmentations, against closed forms."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from genkit.backbones import MLP, UNet
from genkit.core import Draw, Label, Spec
from genkit.objectives import GAN
from genkit.objectives.adversarial.augment import AUGMENTATIONS
from genkit.objectives.adversarial.losses import (
    GAN_LOSSES,
    PENALTIES,
    Hinge,
    Minimax,
    Relativistic,
    SpectralNorm,
    add_spectral_norm,
    iterate_spectral_norm,
    squared_gradient_norm,
)
from tests.support.objectives import Shift, batch_of

F64 = torch.float64


sigmoid = torch.sigmoid


SLOPES = {  # d critic / d real, d critic / d fake, d generator / d fake; r and f are scores of a real and a drawn one
    "minimax": (lambda r, f: sigmoid(r) - 1, lambda r, f: sigmoid(f), lambda r, f: -sigmoid(f)),
    "non-saturating": (lambda r, f: sigmoid(r) - 1, lambda r, f: sigmoid(f), lambda r, f: sigmoid(f) - 1),
    "hinge": (lambda r, f: -(r < 1).to(F64), lambda r, f: (f > -1).to(F64), lambda r, f: -torch.ones_like(f)),
    "wasserstein": (
        lambda r, f: -torch.ones_like(r),
        lambda r, f: torch.ones_like(f),
        lambda r, f: -torch.ones_like(f),
    ),
    "relativistic": (lambda r, f: -sigmoid(f - r), lambda r, f: sigmoid(f - r), lambda r, f: -sigmoid(r - f)),
}


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_gradients_of_each_loss_are_those_of_the_paper(name):
    game, (by_real, by_fake, by_drawn) = GAN_LOSSES[name](), SLOPES[name]
    real, fake = (3 * torch.randn(200, dtype=F64) for _ in range(2))
    r, f = real.clone().requires_grad_(), fake.clone().requires_grad_()
    got = torch.autograd.grad(game.discriminator_loss(r, f).sum(), (r, f))
    assert torch.allclose(got[0], by_real(real, fake))
    assert torch.allclose(got[1], by_fake(real, fake))
    (drawn,) = torch.autograd.grad(game.generator_loss(f, real).sum(), f)
    assert torch.allclose(drawn, by_drawn(real, fake))
    assert game.discriminator_loss(real, fake).shape == (200,)


def test_values_at_equilibrium():
    """At D = 1/2 everywhere the minimax value is -log 4 (Goodfellow et al. 2014, theorem 1)."""
    zero = torch.zeros(3, dtype=F64)
    assert torch.allclose(Minimax().discriminator_loss(zero, zero), torch.tensor(math.log(4), dtype=F64))
    assert torch.allclose(Minimax().generator_loss(zero, zero), torch.tensor(-math.log(2), dtype=F64))
    assert torch.allclose(Relativistic().discriminator_loss(zero, zero), torch.tensor(math.log(2), dtype=F64))
    assert torch.allclose(Hinge().discriminator_loss(zero, zero), torch.full((3,), 2.0, dtype=F64))


class Slope(nn.Module):
    """A discriminator ``a.x + k |x|^2 / 2``, whose gradient is ``a + k x``."""

    def __init__(self, k=0.0):
        super().__init__()
        self.a, self.k = nn.Parameter(torch.tensor([3.0, -4.0], dtype=F64)), k

    def forward(self, x, cond):
        return (x @ self.a + self.k * x.square().sum(1) / 2)[:, None]


def penalty_of(size, k=0.0, step=None, **game):
    """Each sample's penalty and its gradient by ``a``, by the difference to the same loss without penalties."""
    nets = {"generator": Shift().double(), "discriminator": Slope(k)}
    x = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(5))
    whole, bare = (
        GAN(gan_loss=Relativistic(**{"r1": 0.0, "r2": 0.0, **more}), latent=(2,)).loss(
            "discriminator", nets, batch_of(x, step=step)
        )
        for more in ({**game}, {})
    )
    each = whole.per_sample - bare.per_sample
    draw = Draw((0,), 0, 6)
    fake, u = draw.normal(2).double(), draw.uniform().double()[:, None]
    return each, torch.autograd.grad(each.sum(), nets["discriminator"].a)[0], (x, fake, u * x + (1 - u) * fake)


def test_penalties_and_their_gradients_are_those_of_a_known_slope():
    a = torch.tensor([3.0, -4.0], dtype=F64)
    for name, group in (("r1", 0), ("r2", 1)):
        each, grad, x = penalty_of(1, k=0.5, **{name: 2.0})
        g = a + 0.5 * x[group]
        assert torch.allclose(each, g.square().sum(1))  # gamma / 2 |g|^2
        assert torch.allclose(grad, 2 * g.sum(0))
    each, grad, x = penalty_of(1, k=0.5, gp=10.0)
    g = a + 0.5 * x[2]
    norm = g.norm(dim=1, keepdim=True)
    assert torch.allclose(each, 10 * (norm[:, 0] - 1) ** 2)
    assert torch.allclose(grad, (20 * (norm - 1) * g / norm).sum(0))


def test_a_flat_discriminator_has_a_finite_penalty():
    x = torch.randn(4, 2, dtype=F64, requires_grad=True)
    k = torch.zeros((), dtype=F64, requires_grad=True)
    found = PENALTIES["gp"].function(squared_gradient_norm((k * x).sum(1), x))
    assert torch.allclose(found, torch.ones(4, dtype=F64), atol=1e-5)
    assert bool(torch.isfinite(torch.autograd.grad(found.sum(), k)[0]))


def test_lazy_penalties_weigh_the_same_on_average():
    plain = penalty_of(1, r1=2.0)[0]
    lazy = [penalty_of(1, step=s, r1=2.0, penalty_every=4)[0] for s in range(4)]
    assert torch.allclose(torch.stack(lazy).mean(0), plain)
    assert [bool((v != 0).any()) for v in lazy] == [True, False, False, False]
    assert torch.allclose(penalty_of(1, step=None, r1=2.0, penalty_every=4)[0], plain)
    assert Relativistic(r1=0.0, r2=0.0).penalty_factor(0) == 0  # without penalties its default puts nothing off


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Conv2d(3, 6, 3)], ids=["linear", "conv"])
def test_a_bounded_weight_is_that_of_torch_above_one_and_itself_below(layer):
    flat = layer.weight.detach().flatten(1)
    top = torch.linalg.matrix_norm(flat, 2)
    with torch.no_grad():
        layer.weight.mul_(3 / top)
    peer = copy.deepcopy(layer)
    add_spectral_norm(layer)
    iterate_spectral_norm(layer, 200)
    assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=1e-4)
    parametrizations.spectral_norm(peer, n_power_iterations=200)
    assert torch.allclose(layer.weight, peer.weight, atol=1e-4)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(0.1)
    iterate_spectral_norm(layer, 50)
    assert torch.allclose(layer.weight, layer.parametrizations.weight.original)


def test_the_power_iteration_moves_between_steps_only_and_finds_its_way_from_zeros():
    layer = nn.Linear(6, 6)
    nn.init.zeros_(layer.weight)
    add_spectral_norm(layer)
    keep = layer.parametrizations.weight[0]
    before = keep.u.clone()
    assert float(layer(torch.ones(1, 6)).detach().sum() - layer.bias.sum()) == pytest.approx(0, abs=1e-6)
    assert torch.equal(before, keep.u)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(5 * torch.eye(6) + torch.randn(6, 6))
    for _ in range(100):
        layer.train()(torch.ones(1, 6))
        iterate_spectral_norm(layer, 1)
    assert not torch.equal(before, keep.u)
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1, abs=1e-3)


def test_spectral_norm_bounds_every_weight_of_the_discriminator_between_steps():
    objective = GAN(gan_loss=Hinge(), latent=(4,), spectral_norm=True)
    nets = objective.networks(MLP(width=16, depth=1), Spec((2,), {"label": Label(3)}))
    with torch.no_grad():
        for p in nets["discriminator"].parameters():
            p.copy_(2 * torch.randn_like(p))  # an optimizer's step, and a large one
    for step in range(300):
        objective.after_step(nets, step)
    norms = [float(torch.linalg.matrix_norm(m.weight.detach(), 2)) for m in nets["discriminator"].modules()
             if isinstance(m, nn.Linear | nn.Embedding)]  # fmt: skip
    assert len(norms) > 5
    assert max(norms) < 1.05
    assert sum(isinstance(m, SpectralNorm) for m in nets["discriminator"].modules()) == len(norms)
    assert not any(isinstance(m, SpectralNorm) for m in nets["generator"].modules())


def fixed(*values):
    """Uniform numbers that are these, one a call."""
    left = list(values)
    return lambda *shape: torch.full((2, *shape), left.pop(0), dtype=F64)


def test_augmentations_at_known_draws():
    x = torch.arange(2 * 3 * 8 * 8, dtype=F64).view(2, 3, 8, 8) / 100
    moved = AUGMENTATIONS["translation"](x, fixed(0.9, 0.1))  # one down, one to the left
    assert torch.equal(moved[:, :, 1:, :-1], x[:, :, :-1, 1:])
    assert float(moved[:, :, 0].abs().sum() + moved[:, :, :, -1].abs().sum()) == 0
    assert torch.equal(AUGMENTATIONS["translation"](x, fixed(0.5, 0.5)), x)
    cut = AUGMENTATIONS["cutout"](x + 1, fixed(0.5, 0.0))  # around row 4 and column 0: rows 2..5, columns -2..1
    assert float(cut[:, :, 2:6, 0:2].abs().sum()) == 0
    assert int((cut == 0).sum()) == 2 * 3 * 4 * 2
    color = AUGMENTATIONS["color"]
    assert torch.allclose(color(x, fixed(0.5, 0.5, 0.5)), x)
    assert torch.allclose(color(x, fixed(1.0, 0.5, 0.5)), x + 0.5)
    assert torch.allclose(color(x, fixed(0.5, 0.0, 0.5)).std(1), torch.zeros(2, 8, 8, dtype=F64), atol=1e-9)
    assert torch.allclose(color(x, fixed(0.5, 0.5, 1.0)).std((1, 2, 3)), 1.5 * x.std((1, 2, 3)))
    grey = x[:, :1]
    assert torch.allclose(color(grey, fixed(0.5, 0.0, 0.5)), grey)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_differ_by_row_and_let_the_gradient_through(name):
    for shape in ((2, 9, 9), (3, 12)):
        x = torch.randn(64, *shape, requires_grad=True)
        out = AUGMENTATIONS[name](x, batch_of(x).uniform)
        assert out.shape == x.shape
        same = AUGMENTATIONS[name](x[:1].expand_as(x), batch_of(x).uniform)
        assert len({v.detach().numpy().tobytes() for v in same}) >= 3
        assert bool((torch.autograd.grad(out.square().sum(), x)[0].flatten(1) != 0).any(1).all())


def test_the_discriminator_sees_changed_samples_only_and_r1_is_taken_before_the_change():
    """All groups go through the same kind of change, each with draws of its own."""
    spec, seen = Spec((1, 8, 8)), []
    objective = GAN(latent=(4,), augment=("cutout",))
    nets = dict(objective.networks(UNet(width=8), spec))
    inner = nets["discriminator"]
    nets["discriminator"] = lambda x, cond: seen.append(x.detach()) or inner(x, cond)
    nets["generator"] = lambda z, cond: torch.full((len(z), 1, 8, 8), 2.0)
    x = torch.full((8, 1, 8, 8), 3.0)
    for phase in ("discriminator", "generator"):
        objective.loss(phase, nets, batch_of(x))
        real, fake = seen.pop().split(8)
        for group, value in ((real, 3.0), (fake, 2.0)):
            assert set(group.unique().tolist()) == {0.0, value}
        assert not torch.equal(real == 0, fake == 0)
