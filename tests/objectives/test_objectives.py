"""Matching losses: stationary at the exact posterior mean, drawn as they say, and blind to how a batch is cut."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from genkit.backbones import MLP
from genkit.core import Batch, Draw, Label, Spec
from genkit.diffusion.parametrization import Score
from genkit.diffusion.paths import PATHS, VE, VP, Cosine, Linear, Shifted, SubVP, mix
from genkit.diffusion.samplers import bind
from genkit.objectives import DDPM, EDM, OBJECTIVES, Flow
from genkit.objectives.matching.ddpm import log_variance, reverse_step
from genkit.objectives.matching.matching import PathSample
from genkit.objectives.matching.times import (
    TIME_DISTRIBUTIONS,
    Beta,
    LogitNormal,
    LogNormal,
    LossAware,
    LossHistory,
    Uniform,
)
from genkit.objectives.matching.weights import P2, Constant, EDMWeight, MinSNR
from tests.support import objectives as contract
from tests.support.exact import F64, ExactDenoiser, three

MIXTURE = three()
FLOWS = [Flow(path=p, prediction=q) for p, q in product([Linear(), Cosine()], ["velocity", "x0", "v"])]
FLOWS += [Flow(path=p, prediction=q) for p, q in product([VP(), VE()], ["eps", "score", "karras", "x0", "velocity"])]
FLOWS += [
    Flow(loss_space="x0"),
    Flow(path=VP(), loss_space="eps", prediction="x0"),
    Flow(time_distribution=LogitNormal()),
]
FLOWS += [Flow(path=p, prediction=q) for p, q in product([SubVP(), Shifted(), Shifted(VP(), 2.0)], ["velocity", "x0"])]
FLOWS += [Flow(path=VP(), prediction=q, loss_space="x0", loss_weight=MinSNR()) for q in ("eps", "x0", "v")]
FLOWS += [
    Flow(path=VP(), loss_space="eps", loss_weight=P2()),
    Flow(time_distribution=Beta()),
    Flow(path=VP(), time_distribution=LogNormal()),
]
FLOWS += [
    Flow(
        path=VE(), prediction="karras", time_distribution=LogNormal(-1.2, 1.2), loss_space="x0", loss_weight=EDMWeight()
    )
]
MATCHING = [
    *FLOWS,
    EDM(),
    EDM(sigma_data=1.0),
    DDPM(zero_snr=True, prediction="v"),
    DDPM(time_distribution=LogitNormal()),
]
MATCHING += [DDPM(loss_space="x0", loss_weight=MinSNR(2.0)), DDPM(loss_weight=P2(0.5))]
MATCHING += [DDPM(), DDPM(prediction="v", loss_space="x0"), DDPM(betas="cosine", timesteps=50, prediction="x0")]


@pytest.mark.parametrize("objective", MATCHING, ids=lambda o: "-".join(map(str, vars(o).values()))[:70])
def test_the_posterior_mean_is_stationary(objective):
    """At the exact denoiser the gradient of the loss along any function of (x, t) is zero.

    The network is exact + h * direction(x, t); d loss / dh at 0 over 60,000 samples is compared with its own spread.
    A denoiser whose x0 is wrong by a factor of 0.8 fails the same test.
    """
    exact = ExactDenoiser(MIXTURE, objective.path)
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
            x1_hat = (x - objective.path.alpha(t)[:, None] * x0_hat) / objective.path.sigma(t)[:, None]
            h = seen.setdefault("h", torch.zeros(3, dtype=F64, requires_grad=True))
            out = objective.parametrization.target(objective.path, x0_hat, x1_hat, t)
            ways = torch.stack([torch.tanh(x), torch.tanh(x.flip(1) * 2), t[:, None].expand_as(x)], -1)
            if isinstance(inner, Score):  # whose outputs are as large as 1 / sigma
                return out + ways @ h / objective.path.sigma(t)[:, None]
            return out + ways @ h

        inner = objective.parametrization

        class Spy:
            predicts_noise = inner.predicts_noise

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
    t = Flow().sample_times(batch)
    assert float(t.min()) > 0
    assert float(t.max()) <= 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(t.std()) == pytest.approx(12**-0.5, abs=0.01)
    t = Flow(time_distribution=LogitNormal(0.5, 0.8)).sample_times(batch)
    assert float(torch.logit(t).mean()) == pytest.approx(0.5, abs=0.02)
    assert float(torch.logit(t).std()) == pytest.approx(0.8, abs=0.02)
    k = DDPM(timesteps=10).sample_times(batch) * 10
    assert torch.equal(k.round().unique(), torch.arange(1.0, 11.0))
    assert torch.allclose(k, k.round(), atol=1e-5)
    assert float((k.round() == 10).float().mean()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("path", [Linear(), VP(), VE(), Shifted(Cosine(), 2.0)], ids=lambda p: type(p).__name__)
def test_log_normal_times_are_those_of_the_noise_level(path):
    n = 20_000
    batch = Batch(torch.zeros(n, 1), draw=Draw((0,), 0, n))
    t = LogNormal(-1.2, 1.2).sample(batch, path).double()
    level = (path.sigma(t) / path.alpha(t)).log()
    z = Draw((0,), 0, n).normal(1)[:, 0].double()
    assert torch.allclose(level, -1.2 + 1.2 * z, atol=2e-4)  # t is float32
    assert float(t.min()) > 0
    assert float(t.max()) <= 1


def test_beta_times_are_biased_to_noise():
    """Beta(1.5, 1): mean 3/5, variance 1.5 / (2.5^2 3.5) = 0.0686, P(t <= 1/4) = 1/8."""
    batch = Batch(torch.zeros(40_000, 1), draw=Draw((0,), 0, 40_000))
    t = Flow(time_distribution=Beta()).sample_times(batch)
    assert float(t.mean()) == pytest.approx(0.6, abs=0.005)
    assert float(t.var()) == pytest.approx(0.0686, abs=0.002)
    assert float((t <= 0.25).float().mean()) == pytest.approx(1 / 8, abs=0.006)


def test_discrete_times_keep_their_distribution():
    batch = Batch(torch.zeros(40_000, 1), draw=Draw((0,), 0, 40_000))
    k = DDPM(timesteps=4, time_distribution=Beta()).sample_times(batch) * 4
    share = torch.tensor([float((k == i).float().mean()) for i in (1, 2, 3, 4)])
    edges = (torch.arange(5) / 4) ** 1.5
    assert torch.allclose(share, edges.diff(), atol=0.01)


def test_weights_at_values_of_the_papers():
    """SNR = alpha^2 / sigma^2 is 9 at (0.6, 0.2) and 1/4 at (0.5, 1)."""
    a, s = torch.tensor([0.6, 0.5], dtype=F64), torch.tensor([0.2, 1.0], dtype=F64)
    near = lambda x, *y: torch.allclose(x, torch.tensor(y, dtype=F64))  # noqa: E731
    assert near(Constant()(a, s), 1, 1)
    assert near(MinSNR()(a, s), 5, 0.25)  # Hang et al. 2023: min(SNR, 5)
    assert near(MinSNR(10.0)(a, s), 9, 0.25)
    assert near(P2()(a, s), 1 / 10, 4 / 5)  # Choi et al. 2022: 1 / (1 + SNR)
    assert near(P2(0.5, 7.0)(a, s), 1 / 4, (1 / 7.25) ** 0.5)
    # Karras et al. 2022, table 1, at noise levels 1/3 and 2
    assert near(EDMWeight(0.5)(a, s), (1 / 9 + 1 / 4) / (1 / 36), (4 + 1 / 4) / 1)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "velocity", "karras"])
@pytest.mark.parametrize("weight", [MinSNR(), P2(), EDMWeight()], ids=lambda w: type(w).__name__)
def test_a_weighted_loss_is_the_weight_times_the_error_of_its_own_space(weight, prediction):
    """Whatever the network predicts, except where its error would count more than MAX_ERROR_SCALE."""
    objective = Flow(path=VP(), prediction=prediction, loss_space=weight.space, loss_weight=weight)
    t, x0, x1 = torch.tensor([0.2, 0.4, 0.6], dtype=F64), *torch.randn(2, 3, 4, dtype=F64)
    a, s = VP().alpha(t)[:, None], VP().sigma(t)[:, None]
    x, out = a * x0 + s * x1, torch.randn(3, 4, dtype=F64)
    error = out - objective.parametrization.target(VP(), x0, x1, t)
    guess = objective.parametrization.predict(VP(), x, t, out)
    wrong = {"x0": guess.x0 - x0, "eps": guess.x1 - x1}[weight.space]
    assert torch.allclose((objective.error_scale(t, x) * error) ** 2, weight(a, s) * wrong**2)


def test_min_snr_on_a_noise_prediction_is_the_papers():
    """Hang et al. 2023: min(SNR, 5) / SNR on the error of eps, and min(SNR, 5) / (SNR + 1) on that of v; also where
    the linear part alone, sigma / alpha = 157, is far above the bound of the error scale."""
    t = torch.tensor([0.1, 0.6, 1.0], dtype=F64)
    snr = (VP().alpha(t) / VP().sigma(t)) ** 2
    for prediction, weight in (("eps", snr.clamp(max=5) / snr), ("v", snr.clamp(max=5) / (snr + 1))):
        objective = DDPM(prediction=prediction, loss_space="x0", loss_weight=MinSNR())
        assert torch.allclose(objective.error_scale(t, t) ** 2, weight, rtol=1e-9)


def test_edm_is_the_loss_of_karras():
    """Karras et al. 2022, eq. 7-8 and table 1, written out with a network F that is any function of its two inputs."""
    n, data = 500, 0.7
    x0 = torch.randn(n, 3, dtype=F64)
    net = lambda x, label, cond: torch.sin(x + label[:, None])  # noqa: E731
    objective = EDM(sigma_data=data, p_mean=-0.5, p_std=0.9)
    got = objective.loss("denoise", {"net": Float64(net)}, Batch(x0, draw=Draw((5,), 0, n))).per_sample
    draw = Draw((5,), 0, n)
    sigma = (-0.5 + 0.9 * draw.normal(1).double()).exp()
    noise = draw.normal(3).double() * sigma
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
    denoised = c_skip * (x0 + noise) + c_out * net(
        (x0 + noise) / (sigma**2 + data**2).sqrt(), sigma[:, 0].log() / 4, {}
    )
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    assert torch.allclose(got, (weight * (denoised - x0) ** 2).mean(1), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: Flow(loss_space="velocity", loss_weight=MinSNR()),
            "loss_space: given velocity, but min-snr weights the error of x0",
        ),
        (
            lambda: DDPM(loss_space="eps", loss_weight=EDMWeight()),
            "loss_space: given eps, but edm weights the error of x0",
        ),
        (lambda: Flow(path=VP(), loss_space="x0", loss_weight=P2()), "p2 weights the error of eps; allowed: eps"),
        (lambda: Flow(path=VP(), time_distribution=LogNormal(9.0)), "time_distribution.mean: given 9.0; allowed below"),
        (
            lambda: DDPM(learn_variance=True, time_distribution=Beta()),
            "time_distribution: given Beta; the bound of learn_variance",
        ),
        (lambda: DDPM(vlb_weight=0.1), "without learn_variance there is no bound"),
        (lambda: EDM(p_mean=9.0), "p_mean: given 9.0; allowed below 4.38"),
        (lambda: EDM(sigma_max=0.25), "p_mean: given -1.2; allowed below -1.39"),
        (lambda: DDPM(zero_snr=True), r"eps-prediction on the path VP: alpha\(1\) = 0"),
        (lambda: Flow(path=Shifted(), prediction="eps"), r"eps-prediction on the path Shifted: alpha\(1\) = 0"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason) as e:
        make()
    assert "\n" not in str(e.value)


def test_every_path_is_trained_on_with_finite_losses():
    net = {"net": lambda x, t, c: torch.zeros_like(x)}
    batch = Batch(torch.randn(500, 2), draw=Draw((1,), 0, 500))
    every = [cls() for cls in TIME_DISTRIBUTIONS.values() if not cls.loss_aware]
    for path, times in product(PATHS.values(), every):
        flow = Flow(path=path(), time_distribution=times)
        assert bool(torch.isfinite(flow.loss("denoise", net, batch).per_sample).all())
    assert bool(torch.isfinite(DDPM(zero_snr=True, prediction="v").loss("denoise", net, batch).per_sample).all())


def test_conditions_are_dropped_per_sample():
    """Not for the whole batch at once, as a peer's example does."""
    seen = []
    net = {"net": lambda x, t, c: seen.append(c["keep"]) or x}
    batch = Batch(torch.randn(4000, 2), {"label": torch.zeros(4000, dtype=torch.long)}, draw=Draw((0,), 0, 4000))
    Flow(cond_dropout=0.25).loss("denoise", net, batch)
    assert seen[0].shape == (4000,)
    assert float(seen[0].float().mean()) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("name", [name for name, cls in OBJECTIVES.items() if not cls.rows_interact])
