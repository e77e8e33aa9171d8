"""The pretended device finds what it is there to find: planted faults, in small and in a training."""

import pytest
import torch
from torch import Tensor, nn

from genkit.backbones import MLP
from genkit.core import Draw
from genkit.diffusion.paths import Linear
from genkit.objectives import Flow
from genkit.objectives.matching import matching
from tests.support.devices import points, waits_of_a_step
from tests.support.pretended_device import CUDA, DeviceMismatch, Pretended, PretendedDevice


def on_device(*shape):
    return torch.randn(*shape, device=CUDA)


MISMATCHES = {
    "a sum": lambda: on_device(3) + torch.ones(3),
    "a layer on the host": lambda: nn.Linear(3, 2)(on_device(1, 3)),
    "a buffer on the host": lambda: nn.BatchNorm1d(3).to(CUDA)(torch.randn(2, 3)),
    "a table on the host": lambda: torch.arange(4.0)[on_device(3).long()],
    "a generator of the host": lambda: torch.randn(3, generator=torch.Generator(), device=CUDA),
    "a generator of the device": lambda: torch.randn(3, generator=torch.Generator(CUDA)),
    "a concatenation": lambda: torch.cat([on_device(3), torch.ones(3)]),
}
WAITS = {
    "item": lambda: on_device(1).item(),
    "float": lambda: float(on_device(3).sum()),
    "a condition": lambda: bool(torch.isfinite(on_device(3)).all()),
    "tolist": lambda: on_device(3).tolist(),
    "cpu": lambda: on_device(3).cpu(),
    "a constant": lambda: torch.tensor([1.0, 2.0], device=CUDA),
    "pageable memory": lambda: torch.ones(3).to(CUDA),
    "a mask as an index": lambda: on_device(3)[on_device(3) > 0],
    "an index from the host": lambda: on_device(3)[torch.tensor([0, 2])],
    "nonzero": lambda: on_device(3).nonzero(),
    "bincount": lambda: on_device(3).long().clamp(min=0).bincount(minlength=3),
    "a check of equality": lambda: torch.equal(on_device(3), on_device(3)),
    "a linear system": lambda: torch.linalg.solve(torch.eye(2, device=CUDA), on_device(2)),
}
QUIET = {
    "numbers": lambda: on_device(3) * 2.0 + torch.tensor(1.0),  # a scalar of the host is an argument of the kernel
    "pinned memory": lambda: torch.ones(3).pin_memory().to(CUDA, non_blocking=True),
    "a constant by a kernel": lambda: torch.full((3,), 2.0, device=CUDA),
    "a masked fill": lambda: on_device(3).index_put_((on_device(3) > 0,), torch.zeros((), device=CUDA)),
    "its own index": lambda: on_device(3)[on_device(3).long().clamp(0, 2)],
    "its own generator": lambda: torch.randn(3, generator=torch.Generator(CUDA).manual_seed(1), device=CUDA),
    "a gradient": lambda: nn.Linear(3, 2).to(CUDA)(on_device(1, 3)).sum().backward(),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_devices_may_not_be_mixed(name):
    with PretendedDevice(), pytest.raises(DeviceMismatch):
        MISMATCHES[name]()


@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits_once(name):
    with PretendedDevice() as device:
        WAITS[name]()
    assert sum(device.waits.values()) == 1, device.waits


@pytest.mark.parametrize("name", QUIET)
def test_the_host_does_not_wait(name):
    with PretendedDevice() as device:
        made = torch.nn.Linear(1, 1).to(CUDA).weight
        device.waits.clear()
        QUIET[name]()
    assert isinstance(made, Pretended)
    waits = {what: times for what, times in device.waits.items() if "copy to cuda" not in what[0]}
    assert not waits or name == "a gradient", device.waits  # moving a module to the device waits


def test_the_numbers_are_those_of_the_cpu():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1)), torch.randn(5, 3)
    net(x).square().mean().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    with PretendedDevice():
        for p in net.parameters():
            p.grad = None
        net.to(CUDA)
        net(x.to(CUDA)).square().mean().backward()
        for p, grad in zip(net.parameters(), expected, strict=True):
            assert p.grad.device == CUDA
            torch.testing.assert_close(p.grad.cpu(), grad, rtol=0, atol=0)
        with pytest.raises(TypeError, match="numpy"):
            net[0].weight.detach().numpy()


def draw_on_the_host(self, function, shape):
    parts = [function(self.BLOCK, *shape, generator=torch.Generator().manual_seed(b)) for b in self.blocks]
    return torch.cat(parts)[: self.stop - self.start].to(self.device)


def by_a_table(old):
    return lambda self, t: torch.linspace(0, 1, 11)[(t * 10).long()]


FAULTS = {  # where, what, and the fault
    "a tensor of the host in the path": (Linear, "sigma", lambda old: lambda self, t: t + torch.zeros(len(t))),
    "a table of the host in the path": (Linear, "sigma", by_a_table),
    "a number read back in the loss": (matching, "mean_flat", lambda old: lambda x: old(x) * (1 if x.sum() > 0 else 2)),
    "a mask as an index in the loss": (matching, "mean_flat", lambda old: lambda x: old(x[x > -9].view_as(x))),
    "random numbers of the host": (Draw, "_rows", lambda old: draw_on_the_host),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FAULTS, "none"])
def test_planted_faults_are_found_in_a_training(name, monkeypatch):
    if name != "none":
        owner, attribute, fault = FAULTS[name]
        monkeypatch.setattr(owner, attribute, fault(getattr(owner, attribute)))
    if " of the host in the path" in name:
        with pytest.raises(DeviceMismatch, match=r"paths\.py|matching\.py|test_pretended"):
            waits_of_a_step(Flow(), MLP(width=8, depth=1), points())
        return
    waits = waits_of_a_step(Flow(), MLP(width=8, depth=1), points())
    assert bool(waits) == (name != "none"), waits
    assert isinstance(torch.ones(1), Tensor)  # and outside, nothing is pretended
    assert torch.ones(1).device.type == "cpu"
