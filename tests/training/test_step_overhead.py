"""What a training step does beside its passes: no walk over the modules of a network, which takes longer than the
averages themselves, and no random numbers that nothing uses."""

import time

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.scale.steps import PLANE, measure_step
from genkit import config
from genkit.core import Draw, seed_of
from genkit.data import Stream
from genkit.objectives import OBJECTIVES
from genkit.training.averages import Average
from genkit.training.loop import fit, initial_state
from genkit.training.settings import TrainSettings
from tests.support.devices import points
from tests.training.test_devices import SPECIAL, TINY_MLP

FROM_A_TEACHER = {"guidance-distillation", "progressive-distillation", "dmd"}


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - FROM_A_TEACHER))
def test_no_step_walks_over_modules(name, monkeypatch):
    objective, make = SPECIAL.get(name) or (OBJECTIVES[name](), points)
    data, walks, at = make(), [], []
    settings = config.override(TrainSettings(), objective=objective, steps=3, batch=8, ema=(0.9,), precision="fp32")
    nets = objective.networks(TINY_MLP, data.spec)
    state = initial_state(objective, nets, settings)
    walk = nn.Module.named_modules
    monkeypatch.setattr(nn.Module, "named_modules", lambda self, *a, **kw: walks.append(self) or walk(self, *a, **kw))
    fit(objective, state, Stream(data, 8, 0), data.codec, settings, Accelerator(cpu=True),
        progress=lambda step, loss: at.append(len(walks)))  # fmt: skip
    assert at[1] - at[0] == 0  # the second step


def best_of(function, rounds=200):
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return sorted(times)[rounds // 10]


def test_an_average_costs_little_more_than_its_kernel():
    """1.3 times; with a walk over the modules it was 8 times."""
    make = lambda: nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(12)))  # noqa: E731
    net, ema = make(), make().requires_grad_(False)
    old, new = list(ema.parameters()), [p.detach() for p in net.parameters()]
    average = Average(0.99, {"net": ema}, {"net": net})
    kernel, update = best_of(lambda: torch._foreach_lerp_(old, new, 0.1)), best_of(lambda: average.update(5))
    assert update < 3 * kernel


def test_a_buffer_that_is_replaced_is_followed():
    net, ema = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    average = Average(0.9, {"net": ema}, {"net": net})
    net.running_mean = torch.tensor([3.0, 4.0])
    average.update(0)
    assert ema.running_mean.tolist() == [3.0, 4.0]


def test_numbers_that_nobody_draws_cost_no_generators():
    draw = Draw((1, 2), 0, 1 << 20)
    assert "generators" not in vars(draw)
    one = Draw((1, 2), 16, 32)
    expected = torch.randn(16, generator=torch.Generator().manual_seed(seed_of(1, 2, 1)))
    assert one.normal().equal(expected)


@pytest.mark.slow
def test_a_step_of_flow_matching_costs_little_beside_its_passes():
    """1.1 times the passes of a network of two layers; 1.9 times with a walk over the modules."""
    best = min((measure_step("flow", PLANE, 150) for _ in range(5)), key=lambda row: row["overhead_ms"])
    assert best["overhead_ms"] < 1.4 * best["passes_ms"]