def test_loss_does_not_depend_on_how_the_batch_is_cut(name):
    contract.check_loss_does_not_depend_on_how_the_batch_is_cut(OBJECTIVES[name]())


def test_reverse_steps_are_those_of_the_table():
    """Ho et al. 2020, eq. 6-7, from the betas themselves; and by Bayes' rule between any two times."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    bar = (1 - beta).cumprod(0)
    k = torch.tensor([2, 10, 500, 1000])
    got = reverse_step(VP(), k.double() / 1000, (k - 1).double() / 1000)
    b, now, before = beta[k - 1], bar[k - 1], bar[k - 2]
    expected = (b, b * (1 - before) / (1 - now), before.sqrt() * b / (1 - now))
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9)
    t, s = torch.tensor([0.7], dtype=F64), torch.tensor([0.2], dtype=F64)
    a, b, sb = VP().alpha(t), VP().alpha(s), VP().sigma(s)
    spread, variance, _ = reverse_step(VP(), t, s)
    assert torch.allclose(variance, 1 / (1 / sb**2 + (a / b) ** 2 / spread))  # product of two Gaussians in x_s


def test_learned_variance_lies_between_the_two_and_is_finite_at_the_last_step():
    t = torch.tensor([0.001, 0.002, 0.5, 1.0], dtype=F64)
    s = t - 0.001
    beta, posterior, _ = reverse_step(VP(), t, s)
    one = torch.ones(4, 3, dtype=F64)
    assert torch.allclose(log_variance(VP(), t, s, one).exp(), beta[:, None].expand(4, 3))
    low = log_variance(VP(), t, s, -one).exp()
    assert torch.allclose(low[1:], posterior[1:, None].expand(3, 3))
    assert torch.allclose(low[0], posterior[1].expand(3))  # k = 1 takes that of k = 2, as the paper's code does
    assert torch.allclose(log_variance(VP(), t, s, 0 * one).exp() ** 2, low * beta[:, None])


def test_the_bound_is_the_kl_divergence_of_the_steps():
    objective = DDPM(timesteps=20, beta_max=0.3, learn_variance=True)
    path, normal = objective.path, torch.distributions.Normal
    k = torch.tensor([1.0, 2.0, 7.0, 20.0], dtype=F64)
    t, (x0, x1, out, w) = k / 20, torch.randn(4, 4, 6, dtype=F64)
    s, x = t - 0.05, mix(path, x0, x1, t)
    a, b, sa, sb = (f(v)[:, None] for f in (path.alpha, path.sigma) for v in (t, s.clamp(min=0)))
    guess = (x - sa * out) / a
    beta = 1 - (a / b) ** 2
    mean = lambda clean: (b * beta * clean + a / b * sb**2 * x) / sa**2  # noqa: E731  (Ho et al. 2020, eq. 7)
    ours = normal(mean(guess), (log_variance(path, t, s.clamp(min=0).round(decimals=9), w) / 2).exp())
    kl = torch.distributions.kl_divergence(normal(mean(x0)[1:], (beta.sqrt() * sb / sa)[1:]), normal(
        ours.mean[1:], ours.stddev[1:]))  # fmt: skip
    got = objective.vlb_term(PathSample(x, t, x0, x1), out, w)
    assert torch.allclose(got[1:], kl.mean(1))
    assert torch.allclose(got[0], -ours.log_prob(x0)[0].mean())


def test_the_hybrid_loss_is_least_at_the_true_variance():
    """For normal data N(0, c^2) the exact reverse step has variance ``posterior + pull^2 Var(x0 | x)``: w is put there,
    and the gradient of the bound by w vanishes; it does not touch the first half (stop-gradient)."""
    objective, n, c = DDPM(timesteps=50, beta_max=0.2, learn_variance=True), 60_000, 0.6
    path, x0, x1 = objective.path, *torch.randn(2, n, 1, dtype=F64)
    t = torch.full((n,), 0.4, dtype=F64)
    x0, s = c * x0, t - 0.02
    a, sa = path.alpha(t)[:, None], path.sigma(t)[:, None]
    x = a * x0 + sa * x1
    total = a**2 * c**2 + sa**2
    out = (x - a * (a * c**2 / total) * x) / sa  # E[x1 | x]
    beta, posterior, pull = (v[:, None] for v in reverse_step(path, t, s))
    true = posterior + pull**2 * c**2 * sa**2 / total
    v = (true.log() - posterior.log()) / (beta.log() - posterior.log())
    for shift in (0.0, 0.3):
        w = (2 * v - 1 + shift).requires_grad_()
        out = out.detach().requires_grad_()
        each = torch.autograd.grad(objective.vlb_term(PathSample(x, t, x0, x1), out.detach(), w).sum(), w)[0]
        away = float(each.mean() / (each.std() / n**0.5))
        assert abs(away) < 4 if shift == 0 else away > 7


def test_learned_variance_from_training_to_sampling():
    objective, spec = DDPM(learn_variance=True, prediction="x0"), Spec((2,), {"label": Label(3)})
    nets = objective.networks(MLP(width=16), spec)
    batch = Batch(torch.randn(40, 2), {"label": torch.arange(40) % 3}, draw=Draw((1,), 0, 40))
    again = replace(batch, draw=Draw((1,), 0, 40))
    loss = objective.loss("denoise", nets, batch)
    assert bool(torch.isfinite(loss.per_sample).all())
    assert float(loss.per_sample.detach().mean()) == pytest.approx(
        float((loss.logs["simple"] + 1e-3 * loss.logs["vlb"]).detach()), rel=1e-5
    )
    simple = {"net": lambda x, t, c: nets["net"](x, t, c).chunk(2, 1)[0]}
    fixed = DDPM(prediction="x0").loss("denoise", simple, again).per_sample
    assert torch.allclose(fixed.mean(), loss.logs["simple"])
    x = objective.generator(nets, bind("ancestral", 4))(torch.randn(5, 2), {"label": torch.arange(5) % 3})
    assert x.shape == (5, 2)
    prediction, w = objective.denoiser(nets["net"]).predict(torch.randn(5, 2), torch.full((5,), 0.5), {})
    assert prediction.x0.shape == w.shape == (5, 2)
    out = nets["net"](torch.randn(5, 2), torch.full((5,), 0.5), {})
    assert out.shape == (5, 4)


def test_the_bound_trains_the_variance_alone():
    out = torch.randn(6, 4, requires_grad=True)
    batch = lambda: Batch(torch.ones(6, 2), draw=Draw((1,), 0, 6))  # noqa: E731
    grads = [
        torch.autograd.grad(DDPM(learn_variance=True, vlb_weight=k).loss(
            "denoise", {"net": lambda x, t, c: out}, batch()).per_sample.sum(), out)[0]
        for k in (1e-3, 10.0)
    ]  # fmt: skip
    assert torch.allclose(grads[0][:, :2], grads[1][:, :2])
    assert torch.allclose(grads[0][:, 2:] * 1e4, grads[1][:, 2:], rtol=1e-2, atol=1e-4)


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
    for objective in (Flow(), DDPM(prediction="x0"), EDM(sigma_data=1.0)):
        torch.manual_seed(0)
        nets = objective.networks(MLP(width=64, depth=3) if "depth" in MLP.__annotations__ else MLP(), Spec((2,)))
        opt = torch.optim.Adam(nets["net"].parameters(), 2e-3)
        for _ in range(250):
            loss = objective.loss("denoise", nets, Batch(data[torch.randint(4000, (256,))])).per_sample.mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
        x = objective.generator(nets, bind("heun", 20))(torch.randn(1000, 2), {})
        side = (x.mean(1) > 0).float().mean()
        assert 0.35 < float(side) < 0.65, objective
        assert float((x.abs() - 1).abs().mean()) < 0.3, objective


# ------------------------------------------------------------------------------------------ loss-aware times
def remembering(losses):
    """A memory that holds the mean square ``losses(t)^2`` of each bin."""
    history = LossHistory()
    middle = (torch.arange(LossHistory.BINS, dtype=F64) + 0.5) / LossHistory.BINS
    history.record(middle.repeat(20), losses(middle).repeat(20))
    history.update()
    return history


@pytest.mark.parametrize("objective", [
    Flow(path=VP(), loss_space="x0", prediction="eps", time_distribution=LossAware()),
    DDPM(loss_space="x0", timesteps=70, time_distribution=LossAware()),
])  # fmt: skip
def test_loss_aware_times_leave_the_loss_as_it_is_and_calm_its_gradient(objective):
    """The mean of losses and gradients is that of uniform times; their variance falls where losses are unequal."""
    n, spread, means = 60_000, {}, {}
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    weight = torch.tensor(0.9, dtype=F64, requires_grad=True)
    plain = replace(objective, time_distribution=Uniform())
    rms = lambda t: 0.02 + 3 * (plain.path.sigma(t) / plain.path.alpha(t)).clamp(max=20) ** 2  # noqa: E731
    for name, each in (("uniform", plain), ("aware", objective)):
        nets = {"net": lambda x, t, c: weight * 0.3 * x, "history": remembering(rms)}
        loss = each.loss("denoise", nets, Batch(x, draw=Draw((5,), 0, n))).per_sample
        # the loss is quadratic in the weight: its slope at each sample, by two values of it
        with torch.no_grad():
            up, down = (each.loss("denoise", {**nets, "net": lambda x, t, c, k=k: k * 0.3 * x}, Batch(
                x, draw=Draw((5,), 0, n))).per_sample for k in (1.0, 0.8))  # fmt: skip
        for what, v in (("loss", loss.detach()), ("slope", (up - down) / 0.2)):
            spread[name, what], means[name, what] = float(v.std()) / n**0.5, float(v.mean())
    for what in ("loss", "slope"):
        error = (spread["uniform", what] ** 2 + spread["aware", what] ** 2) ** 0.5
        assert abs(means["uniform", what] - means["aware", what]) < 4 * error
        assert spread["aware", what] < 0.75 * spread["uniform", what], spread


def test_times_are_drawn_by_the_root_mean_square_of_each_part():
    """Half the parts have twice the loss: two thirds of the times, all of (0, 1]; alike until each part is known."""
    loss = lambda t: torch.where(t > 0.5, 2.0, 1.0).double()  # noqa: E731
    history = remembering(loss)
    t = history.sample(Batch(torch.zeros(100_000, 1, dtype=F64), draw=Draw((3,), 0, 100_000)))
    assert float(t.min()) > 0
    assert float(t.max()) <= 1
    assert float((t > 0.5).double().mean()) == pytest.approx(2 / 3, abs=0.01)
    assert float(t[t > 0.5].mean()) == pytest.approx(0.75, abs=0.005)
    assert float(history.weight(t).mean()) == pytest.approx(1, abs=0.01)
    young = LossHistory()
    young.record(t[:500], loss(t[:500]))
    young.update()
    assert torch.allclose(young.probabilities(), torch.full_like(young.probabilities(), 1 / LossHistory.BINS))
    history.record(torch.tensor([0.1, 0.2]).double(), torch.tensor([float("nan"), 1.0]).double())
    history.update()
    assert bool(history.probabilities().isfinite().all())
    for _ in range(30):  # the old is forgotten
        history.record(torch.full((10,), 0.105, dtype=F64), torch.full((10,), 7.0, dtype=F64))
        history.update()
    assert float(history.mean[10]) == pytest.approx(49, rel=1e-3)


def test_a_memory_does_not_depend_on_how_the_batch_is_cut():
    objective, x = DDPM(prediction="v", time_distribution=LossAware()), torch.randn(48, 2)
    whole, cut = (objective.networks(MLP(width=8), Spec((2,))) for _ in range(2))
    cut["net"].load_state_dict(whole["net"].state_dict())
    for nets, pieces in ((whole, [(0, 48)]), (cut, [(0, 5), (5, 32), (32, 48)])):
        for step in range(60):
            for a, b in pieces:
                objective.loss("denoise", nets, Batch(x[a:b], draw=Draw((step,), a, b)))
            objective.after_step(nets, step)
    assert float(whole["history"].num_losses.min()) >= LossHistory.MEMORY
    assert torch.allclose(whole["history"].probabilities(), cut["history"].probabilities(), rtol=1e-5)
    assert float(whole["history"].probabilities().std()) > 0
