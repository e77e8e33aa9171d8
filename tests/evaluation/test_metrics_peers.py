"""The metrics against trusted peers: scipy, clean-fid, and files that prdc and torch-fidelity made.

python -m tests.evaluation.test_metrics_peers     writes tests/golden/prdc.json and fidelity.json, if both are installed
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg, stats

from genkit.evaluation import metrics
from genkit.evaluation.metrics import Moments, frechet_distance, frechet_from_features

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [  # rows real, rows generated, features, neighbours, shift, scale
    (60, 60, 3, 5, 0.5, 1.0),
    (50, 80, 8, 3, 0.0, 0.6),
    (80, 40, 16, 1, 0.2, 1.2),
    (40, 40, 2, 10, 3.0, 1.0),
]


def features(case):
    """Real and generated features of a case; ``RandomState`` gives the same numbers forever."""
    n, m, dim, _, shift, scale = CASES[case]
    rng = np.random.RandomState(case)
    return rng.randn(n, dim).astype(np.float32), (shift + scale * rng.randn(m, dim)).astype(np.float32)


def logits():
    return np.random.RandomState(7).randn(120, 6) * 3


def prdc_values():
    from prdc import compute_prdc

    return [{k: float(v) for k, v in compute_prdc(*features(i), c[3]).items()} for i, c in enumerate(CASES)]


def fidelity_values():
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import mmd2
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    made = []
    for i, case in enumerate(CASES):
        real, fake = (torch.from_numpy(v).double() for v in features(i))
        precision, recall = calculate_precision_recall_full(fake, real, case[3])
        made.append({"precision": precision, "recall": recall})
        if len(real) == len(fake):
            x, y = fake.numpy(), real.numpy()
            xx, xy, yy = ((u @ v.T / case[2] + 1) ** 3 for u, v in ((x, x), (x, y), (y, y)))
            made[-1]["kid"] = float(mmd2(xx, xy, yy))
    scores = {s: isc_features_to_metric(torch.from_numpy(logits()), s, False) for s in (1, 4, 7)}
    return {"prc": made, "is": {str(s): v["inception_score_mean"] for s, v in scores.items()}}


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def moments(dim, seed, decay):
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q
    cov = turn * torch.logspace(0, -decay, dim, dtype=torch.float64) @ turn.T
    return Moments(None, torch.randn(dim, generator=g, dtype=torch.float64), (cov + cov.T) / 2)


def scipy_distance(a, b):
    root = linalg.sqrtm(a.cov.numpy() @ b.cov.numpy())
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * float(np.trace(root).real)


# ------------------------------------------------------------------------------------------------- Fréchet
@pytest.mark.parametrize("dim", [1, 7, 64, 128])
@pytest.mark.parametrize("decay", [0.0, 1.5, 4.0])
def test_sqrtm(dim, decay):
    a, b = moments(dim, 1, decay), moments(dim, 2, decay / 2)
    assert frechet_distance(a, b) == pytest.approx(scipy_distance(a, b), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(scipy_distance(a, b), rel=1e-9)


def ratio(dim, repeats):
    """scipy's time over ours, in one process, each the best of some; and both distances."""
    a, b, ours, theirs = moments(dim, 1, 1.5), moments(dim, 2, 1.5), [], []
    for _ in range(repeats):
        start = time.perf_counter()
        value = frechet_distance(a, b)
        middle = time.perf_counter()
        peer = scipy_distance(a, b)
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    return min(theirs) / min(ours), value, peer


def test_faster_than_sqrtm():
    times, value, peer = ratio(256, 4)
    assert value == pytest.approx(peer, rel=1e-9)
    assert times > 2.5, times


@pytest.mark.slow
def test_faster_than_sqrtm_at_the_size_of_inception():
    times, value, peer = ratio(2048, 1)
    print(f"\nD = 2048: {times:.1f} times as fast as scipy's sqrtm")
    assert value == pytest.approx(peer, rel=1e-9)
    assert times > 8, times


@pytest.mark.parametrize(("n", "m"), [(300, 400), (300, 40), (40, 300)])
def test_clean_fid_frechet(n, m):
    """clean-fid passes ``disp`` to sqrtm, which scipy 1.18 refuses. Its root of a singular product is rough."""
    fid = pytest.importorskip("cleanfid.fid")
    g = torch.Generator().manual_seed(0)
    x, y = 1 + torch.randn(n, 48, generator=g), torch.randn(m, 48, generator=g)
    statistics = [(v.double().numpy().mean(0), np.cov(v.double().numpy().T)) for v in (x, y)]
    try:
        peer = fid.frechet_distance(*statistics[0], *statistics[1])
    except TypeError as e:
        pytest.skip(f"clean-fid with this scipy: {e}")
    rel = 1e-9 if min(n, m) > 48 else 1e-5
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(peer, rel=rel)
    assert frechet_from_features(x, Moments.of(y)).value == pytest.approx(peer, rel=rel)


