"""Diffusion-DPO against its loss in closed form, and on a small task."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.mixture import F64
from genkit.core import Label, Spec, Vector
from genkit.data.codecs import Identity, Pixels
from genkit.diffusion.paths import Linear
from genkit.objectives import Flow
from genkit.rl.finetune.chain import Chain, DenoisingTrajectory
from genkit.rl.finetune.dpo import DPO, Pairs, pair_by_rank, read_pairs
from genkit.rl.finetune.experience import Experience
from genkit.rl.finetune.noise import FixedNoise
from genkit.rl.finetune.tasks import FunctionTask
from tests.rl.test_nft import Constant
from tests.support.learning import make_learner
from tests.support.refusals import refuses

OLD = 0.7


def learner_of(value, loss_space="x0"):
    """A learner whose network predicts ``value`` and was ``OLD`` before."""
    objective = Flow(prediction="x0", loss_space=loss_space, cond_dropout=0.0)
    learner = make_learner(Constant(OLD), Chain.on_grid(Linear(), 1, FixedNoise(0.0)), objective=objective)
    with torch.no_grad():
        learner.state.nets["net"].value.fill_(value)
    return learner


@pytest.mark.parametrize("value", [OLD, 0.9, 0.2])
def test_the_loss_is_that_of_the_paper(value):
    """With ``l = (v - x)^2`` the margin is ``-2 (v - old) (chosen - rejected)``, whatever times and noise are drawn."""
    torch.manual_seed(0)
    chosen, rejected = torch.randn(200, 1, dtype=F64) + 0.5, torch.randn(200, 1, dtype=F64)
    learner, method = learner_of(value), DPO(beta=3.0)
    loss = method.loss(learner, Pairs(chosen, rejected, {}, {}), learner.shares(torch.arange(200))[0])
    gap = (chosen - rejected)[:, 0]
    expected = torch.log1p(torch.exp(-3.0 * (value - OLD) * gap)).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    share = learner.shares(torch.arange(200))[0]
    kept = replace(method, chosen_coef=0.5).loss(learner, Pairs(chosen, rejected, {}, {}), share)
    more = 0.5 * 1.5 * ((value - chosen) ** 2).mean()
    assert float((kept - loss).detach()) == pytest.approx(float(more), rel=1e-6)
    if value == OLD:
        assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-12)
        loss.backward()
        assert float(learner.state.nets["net"].value.grad) == pytest.approx(-1.5 * float(gap.mean()), rel=1e-6)
        assert all(p.grad is None for p in learner.frozen["net"].parameters())


@pytest.mark.parametrize(("value", "same"), [(OLD, False), (0.9, True)])
def test_both_models_and_both_samples_see_the_same_times_and_noise(value, same):
    """The error of the velocity depends on the time: it cancels if neither the models nor the samples differ."""
    torch.manual_seed(0)
    chosen = torch.randn(50, 1, dtype=F64)
    rejected = chosen if same else torch.randn(50, 1, dtype=F64)
    learner = learner_of(value, "velocity")
    loss = DPO(beta=3.0).loss(learner, Pairs(chosen, rejected, {}, {}), learner.shares(torch.arange(50))[0])
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-12)


def test_the_best_of_a_group_is_paired_with_its_worst():
    x = torch.arange(8.0)[:, None]
    advantages = torch.tensor([0.0, 3, -2, 1, 5, 5, 5, 4])
    trajectory = DenoisingTrajectory(x[None], x[None])
    pairs = pair_by_rank(Experience(trajectory, {"label": torch.arange(8) // 4}, advantages, None, {}), 4)
    assert pairs.chosen[:, 0].tolist() == [1, 3, 4]  # of the second group the second pair is equal
    assert pairs.rejected[:, 0].tolist() == [2, 0, 7]
    assert pairs.chosen_cond["label"].tolist() == pairs.rejected_cond["label"].tolist() == [0, 0, 1]


def test_pairs_of_a_file_are_checked(tmp_path):
    task = FunctionTask(lambda x, cond: x[:, 0], "first", Identity(), 8, 1)
    spec = Spec((2,), {"label": Label(3)})
    file = tmp_path / "pairs.npz"

    def write(**changes):
        arrays = {"chosen": np.ones((4, 2)), "rejected": np.zeros((4, 2)), "label": np.arange(4) % 3}
        np.savez(file, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
        return str(file)

    pairs = read_pairs(write(), task.codec, spec)
    assert pairs.chosen.tolist() == np.ones((4, 2)).tolist()
    assert pairs.chosen_cond["label"].tolist() == [0, 1, 2, 0]
    refuses(lambda: read_pairs(write(rejected=None), task.codec, spec), "no array rejected")
    assert pairs.chosen.dtype == torch.float32
    refuses(lambda: read_pairs(write(rejected=np.zeros((3, 2))), task.codec, spec), "rejected has shape (3, 2)")
    for wrong in (np.ones(4), np.ones((4, 3))):
        refuses(lambda w=wrong: read_pairs(write(chosen=w), task.codec, spec), "chosen has shape")
    empty = {"chosen": np.ones((0, 2)), "rejected": np.ones((0, 2)), "label": np.zeros(0, int)}
    refuses(lambda: read_pairs(write(**empty), task.codec, spec), "holds none")
    refuses(lambda: read_pairs(write(chosen=np.ones(())), task.codec, spec), "holds none")
    refuses(lambda: read_pairs(write(rejected=np.full((4, 2), np.nan)), task.codec, spec), "rejected", "not finite")
    refuses(lambda: read_pairs(write(label=np.array(["a"] * 4)), task.codec, spec), "cannot be read")
    refuses(lambda: read_pairs(write(label=None), task.codec, spec), "no array label", "each condition of the model")
    assert not read_pairs(write(label=None), task.codec, spec, optional=("label",)).chosen_cond
    seeing = Spec((2,), {"obs": Vector((3,))})
    for bad in (np.nan, np.inf):
        obs = np.full((4, 3), bad)
        refuses(lambda o=obs: read_pairs(write(label=None, obs=o), task.codec, seeing), "obs", "not finite")
    pictures = replace(task, codec=Pixels())
    refuses(lambda: read_pairs(write(), pictures.codec, spec), "chosen are torch.float64", "uint8 in 0..255")
    assert read_pairs(write(**{k: np.full((4, 2), 255, np.uint8) for k in ("chosen", "rejected")}),
                      pictures.codec, spec).chosen.tolist() == [[1.0, 1.0]] * 4  # fmt: skip
    refuses(lambda: read_pairs(write(label=np.full(4, 3)), task.codec, spec), "label", "0..2")
    refuses(lambda: read_pairs(write(), task.codec, spec, "anchor"), "no array chosen_anchor")
    refuses(lambda: read_pairs(str(tmp_path / "no.npz"), task.codec, spec), "cannot be read")
    refuses(lambda: DPO().check(None, object()), "genkit rollout RUN --pairs", "--method.pairs")  # type: ignore[arg-type]
    learner = replace(learner_of(OLD), spec=spec)
    refuses(lambda: DPO().collect(learner, task, 0), "--group 8", "--method.pairs")


@pytest.mark.parametrize("own", [True, False])
def test_it_moves_towards_the_preferred_samples(own, tmp_path):
    """Own samples of a Gaussian chain ranked by their distance to 2, or pairs of a file: the prediction moves there."""
    np.savez(tmp_path / "p.npz", chosen=np.full((64, 1), 2.0), rejected=np.full((64, 1), -1.0))
    objective = Flow(prediction="x0", loss_space="x0", cond_dropout=0.0)
    learner = make_learner(Constant(OLD), Chain.on_grid(Linear(), 1, FixedNoise(0.5)), objective=objective)
    task = FunctionTask(lambda x, cond: -((x[:, 0] - 2) ** 2), "near", Identity(), 64, 1)
    method = DPO(lr=0.05, batch=32, beta=4.0, pairs=None if own else str(tmp_path / "p.npz"))
    for i in range(10):
        experience, _ = method.collect(learner, task, i)
        method.update(learner, task, experience, i)
    moved = learner.state.nets["net"].value.item() - OLD
    assert 0.2 < moved < 2
