"""Frozen weights in bf16, int8 and nf4: the map, its gradients, its error and size, and an adapter on it."""

import copy
import importlib.util

import pytest
import torch
from torch import nn

from genkit.backbones.compressed import PACKAGES, WeightFormat, adopt_tensor, compress, compressed_formats
from genkit.backbones.lora import LoRA, adapt
from tests.support.refusals import refuses

LAYERS = {
    "linear": (nn.Linear(64, 48), (3, 5, 64)),
    "conv": (nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2), (2, 8, 9, 9)),
    "conv-circular": (nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"), (2, 8, 6, 6)),
    "conv1d": (nn.Conv1d(8, 16, 3, padding="same", bias=False), (2, 8, 9)),
}
FORMATS = {"bf16": WeightFormat("bf16"), "int8": WeightFormat(quantize="int8"), "nf4": WeightFormat("bf16", "nf4")}


def require_package(kind):
    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind])


@pytest.mark.parametrize(
    ("kind", "name"), [*(("bf16", name) for name in LAYERS), ("int8", "linear"), ("nf4", "linear")]
)
def test_a_compressed_layer_is_the_map_by_its_dense_weight(kind, name):
    """Values, gradients of the input, and tangents; no copy of the weight in full is kept in between."""
    require_package(kind)
    layer, shape = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1]
    net = nn.Sequential(copy.deepcopy(layer))
    compress({"net": net}, FORMATS[kind])
    assert compressed_formats({"net": net}) == [kind]
    layer.weight.data = net[0].dense(torch.float32)
    x, tangent = torch.randn(2, *shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = net(ours)
    z = layer(theirs)
    assert torch.allclose(y, z, atol=1e-6)
    assert not any(t.numel() >= layer.weight.numel() and t.dtype == torch.float32 for t in kept)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    z.backward(gradient)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    a, b = (torch.func.jvp(f, (x,), (tangent,))[1] for f in (net, layer))
    assert torch.allclose(a, b, atol=1e-6)
    assert net.state_dict().keys() >= {"0.weight"}
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "error", "bits"), [("bf16", 0.003, 16), ("int8", 0.01, 8.6), ("nf4", 0.12, 4.6)])
def test_error_and_size(kind, error, bits):
    """bf16 rounds to 8 bits of mantissa, int8 to 1/127 of a row's largest, nf4 to one of 16 levels of a block."""
    require_package(kind)
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 256, bias=False), torch.randn(64, 256)
    net = nn.Sequential(copy.deepcopy(layer))
    compress({"net": net}, FORMATS[kind])
    difference = float((net(x) - layer(x)).detach().norm() / layer(x).norm())
    assert error / 10 < difference < error
    tensors = [*net[0].parameters(), *net[0].buffers()]
    inner = [getattr(t, name) for t in tensors for name in t.__tensor_flatten__()[0] if getattr(t, name) is not None] \
        if kind == "int8" else tensors  # fmt: skip
    assert 8 * sum(t.numel() * t.element_size() for t in inner) / layer.weight.numel() <= bits


def test_layers_without_memory_compress_the_weights_that_they_are_given():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
    compress({"net": net}, WeightFormat("bf16"))
    full = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
    for name, value in full.state_dict().items():
        adopt_tensor(net, name, value)
    types = {name: value.dtype for name, value in net.state_dict().items()}
    assert types == {"0.weight": torch.bfloat16, **dict.fromkeys(("0.bias", "1.weight", "1.bias"), torch.float32)}
    assert torch.equal(net[0].weight.float(), full[0].weight.to(torch.bfloat16).float())
    assert net[1].weight.data_ptr() == full[1].weight.data_ptr(), "copied"


@pytest.mark.parametrize("kind", FORMATS)
def test_an_adapter_of_a_compressed_layer_is_float32_and_alone_in_checkpoints(kind):
    pytest.importorskip("peft")
    require_package(kind)
    net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    compress({"net": net}, FORMATS[kind])
    adapt({"net": net}, LoRA(rank=2))
    assert {name.rpartition(".0.")[0] or name for name in net.state_dict()} \
        == {"0.lora_A.default.weight", "0.lora_B.default.weight"}  # fmt: skip
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    net(torch.randn(2, 64)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    net = {"net": nn.Sequential(nn.Linear(2, 2))}
    refuses(lambda: compress(net, WeightFormat(quantize="nf4")), "bitsandbytes", 'pip install "genkit-torch[quantize]"')
