"""The flow map's rules against closed forms: every rule's error vanishes at the exact average velocity."""

from dataclasses import replace

import pytest
import torch
from torch.func import jvp

from genkit.backbones import MLP
from genkit.core import SCALE_INPUT, Batch, Draw, Label, Spec
from genkit.diffusion.flow_map import FlowMapDenoiser
from genkit.diffusion.paths import PATHS, VP, Linear, chart
from genkit.objectives import Flow, FlowMap
from genkit.objectives.flow_map.guidance import GuidedTeacher, draw_guidance, scale_at, without
from genkit.objectives.flow_map.learned import LearnedMap, tangent
from genkit.objectives.flow_map.rules import RULES, Alpha, Consistency, Improved, Lagrangian, Mean, Shortcut
from genkit.objectives.matching.times import LossAware, Uniform
from tests.support import objectives as contract
from tests.support.exact import F64, three
from tests.support.flow_maps import (
    STD,
    MapNet,
    Teacher,
    batch_of_normals,
    learned,
    mixture_average,
    normal_average,
    time_of,
)

EXACT = (Improved(), Mean(), Lagrangian(), Shortcut())
"""rules that hold at any gap; the others approximate a derivative by a small one"""
on_every_rule = pytest.mark.parametrize("rule", [cls() for cls in RULES.values()], ids=RULES)
on_every_path = pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=PATHS)


def exact_error(objective, n=2000):
    """The rule's error at the exact map, learned from the exact velocity."""
    u = learned(objective, MapNet(objective), Teacher(objective.path))
    return objective.rule.error(u, objective.draw_jumps(batch_of_normals(n), u), None)


# ------------------------------------------------------------------------------------------------ closed forms
@on_every_path
@pytest.mark.parametrize("rule", EXACT, ids=lambda r: type(r).__name__)
def test_the_exact_map_of_normal_data_has_no_error(rule, path):
    assert float(exact_error(FlowMap(rule=rule, path=path)).abs().max()) < 1e-12


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
@pytest.mark.parametrize("rule", EXACT, ids=lambda r: type(r).__name__)
def test_the_prediction_does_not_matter(rule, prediction):
    """x0 is pixel MeanFlow: the average velocity is found from it. (Its error grows as 1 / tau: few samples there.)"""
    objective = FlowMap(rule=rule, path=VP(), prediction=prediction, time_distribution=Uniform())
    error = exact_error(objective)
    assert float(error.abs().median()) < 1e-12
    assert float(error.abs().max()) < 1e-8


@on_every_path
def test_alpha_and_consistency_hold_for_exact_jumps(path):
    """With the exact average velocity from t to s in the place of v, both are the semigroup property, at any gap."""
    for rule in (Alpha(smallest=0.3), Consistency(last_stage=3)):
        objective = FlowMap(rule=rule, path=path)
        u = learned(objective, MapNet(objective))
        jumps = objective.draw_jumps(batch_of_normals(2000), u)
        s = jumps.t - 0.3 * (jumps.t - jumps.r) if isinstance(rule, Alpha) else rule.earlier(path, jumps.t, None)
        error = rule.error(u, jumps._replace(velocity=u(jumps.z, s.clamp(min=1e-5), jumps.t).detach()), None)
        assert float(error.detach().abs().max()) < 1e-12
        assert float(rule.error(u, jumps, None).detach().abs().median()) > 0.1


def test_alpha_and_consistency_approach_the_exact_map():
    """Half the step: a quarter of alpha's error, which is of second order; half of consistency's after Heun's step."""

    def size(rule):
        error = exact_error(FlowMap(rule=rule, time_distribution=Uniform())).detach().square()
        return float(error[error > 0].mean().sqrt())

    alpha = [size(Alpha(smallest=a)) for a in (0.04, 0.02, 0.01)]
    assert alpha[0] / alpha[1] == pytest.approx(4, rel=0.1)
    assert alpha[1] / alpha[2] == pytest.approx(4, rel=0.1)
    consistent = [size(Consistency(last_stage=k)) for k in (7, 8, 9)]
    assert consistent[0] / consistent[1] == pytest.approx(4, rel=0.2)
    assert consistent[1] / consistent[2] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("rule", EXACT, ids=lambda r: type(r).__name__)
