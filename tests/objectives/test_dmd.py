"""DMD: the generator's gradient is the score difference of two mixtures, the fake score follows, modes are kept."""

import copy
import math

import pytest
import torch
from torch import nn

from genkit import train
from genkit.backbones import MLP
from genkit.core import Batch, Draw, Spec
from genkit.diffusion.paths import VE, VP, Cosine, Linear, chart
from genkit.diffusion.samplers import Seeds
from genkit.evaluation.metrics import wasserstein2
from genkit.objectives import DDPM, DMD, EDM, Flow
from genkit.objectives.distillation.dmd import score_difference
from genkit.objectives.distillation.student import step_times
from genkit.objectives.matching.couplings import OptimalTransport
from genkit.training.sampling import Sampling
from tests.support.exact import F64, ExactDenoiser, Mixture, three

REAL = three()
FAKE = Mixture(REAL.weights.flip(0), REAL.means * 0.7 + 0.3, REAL.covs * 1.5)


def score(mixture, path, z, t):
    """The gradient of the log-density at one time, by automatic differentiation of the closed form."""
    a, s = float(path.alpha(t[:1])), float(path.sigma(t[:1]))
    z = z.detach().requires_grad_()
    return torch.autograd.grad(mixture.noised(a, s).log_prob(z).sum(), z)[0]


