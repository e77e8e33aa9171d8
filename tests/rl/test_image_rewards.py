"""Rewards of images, the conditions that they are drawn for, and what they cost."""

import json
import logging
import math

import pytest
import torch

from genkit.cli.commands.finetune import main as finetune
from genkit.core import Draw, Label, Spec, Vector
from genkit.data import DATA
from genkit.data.codecs import Pixels
from genkit.rl.finetune import image_rewards as image
from genkit.rl.finetune.evaluation import plot_reward_kl
from genkit.rl.finetune.tasks import FunctionTask
from genkit.training.directory import find_run, read_log


def test_rewards_of_images():
    flat = torch.full((1, 3, 16, 16), 0.25)
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    both = torch.cat([flat, noise])
    assert image.brightness(both, {})[0] == 0.25
    assert torch.equal(image.darkness(both, {}), -image.brightness(both, {}))
    sizes = image.incompressibility(both[:, :1], {})
    assert 0.2 < float(sizes[0]) < float(sizes[1]) < 2  # kilobytes: a header, and what cannot be compressed
    assert torch.equal(image.compressibility(both[:, :1], {}), -sizes)
    assert image.compressibility(both, {}).shape == (2,)


@pytest.mark.slow
def test_the_classifier_recognizes_an_eight():
    data = DATA["digits"]().load("test")
    batch = data.batch(torch.arange(200), Draw((0,), 0, 200))
    x = (batch.x.float() / 255).requires_grad_()
    score = image.eight(x, {})
    is_eight = batch.cond["label"] == 8
    assert float(score[is_eight].mean()) > float(score[~is_eight].mean()) + 2
    assert float(torch.autograd.grad(score.sum(), x)[0].abs().sum()) > 0


def test_conditions_that_samples_are_drawn_for():
    spec = Spec((1, 4, 4), {"label": Label(3)})
    never = lambda rows: pytest.fail("needs no data")  # noqa: E731
    scoring = lambda **more: FunctionTask(image.brightness, "", Pixels(), 8, more.pop("group", 1), **more)  # noqa: E731
    assert scoring(group=2).conditions(spec, 8, never)["label"].tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert scoring(label=2).conditions(spec, 3, never)["label"].tolist() == [2, 2, 2]
    free = scoring(unconditional=True).conditions(spec, 4, never)
    assert not free["keep"].any()
    spec.check(free, 4)
    policy = Spec((2,), {"obs": Vector((1, 1))})
    data = {"obs": torch.arange(4.0).reshape(4, 1, 1)}
    got = scoring(group=2).conditions(policy, 8, lambda rows: {k: v[:rows] for k, v in data.items()})
    assert got["obs"].flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_rewards_see_what_a_person_sees():
    """A pixel that is whiter than white is white: no reward for leaving the range."""
    task = FunctionTask(image.brightness, "brightness", Pixels(), 2, 1)
    x = torch.tensor([1.0, 50.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    assert task.reward(x, {}).tolist() == [1.0, 1.0]


def test_reward_against_divergence_is_drawn_once_both_are_known(tmp_path):
    out = tmp_path / "reward-kl.png"
    assert plot_reward_kl([{"step": 1, "reward": 1.0}, {"step": 2, "reward": 2.0}], out) is None
    assert not out.exists()
    records = [{"step": i, "reward": math.log1p(i), "kl_reference": float(i)} for i in range(5)]
    assert plot_reward_kl(records, out) == out
    assert out.stat().st_size > 1000


LIGHT = ["--reward", "genkit.rl.finetune.image_rewards:brightness"]


BRIGHT = [*LIGHT, "--method=ddpo", "--method.lr", "5e-3", "--method.batch", "40", "--method.epochs", "2",
          "--exploration-noise=sde", "--steps", "3", "--min-std", "0.1", "--samples", "120", "--ema", "0.5",
          "--eval-samples", "40", "--no-tensorboard"]  # fmt: skip


def test_pictures_become_brighter_and_the_run_tells_at_what_price(digits, tmp_path):
    assert finetune([str(digits), *BRIGHT, "--method.kl", "0.001", "--iterations", "15", "--out", str(tmp_path)]) == 0
    run = find_run(tmp_path / "latest")
    before, after = (json.loads((run / f"{name}.json").read_text()) for name in ("before", "after"))
    assert after["reward"]["value"] > before["reward"]["value"] + 2 * before["reward_std"]
    assert before.keys() >= {"frechet", "frechet_class", "precision", "recall", "accuracy", "reward_std"}
    assert before["frechet_class"]["low"] <= before["frechet_class"]["value"] <= before["frechet_class"]["high"]
    log = [r for r in read_log(run) if "kl_reference" in r]
    assert log[0]["kl_reference"] == 0 < log[-1]["kl_reference"]
    for name in ("samples/before.png", "samples/after.png", "reward-kl.png"):
        assert (run / name).stat().st_size > 500


def test_it_ends_where_the_divergence_is_too_large_and_resumes_the_same(digits, tmp_path, caplog):
    caplog.set_level(logging.INFO, "genkit")
    more = ["--method.kl", "0", "--eval-samples", "0", "--save-every", "2"]
    finetune([str(digits), *BRIGHT, *more, "--max-kl", "5", "--iterations", "10", "--out", str(tmp_path / "a")])
    assert "stopped  at iteration" in caplog.text
    run = find_run(tmp_path / "a" / "latest")
    log = [r for r in read_log(run) if "kl_reference" in r]
    assert 1 < len(log) < 10
    assert max(r["kl_reference"] for r in log) <= 5
    finetune([str(digits), *BRIGHT, *more, "--iterations", "4", "--out", str(tmp_path / "b")])
    finetune([str(digits), *BRIGHT, *more, "--iterations", "2", "--out", str(tmp_path / "c")])
    finetune(["--resume", str(tmp_path / "c" / "latest"), "--iterations", "4"])
    b, c = ([r for r in read_log(find_run(tmp_path / x / "latest")) if "kl_reference" in r] for x in "bc")
    assert [r["kl_reference"] for r in b] == [r["kl_reference"] for r in c]
