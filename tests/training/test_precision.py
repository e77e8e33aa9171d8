"""Networks sample in the precision that is asked for, and nothing else does."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from genkit.core.device import has_fast_bf16, pick_device
from genkit.core.messages import warn_once
from genkit.diffusion.samplers import bind
from genkit.objectives import Flow
from genkit.training.precision import network_precision, require_precision, with_networks
from genkit.training.run import load_run
from genkit.training.sampling import Sampling
from genkit.training.train import train
from tests.support.pretended_device import CUDA

CPU = torch.device("cpu")


class Product(nn.Linear):
    """A network that multiplies by a matrix."""

    def forward(self, x, label, cond):
        return super().forward(x)


def test_bf16_rounds_the_network_and_not_the_sampler():
    """One Euler step from z is ``z - W z`` with the product in bf16; the sum is not rounded."""
    torch.manual_seed(0)
    net, z = Product(3, 3, bias=False).requires_grad_(False), torch.randn(4, 3)
    generate = Flow().generator({"net": net}, bind("ddim", 1))
    drawn = with_networks(generate, {"net": net}, "bf16", CPU)(z, {})
    rounded = (z.bfloat16() @ net.weight.bfloat16().T).float()
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, z - rounded, rtol=0, atol=1e-6)
    assert (drawn - generate(z, {})).abs().max() > 1e-4
    assert with_networks(generate, {"net": net}, "fp32", CPU) is generate


def test_it_ends_with_the_context_also_after_an_error():
    net, x = Product(3, 3), torch.randn(2, 3)
    exact = net(x, None, {})
    with pytest.raises(RuntimeError), network_precision({"net": net}, "bf16", CPU):
        net(torch.randn(2, 4), None, {})
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(net(x, None, {}), exact)


def test_tf32_is_switched_on_and_back():
    products = torch.backends.cuda.matmul
    before = products.allow_tf32
    with network_precision({}, "tf32", CUDA):
        assert products.allow_tf32
    assert products.allow_tf32 == before


def test_a_cpu_has_no_tf32():
    with pytest.raises(ValueError, match="precision: given tf32, which only CUDA devices have; allowed on cpu"):
        with_networks(lambda z, cond, noise=None: z, {}, "tf32", pick_device("cpu"))


def test_a_run_samples_in_bf16_and_the_shift_is_small(tmp_path):
    train(objective="flow", data="moons", backbone={"name": "mlp", "width": 16, "depth": 2}, steps=20, batch=64,
          sample_every=0, tensorboard=False, device="cpu", out=str(tmp_path))  # fmt: skip
    run = load_run(tmp_path / "latest", device="cpu")
    exact, rounded = (run.sample(16, Sampling(steps=4, precision=p)).x for p in ("fp32", "bf16"))
    shift = (exact - rounded).abs().max()
    assert 0 < shift < 0.05
    assert replace(Sampling(), precision="bf16") != Sampling()


@pytest.mark.parametrize(("native", "emulated"), [(True, True), (False, True)])
def test_emulated_bf16_is_not_fast(monkeypatch, native, emulated):
    """A V100 emulates it, and torch says yes unless it is asked without emulation."""
    answer = lambda including_emulation=True: emulated if including_emulation else native  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    assert has_fast_bf16(CUDA) == native


@pytest.mark.parametrize(("has", "precision", "expected"), [
    (False, "bf16", 1), (True, "bf16", 0), (False, "fp32", 0),
])  # fmt: skip
def test_emulated_bf16_is_used_with_a_warning(monkeypatch, caplog, has, precision, expected):
    monkeypatch.setattr("genkit.core.device.cpu_has_bf16", lambda: has)
    warn_once.cache_clear()
    for _ in range(2):  # said once
        require_precision(precision, CPU)
    warnings = [
        r.getMessage() for r in caplog.records if "precision: bf16: this CPU only emulates it" in r.getMessage()
    ]
    assert len(warnings) == expected
