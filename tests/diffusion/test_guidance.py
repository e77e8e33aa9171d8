"""Guidance: linear, off at 1, and on the exact mixture the known combination of scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genkit.core import Prediction
from genkit.diffusion.guidance import (
    APG,
    LINEAR,
    PASSES,
    RULES,
    Rescale,
    autoguidance,
    by_classifier,
    clamp,
    classifier_free,
    compose,
    within,
)
from genkit.diffusion.paths import PATHS, VP, Linear, mix, times_at
from genkit.diffusion.samplers import CountingDenoiser, bind
from tests.support import guidance as contract
from tests.support.exact import F64, ExactDenoiser, three
from tests.support.guidance import tensors

MIXTURE = three()


def state(n=6, t=0.6):
    x0, k = MIXTURE.sample(n)
    x1 = torch.randn(n, 2, dtype=F64)
    return mix(VP(), x0, x1, torch.full((n,), t, dtype=F64)), torch.full((n,), t, dtype=F64), {"label": k}


EVERY_RULE = [cls() for cls in RULES.values()]


@pytest.mark.parametrize("rule", EVERY_RULE, ids=lambda r: type(r).__name__)
def test_off_at_one(rule):
    contract.check_off_at_one(rule)


@pytest.mark.parametrize("rule", [*EVERY_RULE, APG(momentum=-0.5)], ids=[*RULES, "apg with memory"])
def test_rows_are_independent(rule):
    contract.check_rows_are_independent(rule)


@pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("rule", [*EVERY_RULE, APG(threshold=0.3, momentum=-0.5)], ids=[*RULES, "apg with memory"])
def test_stays_on_the_path(path, rule):
    contract.check_stays_on_the_path(rule, path)


@given(scale=st.floats(-3, 8))
def test_linear_in_the_scale(scale):
    denoise = ExactDenoiser(MIXTURE, VP())
    x, t, cond = state()
    got = classifier_free(scale)(denoise)(x, t, cond)
    with_it, without = denoise(x, t, cond), denoise(x, t, {})
    for part in ("x0", "x1"):
        a, b = getattr(with_it, part), getattr(without, part)
        assert torch.allclose(getattr(got, part), b + scale * (a - b), atol=1e-11)


@pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=lambda p: type(p).__name__)
def test_is_the_score_of_the_sharpened_law(path):
    """score = s(x) + w (s(x | k) - s(x)): Ho & Salimans 2022, eq. 6, with scores by autograd of the densities."""
    w, t = 2.5, torch.full((4,), 0.5, dtype=F64)
    x0, _ = MIXTURE.sample(4)
    x = mix(path, x0, torch.randn(4, 2, dtype=F64), t).requires_grad_()
    a, s = float(path.alpha(t[:1])), float(path.sigma(t[:1]))
    log_p = MIXTURE.noised(a, s).log_prob(x)
    log_k = MIXTURE.component(1).noised(a, s).log_prob(x)
    score = torch.autograd.grad((log_p + w * (log_k - log_p)).sum(), x)[0]
    cond = {"label": torch.ones(4, dtype=torch.long)}
    got = classifier_free(w)(ExactDenoiser(MIXTURE, path))(x.detach(), t, cond)
    assert torch.allclose(-got.x1 / s, score, atol=1e-9)
    assert torch.allclose(a * got.x0 + s * got.x1, x.detach(), atol=1e-9)


def test_one_pass_of_twice_the_batch_or_two_passes_and_samples_that_keep_nothing():
    exact = ExactDenoiser(MIXTURE, VP())
    x, t, cond = state(4)
    keep = torch.tensor([True, False, True, False])
    got = {}
    for passes, calls in (("together", 1), ("apart", 2)):
        counted = CountingDenoiser(exact)
        got[passes] = classifier_free(2.0, passes=passes)(counted)(x, t, {**cond, "keep": keep})
        assert (counted.calls, counted.rows) == (calls, 8)
    assert torch.allclose(got["together"].x0, got["apart"].x0, atol=1e-12)
    assert torch.allclose(got["together"].x1, got["apart"].x1, atol=1e-12)
    null = exact(x, t, {})
    assert torch.allclose(got["apart"].x0[~keep], null.x0[~keep])
    assert not torch.allclose(got["apart"].x0[keep], null.x0[keep])


def test_scale_zero_is_the_null_pass_alone():
    counted = CountingDenoiser(ExactDenoiser(MIXTURE, VP()))
    x, t, cond = state(4)
    got = classifier_free(0.0)(counted)(x, t, cond)
    assert torch.equal(got.x0, counted.inner(x, t, {}).x0)
    assert counted.rows == 4
    good, bad = counted.inner(x, t, cond), counted.inner(x, t, {})
    projected = classifier_free(0.0, APG())(counted)(x, t, cond)  # other rules have a limit of their own
    assert torch.allclose(projected.x0, APG()(good.x0, bad.x0, 0.0, None)[0], atol=1e-12)
    assert not torch.allclose(projected.x0, bad.x0, atol=1e-3)


def test_needs_a_condition():
    x, t, _ = state()
    with pytest.raises(ValueError, match="no condition"):
        classifier_free(2.0)(ExactDenoiser(MIXTURE, VP()))(x, t, {})


def test_clamp_stays_on_the_path():
    class Wild:
        path = Linear()

        def __call__(self, x, t, cond):
            return Prediction(3 * torch.ones_like(x), x)

    x, t = torch.randn(3, 2), torch.full((3,), 0.4)
    got = clamp()(Wild())(x, t, {})
    assert float(got.x0.max()) == 1
    assert torch.allclose(0.6 * got.x0 + 0.4 * got.x1, x, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- rules
@given(phi=st.floats(0.01, 1), scale=st.floats(-2, 8))
def test_rescale_brings_the_standard_deviation_back(phi, scale):
    """Lin et al. 2024: at phi = 1 that of the conditional prediction, else the mean of the two, weighted by phi."""
    torch.manual_seed(0)
    good, bad = tensors(5, 2, 3, 4), 2 * tensors(5, 2, 3, 4) + 1
    linear = LINEAR(good, bad, scale, None)[0]
    got = Rescale(phi)(good, bad, scale, None)[0]
    std = [y.flatten(1).std(1) for y in (good, linear, got)]
    assert torch.allclose(std[2], phi * std[0] + (1 - phi) * std[1], atol=1e-9)
    assert torch.allclose(got / got.flatten(1).norm(dim=1).view(-1, 1, 1, 1),
                          linear / linear.flatten(1).norm(dim=1).view(-1, 1, 1, 1))  # fmt: skip


def test_rescale_leaves_what_has_no_deviation():
    flat = torch.ones(2, 4)
    assert torch.equal(Rescale()(flat, flat, 3.0, None)[0], flat)
    with pytest.raises(ValueError, match="one number"):
        Rescale()(torch.ones(2, 1), torch.zeros(2, 1), 3.0, None)


def test_apg_with_everything_off_is_linear():
    good, bad = tensors(5, 3, 4), tensors(5, 3, 4)
    for scale in (-1.0, 0.0, 2.0, 7.5):
        got, kept = APG(parallel=1.0)(good, bad, scale, None)
        assert kept is None
        assert torch.allclose(got, LINEAR(good, bad, scale, None)[0], atol=1e-12)


@given(parallel=st.floats(0, 2))
def test_apg_weakens_the_part_along_the_prediction_and_no_other(parallel):
    """Sadat et al. 2025, eqs. 4 and 5, by a basis: the first axis of each sample is its prediction's direction."""
    good, way = torch.zeros(3, 4, dtype=F64), torch.arange(12.0, dtype=F64).view(3, 4) - 5
    good[:, 0] = torch.tensor([2.0, -3.0, 0.5])
    got = APG(parallel)(good, good - way, 3.0, None)[0]
    assert torch.allclose(got - good, 2 * way * torch.tensor([parallel, 1, 1, 1], dtype=F64), atol=1e-12)
    assert torch.isfinite(APG(parallel)(0 * good, way, 3.0, None)[0]).all()  # no direction, nothing to weaken