@pytest.mark.parametrize("path", [Linear(), Cosine(), VP(), VE(sigma_max=20.0)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("time", [0.15, 0.5, 0.8])
def test_the_gradient_is_the_score_difference_of_two_mixtures(path, time):
    """To 1e-6 and better: ``sigma^2 / alpha (s_fake - s_real)``, over the mean distance of the real prediction from x,
    for a generator of known samples, through the loss that is really minimised."""
    n = 50
    x, _ = FAKE.sample(n, seed=1)
    t = torch.full((n,), time, dtype=F64)
    shift = torch.zeros(n, 2, dtype=F64, requires_grad=True)
    a, s = path.alpha(t)[:, None], path.sigma(t)[:, None]
    noise = torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    z = a * x + s * noise

    class Known(DMD):
        def draw(self, net, batch, cond):
            return x + shift

        def add_noise(self, batch, x):
            return z, t

        def denoisers(self, nets):
            return ExactDenoiser(REAL, path), ExactDenoiser(FAKE, path)

    losses = Known().loss("generator", {"net": None, "teacher": None, "fake": None}, Batch(x)).per_sample
    got = torch.autograd.grad(losses.sum(), shift)[0]
    difference = s**2 / a * (score(FAKE, path, z, t) - score(REAL, path, z, t))
    real = (z + s**2 * score(REAL, path, z, t)) / a  # Tweedie
    expected = difference / (x - real).abs().mean(1, keepdim=True) / 2  # the loss is the mean over two numbers
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-9)
    assert float(got.abs().mean()) > 1e-3


def test_following_the_score_difference_lowers_the_divergence():
    """Samples of the fake mixture, moved by minus the direction, are more likely under the real one, and not under the
    fake one; where both are the same nothing moves."""
    x, _ = FAKE.sample(4000, seed=3)
    t = torch.full((4000,), 0.4, dtype=F64)
    z = Linear().alpha(t)[:, None] * x + Linear().sigma(t)[:, None] * torch.randn_like(x)
    real, fake = ExactDenoiser(REAL, Linear()), ExactDenoiser(FAKE, Linear())
    direction, gap = score_difference(x, z, t, {}, real, fake)
    moved = x - 0.05 * direction
    assert float((REAL.log_prob(moved) - FAKE.log_prob(moved)).mean()) > float(
        (REAL.log_prob(x) - FAKE.log_prob(x)).mean()) + 0.01  # fmt: skip
    assert float(score_difference(x, z, t, {}, real, real)[1].abs().max()) == 0
    assert torch.allclose(gap, fake(z, t, {}).x0 - real(z, t, {}).x0)


@pytest.mark.parametrize("of", [Flow(), DDPM(prediction="v"), EDM()], ids=lambda o: type(o).__name__)
def test_times_are_uniform_in_the_chart_and_noise_is_the_paths(of):
    objective, n = DMD(of=of), 20_000
    x = torch.ones(n, 2, dtype=F64)
    z, t = objective.add_noise(Batch(x, draw=Draw((1,), 0, n)), x)
    tau, end = chart(objective.path, t)[0], chart(objective.path, torch.ones(1, dtype=F64))[0]
    assert float(tau.min() / end) == pytest.approx(0.02, abs=2e-3)
    assert float(tau.max() / end) == pytest.approx(0.98, abs=2e-3)
    assert float((tau / end).mean()) == pytest.approx(0.5, abs=0.01)
    noise = (z - objective.path.alpha(t)[:, None]) / objective.path.sigma(t)[:, None]
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_a_generator_is_trained_on_its_own_samples_and_draws_the_same_way():
    """Backward simulation: the inputs of step k are what sampling reaches after k steps, and rows differ in k."""
    objective, n = DMD(steps=3), 3000
    visits = []

    def net(x, label, cond):
        visits.append((x.detach().clone(), label.clone(), torch.is_grad_enabled()))
        return x * 0.5 + label[:, None]

    objective.draw(net, Batch(torch.zeros(n, 2, dtype=F64), draw=Draw((1,), 0, n)), {})
    times = step_times(Linear(), 3)
    (x0, t0, first), (x1, t1, second), (x2, t2, last) = visits
    assert [first, second, last] == [False, False, True]
    assert torch.equal(t0, torch.ones(n, dtype=F64))
    assert torch.allclose(t1, times[1].expand(n))
    counts = [float((t2 == time).double().mean()) for time in times[:3].tolist()]
    assert counts == pytest.approx([1 / 3] * 3, abs=0.04)
    assert torch.equal(x2[t2 == 1], x0[t2 == 1])
    assert torch.equal(x2[t2 == times[1]], x1[t2 == times[1]])
    visits.clear()
    noise = Seeds(range(5), dtype=F64)
    drawn = objective.generator({"net": net})(noise((2,)), {}, noise)
    assert [float(t[0]) for _, t, _ in visits] == pytest.approx(times[:3].tolist())
    again = Seeds(range(5), dtype=F64)
    x = again((2,))
    for time, following in zip(times[:3].tolist(), times[1:].tolist(), strict=True):
        clean = x - time * (0.5 * x + time)  # the velocity that net predicts
        x = (1 - following) * clean + following * again((2,)) if following else clean
    assert torch.allclose(drawn, x)


def test_the_fake_score_learns_the_generators_samples_by_the_teachers_loss():
    objective = DMD(of=Flow(cond_dropout=0.5))
    seen = {}

    def fake(x, t, cond):
        seen.update(x=x, t=t)
        return torch.zeros_like(x)

    batch = Batch(torch.full((64, 2), 9.0), draw=Draw((1,), 0, 64))
    nets = {"net": lambda x, t, cond: x - 3.0, "fake": fake, "teacher": None}  # x0 = x - (x - 3) = 3, whatever x
    loss = objective.loss("fake", nets, batch).per_sample
    noise = (seen["x"] - (1 - seen["t"][:, None]) * 3.0) / seen["t"][:, None]
    assert torch.allclose(loss, (noise - 3.0).square().mean(1), rtol=1e-3)
    assert abs(float(noise.mean())) < 0.3


# ------------------------------------------------------------------------------------------------- phases, training
def test_phases_and_what_they_train():
    plain, full = DMD(), DMD(gan_weight=0.1, fake_updates=3)
    assert [(p.name, p.trains, p.repeats) for p in plain.phases] == [("fake", ("fake",), 5), ("generator", ("net",), 1)]
    assert [(p.name, p.repeats) for p in full.phases] == [("fake", 3), ("discriminator", 3), ("generator", 1)]
    torch.manual_seed(0)
    nets = full.networks(MLP(width=16), Spec((2,)))
    assert set(nets) == {"net", "fake", "teacher", "discriminator"}
    for name in ("fake", "teacher"):
        for p in nets[name].parameters():
            p.data += 0.1 * torch.randn_like(p)
    for phase in full.phases:
        batch = Batch(torch.randn(32, 2), draw=Draw((2,), 0, 32))
        for net in nets.values():
            net.requires_grad_(False)
            net.zero_grad()
        for name in phase.trains:
            nets[name].requires_grad_(True)
        full.loss(phase.name, nets, batch).per_sample.mean().backward()
        for name, net in nets.items():
            moved = any(p.grad is not None and bool(p.grad.any()) for p in net.parameters())
            assert moved == (name in phase.trains), (phase.name, name)


def test_a_discriminator_pulls_samples_to_where_it_scores_high():
    """Its share of the generator's gradient is ``-sigmoid(-D) dD``, times the weight."""

    class Linearly(nn.Module):
        def forward(self, z, cond):
            return z @ torch.tensor([[2.0], [0.0]])

    with_gan, without = DMD(gan_weight=0.3), DMD()
    net = MLP(width=8).denoiser(Spec((2,)))
    nets = {"net": net, "fake": copy.deepcopy(net), "teacher": copy.deepcopy(net), "discriminator": Linearly()}
    batch = lambda: Batch(torch.zeros(16, 2), draw=Draw((4,), 0, 16))  # noqa: E731
    a, b = (o.loss("generator", nets, batch()) for o in (with_gan, without))
    assert torch.allclose(a.per_sample.mean(), b.per_sample.mean() + 0.3 * a.logs["adversarial"], atol=1e-6)
    real = Batch(torch.tensor([[5.0, 0.0]]).expand(16, 2), draw=Draw((4,), 0, 16))
    loss = with_gan.loss("discriminator", nets, real)
    assert float(loss.logs["accuracy"]) > 0.8, "real samples score higher"
    assert float(loss.per_sample.mean()) < 2 * math.log(2)


@pytest.mark.parametrize(("options", "says"), [
    ({"of": Flow(coupling=OptimalTransport())}, "has no score"),
    ({"of": Flow(cond_dropout=0.0), "teacher_guidance": 2.0}, "nothing to guide away from"),
    ({"of": DMD()}, "steps cannot be distilled"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        DMD(**options)
    with pytest.raises(ValueError, match="takes steps of its own"):
        DMD().generator({}, lambda denoise: None)


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """A flow of eight Gaussians without classes: one step of its sampler is a blot in the middle."""
    out = tmp_path_factory.mktemp("ring")
    return train(
        data={"name": "8gaussians", "n": 4000, "labels": False}, backbone={"name": "mlp", "width": 64}, steps=1000,
        batch=256, workers=0, tensorboard=False, sample_every=0, out=str(out), ema=(0.99,),
    )  # fmt: skip


def test_a_short_training_closes_the_gap(tmp_path):
    base = train(
        data={"name": "8gaussians", "n": 1000}, backbone={"name": "mlp", "width": 32, "depth": 2}, steps=60, batch=64,
        workers=0, tensorboard=False, sample_every=0, out=str(tmp_path), ema=(0.9,),
    )  # fmt: skip
    run = train(
        init=str(base.directory), objective={"name": "dmd", "teacher_guidance": 1.5, "fake_updates": 2}, steps=12,
        batch=64, lr=3e-4, workers=0, tensorboard=False, sample_every=0, out=str(tmp_path), ema=(0.9,),
    )  # fmt: skip
    assert run.objective.of == base.objective
    assert all(torch.equal(a, b) for a, b in zip(run.nets["teacher"].parameters(), base.nets["net"].parameters(),
                                                  strict=True))  # fmt: skip
    assert run.sample(4).network_rows == 1
    with pytest.raises(ValueError, match="guidance: has no effect on DMD"):
        run.sample(4, guidance=2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"gan_weight": 0.01, "steps": 2}, {"gan_weight": 0.01, "discriminator": "head"}],
    ids=["one-step", "two-steps-gan", "head"],
)
def test_eight_gaussians(ring, tmp_path, options):
    """All modes, and as near to the data as the teacher's 50 evaluations; a wrong sign, or a fake score that is never
    updated, ends far away."""
    base = ring
    run = train(
        init=str(base.directory), objective={"name": "dmd", **options}, steps=400, batch=128, lr=5e-4, workers=0,
        tensorboard=False, sample_every=0, out=str(tmp_path), ema=(0.99,),
    )  # fmt: skip
    data = base.config.data.load("train").x
    x = run.sample(1000).x
    many = base.sample(1000, Sampling(sampler="heun", steps=25)).x
    real, teacher, student = (wasserstein2(v, data[1000:2000]) for v in (data[:1000], many, x))
    modes = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round().long() % 8
    assert modes.bincount(minlength=8).min() > 50, modes.bincount(minlength=8)
    assert student < 1.5 * max(real, teacher), (student, teacher, real)
