"""Drifting models: the field's symmetries in closed form, and modes that are kept or lost."""

import math

import pytest
import torch

from genkit.backbones import MLP
from genkit.core import Batch, Draw, Label, Spec
from genkit.objectives import Drift
from genkit.objectives.drift import coverage, distances, drift_field
from tests.support.exact import F64
from tests.support.objectives import train


def field(x, data, samples, width=0.3):
    return drift_field(distances(x, data) / width, distances(x, samples) / width, data, samples)


# ------------------------------------------------------------------------------------------------- the field
@pytest.mark.parametrize("width", [0.05, 0.3, 2.0])
def test_exchanging_data_and_samples_changes_the_sign(width):
    x, a, b = torch.randn(32, 2, dtype=F64), torch.randn(64, 2, dtype=F64), torch.randn(64, 2, dtype=F64) + 1
    forth, back = field(x, a, b, width), field(x, b, a, width)
    assert float(forth.abs().max()) > 1e-3
    assert float((forth + back).abs().max()) < 1e-12


def test_equal_sets_do_not_drift():
    x, a = torch.randn(32, 3, dtype=F64), torch.randn(64, 3, dtype=F64)
    assert float(field(x, a, a).abs().max()) < 1e-12


def test_two_points_drift_as_the_paper_says():
    """One point, one datum and one sample: by hand. Over one point the softmax is 1, so affinities are roots."""
    x, y, z = (torch.tensor([[v]], dtype=F64) for v in (0.0, 1.0, -2.0))
    near, far = (math.exp(-d) for d in (1.0, 2.0))
    a, b = math.sqrt(near / (near + far)), math.sqrt(far / (near + far))
    expected = a * b * 1.0 - b * a * (-2.0)
    assert float(field(x, y, z, 1.0)) == pytest.approx(expected, rel=1e-12)


def test_a_sample_does_not_repel_itself_nor_meet_other_classes():
    """The only sample of a class has nothing to repel it, so no drift: attraction is weighed by repulsion."""
    objective = Drift(temperatures=(0.5,))
    x, data = torch.randn(6, 2, dtype=F64), torch.randn(6, 2, dtype=F64) + 3
    label = torch.tensor([0, 0, 0, 1, 1, 2])
    apart = label[:, None] != label
    drift = objective.drift(x, data, apart)
    assert float(drift[5].abs().max()) == 0
    moved = data.clone()
    moved[label == 1] += 100  # the width is a mean distance, so compare directions
    other = objective.drift(x, moved, apart)
    same = torch.nn.functional.cosine_similarity(drift[:3], other[:3])
    assert float(same.min()) > 0
    assert float(drift[:3].abs().min()) > 0
    alone = objective.drift(x[:3], data[:3], apart[:3, :3])
    wide = Drift(temperatures=(0.5 * float(distances(x, data)[~apart].mean() / distances(x[:3], data[:3]).mean()),))
    torch.testing.assert_close(wide.drift(x[:3], data[:3], apart[:3, :3]), drift[:3])
    assert alone.shape == (3, 2)


def test_the_loss_is_the_drift_and_its_target_is_constant():
    objective, spec = Drift(), Spec((2,), {"label": Label(2)})
    net = objective.networks(MLP(width=8, depth=1), spec)["net"]
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn_like(p)
    batch = lambda: Batch(torch.ones(40, 2) + torch.arange(80).view(40, 2) / 40, {"label": torch.arange(40) % 2},  # noqa: E731
                          draw=Draw((1,), 0, 40))  # fmt: skip
    loss = objective.loss("drift", {"net": net}, batch())
    z, cond = Draw((1,), 0, 40).normal(2), batch().cond
    x = net(z, torch.zeros(40), cond)
    apart = cond["label"][:, None] != cond["label"]
    drift = objective.drift(x.detach(), batch().x, apart)
    torch.testing.assert_close(loss.per_sample, drift.square().mean(1), rtol=1e-4, atol=1e-7)
    assert float(loss.logs["drift"]) == pytest.approx(float(drift.square().mean().sqrt()), rel=1e-5)
    got = torch.autograd.grad(loss.per_sample.sum(), list(net.parameters()))
    expected = torch.autograd.grad(-(x * drift).sum(), list(net.parameters()))  # 2 / D of two dimensions
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_coverage_is_the_share_of_data_with_a_sample_nearby():
    data = torch.cat([torch.randn(200, 2), torch.randn(200, 2) + 20])
    same = torch.cat([torch.randn(200, 2), torch.randn(200, 2) + 20])
    assert float(coverage(same, data)) > 0.9
    assert 0.4 < float(coverage(torch.randn(400, 2), data)) < 0.52


# ---------------------------------------------------------------------------------------------- what is learned
def ring(n):
    g = torch.Generator().manual_seed(3)
    k = torch.randint(0, 8, (n,), generator=g) * (math.pi / 4)
    return 2 * torch.stack([k.cos(), k.sin()], 1) + 0.1 * torch.randn(n, 2, generator=g)


@pytest.mark.slow
def test_several_kernels_keep_all_modes_and_a_narrow_one_loses_them():
    for temperatures, keeps in (((0.02, 0.05, 0.2), True), ((0.02,), False)):
        objective = Drift(temperatures=temperatures)
        nets = train(objective, MLP(width=64, depth=2), ring(20_000), Spec((2,)), 500, lr=2e-3)
        x = objective.generator(nets)(torch.randn(800, 2, generator=torch.Generator().manual_seed(9)), {})
        found = ((torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round() % 8).long().bincount(minlength=8)
        assert (int((found > 40).sum()) == 8) == keeps, found
        log = objective.loss("drift", nets, Batch(ring(256), draw=Draw((5,), 0, 256))).logs["coverage"]
        assert (float(log) > 0.3) == keeps, log


def test_the_drift_is_a_sum_over_kernels():
    x, data, different = torch.randn(9, 2, dtype=F64), torch.randn(9, 2, dtype=F64) + 1, torch.zeros(9, 9).bool()
    wide, narrow, both = (Drift(temperatures=t).drift(x, data, different) for t in ((0.5,), (0.1,), (0.5, 0.1)))
    torch.testing.assert_close(both, wide + narrow)


def test_refusals():
    with pytest.raises(ValueError, match="temperatures: given none"):
        Drift(temperatures=())
    with pytest.raises(ValueError, match="one pass"):
        Drift().generator({"net": torch.nn.Identity()}, lambda denoise: lambda z, cond, noise=None: z)
