"""Objectives of policies: regression onto the mean, flows from anchors."""

from typing import Any

import pytest
import torch

from genkit.backbones import MLP
from genkit.core import Batch, Draw, Label, Spec, Vector
from genkit.diffusion.samplers import Seeds, bind
from genkit.objectives import AnchoredFlow, Regression
from tests.support.refusals import refuses


def test_regression_learns_the_mean_and_takes_no_sampler():
    torch.manual_seed(0)
    objective = Regression()
    spec = Spec((2, 4), {"obs": Vector((1, 1))})
    nets = objective.networks(MLP(width=32, depth=1), spec)
    optimizer = torch.optim.Adam(nets["net"].parameters(), lr=1e-2)
    obs = torch.randint(2, (1000, 1, 1)).float()
    x = torch.where(torch.rand(1000, 1, 1) < 0.5 + 0.4 * obs, 1.0, -1.0).expand(-1, 2, 4)
    for _ in range(150):
        optimizer.zero_grad()
        objective.loss("regress", nets, Batch(x, {"obs": obs})).per_sample.mean().backward()
        optimizer.step()
    generate = objective.generator(nets)
    cond = {"obs": torch.tensor([0.0, 1.0]).reshape(2, 1, 1)}
    means = torch.stack([x[obs[:, 0, 0] == v].mean((0, 2)) for v in (0, 1)])
    out = generate(torch.randn(2, 2, 4), cond)
    assert torch.allclose(out, means[..., None].expand(-1, -1, 4), atol=0.05)
    assert torch.equal(out, generate(torch.randn(2, 2, 4), cond))
    refuses(lambda: objective.generator(nets, bind("ddim", 4)), "sampler has no effect")


def test_an_anchored_flow_draws_both_modes_in_one_step_as_often_as_they_are():
    """x = ±1 with P(1 | obs) = 0.9 or 0.2: one step from the right anchor suffices, and the head knows the shares."""
    torch.manual_seed(0)
    objective = AnchoredFlow(cond_dropout=0.0)
    spec = Spec((1,), {"obs": Vector((1,)), "anchor": Label(2, centers=(-0.8, 0.8))})
    nets = objective.networks(MLP(width=32, depth=1), spec)
    optimizer = torch.optim.Adam([p for net in nets.values() for p in net.parameters()], lr=1e-2)
    for _ in range(200):
        obs = torch.randint(2, (256, 1)).float()
        up = (torch.rand(256, 1) < 0.2 + 0.7 * obs).long()
        batch = Batch(2.0 * up - 1, {"obs": obs, "anchor": up[:, 0]})
        optimizer.zero_grad()
        objective.loss("denoise", nets, batch).per_sample.mean().backward()
        optimizer.step()
    generate = objective.generator(nets, bind("ddim", 1))
    n = 2000
    for given, share in ((0.0, 0.2), (1.0, 0.9)):
        noise = Seeds(range(n))
        x = generate(noise((1,)), {"obs": torch.full((n, 1), given)}, noise)
        assert float((x.abs() - 1).abs().mean()) < 0.1
        assert float((x > 0).float().mean()) == pytest.approx(share, abs=0.07)
    named = generate(torch.randn(9, 1), {"obs": torch.zeros(9, 1), "anchor": torch.ones(9, dtype=torch.long)})
    assert float(named.min()) > 0.5
    refuses(lambda: objective.networks(MLP(), Spec((1,))), "--data.anchors 32")
    refuses(lambda: objective.generator(nets, bind("ancestral", 4))(torch.randn(3, 1), {"obs": obs[:3]}), "only an ODE")


def test_anchored_starts_lie_about_the_centre_that_is_given():
    objective, n = AnchoredFlow(std=0.3), 20_000
    batch = Batch(torch.zeros(n, 2), draw=Draw((0,), 0, n), x1=torch.tensor([[1.0, -2.0]]).expand(n, -1))
    _, x1 = objective.endpoints(batch, torch.ones(n))
    assert torch.allclose(x1.mean(0), torch.tensor([1.0, -2.0]), atol=0.01)
    assert torch.allclose(x1.std(0), torch.tensor(0.3), atol=0.01)
    inputs = {}
    spec = Spec((2,), {"anchor": Label(3, centers=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0))})
    narrow = AnchoredFlow(std=1e-6)
    nets: dict[str, Any] = narrow.networks(MLP(width=8, depth=1), spec)
    nets["net"] = lambda x, t, cond: inputs.update(x=x, t=t[:, None]) or torch.zeros_like(x)
    which, x0 = torch.arange(300) % 3, torch.randn(300, 2)
    narrow.loss("denoise", nets, Batch(x0, {"anchor": which}))
    start = (inputs["x"] - (1 - inputs["t"]) * x0) / inputs["t"]
    late = inputs["t"][:, 0] > 0.1
    assert torch.allclose(start[late], torch.arange(6.0).reshape(3, 2)[which[late]], atol=1e-3)