def test_apg_limits_the_norm_of_a_whole_sample():
    good, way = tensors(4, 2, 3), tensors(4, 2, 3)
    way = way / way.flatten(1).norm(dim=1).view(-1, 1, 1) * torch.tensor([0.5, 1.0, 2.0, 8.0]).view(-1, 1, 1)
    got = APG(1.0, threshold=1.0)(good, good - way, 2.0, None)[0] - good
    assert torch.allclose(got.flatten(1).norm(dim=1), torch.tensor([0.5, 1.0, 1.0, 1.0], dtype=F64), atol=1e-12)
    assert torch.allclose(got[0], way[0], atol=1e-12)
    assert torch.nn.functional.cosine_similarity(got.flatten(1), way.flatten(1)) == pytest.approx([1.0] * 4)


def test_apg_remembers_the_whole_differences():
    """The running sum of Sadat et al. 2025, section 4.3, written out; the limit does not enter what is remembered."""
    rule, past, good = APG(1.0, threshold=0.7, momentum=-0.5), None, tensors(3, 2)
    ways = [tensors(3, 2) for _ in range(3)]
    for way in ways:
        got, past = rule(good, good - way, 2.0, past)
    total = ways[2] - 0.5 * (ways[1] - 0.5 * ways[0])
    assert torch.allclose(past, total, atol=1e-12)
    limited = total * (0.7 / total.norm(dim=1, keepdim=True)).clamp(max=1)
    assert torch.allclose(got - good, limited, atol=1e-12)


def test_memory_is_of_one_trajectory_and_of_one_sample():
    z, label = tensors(6, 2), torch.arange(6) % 3
    sampling = bind("heun", 5, classifier_free(3.0, APG(momentum=-0.7)))
    generate = sampling(ExactDenoiser(MIXTURE, Linear()))
    first = generate(z, {"label": label})
    assert torch.equal(generate(z, {"label": label}), first)
    assert torch.allclose(generate(z[4:], {"label": label[4:]}), first[4:], atol=1e-12)
    without = bind("heun", 5, classifier_free(3.0, APG()))(ExactDenoiser(MIXTURE, Linear()))
    assert not torch.allclose(without(z, {"label": label}), first, atol=1e-3)


