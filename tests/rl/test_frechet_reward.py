"""The Fréchet distance as a reward: its gradient in closed form, what it improves, and where it may not rank."""

import pytest
import torch

from genkit import evaluate, finetune, train
from genkit.cli.main import main
from genkit.evaluation.best import find_best
from genkit.evaluation.cards import Card, compare, rankable
from genkit.evaluation.differences import diff_runs
from genkit.evaluation.listing import list_runs
from genkit.evaluation.metrics import Moments, frechet_distance
from genkit.evaluation.metrics.frechet import frechet_contributions
from genkit.evaluation.trained_features import trained_features
from genkit.rl.finetune.frechet_reward import FrechetReward
from tests.support.exact import F64


def rows(n, dim, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=F64)).Q
    return scale * torch.randn(n, dim, generator=g, dtype=F64) @ turn * torch.linspace(0.5, 2, dim, dtype=F64) + 0.3


@pytest.mark.parametrize(("n", "dim"), [(9, 3), (40, 8), (200, 2)])
def test_the_gradient_is_that_of_the_distance(n, dim):
    """Against central differences of the distance between the Gaussians, to 1e-8."""
    x, reference = rows(n, dim, 1).requires_grad_(), Moments.of(rows(500, dim, 2, 1.5))
    (gradient,) = torch.autograd.grad(frechet_contributions(x, reference).mean(), x)
    h = 1e-4
    for i, j in ((0, 0), (n // 2, dim - 1), (n - 1, 1)):
        moved = [x.detach().clone() for _ in range(4)]
        for v, k in zip(moved, (h, -h, 2 * h, -2 * h), strict=True):
            v[i, j] += k
        a, b, c, d = (frechet_distance(Moments.of(v), reference) for v in moved)
        difference = (8 * (a - b) - (c - d)) / (12 * h)  # of fourth order
        assert float(gradient[i, j]) == pytest.approx(difference, abs=1e-8)


def test_the_gradient_is_that_of_autograd_through_the_matrix_root():
    x, reference = rows(30, 4, 3).requires_grad_(), Moments.of(rows(300, 4, 4, 0.7))
    c = x - x.mean(0)
    values, vectors = torch.linalg.eigh(reference.cov)
    root = vectors * values.sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ (c.T @ c / 29) @ root)
    distance = (x.mean(0) - reference.mean).square().sum() + (c.square().sum() / 29) + reference.cov.trace()
    distance = distance - 2 * product.sqrt().sum()
    (expected,) = torch.autograd.grad(distance, x)
    (got,) = torch.autograd.grad(frechet_contributions(x, reference).mean(), x)
    assert torch.allclose(got, expected, atol=1e-10)


def test_samples_that_follow_it_reach_the_data():
    x, reference = rows(100, 3, 5).requires_grad_(), Moments.of(rows(1000, 3, 6, 2.0))
    reward = FrechetReward(torch.nn.Flatten(), reference)
    before = frechet_distance(Moments.of(x.detach()), reference)
    optimizer = torch.optim.SGD([x], lr=20.0)
    for _ in range(40):
        optimizer.zero_grad()
        (-reward(x, {}).mean()).backward()
        optimizer.step()
    assert frechet_distance(Moments.of(x.detach()), reference) < 1e-2 * before
    with pytest.raises(ValueError, match="needs more samples than features"):
        reward(x[:3], {})
    with pytest.raises(ValueError, match="needs more rows than features"):
        frechet_contributions(x[:3], reference)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    return train(
        data={"name": "8gaussians", "n": 2000, "labels": False}, backbone={"name": "mlp", "width": 32, "depth": 2},
        steps=100, batch=128, workers=0, tensorboard=False, sample_every=0, out=str(out), ema=(0.9,),
    )  # fmt: skip


def test_one_step_of_a_flow_is_improved_and_its_cards_say_on_what(base, tmp_path, capsys):
    """The covariance that one step of the flow gets wrong is learned; what was trained on is refused where it would
    rank."""
    run = finetune(
        base, reward="frechet", steps=1, method={"name": "mixed", "gradient": "through", "lr": 3e-3, "weight": 10.0,
        "batch": 256, "bc_batch": 1}, samples=256, iterations=25, eval_samples=500, tensorboard=False,
        out=str(tmp_path), min_std=0.001, ema=0.5,
    )  # fmt: skip
    assert trained_features(run.directory) == ["raw"]
    data = base.config.data.load("train").x
    reference = Moments.of(data)
    before, after = (
        frechet_distance(Moments.of(r.sample(1000, sampler="ddim", steps=1, seed=50_000).x), reference)
        for r in (base, run)
    )
    assert after < 0.4 * before, (before, after)
    how = {"metrics": "fid,w2", "n": 200, "sampler": "ddim", "steps": 1, "device": "cpu"}
    old, new = evaluate(base, **how), evaluate(run, **how)
    assert new.settings["trained_on"] == ["raw"]
    assert "trained_on" not in old.settings
    assert any("trained on these features" in note for note in new.notes)
    with pytest.raises(ValueError, match="was trained on these features"):
        compare(old, new)
    files = [str(card.save(tmp_path / f"{name}.json")) for name, card in (("old", old), ("new", new))]
    assert main(["eval", "--compare", *files]) == 2
    assert "was trained on these features (raw)" in capsys.readouterr().err
    assert [rankable(card, "fid") for card in (old, new, None)] == [old.metrics["fid"], None, None]
    assert find_best("lower", [rankable(card, "fid") for card in (old, new)]) is None
    for card in (old, new):
        card.save()
    row = next(r for r in diff_runs(base.directory, run.directory).metrics if r.metric == "fid")
    assert row.best is None
    listed = list_runs(base.directory.parent, tmp_path, sort="fid")
    assert next(r.path for r in listed) == base.directory.resolve()
    again = train(init=str(run.directory), data=base.config.data, steps=1, workers=0, tensorboard=False, sample_every=0,
                  out=str(tmp_path))  # fmt: skip
    assert trained_features(again.directory) == ["raw"], "a run that starts from it forgets it"
    other = Card(new.metrics, {**new.settings, "features": {"name": "inception"}})
    assert not other.is_trained_on


def test_features_without_a_gradient_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="have no gradient; allowed: frechet:classifier, frechet:raw"):
        finetune(base, reward="frechet:inception", out=str(tmp_path))
    assert not list(tmp_path.iterdir())
