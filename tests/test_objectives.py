"""Matching losses: stationary at the exact posterior mean, drawn as they say, and blind to how a batch is cut."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from exact import F64, ExactDenoiser, three
from torch import nn

from genkit.backbones import MLP
from genkit.core import Batch, Draw, Label, Spec
from genkit.objectives import DDPM, OBJECTIVES, Flow
from genkit.paths import VE, VP, Cosine, Linear
from genkit.sampling import bind

MIXTURE = three()
FLOWS = [Flow(path=p, prediction=q) for p, q in product([Linear(), Cosine()], ["velocity", "x0", "v"])]
FLOWS += [Flow(path=p, prediction=q) for p, q in product([VP(), VE()], ["eps", "score", "karras", "x0", "velocity"])]
FLOWS += [Flow(space="x0"), Flow(path=VP(), space="eps", prediction="x0"), Flow(times="logit-normal")]
MATCHING = [*FLOWS, DDPM(), DDPM(prediction="v", space="x0"), DDPM(betas="cosine", timesteps=50, prediction="x0")]


@pytest.mark.parametrize("objective", MATCHING, ids=lambda o: "-".join(map(str, vars(o).values()))[:70])
def test_the_posterior_mean_is_stationary(objective):
    """At the exact denoiser the gradient of the loss along any function of (x, t) is zero.

    The network is exact + h * direction(x, t); d loss / dh at 0 over 60,000 samples is compared with its own spread.
    A denoiser whose x0 is wrong by a factor of 0.8 fails the same test.
    """
    exact = ExactDenoiser(MIXTURE, objective.along)
    n = 60_000
    x0, _ = MIXTURE.sample(n, seed=1)
    batch = Batch(x0, draw=Draw((3,), 0, n))

    def slopes(factor):
        seen = {}

        def net(x_in, label, cond):
            # undo the parametrisation: what would the exact network put out for the x and t that made x_in?
            x, t = seen["x"], seen["t"]
            p = exact(x, t, {})
            x0_hat = p.x0 * factor
            x1_hat = (x - objective.along.alpha(t)[:, None] * x0_hat) / objective.along.sigma(t)[:, None]
            h = seen.setdefault("h", torch.zeros(3, dtype=F64, requires_grad=True))
            out = objective.parametrization.target(objective.along, x0_hat, x1_hat, t)
            ways = torch.stack([torch.tanh(x), torch.tanh(x.flip(1) * 2), t[:, None].expand_as(x)], -1)
            return out + ways @ h

        inner = objective.parametrization

        class Spy:
            def inputs(self, path, x, t):
                seen.update(x=x, t=t)
                return inner.inputs(path, x, t)

            target, predict = inner.target, inner.predict

        watched = Watched(objective, Spy())
        per_sample = watched.loss("denoise", {"net": Float64(net)}, batch).per_sample
        grads = []
        for piece in per_sample.split(n // 30):
            grads.append(torch.autograd.grad(piece.mean(), seen["h"], retain_graph=True)[0])
        g = torch.stack(grads)
        return (g.mean(0) / (g.std(0) / 30**0.5)).abs().max()  # in standard errors

    assert float(slopes(1.0)) < 5
    assert float(slopes(0.8)) > 7


class Float64:
    """A network whose `.float()` is kept in float64, so that the loss is exact."""

    def __init__(self, net):
        self.net = net

    def __call__(self, *a):
        out = self.net(*a)
        return type("Out", (), {"float": lambda self: out})()


def Watched(objective, parametrization):
    kind = type("Watched", (type(objective),), {"parametrization": parametrization})
    made = object.__new__(kind)
    made.__dict__.update(vars(objective))
    return made


def test_loss_is_the_mean_square_of_the_paper():
    """Liu et al. 2023, eq. 1, and Ho et al. 2020, eq. 14, recomputed for a network that answers 0."""
    zero = {"net": lambda x, t, c: torch.zeros_like(x)}
    x0 = torch.randn(32, 1, 4, 4)
    batch = Batch(x0, draw=Draw((1,), 0, 32))
    flow = Flow().loss("denoise", zero, batch).per_sample
    draw = Draw((1,), 0, 32)
    draw.uniform()
    x1 = draw.normal(1, 4, 4)
    assert torch.allclose(flow, ((x1 - x0) ** 2).mean((1, 2, 3)), atol=1e-6)
    batch = Batch(x0, draw=Draw((1,), 0, 32))
    assert torch.allclose(DDPM().loss("denoise", zero, batch).per_sample, (x1**2).mean((1, 2, 3)), atol=1e-6)


def test_time_distributions():
    n = 40_000
    batch = Batch(torch.zeros(n, 1), draw=Draw((0,), 0, n))
    t = Flow().draw_times(batch)
    assert float(t.min()) > 0
    assert float(t.max()) <= 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(t.std()) == pytest.approx(12**-0.5, abs=0.01)
    t = Flow(times="logit-normal", t_mean=0.5, t_std=0.8).draw_times(batch)
    assert float(torch.logit(t).mean()) == pytest.approx(0.5, abs=0.02)
    assert float(torch.logit(t).std()) == pytest.approx(0.8, abs=0.02)
    k = DDPM(timesteps=10).draw_times(batch) * 10
    assert torch.equal(k.round().unique(), torch.arange(1.0, 11.0))
    assert torch.allclose(k, k.round(), atol=1e-5)
    assert float((k.round() == 10).float().mean()) == pytest.approx(0.1, abs=0.01)


def test_conditions_are_dropped_per_sample():
    """Not for the whole batch at once, as a peer's example does."""
    seen = []
    net = {"net": lambda x, t, c: seen.append(c["keep"]) or x}
    batch = Batch(torch.randn(4000, 2), {"label": torch.zeros(4000, dtype=torch.long)}, draw=Draw((0,), 0, 4000))
    Flow(drop=0.25).loss("denoise", net, batch)
    assert seen[0].shape == (4000,)
    assert float(seen[0].float().mean()) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_does_not_depend_on_how_the_batch_is_cut(name):
    objective, spec = OBJECTIVES[name](), Spec((2,), {"label": Label(3)})
    nets = objective.networks(MLP(width=32), spec)
    x, label = torch.randn(40, 2), torch.arange(40) % 3

    def losses(a, b):
        batch = Batch(x[a:b], {"label": label[a:b]}, draw=Draw((7, 1), a, b))
        return torch.cat([objective.loss(p.name, nets, batch).per_sample for p in objective.phases])

    whole = losses(0, 40)
    assert torch.allclose(torch.cat([losses(0, 13), losses(13, 32), losses(32, 40)]), whole, atol=1e-5)


