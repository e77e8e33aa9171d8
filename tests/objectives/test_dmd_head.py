"""DMD's discriminator as a head on the fake score's features: what learns from it, and what the features are."""

import copy

import pytest
import torch
from torch import nn

from genkit import train
from genkit.backbones import BACKBONES, EDM2, MLP, DiT, UNet
from genkit.core import Batch, Draw, Label, Spec
from genkit.objectives import DDPM, DMD, EDM, Flow
from genkit.objectives.distillation.dmd import make_head
from tests.support.exact import F64

HEAD = DMD(gan_weight=0.3, discriminator="head", head_weight=0.5, fake_updates=2)
IMAGES = Spec((1, 8, 8), {"label": Label(3)})
FAMILIES = {
    "mlp": (MLP(width=16, depth=2), {"net.last"}),
    "unet": (UNet(width=32, mults=(1, 2), num_blocks=1), {"up"}),
    "dit": (DiT(width=16, depth=2, patch=4), {"last"}),
    "edm2": (EDM2(width=16, mults=(1, 2), num_blocks=1), {"up", "last", "gain"}),
}


def awakened(net):
    """The network with weights of which none is 0, as after training."""
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


@pytest.mark.parametrize("name", FAMILIES)
def test_a_denoiser_hands_out_the_features_in_which_it_sees_a_sample(name):
    """They depend on sample, time and class; their gradient reaches all weights but those behind them."""
    family, behind = FAMILIES[name]
    torch.manual_seed(0)
    net = awakened(family.denoiser(IMAGES)).eval()
    x, t, cond = torch.randn(6, 1, 8, 8, requires_grad=True), torch.rand(6), {"label": torch.arange(6) % 3}
    features = net(x, t, cond, features=True)
    assert features.shape == (6, net.feature_dim)
    features.square().sum().backward()
    assert bool(x.grad.flatten(1).any(1).all())
    without = {k for k, p in net.named_parameters() if p.grad is None and not k.endswith("null")}
    assert without
    assert all(any(k.startswith(f"{b}.") for b in behind) for k in without)
    assert all(p.grad is None for k, p in net.named_parameters() if any(k.startswith(f"{b}.") for b in behind))
    with torch.no_grad():
        for others in ((x + 1, t, cond), (x, t / 2, cond), (x, t, {"label": (cond["label"] + 1) % 3})):
            assert not torch.allclose(net(*others, features=True), features, atol=1e-4)
        assert net(x, t, cond).shape == x.shape


def test_every_family_has_features_or_is_refused():
    assert set(BACKBONES) - set(FAMILIES) == {"diffusers"}
    with pytest.raises(ValueError, match="given head, but networks of Diffusers hand out no features"):
        make_head(nn.Linear(2, 2), "Diffusers")


class Known(nn.Module):
    """A network whose output is ``x / 2`` and whose features are ``x`` and the time."""

    feature_dim = 3

    def forward(self, x, label, cond, features=False):
        return torch.cat([x, label[:, None]], 1) if features else x / 2


class Score(nn.Module):
    """The head ``2 x_1 - x_2 + time``."""

    def forward(self, h):
        return h @ torch.tensor([[2.0], [-1.0], [1.0]], dtype=h.dtype)


@pytest.mark.parametrize("of", [Flow(), DDPM(prediction="v"), EDM()], ids=lambda o: type(o).__name__)
def test_the_generators_gradient_is_that_of_the_head(of):
    """``-weight sigmoid(-D) dD/dz dz/dx`` beside the score difference, at what the fake score itself is given."""
    n = 40
    x = torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    shift = torch.zeros(n, 2, dtype=F64, requires_grad=True)

    class Shifted(DMD):
        def draw(self, net, batch, cond):
            return x + shift

    nets = {"net": None, "fake": Known(), "teacher": Known(), "discriminator": Score()}
    both = Shifted(of=of, gan_weight=0.3, discriminator="head")
    loss = both.loss("generator", nets, Batch(x, draw=Draw((1,), 0, n)))
    (got,) = torch.autograd.grad(loss.per_sample.sum(), shift)  # equal scores: the rest of the gradient is 0
    z, t = both.add_noise(Batch(x, draw=Draw((1,), 0, n)), x)
    path = of.denoiser(nets["fake"]).path
    x_in, label = of.parametrization.inputs(path, z, t)
    scale = (x_in[:, :1] / z[:, :1]) * path.alpha(t)[:, None]
    score = 2 * x_in[:, 0] - x_in[:, 1] + label
    expected = -0.3 * torch.sigmoid(-score)[:, None] * torch.tensor([2.0, -1.0], dtype=F64) * scale
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-7)
    assert float(loss.logs["gap"]) == 0


