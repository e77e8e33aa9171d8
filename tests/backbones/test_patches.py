"""Patch embeddings are convolutions whose stride is their kernel's size, and compute no convolution."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from genkit.backbones import DiT
from genkit.backbones.compressed import CompressedLayer, WeightFormat, compress
from genkit.backbones.lora import ADAPTABLE
from genkit.backbones.patches import NUM_AXES, embed_patches, unembed_patches
from genkit.core import Spec

CONVOLUTIONS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d)}


@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize("axes", NUM_AXES)
@pytest.mark.parametrize("transposed", [False, True])
def test_they_are_the_convolutions_of_torch(transposed, axes, patch):
    """Initial weights, values and gradients; heights and widths differ, so that no axis can stand for another."""
    make = unembed_patches if transposed else embed_patches
    torch.manual_seed(0)
    ours = make(axes, 3, 5, patch).double()
    torch.manual_seed(0)
    theirs = CONVOLUTIONS[axes][transposed](3, 5, patch, patch).double()
    assert isinstance(ours, type(theirs))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.randn(2, 3, *(n * (1 if transposed else patch) for n in (2, 4)[:axes]), dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        given = x.clone().requires_grad_(True)
        y = layer(given)
        weight = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [given, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bottleneck", [0, 8])
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 8)])
def test_a_dit_computes_no_convolution(shape, bottleneck):
    """Forward or backward: a compiler would have to guess its layout."""
    net = DiT(width=16, depth=1, head_size=8, bottleneck=bottleneck).denoiser(Spec(shape, {}))
    x = torch.randn(3, *shape, requires_grad=True)
    with Operators() as seen:
        net(x, torch.rand(3)).square().sum().backward()
    assert "addmm" in seen.names or "mm" in seen.names
    assert not [name for name in seen.names if "conv" in name]


def test_they_are_adapted_and_compressed_as_other_convolutions_are():
    net = nn.Sequential(embed_patches(2, 3, 16, 2))
    assert isinstance(net[0], ADAPTABLE)
    x = torch.randn(2, 3, 4, 4)
    before = copy.deepcopy(net)(x)
    compress({"net": net}, WeightFormat(base="bf16"))
    assert isinstance(net[0], CompressedLayer)
    torch.testing.assert_close(net(x), before, rtol=0, atol=0.02)
