"""EDM2's magnitude-preserving layers: unit variance in, unit variance out, at the start and after training."""

import math

import pytest
import torch
from torch import nn

from genkit import config
from genkit.backbones import EDM2
from genkit.backbones.edm2 import MPBlock, MPFourier, MPLayer, mp_cat, mp_silu, mp_sum, normalize
from genkit.core import Label, Spec
from genkit.training.train import train


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sums_and_joins_keep_the_variance(t):
    a, b = torch.randn(64, 40, 5, 5), torch.randn(64, 20, 5, 5)
    assert rms(mp_sum(a, torch.randn_like(a), t)) == pytest.approx(1, abs=0.01)
    joined = mp_cat(a, b, t)
    assert rms(joined) == pytest.approx(1, abs=0.01)
    shares = joined[:, :40].square().sum(), joined[:, 40:].square().sum()
    assert float(shares[1] / sum(shares)) == pytest.approx(t**2 / ((1 - t) ** 2 + t**2), abs=0.01)


def test_silu_keeps_the_variance():
    """The factor is 1 / sqrt(E silu(z)^2), by quadrature over a standard normal z."""
    z = torch.linspace(-12, 12, 200_001, dtype=torch.double)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    moment = torch.trapezoid(mp_silu(z).square() * density, z)
    assert float(moment) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_layers_keep_the_variance_whatever_their_stored_weights(size):
    layer = MPLayer(64, 48, size)
    x = torch.randn(256, 64) if size == 0 else torch.randn(32, 64, 16, 16)
    with torch.no_grad():
        before = layer(x)
        inner = before if size == 0 else before[..., 1:-1, 1:-1]  # zeros lie outside
        assert rms(inner) == pytest.approx(1, abs=0.03)
        layer.weight *= torch.rand(48, *[1] * (layer.weight.ndim - 1)) + 0.5  # what matters is their direction
        torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-4)
        layer.project_weights()
        norms = layer.weight.square().mean(tuple(range(1, layer.weight.ndim)))
        torch.testing.assert_close(norms, torch.ones(48), rtol=1e-3, atol=0)
    assert layer.bias is None if hasattr(layer, "bias") else True
    torch.testing.assert_close(layer(x, 0.5), 0.5 * layer(x))


def test_gradients_are_orthogonal_to_the_weights():
    """So that weights only grow when they are stepped, which forced normalization undoes (section 2.3)."""
    layer = MPLayer(8, 4, 3).double()
    layer(torch.randn(2, 8, 5, 5, dtype=torch.double)).square().sum().backward()
    inner = (layer.weight * layer.weight.grad).flatten(1).sum(1)
    assert bool((inner.abs() < 1e-3 * layer.weight.grad.flatten(1).norm(dim=1)).all())


def test_waves_have_unit_variance_and_repeat():
    waves = MPFourier(512)
    assert rms(waves(torch.randn(200))) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(waves(torch.ones(1)), MPFourier(512)(torch.ones(1)), rtol=0, atol=0)


def test_attention_is_of_cosines():
    """Queries and keys have unit root mean square, so logits are at most sqrt(d), and scales of them do not matter."""
    block = MPBlock(EDM2(head_size=8), 16, 16, 4, decodes=True, attends=True)
    qkv = torch.randn(2, 48, 3, 3)
    scaled = qkv.unflatten(1, (2, 8, 3)) * torch.tensor([3.0, 0.2, 5.0])[:, None, None]
    torch.testing.assert_close(block._attend(scaled.flatten(1, 3)), block._attend(qkv), rtol=1e-2, atol=1e-3)
    q, k, v = (normalize(y, (3,)) for y in qkv.flatten(2).unflatten(1, (2, 8, 3)).transpose(2, 4).unbind(3))
    weights = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, -1)
    expected = (weights @ v).transpose(2, 3).flatten(1, 2).unflatten(2, (3, 3))
    torch.testing.assert_close(block._attend(qkv), expected)


def magnitudes(net, x, label, cond):
    """The root mean squares of what every block of a network returns."""
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, a, y: seen.append(rms(y))) for m in net.modules() if isinstance(m, MPBlock)
    ]
    with torch.no_grad():
        net(x, label, cond)
    for hook in hooks:
        hook.remove()
    return seen


CONFIG = EDM2(width=32, mults=(1, 2), num_blocks=2, attention=(8,), head_size=32)


def test_activations_have_unit_magnitude_at_the_start():
    net = CONFIG.denoiser(Spec((4, 16, 16), {"label": Label(10)}))
    found = magnitudes(net, torch.randn(8, 4, 16, 16), torch.randn(8), {"label": torch.arange(8)})
    assert len(found) == 14
    assert all(0.7 < m < 1.3 for m in found), found


def test_magnitudes_stay_after_training(tmp_path):
    run = train(
        objective="edm", data="digits", backbone=CONFIG, steps=12, batch=8, lr=1e-2, warmup=0, schedule="constant",
        ema=(), sample_every=0, tensorboard=False, workers=0, out=str(tmp_path), device="cpu", precision="fp32",
    )  # fmt: skip
    net = next(iter(run.nets.values()))
    layers = [m for m in net.modules() if isinstance(m, MPLayer)]
    norms = torch.stack([m.weight.square().mean(tuple(range(1, m.weight.ndim))).sqrt().max() for m in layers])
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-3, atol=0)  # forced after every step
    assert float(next(m for n, m in net.named_parameters() if n == "gain.value")) != 0
    found = magnitudes(net, torch.randn(8, 1, 8, 8), torch.zeros(8), {"label": torch.arange(8)})
    # the encoder normalises its input; in the decoder branches that are alike by now add up to more than one
    assert all(0.5 < m < 1.6 for m in found[:5]), str(found)
    assert all(0.5 < m < 6 for m in found[5:]), str(found)


def test_no_biases_and_no_norms():
    net = config.from_dict(EDM2, {"width": 8, "mults": [1, 2]}).denoiser(Spec((1, 8, 8), {"label": Label(3)}))
    assert not [name for name, _ in net.named_parameters() if "bias" in name]
    assert not [m for m in net.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