def test_the_fake_score_and_its_head_learn_together():
    """Its trunk from both losses in the proportion of the weight, its last layer from its own alone; the generator's
    phase trains neither."""
    torch.manual_seed(0)
    nets = HEAD.networks(MLP(width=16, depth=1), Spec((2,)))
    nets = {k: awakened(net) for k, net in nets.items()}
    assert [(p.name, p.trains, p.repeats) for p in HEAD.phases] == [
        ("fake", ("fake", "discriminator"), 2), ("generator", ("net",), 1)]  # fmt: skip
    gradients = {}
    for weight in (0.5, 1.0, 2.0):
        objective = DMD(gan_weight=0.3, discriminator="head", head_weight=weight)
        for net in nets.values():
            net.zero_grad()
        loss = objective.loss("fake", nets, Batch(torch.randn(64, 2, generator=torch.Generator().manual_seed(1)) + 3,
                                                  draw=Draw((2,), 0, 64)))  # fmt: skip
        loss.per_sample.mean().backward()
        gradients[weight] = {f"{k}.{n}": p.grad.clone() for k in ("fake", "discriminator")
                             for n, p in nets[k].named_parameters() if p.grad is not None}  # fmt: skip
        assert nets["teacher"].net.last.weight.grad is None
    assert "accuracy" in loss.logs
    for key, one in gradients[1.0].items():
        half, two = gradients[0.5][key], gradients[2.0][key]
        assert torch.allclose(two - one, 2 * (one - half), rtol=1e-3, atol=1e-6), key
        own = key.startswith("fake.net.last.")
        assert own == torch.equal(one, two), key
        if key.startswith("discriminator"):
            assert torch.allclose(two, 2 * one, rtol=1e-4, atol=1e-7), key
    alone = DMD(of=HEAD.of).loss("fake", nets, Batch(torch.zeros(64, 2), draw=Draw((2,), 0, 64)))
    assert "accuracy" not in alone.logs


def test_a_head_that_learns_scores_the_data_higher():
    """Against a generator far from the data; then it pulls the generator towards them."""
    torch.manual_seed(0)
    nets = HEAD.networks(MLP(width=32, depth=1), Spec((2,)))
    nets["net"] = awakened(nets["net"]).requires_grad_(False)
    parameters = [p for k in ("fake", "discriminator") for p in nets[k].parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    data = lambda i: Batch(torch.tensor([[4.0, 0.0]]).expand(128, 2), draw=Draw((i,), 0, 128))  # noqa: E731
    accuracy = []
    for i in range(40):
        optimizer.zero_grad()
        loss = HEAD.loss("fake", nets, data(i))
        loss.per_sample.mean().backward()
        optimizer.step()
        accuracy.append(float(loss.logs["accuracy"]))
    assert sum(accuracy[-5:]) / 5 > 0.87, accuracy  # samples of much noise cannot be told apart
    nets["teacher"] = copy.deepcopy(nets["fake"])  # no score difference
    shift = torch.zeros(128, 2, requires_grad=True)

    class Shifted(DMD):
        def draw(self, net, batch, cond):
            return super().draw(net, batch, cond) + shift

    pull = Shifted(gan_weight=1.0, discriminator="head").loss("generator", nets, data(99)).per_sample.sum()
    (gradient,) = torch.autograd.grad(pull, shift)
    assert float(gradient[:, 0].mean()) < 0


@pytest.mark.parametrize(("options", "says"), [
    ({"discriminator": "head"}, "given head, which has no effect at gan_weight 0"),
    ({"head_weight": 0.1, "gan_weight": 0.1}, "head_weight: has no effect without --objective.discriminator head"),
])  # fmt: skip
def test_what_has_no_effect_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        DMD(**options)


def test_a_run_is_distilled_with_a_head(tmp_path):
    how = {"workers": 0, "tensorboard": False, "sample_every": 0, "out": str(tmp_path), "ema": (0.9,), "batch": 32}
    mlp, head = {"name": "mlp", "width": 16, "depth": 1}, {"gan_weight": 0.003, "discriminator": "head"}
    base = train(data={"name": "8gaussians", "n": 500}, backbone=mlp, steps=20, **how)
    run = train(init=str(base.directory), objective={"name": "dmd", **head}, steps=4, **how)
    assert run.sample(4).network_rows == 1
    assert set(run.nets) == {"net", "fake", "teacher", "discriminator"}
