"""The metrics against closed forms, of Gaussians above all."""

import importlib.util
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genkit.evaluation import metrics
from genkit.evaluation.metrics import (
    METRICS,
    Estimate,
    MetricSettings,
    Moments,
    SampleStatistics,
    frechet_distance,
    frechet_from_features,
    frechet_infinity,
)
from genkit.evaluation.metrics.frechet import distance_and_influence
from tests.support import metrics as contract

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gaussian(mean, cov):
    return Moments(None, torch.as_tensor(mean, dtype=F64), torch.as_tensor(cov, dtype=F64))


# ------------------------------------------------------------------------------------------------- moments
@given(st.integers(2, 40), st.integers(1, 9), st.lists(st.integers(0, 40), max_size=4))
def test_moments_of_parts_are_those_of_all(n, dim, cuts):
    """Added in pieces (also empty ones), merged in pieces, or at once: as in numpy."""
    x = 3 + normal(n, dim)
    pieces = x.tensor_split(sorted(min(c, n) for c in cuts))
    whole, added, merged = Moments.of(x), Moments.zeros(dim), Moments.zeros(dim)
    for p in pieces:
        added.add(p)
        part = Moments.zeros(dim)
        part.add(p)
        merged = merged.merge(part)
    for m in (whole, added, merged):
        assert m.n == n
        assert torch.allclose(m.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        assert np.allclose(m.cov.numpy(), np.cov(x.numpy().T), rtol=1e-12, atol=1e-12)


def test_moments_far_from_zero():
    """Mean 1000, spread 0.01: plain sums of squares would lose nine of the sixteen digits."""
    z = normal(3000, 5)
    far = Moments.of(1000 + 0.01 * z)
    near = Moments.of(0.01 * z)
    assert torch.allclose(far.cov, near.cov, rtol=1e-9, atol=1e-14)
    parts = [Moments.of(1000 + 0.01 * p) for p in z.split(700)]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3]).merge(parts[4])
    assert torch.allclose(merged.cov, near.cov, rtol=1e-9, atol=1e-14)
    assert frechet_distance(far, Moments.of(1000 + 0.01 * z)) == pytest.approx(0, abs=1e-12)


def test_half_precision_is_added_in_double():
    x = normal(500, 4).half()
    assert torch.allclose(Moments.of(x).cov, torch.cov(x.double().T), rtol=1e-12)


def test_moments_in_files(tmp_path):
    m = Moments.of(normal(30, 4))
    m.save(tmp_path / "own.npz")
    back = Moments.load(tmp_path / "own.npz")
    assert (back.n, back.dim) == (30, 4)
    assert torch.allclose(back.cov, m.cov, rtol=1e-14)
    assert [p.name for p in tmp_path.iterdir()] == ["own.npz"]
    back.add(normal(5, 4))
    assert back.n == 35

    np.savez(tmp_path / "foreign.npz", mu=m.mean.numpy(), sigma=m.cov.numpy())  # as pytorch-fid and EDM have it
    other = Moments.load(tmp_path / "foreign.npz")
    assert other.n is None
    assert frechet_distance(m, other) == pytest.approx(0, abs=1e-12)
    other.save(tmp_path / "again.npz")
    assert Moments.load(tmp_path / "again.npz").n is None
    with pytest.raises(ValueError, match="does not store its number"):
        other.add(normal(5, 4))