def test_the_exact_map_of_a_mixture_has_no_error(rule):
    """Its map comes from integrating its ODE, through which the derivatives pass."""
    mixture = three()
    average = mixture_average(mixture, Linear())
    objective = FlowMap(rule=replace(rule, share=0.0), time_distribution=Uniform())
    net = MapNet(objective, average)
    teacher = Teacher(Linear(), lambda z, tau: average(z, tau, tau))
    u = learned(objective, net, teacher)
    batch = Batch(mixture.sample(24, seed=3)[0], draw=Draw((2,), 0, 24))
    jumps = objective.draw_jumps(batch, u)
    early = torch.where(jumps.r < 0.1, 0.1, jumps.r)  # the mixture's velocity is steep at the data
    jumps = jumps._replace(r=torch.minimum(early, jumps.t))
    assert float((jumps.t - jumps.r).max()) > 0.4
    assert float(rule.error(u, jumps, None).detach().abs().max()) < 1e-6


@pytest.mark.parametrize("rule", EXACT, ids=lambda r: type(r).__name__)
def test_without_a_teacher_the_exact_map_is_where_the_gradient_vanishes(rule):
    """``x1 - x0`` is the velocity in the mean only: at the exact map the error has no correlation with any function of
    (z, r, t), within its standard error; at a wrong one it has."""
    objective, n = FlowMap(rule=replace(rule, share=0.4), time_distribution=Uniform()), 60_000

    def correlation(factor):
        net = MapNet(objective)
        net.factor.data.fill_(factor)
        u = learned(objective, net)
        jumps = objective.draw_jumps(batch_of_normals(n, 1), u)
        error = objective.rule.error(u, jumps, None).detach()
        probes = torch.cat([torch.tanh(jumps.z), jumps.z * jumps.t[:, None], jumps.z * jumps.r[:, None]], 1)
        parts = torch.stack([p.mean(0) for p in (error * probes).split(n // 30)])
        return float((parts.mean(0) / (parts.std(0) / 30**0.5)).abs().max())

    assert correlation(1.0) < 5
    assert correlation(0.8) > 7


# --------------------------------------------------------------------------------- derivatives and stop-gradients
def test_derivatives_are_those_of_the_map():
    """Against differences in the chart, on a path whose time is not the chart's."""
    objective = FlowMap(path=VP())
    u = learned(objective, MapNet(objective))
    jumps = objective.draw_jumps(batch_of_normals(400), u)
    keep = (jumps.r > 0.1) & (jumps.t < 0.8) & (jumps.t - jumps.r > 0.01)
    z, r, t, v = (w[keep] for w in jumps[:4])
    tau = lambda time: chart(VP(), time)[0][:, None]  # noqa: E731
    h = 1e-6
    with torch.no_grad():
        slope = (normal_average(z + h * v, tau(r), tau(t) + h) - normal_average(z - h * v, tau(r), tau(t) - h)) / (
            2 * h
        )
        torch.testing.assert_close(u.derivative(z, r, t, v), slope, rtol=1e-6, atol=1e-6)
        end = (normal_average(z, tau(r) + h, tau(t)) - normal_average(z, tau(r) - h, tau(t))) / (2 * h)
    value, derivative = u.with_end_derivative(z, r, t)
    torch.testing.assert_close(derivative.detach(), end, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(value, u(z, r, t))


def test_one_row_has_the_derivative_that_it_has_among_others():
    """A path's coefficients are read as numbers for a single row; under a derivative they must not be."""
    objective = FlowMap(rule=Improved(), path=VP(), prediction="x0")
    u = learned(objective, MapNet(objective))
    z, r, t, v = objective.draw_jumps(batch_of_normals(5), u)[:4]
    all_rows = u.derivative(z, r, t, v)
    for i in range(5):
        one = slice(i, i + 1)
        torch.testing.assert_close(u.derivative(z[one], r[one], t[one], v[one]), all_rows[one])


@on_every_path
def test_a_jump_starts_on_its_samples_path(path):
    objective = FlowMap(path=path, time_distribution=Uniform())
    jumps = objective.draw_jumps(batch_of_normals(50), learned(objective, MapNet(objective)))
    alpha, sigma = path.alpha(jumps.t)[:, None], path.sigma(jumps.t)[:, None]
    torch.testing.assert_close(jumps.z * (alpha + sigma), alpha * jumps.x0 + sigma * jumps.x1)
    torch.testing.assert_close(jumps.velocity, jumps.x1 - jumps.x0)


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_targets_point_to_data_within_the_radius(prediction):
    """A ball that holds all data changes no exact map; the end of a jump beyond it is drawn back to its edge."""
    objective = FlowMap(path=VP(), prediction=prediction, time_distribution=Uniform())
    net = MapNet(objective)
    free = learned(objective, net)
    z, r, t = objective.draw_jumps(batch_of_normals(400), free)[:3]
    wide, narrow = (replace(free, radius=radius).frozen(z, r, t) for radius in (10.0, 0.2))
    assert torch.equal(wide, free.frozen(z, r, t))
    tau = chart(VP(), t)[0][:, None]
    size, kept = ((z - tau * u).square().mean(1).sqrt() for u in (wide, narrow))
    torch.testing.assert_close(kept, size.clamp(max=0.2))
    assert 0.2 < float((size > 0.2).double().mean()) < 0.99


def test_the_radius_is_measured_with_some_slack_and_grows_with_the_scale_of_guidance():
    objective = FlowMap(guidance=4.0).decide(lambda: 1.0, lambda: 0.8)
    assert objective.data_radius == pytest.approx(1.2)
    assert objective.decide(lambda: 1.0, lambda: 7.0) == objective
    assert FlowMap(data_radius=3.0).decide(lambda: 1.0, lambda: 0.8).data_radius == 3.0
    assert FlowMap().decide(lambda: 1.0).data_radius is None
    scales = torch.tensor([1.0, 3.0])
    net = objective.networks(MLP(width=8, depth=1), Spec((2,), {"label": Label(2)}))["net"]
    torch.testing.assert_close(objective.learned_map(net, {SCALE_INPUT: scales}).radius, 1.2 * torch.tensor([1.0, 5.0]))
    assert replace(objective, guidance=1.0).learned_map(net, {}).radius == pytest.approx(1.2)


@on_every_rule
def test_targets_are_constants(rule):
    """The gradient goes through the prediction alone; the Lagrangian rule's prediction has a derivative in it."""
    objective = FlowMap(rule=rule)
    net = MapNet(objective)
    net.factor.data.fill_(0.9)
    u = learned(objective, net)
    jumps = objective.draw_jumps(batch_of_normals(300), u)
    z, r, t = jumps[:3]
    probe = torch.randn_like(z)
    (got,) = torch.autograd.grad((rule.error(u, jumps, None) * probe).sum(), net.factor)
    per_unit = u(z, r, t).detach() / 0.9
    if isinstance(rule, Lagrangian):
        end = jvp(lambda r: u(z, r, t), (r,), (torch.ones_like(r),))[1].detach() / 0.9
        per_unit = per_unit - u.gap(r, t, z) * end
    if isinstance(rule, Consistency):
        s = rule.earlier(objective.path, t, None).clamp(min=1e-5)
        per_unit = -u.gap(r, t, z) * per_unit / u.gap(s, t, z).clamp(min=1e-5)
    torch.testing.assert_close(got, (per_unit * probe).sum())


# ----------------------------------------------------------------------------------------------- times and losses
@on_every_rule
def test_times_are_in_order_and_shared_as_the_rule_says(rule):
    objective, batch = FlowMap(rule=rule), Batch(torch.zeros(20_000, 1), draw=Draw((5,), 0, 20_000))
    r, t = rule.times(batch, lambda: objective.time_distribution.sample(batch, objective.path), objective.path)
    assert bool(((r >= 0) & (r <= t) & (t > 0) & (t <= 1)).all())
    assert float((r == t).float().mean()) == pytest.approx(rule.share, abs=0.02)
    if isinstance(rule, Shortcut):
        length = (t - r)[r < t]
        assert set(length.log2().round().tolist()) == {-float(k) for k in range(rule.halvings)}
        torch.testing.assert_close(length.log2(), length.log2().round())
        torch.testing.assert_close((t[r < t] / length), (t[r < t] / length).round())


def test_the_consistency_step_shrinks_from_the_whole_way():
    rule, t = Consistency(stage_steps=10, last_stage=6), torch.tensor([0.05, 0.5, 0.95], dtype=F64)
    assert rule.earlier(Linear(), t, 0).tolist()[:2] == [0, 0]
    steps = torch.stack([t - rule.earlier(Linear(), t, k) for k in range(0, 100, 10)])
    assert bool((steps[1:] <= steps[:-1]).all())
    assert bool((steps[7:] == steps[6]).all())
    level = lambda tau: tau / (1 - tau)  # noqa: E731
    late = rule.earlier(Linear(), t, None)
    expected = 1 - 2.0**-7 * (1 + 8 * torch.sigmoid(-level(t)))  # Geng et al. 2024, section 3
    torch.testing.assert_close(level(late) / level(t), expected, rtol=1e-6, atol=1e-6)


def test_alpha_falls_from_flow_matching():
    rule = Alpha(start=10, end=110, smallest=0.05)
    ratios = [rule.ratio(k) for k in (0, 10, 60, 109, 110, 500, None)]
    assert ratios[:2] == [1.0, 1.0]
    assert ratios[2] == pytest.approx(0.5)
    assert ratios[3:] == [0.05] * 4
    objective = FlowMap(rule=rule)
    u = learned(objective, MapNet(objective))
    jumps = objective.draw_jumps(batch_of_normals(50), u)
    torch.testing.assert_close(rule.error(u, jumps, 0), u(jumps.z, jumps.r, jumps.t) - jumps.velocity)


@on_every_rule
def test_a_rows_loss_does_not_depend_on_how_the_batch_is_split(rule):
    contract.check_loss_does_not_depend_on_how_the_batch_is_cut(FlowMap(rule=rule))


@on_every_rule
def test_logs_are_unweighted_errors(rule):
    """An untrained network says 0. With r = t the mean squared error is that of ``x1 - x0``."""
    objective, n = FlowMap(rule=rule), 20_000
    nets = objective.networks(MLP(width=8, depth=1), Spec((2,)))
    batch = Batch(torch.randn(n, 2, generator=torch.Generator().manual_seed(0)), draw=Draw((1,), 0, n))
    loss = objective.loss("denoise", nets, batch)
    assert loss.per_sample.shape == (n,)
    zero_target = isinstance(rule, Lagrangian | Shortcut)  # its own, and it says 0
    assert (float(loss.logs["map"]) == 0) == zero_target
    if rule.share:
        assert float(loss.logs["velocity"]) == pytest.approx(2, rel=0.05)
    else:
        assert loss.logs.keys() == {"map"}


def test_weighting_belongs_to_the_rule():
    error = torch.randn(50, 3)
    squared = error.square().mean(1)
    torch.testing.assert_close(Lagrangian().weigh(error), squared)
    torch.testing.assert_close(Improved(floor=0.01).weigh(error), squared / (squared + 0.01))
    torch.testing.assert_close(Mean(power=0.5, floor=0.01).weigh(error), squared / (squared + 0.01).sqrt())
    far = 100 * error
    torch.testing.assert_close(Consistency().weigh(far), (far.square().mean(1)).sqrt(), rtol=1e-3, atol=0.05)
    (grad,) = torch.autograd.grad(Improved().weigh(e := error.requires_grad_()).sum(), e)
    torch.testing.assert_close(grad, 2 * error / 3 / (squared[:, None] + 1e-3))


def test_errors_of_a_prediction_of_data_are_bounded_near_the_data():
    objective = FlowMap(prediction="x0")
    bound = objective.error_bound(torch.tensor([1e-3, 0.04, 0.5]), torch.zeros(3, 2))[:, 0]
    torch.testing.assert_close(bound, torch.tensor([0.02, 0.8, 1.0]))


# ------------------------------------------------------------------------------------------------------ networks
@pytest.mark.parametrize("path", [Linear(), VP()], ids=["linear", "vp"])
def test_a_lagrangian_jump_counts_by_how_little_it_asks_of_predicted_data(path):
    """The same map has the same errors by either prediction, times ``tau_r / tau_t`` if it predicts the data."""
    errors = []
    for prediction in ("velocity", "x0"):
        objective = FlowMap(rule=Lagrangian(share=0.3), path=path, prediction=prediction, time_distribution=Uniform())
        net = MapNet(objective)
        net.factor.data.fill_(0.9)
        u = learned(objective, net, Teacher(path))
        jumps = objective.draw_jumps(batch_of_normals(300), u)
        errors.append(objective.rule.error(u, jumps, None))
    ratio = (chart(path, jumps.r)[0] / chart(path, jumps.t)[0])[:, None]
    assert 0.2 < float((jumps.r == jumps.t).double().mean()) < 0.4
    torch.testing.assert_close(errors[1], ratio * errors[0], atol=1e-8, rtol=1e-6)


@on_every_path
@pytest.mark.parametrize("prediction", ["velocity", "eps", "v", "score", "karras"])
def test_jumps_to_the_data_alone_need_a_model_that_keeps_data_without_noise(prediction, path):
    """Song et al. 2023, section 3: every prediction but x0 has this boundary condition."""
    assert FlowMap(path=VP(), prediction=prediction, rule=Consistency()).keeps_data()
    with pytest.raises(ValueError, match="always predicts the same data"):
        FlowMap(path=path, prediction="x0", rule=Consistency())


def test_a_network_starts_as_it_was_without_a_second_time():
    spec = Spec((2,), {"label": Label(3)})
    flow = Flow().networks(MLP(width=16), spec)["net"]
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1 * torch.randn_like(p)
    net = FlowMap(rule=Shortcut()).networks(MLP(width=16), spec)["net"]
    missing, unexpected = net.load_state_dict(flow.state_dict(), strict=False)
    assert not unexpected
    assert {k.rsplit(".", 1)[0] for k in missing} == {"net.cond.embed.on_span"}
    x, t, cond = torch.randn(6, 2), torch.rand(6), {"label": torch.arange(6) % 3}
    a = Flow().denoiser(flow)(x, t, cond)
    for target in ({}, {"target_time": t / 2}):
        b = FlowMap(rule=Shortcut()).denoiser(net)(x, t, {**cond, **target})
        torch.testing.assert_close(b.x0, a.x0)


def test_dropped_conditions_do_not_drop_the_second_time():
    net = FlowMap().networks(MLP(width=16), Spec((2,), {"label": Label(3)}))["net"]
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn_like(p)
    denoise = FlowMap().denoiser(net)
    x, t, cond = torch.randn(4, 2), torch.full((4,), 0.8), {"label": torch.arange(4) % 3}
    hidden = {**cond, "keep": torch.zeros(4, dtype=torch.bool)}
    near, far = (denoise(x, t, {**hidden, "target_time": r * t}).x0 for r in (0.9, 0.1))
    assert float((near - far).abs().min()) > 1e-5


def test_passes_without_a_gradient_drop_the_same_activations():
    torch.manual_seed(0)
    net = FlowMap().networks(MLP(width=32, dropout=0.5), Spec((2,)))["net"].train()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn_like(p)
    u = LearnedMap(FlowMapDenoiser(net, Linear(), FlowMap().parametrization), {})
    z, t = torch.randn(8, 2), torch.rand(8)
    frozen = u.frozen(z, t / 2, t)
    torch.testing.assert_close(u(z, t / 2, t), frozen)
    assert not torch.allclose(u(z, t / 2, t), frozen)


class SeesConditions(torch.nn.Module):
    """A network that says 0 and keeps the conditions of its last call."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, label, cond):
        self.seen = cond
        return self.weight * x


def test_conditions_are_dropped_in_training():
    net, n = SeesConditions(), 4000
    batch = Batch(torch.randn(n, 2), {"label": torch.arange(n) % 3}, draw=Draw((1,), 0, n))
    FlowMap(cond_dropout=0.3).loss("denoise", {"net": net}, batch)
    assert float(net.seen["keep"].float().mean()) == pytest.approx(0.7, abs=0.03)


def test_a_network_sees_the_span_and_not_the_target():
    net = SeesConditions()
    FlowMap().denoiser(net)(torch.zeros(2, 2), torch.full((2,), 0.7), {"target_time": torch.full((2,), 0.2)})
    assert net.seen.keys() == {"span"}
    torch.testing.assert_close(net.seen["span"], torch.full((2,), 0.5))


def test_what_nothing_depends_on_has_the_derivative_zero():
    assert torch.equal(tangent(torch.ones(3)), torch.zeros(3))


# ------------------------------------------------------------------------------------------------- its guidance
def test_intervals_of_guidance_hold_the_middle_of_the_path():
    n = 20_000
    batch = Batch(torch.zeros(n, 1), {"label": torch.zeros(n, dtype=torch.long)}, draw=Draw((1,), 0, n))
    drawn = draw_guidance(batch, batch.cond, 4.0)
    low, high = drawn["guidance_low"], drawn["guidance_high"]
    assert float(low.max()) == pytest.approx(0.5, abs=0.01)
    assert float(high.min()) == pytest.approx(0.5, abs=0.01)
    assert float(((low == 0) & (high == 1)).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_an_interval_of_guidance_is_of_chart_times():
    tau = torch.tensor([0.3, 0.45, 0.55, 0.7], dtype=F64)
    limits = {"guidance": torch.full((4,), 3.0, dtype=F64), "guidance_low": torch.full((4,), 0.4, dtype=F64),
              "guidance_high": torch.full((4,), 0.6, dtype=F64)}  # fmt: skip
    assert scale_at(VP(), time_of(VP(), tau), limits).tolist() == [1, 3, 3, 1]


def test_what_is_guided_away_from_sees_no_condition_and_no_scale():
    cond = {"label": torch.zeros(2), "guidance": torch.ones(2), "guidance_low": torch.ones(2), "keep": torch.ones(2)}
    rest = without(cond, torch.zeros(2, 1))
    assert rest.keys() == {"label", "keep"}
    assert not bool(rest["keep"].any())
    net = SeesConditions()
    GuidedTeacher(Flow().denoiser(net))(torch.zeros(2, 2), torch.full((2,), 0.5), {**limits_of(2), **cond})
    assert net.seen.keys() == {"label", "keep"}


def limits_of(n):
    return {"guidance": torch.full((n,), 2.0), "guidance_low": torch.zeros(n), "guidance_high": torch.ones(n)}


# ------------------------------------------------------------------------------------------------------ refusals
def test_weights_of_another_rate_of_the_time_label_are_refused():
    FlowMap(rule=Improved()).refuse_init(FlowMap(rule=Mean()))
    with pytest.raises(ValueError, match="which rule shortcut takes at 1"):
        FlowMap().refuse_init(FlowMap(rule=Mean()))


def test_a_teacher_is_named_by_where_it_really_is(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    assert FlowMap(teacher="latest").teacher == str((tmp_path / "run").resolve())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction": "eps"}, "alpha"),
        ({"time_distribution": LossAware()}, "loss-aware"),
        ({"teacher_guidance": 2.0}, "no teacher"),
        ({"rule": Consistency(), "prediction": "x0"}, "always predicts the same data"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FlowMap(**settings)


def test_a_curriculum_ends_after_it_starts():
    with pytest.raises(ValueError, match="start < end"):
        Alpha(start=10, end=10)


def test_standard_deviation_of_the_support_is_that_of_its_batches():
    assert float(batch_of_normals(20_000).x.std()) == pytest.approx(STD, rel=0.03)