# ------------------------------------------------------------------------------------------------- interval
@pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=lambda p: type(p).__name__)
def test_guides_within_the_interval_and_nowhere_else(path):
    bare = ExactDenoiser(MIXTURE, path)
    taus = torch.tensor([0.1, 0.29, 0.31, 0.5, 0.69, 0.71, 0.9], dtype=F64)
    t = times_at(path, taus)
    x0, k = MIXTURE.sample(len(t))
    x = mix(path, x0, tensors(*x0.shape), t)
    guided = classifier_free(3.0)(bare)
    some = within(0.3, 0.7, classifier_free(3.0))(bare)
    mixed = some(x, t, {"label": k})
    for i in range(len(t)):
        one = slice(i, i + 1)
        cond = {"label": k[one]}
        want = (guided if 0.3 < taus[i] < 0.7 else bare)(x[one], t[one], cond)
        assert torch.equal(some(x[one], t[one], cond).x0, want.x0)
        assert torch.allclose(mixed.x0[one], want.x0, atol=1e-12)  # samples with times of their own
        assert torch.allclose(mixed.x1[one], want.x1, atol=1e-12)


def test_the_whole_interval_is_guidance_and_its_ends_belong_to_it():
    bare, (x, t, cond) = ExactDenoiser(MIXTURE, Linear()), state(t=0.5)
    guided = classifier_free(3.0)(bare)(x, t, cond)
    for low, high in ((0.0, 1.0), (0.5, 1.0), (0.0, 0.5)):
        assert torch.equal(within(low, high, classifier_free(3.0))(bare)(x, t, cond).x0, guided.x0)


def test_an_interval_saves_evaluations():
    z, cond = tensors(4, 2), {"label": torch.zeros(4, dtype=torch.long)}
    rows = []
    for guidance in (classifier_free(3.0), within(0.21, 0.59, classifier_free(3.0)), None):
        counted = CountingDenoiser(ExactDenoiser(MIXTURE, Linear()))
        bind("ddim", 20, guidance)(counted)(z, cond)
        assert counted.calls == 20
        rows.append(counted.rows / 4)
    assert rows == [40, 20 + 7, 20]  # seven of the nodes 0.05, 0.1, ... 1 lie in [0.21, 0.59]


# ----------------------------------------------------------------------------------------------- autoguidance
def test_autoguidance_extrapolates_from_the_weaker_one():
    """Karras et al. 2024, eq. 3; with the same model for both nothing changes, with or without conditions."""
    strong, weak = (ExactDenoiser(m, VP()) for m in (MIXTURE, MIXTURE.noised(0.8, 0.5)))
    x, t, cond = state()
    for c in (cond, {}):
        got, a, b = autoguidance(weak, 2.5)(strong)(x, t, c), strong(x, t, c), weak(x, t, c)
        assert torch.allclose(got.x0, b.x0 + 2.5 * (a.x0 - b.x0), atol=1e-12)
        assert torch.allclose(got.x1, b.x1 + 2.5 * (a.x1 - b.x1), atol=1e-12)
        assert torch.allclose(autoguidance(strong, 2.5)(strong)(x, t, c).x0, a.x0, atol=1e-12)


def test_compose_starts_at_the_network():
    order = []

    def named(name):
        return lambda denoise: order.append((name, denoise)) or name

    assert compose(named("a"), named("b"))("net") == "b"
    assert order == [("a", "net"), ("b", "a")]
    assert compose()("net") == "net"


# --------------------------------------------------------------------------------------------------- mistakes
EXACT = ExactDenoiser(MIXTURE, VP())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: classifier_free(float("nan")), "guidance: given nan"),
        (lambda: autoguidance(EXACT, float("inf")), "guidance: given inf"),
        (lambda: by_classifier(EXACT, float("nan")), "classifier_scale: given nan"),
        (lambda: classifier_free(2.0, passes="both"), f"allowed: {', '.join(PASSES)}"),
        (lambda: within(0.8, 0.2, classifier_free(2.0)), "low < high"),
        (lambda: within(0.2, 0.2, classifier_free(2.0)), "low < high"),
        (lambda: within(-0.1, 0.2, classifier_free(2.0)), "0 <= low"),
        (lambda: within(0.2, 1.1, classifier_free(2.0)), "high <= 1"),
        (lambda: within(0.2, float("nan"), classifier_free(2.0)), "interval"),
        (lambda: Rescale(0.0), "phi"),
        (lambda: Rescale(1.1), "phi"),
        (lambda: APG(parallel=-0.1), "parallel"),
        (lambda: APG(threshold=-1.0), "threshold"),
        (lambda: APG(momentum=1.0), "momentum"),
        (lambda: APG(momentum=float("nan")), "momentum"),
        (lambda: autoguidance(EXACT, 2.0)(ExactDenoiser(MIXTURE, Linear())), "the model's path is Linear"),
        (lambda: by_classifier(EXACT)(ExactDenoiser(MIXTURE, Linear())), "the model's path is Linear"),
    ],
)
def test_mistakes_are_one_line(make, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