# -------------------------------------------------------------------------------------------------- kernels
@pytest.mark.parametrize(("n", "m", "size"), [(200, 300, 50), (60, 200, 1000), (100, 100, 30)])
def test_clean_fid_kernel_distance(n, m, size):
    """The same subsets: clean-fid draws them from numpy's global stream, genkit from an equal one."""
    fid = pytest.importorskip("cleanfid.fid")
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(n, 24, generator=g), 0.3 + 0.8 * torch.randn(m, 24, generator=g)
    np.random.seed(5)  # noqa: NPY002
    peer = fid.kernel_distance(real.double().numpy(), fake.double().numpy(), num_subsets=20, max_subset_size=size)
    stream = np.random.RandomState(5)
    assert metrics.kid(fake, real, 20, size, stream).value == pytest.approx(peer, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("case", [0, 3])
def test_torch_fidelity_kid(case):
    real, fake = (torch.from_numpy(v) for v in features(case))
    assert metrics.kid(fake, real).value == pytest.approx(golden("fidelity")["prc"][case]["kid"], rel=1e-9)


# ------------------------------------------------------------------------------------------------ manifolds
@pytest.mark.parametrize("case", range(len(CASES)))
def test_prdc(case, monkeypatch):
    """prdc's numbers, whole and with distances in chunks of a few rows; torch-fidelity's if it has them."""
    real, fake = (torch.from_numpy(v) for v in features(case))
    for chunk in (2**24, 200):
        monkeypatch.setattr("genkit.evaluation.metrics.manifold.CHUNK", chunk)
        ours = {k: v.value for k, v in metrics.prdc(real, fake, CASES[case][3]).items()}
        assert ours == pytest.approx(golden("prdc")[case], abs=1e-12)
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(golden("fidelity")["prc"][case][name], abs=1e-6)  # float32 means


def test_the_prdc_file_agrees_with_prdc():
    pytest.importorskip("prdc")
    assert [pytest.approx(v, abs=1e-12) for v in prdc_values()] == golden("prdc")


def test_the_fidelity_file_agrees_with_torch_fidelity():
    pytest.importorskip("torch_fidelity")
    made = fidelity_values()
    assert made["is"] == pytest.approx(golden("fidelity")["is"], rel=1e-9)
    assert [pytest.approx(v, rel=1e-9) for v in made["prc"]] == golden("fidelity")["prc"]


# ---------------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize("splits", [1, 4, 7])
def test_torch_fidelity_inception_score(splits, monkeypatch):
    monkeypatch.setattr(
        "genkit.evaluation.metrics.score.torch.randperm", lambda n, generator: torch.arange(n)
    )  # unshuffled
    ours = metrics.inception_score(torch.from_numpy(logits()), splits)
    assert ours.value == pytest.approx(golden("fidelity")["is"][str(splits)], rel=1e-9)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (37, 100), (1, 3)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_scipy_wilson(hits, n, level):
    labels = torch.zeros(n, dtype=torch.long)
    logits_of_hits = torch.nn.functional.one_hot((torch.arange(n) >= hits).long(), 2).double()
    ours = metrics.accuracy(logits_of_hits, labels, level)
    peer = stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    assert ours == pytest.approx((hits / n, peer.low, peer.high), abs=1e-12)


# ------------------------------------------------------------------------------------------------- transport
def test_pot():
    """Exact and sliced distances of unequal sets; POT's sliced one with our directions."""
    ot = pytest.importorskip("ot")
    g = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(30, 3, generator=g, dtype=torch.float64),
        1 + torch.randn(20, 3, generator=g, dtype=torch.float64),
    )
    assert metrics.wasserstein2(x, y) == pytest.approx(float(ot.emd2([], [], ot.dist(x.numpy(), y.numpy()))) ** 0.5)
    g = torch.Generator().manual_seed(4)
    directions = torch.randn(3, 50, generator=g, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).numpy()
    peer = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=directions)
    assert metrics.sliced_wasserstein2(x, y, 50, seed=4) == pytest.approx(float(peer), rel=1e-9)


if __name__ == "__main__":
    for name, made in (("prdc", prdc_values()), ("fidelity", fidelity_values())):
        (GOLDEN / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")