def test_bad_files_of_moments(tmp_path):
    np.savez(tmp_path / "names.npz", mean=np.zeros(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "pickle.npz", mu=np.array([object()]), sigma=np.zeros((1, 1)))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no")
    for name, match in (
        ("names.npz", "holds mean; statistics need mu and sigma"),
        ("shape.npz", r"\[D\] and \[D, D\]"),
        ("nan.npz", "not finite"),
        ("pickle.npz", "not an npz"),
        ("one.npy", "not an npz"),
        ("text.npz", "not an npz"),
    ):
        with pytest.raises(ValueError, match=match):
            Moments.load(tmp_path / name)


# ------------------------------------------------------------------------------------------------- Fréchet
def test_frechet_distances_in_closed_form():
    one = frechet_distance(gaussian([1.0], [[4.0]]), gaussian([-2.0], [[0.25]]))
    assert one == pytest.approx(3**2 + (2 - 0.5) ** 2, rel=1e-12)
    s, r = torch.linspace(0.1, 3, 12, dtype=F64), torch.linspace(2, 0.5, 12, dtype=F64)
    turn = torch.linalg.qr(normal(12, 12)).Q
    a, b = gaussian(torch.zeros(12), turn * s**2 @ turn.T), gaussian(torch.ones(12), turn * r**2 @ turn.T)
    assert frechet_distance(a, b) == pytest.approx(12 + float((s - r).square().sum()), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    # a linear map of a Gaussian by a symmetric positive matrix is its optimal transport
    w = turn * r @ turn.T
    c = gaussian(torch.zeros(12), normal(12, 12) @ normal(12, 12).T)
    moved = (w - torch.eye(12, dtype=F64)) @ c.cov @ (w - torch.eye(12, dtype=F64))
    assert frechet_distance(c, gaussian(torch.zeros(12), w @ c.cov @ w)) == pytest.approx(
        float(moved.trace()), rel=1e-9
    )


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 20), st.booleans())
def test_frechet_distance_of_any_numbers_of_samples(n, m, dim, dead):
    """Symmetric, 0 from itself, the same by small matrices; singular if N <= D or a feature is constant."""
    x, y = normal(n, dim, seed=1) * torch.linspace(1, 3, dim), 0.5 + normal(m, dim, seed=2)
    if dead:
        x[:, 0] = 7
    a, b = Moments.of(x), Moments.of(y)
    d = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(d, rel=1e-6, abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_from_features(x, b).value == pytest.approx(d, rel=1e-6, abs=1e-6)
    if not dead:  # known ranks: no roots of rounding errors
        assert frechet_from_features(x, b).value == pytest.approx(d, rel=1e-9)


def test_singular_covariances_have_a_closed_form():
    """Three points in 50 dimensions against a unit Gaussian: the roots of the Gram matrix's eigenvalues."""
    x = normal(3, 50)
    roots = torch.linalg.svdvals(x - x.mean(0)) / math.sqrt(2)
    truth = float(x.mean(0).square().sum() + (roots[:2] ** 2).sum() + 50 - 2 * roots[:2].sum())
    unit = gaussian(torch.zeros(50), torch.eye(50))
    assert frechet_distance(Moments.of(x), unit) == pytest.approx(truth, rel=1e-12)
    assert frechet_distance(unit, Moments.of(x)) == pytest.approx(truth, rel=1e-12)
    assert frechet_from_features(x, unit).value == pytest.approx(truth, rel=1e-12)
    flat = Moments.of(torch.ones(5, 50))
    assert frechet_distance(flat, unit) == pytest.approx(100)
    assert frechet_distance(flat, flat) == 0


@pytest.mark.parametrize(("n", "dim"), [(40, 6), (6, 40)])
def test_influence_is_the_derivative(n, dim):
    """A row's influence is the derivative of the distance in its weight: against weights of 1 + h."""
    x, h = normal(n, dim) * torch.linspace(0.5, 2, dim), 1e-5
    reference = gaussian(torch.ones(dim), torch.diag(torch.linspace(0.5, 1.5, dim)))

    def weighted(row, h):
        w = torch.ones(n, dtype=F64)
        w[row] += h
        w = w / w.sum()
        mean = w @ x
        cov = (x - mean).T * w @ (x - mean) * n / (n - 1)
        return frechet_distance(reference, Moments(n, mean, (n - 1) * cov))

    influence = distance_and_influence(x, reference)[1]
    influence = influence - influence.mean()
    numeric = [(weighted(i, h) - weighted(i, -h)) / (2 * h) * n for i in range(4)]
    assert influence[:4].tolist() == pytest.approx(numeric, rel=1e-5)


KINDS = {  # dimensions, samples, standard deviations of the generated, shift of each feature
    "shifted": (8, 500, (0.7, 1.2), 0.1),
    "far": (16, 64, (0.2, 2.0), 1.0),
    "fewer samples than features": (16, 12, (0.2, 2.0), 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_interval_holds_the_mean(kind):
    """Of 200 intervals at 95 %, about that share holds the mean FID at this n; a tenth of their width holds few."""
    dim, n, spread, shift = KINDS[kind]
    scale, reference = torch.linspace(*spread, dim, dtype=F64), gaussian(torch.zeros(dim), torch.eye(dim))
    estimates = [frechet_from_features(shift + scale * normal(n, dim, seed=s), reference) for s in range(200)]
    mean = np.mean([e.value for e in estimates])
    hit = np.mean([e.low < mean < e.high for e in estimates])
    assert 0.87 <= hit <= 0.99, hit
    assert np.mean([abs(e.value - mean) < 0.1 * (e.high - e.value) for e in estimates]) < 0.3


def test_fid_inf_has_no_bias_and_its_interval_holds_the_truth():
    dim, n, scale = 16, 500, torch.linspace(0.7, 1.2, 16, dtype=F64)
    truth = 16 * 0.1**2 + float((scale - 1).square().sum())
    reference = gaussian(torch.zeros(dim), torch.eye(dim))
    draws = [0.1 + scale * normal(n, dim, seed=s) for s in range(150)]
    plain = np.array([frechet_from_features(x, reference).value for x in draws])
    estimates = [frechet_infinity(x, reference) for x in draws]
    error = np.array([e.value for e in estimates]) - truth
    standard = error.std() / math.sqrt(len(draws))
    assert (plain - truth).mean() > 20 * standard  # the bias to be removed
    assert abs(error.mean()) < 3 * standard
    assert 0.9 <= np.mean([e.low < truth < e.high for e in estimates]) <= 0.99


def test_fid_inf_of_few_samples():
    reference = gaussian(torch.zeros(8), torch.eye(8))
    few = frechet_infinity(normal(40, 8), reference)
    assert few.low is None
    assert few.high is None
    assert frechet_infinity(normal(80, 8), reference).low is not None
    with pytest.raises(ValueError, match="given 16 samples of 8 features; needs at least 17"):
        frechet_infinity(normal(16, 8), reference)


def test_bias_warning():
    assert metrics.bias_warning(10_000) is None
    assert "FID of 9999 samples is too high" in metrics.bias_warning(9999)
    assert "\n" not in metrics.bias_warning(100)


# ----------------------------------------------------------------------------------------------- bootstrap
def test_bootstrap_of_a_mean():
    """Its interval is that of the normal distribution, and does not depend on the statistic's bias."""
    x = normal(400, 1)
    e = metrics.bootstrap(lambda v: float(v.mean()), x, num=1000)
    assert e.value == pytest.approx(float(x.mean()))
    assert (e.high - e.low) / 2 == pytest.approx(1.96 * float(x.std()) / 20, rel=0.1)
    reference = gaussian(torch.zeros(8), torch.eye(8))
    biased = metrics.bootstrap(lambda v: distance_and_influence(v, reference)[0], normal(60, 8), num=50)
    assert biased.low < biased.value < biased.high
    two = metrics.bootstrap(lambda a, b: float(a.mean() - b.mean()), x, normal(100, 1, seed=1), num=1000)
    assert (two.high - two.low) / 2 == pytest.approx(1.96 * math.sqrt(1 / 400 + 1 / 100), rel=0.15)
    with pytest.raises(ValueError, match="20"):
        metrics.bootstrap(lambda v: 0.0, x, num=3)


# ------------------------------------------------------------------------------------------------- kernels
def kernel_truth(dim, shift, spread, h):
    """Squared MMD of N(shift, spread^2) and N(0, 1) for ``exp(-|x - y|^2 / (2 h^2))``."""

    def mean(variance, away):
        total = h * h + variance
        return (h * h / total) ** (dim / 2) * math.exp(-dim * away**2 / (2 * total))

    return mean(2 * spread**2, 0) + mean(2, 0) - 2 * mean(1 + spread**2, shift)


@pytest.mark.parametrize(("shift", "spread"), [(0.3, 1.0), (0.0, 1.4), (0.0, 1.0)])
def test_mmd_of_gaussians(shift, spread):
    """Unbiased: the mean over draws is the closed form; and the intervals hold it."""
    truth = kernel_truth(3, shift, spread, 1.5)
    estimates = [
        metrics.mmd(shift + spread * normal(60, 3, seed=2 * s), normal(90, 3, seed=2 * s + 1), 1.5) for s in range(200)
    ]
    values = np.array([e.value for e in estimates])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(len(values))
    assert np.mean([e.low < truth < e.high for e in estimates]) >= 0.88


def test_mmd_does_not_depend_on_chunks(monkeypatch):
    x, y = normal(31, 3), 1 + normal(17, 3, seed=1)
    whole = metrics.mmd(x, y)
    monkeypatch.setattr("genkit.evaluation.metrics.kernel.CHUNK", 50)
    assert metrics.mmd(x, y) == pytest.approx(whole, rel=1e-12)
    assert metrics.mmd(5 * x, 5 * y).value == pytest.approx(whole.value, rel=1e-9)  # the bandwidth is the data's own
    assert metrics.mmd(x, x).value < 0 < whole.value  # pairs of equal points are not counted within, but between


def test_kid_has_no_bias():
    """Equal distributions: 0 on average, unlike the FID; shifted by v: the closed form of a cubic kernel."""
    estimates = [metrics.kid(normal(50, 8, seed=2 * s), normal(50, 8, seed=2 * s + 1)) for s in range(200)]
    values = np.array([e.value for e in estimates])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(200)
    assert np.mean([e.low < 0 < e.high for e in estimates]) >= 0.9
    # one feature, x ~ N(v, 1): E(xy + 1)^3 = m3 m3 + 3 m2 m2 + 3 m1 m1 + 1 of its moments
    power = lambda v: (v, v**2 + 1, v**3 + 3 * v)  # noqa: E731
    own, real = power(0.5), power(0.0)
    square = lambda a, b: a[2] * b[2] + 3 * a[1] * b[1] + 3 * a[0] * b[0] + 1  # noqa: E731
    truth = square(own, own) + square(real, real) - 2 * square(own, real)
    estimates = [metrics.kid(0.5 + normal(100, 1, seed=2 * s), normal(100, 1, seed=2 * s + 1)) for s in range(200)]
    values = np.array([e.value for e in estimates])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(200)
    assert 0.8 <= np.mean([e.low < truth < e.high for e in estimates]) <= 0.99  # sixth powers: far from normal


def test_kid_of_subsets():
    """Subsets of equal size estimate the same; few of them widen the interval; the seed is the same each time."""
    x, y = 0.3 + normal(300, 8), normal(300, 8, seed=1)
    whole, many, few = metrics.kid(x, y), metrics.kid(x, y, 200, 50), metrics.kid(x, y, 5, 50)
    assert many.value == pytest.approx(whole.value, rel=0.1)
    assert 1 < (many.high - many.low) / (whole.high - whole.low) < 1.6
    assert few.high - few.low > 1.5 * (whole.high - whole.low)
    assert metrics.kid(x, y, 5, 50) == few
    assert metrics.kid(x, y, 5, 50, np.random.default_rng(1)) != few


# ----------------------------------------------------------------------------------------------- manifolds
def test_prdc_of_known_sets():
    x = normal(60, 4)
    same = {k: v.value for k, v in metrics.prdc(x, x, 5).items()}
    assert same == pytest.approx({"precision": 1, "recall": 1, "density": 1, "coverage": 1})
    away = {k: v.value for k, v in metrics.prdc(x, x + 100, 5).items()}
    assert away == pytest.approx({"precision": 0, "recall": 0, "density": 0, "coverage": 0})
    modes = torch.cat([x, x + 100])  # the generator draws one of two modes
    dropped = {k: v.value for k, v in metrics.prdc(modes, x, 5).items()}
    assert dropped == pytest.approx({"precision": 1, "recall": 0.5, "density": 1, "coverage": 0.5})
    invented = {k: v.value for k, v in metrics.prdc(x, modes, 5).items()}  # or one that does not exist
    assert invented == pytest.approx({"precision": 0.5, "recall": 1, "density": 0.5, "coverage": 1})


def test_prdc_far_from_zero():
    """The same to the last digit at a distance of 1000 and at spreads of 0.01."""
    x, y = normal(50, 6), 0.4 + normal(70, 6, seed=1)
    near, far = metrics.prdc(x, y), metrics.prdc(1000 + 0.01 * x, 1000 + 0.01 * y)
    assert {k: v.value for k, v in near.items()} == {k: v.value for k, v in far.items()}
    for name in ("precision", "density"):
        assert near[name].low < near[name].value < near[name].high


# -------------------------------------------------------------------------------------------------- scores
@given(st.integers(2, 12), st.integers(1, 20))
def test_inception_score_of_known_logits(k, repeats):
    """1 for a classifier that is undecided; K for one that is certain of balanced classes, sorted or not."""
    n = k * repeats
    assert metrics.inception_score(torch.zeros(n, k), 1).value == pytest.approx(1)
    sure = 1000 * torch.nn.functional.one_hot(torch.arange(n) % k, k).float()
    assert metrics.inception_score(sure, 1).value == pytest.approx(k)
    assert metrics.inception_score(sure[torch.arange(n) % k == 0], 1).value == pytest.approx(1)


def test_inception_score_of_splits():
    labels = torch.arange(4000) // 1000  # sorted by class
    sure = 1000.0 * torch.nn.functional.one_hot(labels, 4).float()
    e = metrics.inception_score(sure, 10)
    assert 3.9 < e.low < e.value < e.high <= 4.01
    assert metrics.inception_score(sure, 1) == Estimate(pytest.approx(4), None, None)
    p = torch.tensor([0.9, 0.1]).log()
    two = torch.stack([p, p.flip(0)]).repeat(50, 1)
    truth = math.exp(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert metrics.inception_score(two, 1).value == pytest.approx(truth, rel=1e-6)
    assert metrics.inception_score(two + 50, 1).value == pytest.approx(truth, rel=1e-5)  # a constant adds nothing


def test_the_interval_of_the_inception_score():
    """Of 200 intervals at 95 % about that share holds the mean, and half of those at 50 %."""
    for level, least, most in ((0.95, 0.88, 0.99), (0.5, 0.4, 0.62)):
        estimates = [metrics.inception_score(2 * normal(200, 3, seed=s), 10, level=level) for s in range(200)]
        mean = np.mean([e.value for e in estimates])
        assert least <= np.mean([e.low < mean < e.high for e in estimates]) <= most


# ----------------------------------------------------------------------------------------------- transport
def test_wasserstein_of_known_sets():
    x, v = normal(40, 3), torch.tensor([3.0, 0.0, 4.0], dtype=F64)
    assert metrics.wasserstein2(x, (x + v)[torch.randperm(40)]) == pytest.approx(5)
    assert metrics.wasserstein2(x, x[torch.randperm(40)]) == 0
    assert metrics.sliced_wasserstein2(x, x[torch.randperm(40)]) == pytest.approx(0, abs=1e-12)
    assert metrics.sliced_wasserstein2(x, x + v, 20_000) == pytest.approx(5 / math.sqrt(3), rel=2e-2)
    small, other = x[:5], normal(5, 3, seed=1)
    brute = min(sum(float((small[i] - other[j]).square().sum()) for i, j in enumerate(p)) for p in itertools.permutations(range(5)))  # fmt: skip # noqa: E501
    assert metrics.wasserstein2(small, other) == pytest.approx(math.sqrt(brute / 5))


def test_wasserstein_of_gaussians():
    """In one dimension, quantiles of N(1, 2^2) against N(0, 1): W2^2 = 1 + 1; the sliced distance is exact there."""
    q = torch.special.ndtri((torch.arange(4000, dtype=F64) + 0.5) / 4000)[:, None]
    assert metrics.sliced_wasserstein2(1 + 2 * q, q, 3) == pytest.approx(math.sqrt(2), rel=1e-3)
    line = metrics.wasserstein2(1 + 2 * q[::10], q[::10])
    assert line == pytest.approx(metrics.sliced_wasserstein2(1 + 2 * q[::10], q[::10], 3), rel=1e-9)


SIZES = (st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))


def repeated(n, m, dim):
    """Sets of n and m points, and the same with each point repeated, so that both have n m points."""
    x, y = normal(n, dim), 1 + normal(m, dim, seed=1)
    return (x, y), (x.repeat(m, 1), y.repeat(n, 1))


@given(*SIZES)
def test_repeated_points_do_not_change_the_sliced_distance(n, m, dim):
    plain, twice = repeated(n, m, dim)
    assert metrics.sliced_wasserstein2(*plain, 20) == pytest.approx(metrics.sliced_wasserstein2(*twice, 20), rel=1e-9)


@pytest.mark.skipif(importlib.util.find_spec("ot") is None, reason="POT is not installed")
@given(*SIZES)
def test_repeated_points_do_not_change_the_exact_distance(n, m, dim):
    plain, twice = repeated(n, m, dim)
    assert metrics.wasserstein2(*plain) == pytest.approx(metrics.wasserstein2(*twice), rel=1e-9)


def test_unequal_sets_without_pot(monkeypatch):
    monkeypatch.setattr("genkit.evaluation.metrics.transport.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"given 5 and 4 vectors.*pip install POT"):
        metrics.wasserstein2(normal(5, 2), normal(4, 2))


# ------------------------------------------------------------------------------------------------ registry
@pytest.mark.parametrize("name", METRICS)
def test_each_metric_keeps_its_contract(name):
    contract.check_all(name)


def test_no_two_metrics_give_a_number_of_the_same_name():
    names = [value for metric in METRICS.values() for value in metric.values]
    assert len(names) == len(set(names))
    assert metrics.find_metric("recall") == "prdc"
    assert metrics.find_metric("beauty") is None
    assert metrics.metric_direction("beauty") is None


def test_fid_of_moments_alone_has_no_interval():
    generated = contract.make_statistics()
    reference = SampleStatistics(contract.make_statistics(50, seed=1, shift=0.7).moments)
    alone = METRICS["fid"].compute(SampleStatistics(generated.moments), reference, MetricSettings())["fid"]
    with_features = METRICS["fid"].compute(generated, reference, MetricSettings())["fid"]
    assert alone.low is None
    assert with_features.low < with_features.value < with_features.high
    assert alone.value == pytest.approx(with_features.value, rel=1e-9)


def test_bad_input():
    with pytest.raises(ValueError, match="row 23 is not finite"):  # counted over all rows added
        (lambda m, x: (m.add(x), m.add(x.clone().index_fill_(0, torch.tensor([3]), torch.nan))))(
            Moments.zeros(2), torch.zeros(20, 2)
        )
    with pytest.raises(ValueError, match=r"needs \[N, D\]"):
        Moments.of(torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="floating-point"):
        Moments.of(torch.zeros(3, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="given 1 samples; needs at least 2"):
        frechet_distance(Moments.of(torch.zeros(1, 2)), Moments.of(torch.zeros(5, 2)))
    with pytest.raises(ValueError, match="take the same features"):
        Moments.of(torch.zeros(3, 2)).merge(Moments.of(torch.zeros(3, 4)))
    with pytest.raises(ValueError, match="given 5 samples; needs at least 6"):
        metrics.prdc(normal(5, 2), normal(50, 2))
    with pytest.raises(ValueError, match="k: given 0"):
        metrics.prdc(normal(5, 2), normal(50, 2), 0)
    with pytest.raises(ValueError, match="subsets"):
        metrics.kid(normal(5, 2), normal(50, 2), 0)
    with pytest.raises(ValueError, match="bandwidth"):
        metrics.mmd(normal(5, 2), torch.ones(5, 2, dtype=F64))
    with pytest.raises(ValueError, match="given 5 samples; needs at least 10"):
        metrics.inception_score(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="splits"):
        metrics.inception_score(torch.zeros(5, 3), 0)
    with pytest.raises(ValueError, match="projections"):
        metrics.sliced_wasserstein2(normal(5, 2), normal(5, 2), 0)
    for labels in (torch.zeros(4, dtype=torch.long), torch.zeros(5), torch.zeros(5, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"needs \[5\] integers"):
            metrics.accuracy(torch.zeros(5, 3), labels)
    with pytest.raises(ValueError, match=r"given 0\.\.3; this classifier knows 0\.\.2"):
        metrics.accuracy(torch.zeros(5, 3), torch.tensor([0, 1, 2, 3, 0]))
