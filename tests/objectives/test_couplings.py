"""Couplings and sources: against torchcfm and POT, their marginals, and where sampling starts."""

from dataclasses import dataclass, replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from genkit.backbones import MLP
from genkit.core import Batch, Draw, Label, Spec, Vector
from genkit.data import DATA, InMemory
from genkit.data.codecs import Pixels
from genkit.diffusion.paths import VP, Cosine, Linear, mix
from genkit.diffusion.samplers import SAMPLERS, Seeds, bind, ode_samplers, uniform
from genkit.objectives import Flow
from genkit.objectives.matching.couplings import (
    COUPLINGS,
    GivenPairs,
    Independent,
    OptimalTransport,
    SchrodingerBridge,
    entropic_plan,
    squared_distances,
)
from genkit.objectives.matching.sources import SOURCES, Anchored, DatasetSource, Normal
from genkit.training.settings import TrainSettings
from tests.support.exact import F64, Mixture, three


def pairs(n, dim=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return three().sample(n, seed)[0][:, :dim], torch.randn(n, dim, generator=g, dtype=F64)


def batch(x0, **more):
    return Batch(x0, draw=Draw((4,), 0, len(x0)), **more)


# ---------------------------------------------------------------------------------------------- trusted peers
def test_paths_and_targets_are_those_of_torchcfm():
    """The same x0, x1 and t give the same x_t and u_t; theirs has t = 1 at the data, and velocities towards them."""
    cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    data, noise = pairs(64)
    t = torch.linspace(0.02, 0.98, 64, dtype=F64)
    _, x, u = cfm.ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(noise, data, t=1 - t)
    assert torch.allclose(mix(Linear(), data, noise, t), x)
    assert torch.allclose(Flow().parametrization.target(Linear(), data, noise, t), -u)
    # variance preserving: theirs is Albergo & Vanden-Eijnden's, the derivative in their time
    _, x, u = cfm.VariancePreservingConditionalFlowMatcher(0.0).sample_location_and_conditional_flow(
        noise, data, t=1 - t
    )
    ours = mix(Cosine(), data, noise, t)
    assert torch.allclose(ours, x)
    a, s = Cosine().alpha(t)[:, None], Cosine().sigma(t)[:, None]
    p = Flow(path=Cosine()).parametrization.predict(Cosine(), ours, t, noise - data)
    assert torch.allclose(-torch.pi / 2 * (a * p.x1 - s * p.x0), u)


def test_the_bridge_is_that_of_torchcfm():
    """x between the ends, and their difference, are SB-CFM's location and conditional flow for the same noise."""
    cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    data, noise = pairs(50)
    t, e, sigma = torch.linspace(0.05, 0.95, 50, dtype=F64), torch.randn(50, 2, dtype=F64), 0.4
    theirs = cfm.SchrodingerBridgeConditionalFlowMatcher(sigma=sigma)
    x = theirs.compute_mu_t(noise, data, 1 - t) + theirs.compute_sigma_t(1 - t)[:, None] * e
    u = theirs.compute_conditional_flow(noise, data, 1 - t, x)
    fixed = Frozen(torch.zeros(50, dtype=F64), e)
    still = SchrodingerBridge(sigma)
    apart = 1e3 * torch.arange(50, dtype=F64)[:, None]  # so far apart that everyone's partner is their own
    x0, x1 = still(Batch(data + apart, draw=fixed), noise + apart, Linear(), t)
    assert torch.allclose(mix(Linear(), x0, x1, t) - apart, x, atol=1e-6)
    assert torch.allclose(x1 - x0, -u, atol=1e-6)


class Frozen:
    def __init__(self, u, e):
        self.u, self.e = u, e

    def uniform(self):
        return self.u

    def normal(self, *shape):
        return self.e


def test_plans_are_those_of_pot():
    ot = pytest.importorskip("ot")
    data, noise = pairs(40)
    cost, flat = squared_distances(data, noise), [1 / 40] * 40
    x0, x1 = OptimalTransport()(batch(data), noise, Linear(), torch.ones(40, dtype=F64))
    assert float(((x0 - x1) ** 2).sum(1).mean()) == pytest.approx(float(ot.emd2(flat, flat, cost.numpy())), rel=1e-9)
    for sigma in (0.3, 1.0):
        theirs = torch.as_tensor(ot.sinkhorn(flat, flat, cost.numpy(), reg=2 * sigma**2, numItermax=20_000))
        assert torch.allclose(entropic_plan(cost, 2 * sigma**2, 20_000, 1e-9), theirs, atol=1e-8)


# ------------------------------------------------------------------------------------------------- couplings
def test_optimal_transport_moves_sources_only_and_shortens_the_way():
    data, noise = pairs(128)
    x0, x1 = OptimalTransport()(batch(data), noise, Linear(), torch.ones(128))
    assert torch.equal(x0, data)
    assert torch.equal(x1.sort(0).values, noise.sort(0).values)
    assert len(x1.unique(dim=0)) == 128
    assert float(((x1 - data) ** 2).sum()) < 0.7 * float(((noise - data) ** 2).sum())
    # cyclically monotone: no exchange of two partners is shorter (Brenier)
    cost = squared_distances(x0, x1)
    both = cost.diag()[:, None] + cost.diag()[None]
    assert float((both - cost - cost.T).max()) <= 1e-9


def test_optimal_transport_stays_within_classes():
    """Else noise, given the class, would not be normal, which is what sampling starts from."""
    torch.manual_seed(0)
    label = torch.arange(60) % 3
    x, x1 = torch.randn(60, 2) + 4 * label[:, None], torch.randn(60, 2)
    batch = Batch(x, {"label": label, "size": torch.randn(60)})
    _, moved = OptimalTransport()(batch, x1, Linear(), torch.rand(60))
    source = (moved[:, None] == x1).all(2).float().argmax(1)
    assert torch.equal(label[source], label)
    assert sorted(source.tolist()) == list(range(60))
    for k in range(3):
        cost = torch.cdist(x[label == k], x1[label == k]).double().square()
        rows, columns = linear_sum_assignment(cost.numpy())
        torch.testing.assert_close(
            (x - moved)[label == k].double().square().sum(), cost[rows, columns].sum(), rtol=1e-5, atol=0
        )


def test_optimal_transport_serves_pictures():
    x, x1 = torch.randn(2, 16, 3, 4, 4)
    x0, got = OptimalTransport()(batch(x), x1[torch.randperm(16)], Linear(), torch.ones(16))
    assert got.shape == x0.shape
    x0, got = OptimalTransport()(batch(x), x[torch.randperm(16)] + 0.01 * x1, Linear(), torch.ones(16))
    assert torch.equal(got.sub(x).abs().amax((1, 2, 3)) < 0.1, torch.ones(16, dtype=torch.bool))


def test_the_entropic_plan_has_its_marginals_and_its_limits():
    cost = squared_distances(*pairs(32))
    plan = entropic_plan(cost, 0.5)
    assert torch.allclose(plan.sum(0), torch.full((32,), 1 / 32, dtype=F64), rtol=1e-3)
    assert torch.allclose(plan.sum(1), torch.full((32,), 1 / 32, dtype=F64), rtol=1e-3)
    assert torch.allclose(entropic_plan(cost, 1e6), torch.full_like(cost, 1 / 32**2), rtol=1e-3)  # independent


def test_partners_of_the_bridge_follow_the_entropic_plan():
    """Frequencies over many draws of one small plan."""
    data, noise = pairs(5)
    seen = torch.zeros(5, 5)
    many = 4000
    for i in range(many // 5):
        ends = SchrodingerBridge(0.5)(
            Batch(data, draw=Draw((i,), 0, 5)), noise, Linear(), torch.full((5,), 1 - 1e-4, dtype=F64)
        )[1]
        near = torch.cdist(ends, noise).argmin(1)  # the bridge adds 0.0025 there
        seen[range(5), near] += 1
    plan = entropic_plan(squared_distances(data, noise), 0.5) * 5
    assert torch.allclose(seen.double() / (many // 5), plan, atol=0.06)


def test_the_bridge_has_the_variance_of_a_brownian_bridge():
    """Between one point and another: mean on the line, variance sigma^2 t (1 - t); so also in the chart of VP."""
    n, sigma = 20_000, 0.8
    x0, x1 = torch.tensor([[1.0, -1.0]], dtype=F64).expand(n, 2), torch.tensor([[3.0, 0.5]], dtype=F64).expand(n, 2)
    for path, time in ((Linear(), 0.3), (VP(), 0.4)):
        t = torch.full((n,), time, dtype=F64)
        a, s = float(path.alpha(t[0])), float(path.sigma(t[0]))
        few = [
            SchrodingerBridge(sigma)(Batch(x0[:100], draw=Draw((7, i), 0, 100)), x1[:100], path, t[:100])
            for i in range(n // 100)
        ]
        x = torch.cat([mix(path, p, q, t[:100]) for p, q in few]) / (a + s)
        tau = s / (a + s)
        assert torch.allclose(x.mean(0), (1 - tau) * x0[0] + tau * x1[0], atol=0.01)
        assert torch.allclose(x.var(0), torch.tensor(sigma**2 * tau * (1 - tau), dtype=F64), rtol=0.04)


@pytest.mark.parametrize("coupling", [Independent(), OptimalTransport(), SchrodingerBridge()], ids=str)
def test_the_loss_of_every_coupling_is_finite_and_conditions_stay(coupling):
    seen = []
    net = {"net": lambda x, t, c: seen.append(c["label"]) or torch.zeros_like(x)}
    label = torch.arange(64) % 3
    loss = Flow(coupling=coupling).loss("denoise", net, batch(torch.randn(64, 2), cond={"label": label}))
    assert bool(torch.isfinite(loss.per_sample).all())
    assert torch.equal(seen[0], label)


def test_given_pairs_are_used_as_they_are():
    seen = []
    net = {"net": lambda x, t, c: seen.append((x, t)) or torch.zeros_like(x)}
    x0, x1 = torch.randn(2, 32, 2)
    loss = Flow(coupling=GivenPairs()).loss("denoise", net, batch(x0, x1=x1)).per_sample
    assert torch.allclose(loss, ((x1 - x0) ** 2).mean(1))
    assert torch.allclose(seen[0][0], mix(Linear(), x0, x1, seen[0][1]))
    with pytest.raises(ValueError, match="no pairs"):
        Flow(coupling=GivenPairs()).loss("denoise", net, batch(x0))


def test_pairs_travel_with_the_batch():
    b = batch(torch.randn(3, 2), x1=torch.randn(3, 2)).to("meta")
    assert b.x1.device.type == "meta"
    assert batch(torch.randn(3, 2)).to("meta").x1 is None


# --------------------------------------------------------------------------------------------------- sources
def test_every_source_serves_training_and_sampling_alike():
    z, mu = torch.randn(6, 2), torch.randn(6, 2)
    assert Normal()(z, {}) is z
    assert torch.allclose(Anchored("mu", 0.3)(z, {"mu": mu}), mu + 0.3 * z)
    with pytest.raises(ValueError, match="needs the condition 'mu'; given: none"):
        Anchored("mu")(z, {})
    spec = Spec((2,), {"mu": Vector((2,)), "label": Label(3)})
    Anchored("mu").check(spec)
    for wrong in ("label", "nu"):
        with pytest.raises(ValueError, match=r"needs a condition of the sample's shape \(2,\); the data have: mu"):
            Flow(source=Anchored(wrong)).networks(MLP(), spec)


def test_a_data_set_as_source_is_drawn_evenly_and_by_seed():
    moons = DATA["moons"](n=1000)
    source, data = DatasetSource(moons), moons.load("train")
    noise = Seeds(range(4000))((2,))
    x1 = source(noise, {})
    which = torch.cdist(x1, data.x).argmin(1)
    assert torch.equal(data.x[which], x1)
    share = torch.bincount(which // 100, minlength=10) / 4000
    assert torch.allclose(share, torch.full((10,), 0.1), atol=0.02)
    assert torch.equal(source(noise[7:9], {}), x1[7:9])
    assert int(source(torch.full((1, 2), 9.0), {}).isnan().sum()) == 0  # Phi(9) = 1
    with pytest.raises(ValueError, match=r"given samples of shape \(2,\); needs \(1, 8, 8\)"):
        Flow(source=source).networks(MLP(), Spec((1, 8, 8)))


def test_pictures_as_source_come_encoded_and_unmirrored():
    digits = DATA["digits"]()
    data = digits.load("train")
    z = torch.randn(5, *data.spec.shape)
    x1 = DatasetSource(digits)(z, {})
    assert x1.shape == z.shape
    assert -1 <= float(x1.min()) < float(x1.max()) <= 1
    number = int(torch.special.ndtr(z[0].flatten()[0].double()) * len(data))
    once = data.codec.encode(data.batch(torch.tensor([number]), Draw((0,), 0, 1))).x[0]
    assert torch.equal(x1[0], once) or torch.equal(x1[0], once.flip(-1))


@dataclass(frozen=True)
class Mirrored:
    """Pictures that are flipped when they are trained on."""

    def load(self, split):
        x = torch.arange(4 * 6, dtype=torch.uint8).reshape(4, 1, 2, 3)
        return InMemory(x, {}, Spec((1, 2, 3)), Pixels(), flip=True)


def test_a_source_is_not_augmented():
    """Else sample i would depend on the row that it is drawn in."""
    z = torch.randn(1, 1, 2, 3).expand(40, 1, 2, 3)
    x1 = DatasetSource(Mirrored())(z, {})
    assert torch.equal(x1, x1[:1].expand_as(x1))
    assert bool((x1.diff(dim=-1) > 0).all())


def test_sampling_starts_at_the_source():
    """A network that answers velocity 0 gives the source back."""
    zero = {"net": Zero()}
    z, mu = torch.randn(4, 2), torch.randn(4, 2)
    got = Flow(source=Anchored("mu", 0.5)).generator(zero, bind("heun", 3))(z, {"mu": mu})
    assert torch.allclose(got, mu + 0.5 * z, atol=1e-6)
    assert torch.allclose(Flow().generator(zero, bind("heun", 3))(z, {}), z, atol=1e-6)


class Zero(nn.Module):
    def forward(self, x, label, cond):
        return torch.zeros_like(x)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("flow", [Flow(coupling=OptimalTransport()), Flow(source=DatasetSource())], ids=["ot", "data"])
def test_samplers_that_add_noise_are_refused_where_the_sde_is_wrong(flow, sampler):
    generate = flow.generator({"net": Zero()}, bind(sampler, uniform(4)))
    if sampler in ode_samplers():
        assert bool(torch.isfinite(generate(torch.randn(3, 2), {})).all())
    else:
        with pytest.raises(ValueError, match="only an ODE; take one of ddim, heun"):
            generate(torch.randn(3, 2), {})
    Flow().generator({"net": Zero()}, bind(sampler, uniform(4)))(torch.randn(3, 2), {})


@pytest.mark.parametrize("coupling", [OptimalTransport(), SchrodingerBridge()])
def test_a_source_that_belongs_to_its_condition_is_not_given_to_another(coupling):
    with pytest.raises(ValueError, match="belongs to its condition; allowed: independent, given"):
        Flow(source=Anchored(), coupling=coupling)
    replace(Flow(source=Anchored()), coupling=GivenPairs())


def test_every_coupling_and_source_is_a_configuration():
    from genkit import config

    for coupling in COUPLINGS:
        for source in SOURCES:
            tree = {"objective": {"name": "flow", "coupling": coupling, "source": source}}
            if source == "anchored" and coupling in ("ot", "sb"):
                with pytest.raises(ValueError, match="objective: coupling: given"):
                    config.from_dict(TrainSettings, tree)
                continue
            cfg = config.from_dict(TrainSettings, tree)
            assert config.from_dict(TrainSettings, config.dump(cfg)) == cfg


# ---------------------------------------------------------------------------------------------------- training
def train(flow, draw, steps, width=64, seed=0, rate=2e-3):
    torch.manual_seed(seed)
    nets = flow.networks(MLP(width=width, depth=2), Spec((2,)))
    optimizer = torch.optim.Adam(nets["net"].parameters(), rate)
    for i in range(steps):
        loss = flow.loss("denoise", nets, replace(draw(i), draw=Draw((seed, i), 0, 256))).per_sample.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return nets


def energy_above_transport(flow, nets, n=512):
    """E of the velocity's square along the way, against that of the straight way between the same ends; 1: straight."""
    states = []
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(5))
    start = flow.source(z, {})
    out = flow.generator(nets, bind("heun", uniform(40), callback=lambda i, x, p: states.append(x)))(z, {})
    way = torch.stack([start, *states])
    energy = (way.diff(dim=0) ** 2).sum(-1).mean(1).sum() * 40
    return float(energy / ((out - start) ** 2).sum(1).mean())


@pytest.mark.slow
def test_optimal_transport_straightens_the_flow():
    """Tong et al. 2024, table 2: the energy of the way is closer to the least there can be."""
    data = DATA["8gaussians"](n=20_000).load("train").x
    draw = lambda i: Batch(data[torch.arange(256 * i, 256 * (i + 1)) % len(data)])  # noqa: E731
    found = {}
    for name in ("independent", "ot"):
        flow = Flow(coupling=COUPLINGS[name]())
        found[name] = energy_above_transport(flow, train(flow, draw, 300))
    assert found["ot"] - 1 < 0.35 * (found["independent"] - 1), found


@pytest.mark.slow
def test_data_to_data_arrives():
    """From one mixture of two Gaussians to another: the second's mean, its spread, and both halves."""
    eye = torch.eye(2, dtype=F64)[None] * 0.02
    target = Mixture(torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64), eye.expand(2, 2, 2))
    x = target.sample(8192)[0].float()
    flow = Flow(source=DatasetSource(DATA["moons"](n=4000)), coupling=OptimalTransport())
    nets = train(flow, lambda i: Batch(x[torch.arange(256 * i, 256 * (i + 1)) % len(x)]), 300)
    out = flow.generator(nets, bind("heun", 20))(torch.randn(1000, 2), {})
    assert torch.allclose(out.mean(0), x.mean(0), atol=0.2)
    assert torch.allclose(out.std(0), x.std(0), atol=0.12)