def test_a_sampler_is_needed():
    with pytest.raises(ValueError, match="needs a sampler"):
        Flow().generator({"net": nn.Identity()})


@pytest.mark.parametrize("bad", [{"prediction": "eps"}, {"prediction": "score"}, {"prediction": "karras"}])
def test_predictions_that_say_nothing_at_pure_noise_are_refused(bad):
    with pytest.raises(ValueError, match="alpha"):
        Flow(**bad)
    replace(Flow(), path=VP(), **bad)


def test_a_small_network_learns_two_gaussians():
    """Training end to end: flow and ddpm bring 2-D data back with its moments."""
    data = torch.cat([torch.randn(2000, 2) * 0.2 + 1, torch.randn(2000, 2) * 0.2 - 1])
    for objective in (Flow(), DDPM(prediction="x0")):
        torch.manual_seed(0)
        nets = objective.networks(MLP(width=64, depth=3) if "depth" in MLP.__annotations__ else MLP(), Spec((2,)))
        opt = torch.optim.Adam(nets["net"].parameters(), 2e-3)
        for _ in range(400):
            loss = objective.loss("denoise", nets, Batch(data[torch.randint(4000, (256,))])).per_sample.mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
        x = objective.generator(nets, bind("heun", 20))(torch.randn(1000, 2), {})
        side = (x.mean(1) > 0).float().mean()
        assert 0.35 < float(side) < 0.65, objective
        assert float((x.abs() - 1).abs().mean()) < 0.3, objective
