"""docs/contributing/reward-method.md, executed: a new reward method is one file and one line."""

import pytest
import torch
from safetensors.torch import load_file

from genkit.cli.main import main
from genkit.diffusion.paths import Linear
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.methods import METHODS
from genkit.rl.finetune.noise import FixedNoise
from genkit.training.directory import read_log
from tests.recipes.reward_method import Reinforce
from tests.support.exact import Constant
from tests.support.learning import STD, THETA, bandit, make_learner
from tests.support.recipes import TINY, page_shows

QUICK = ["--iterations=4", "--save-every=2", "--device=cpu", "--no-tensorboard"]
SAMPLES = ["--reward=tests.recipes.test_reward_method:first_number", "--samples=64", "--eval-samples=0"]


def first_number(x, cond):
    return x[:, 0]


@pytest.fixture(autouse=True)
def _reinforce(monkeypatch):
    monkeypatch.setitem(METHODS, "reinforce", Reinforce)


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    out = tmp_path_factory.mktemp("points")
    assert main(["train", *TINY, f"--out={out}"]) == 0
    return out / "latest"


def finetune(run, out, *args):
    assert main(["finetune", str(run), *QUICK, "--method=reinforce", f"--out={out}", *args]) == 0
    return (out / "latest").resolve()


def weights(run):
    files = ("nets.safetensors", "ema-0.99.safetensors", "optim.safetensors", "finetune.safetensors")
    return {f"{f}:{k}": v for f in files for k, v in load_file(run / "latest" / f).items()}


def test_the_page_shows_this_recipe():
    page_shows("reward-method")


def test_it_raises_the_reward(points, tmp_path):
    run = finetune(points, tmp_path, *SAMPLES, "--iterations=15", "--method.lr=1e-2")
    rewards = [r["reward"] for r in read_log(run) if "reward" in r]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.5


def test_resume_is_bit_identical_and_micro_batches_change_nothing(points, tmp_path):
    whole = weights(finetune(points, tmp_path / "a", *SAMPLES))
    half = finetune(points, tmp_path / "b", *SAMPLES, "--iterations=2")
    assert main(["finetune", "--resume", str(half), "--iterations=4"]) == 0
    resumed = weights(half)
    assert whole.keys() == resumed.keys()
    assert [k for k in whole if not torch.equal(whole[k], resumed[k])] == []
    cut = weights(finetune(points, tmp_path / "c", *SAMPLES, "--micro-batch=7"))
    assert all(torch.allclose(whole[k], cut[k], atol=1e-5) for k in whole if k.startswith("nets"))


def test_it_improves_policies_after_the_critics_warmup(tmp_path):
    train = [*TINY, "--data=four-ways", "--data.n=4", f"--out={tmp_path}"]
    assert main(["train", *train]) == 0
    args = ["--num-envs=4", "--num-steps=4", "--eval-episodes=0", "--method.warmup=2"]
    log = [r for r in read_log(finetune(tmp_path / "latest", tmp_path, *args)) if "critic_loss" in r]
    assert ["loss" in r for r in log] == [False, False, True, True]


def test_from_outside_the_package(points, tmp_path, monkeypatch):
    monkeypatch.delitem(METHODS, "reinforce")
    finetune(points, tmp_path, *SAMPLES, "--method=tests.recipes.reward_method:Reinforce", "--method.lr=1e-3")


def test_its_gradient_is_the_policy_gradient():
    """Of a Gaussian bandit, in closed form."""
    experience, slope = bandit()
    net = Constant(THETA)
    learner = make_learner(net, Chain.on_grid(Linear(), 1, FixedNoise(STD)))
    Reinforce(lr=0.01).update(learner, None, experience, 0)
    assert float(net.theta.detach() - THETA) / 0.01 == pytest.approx(slope, rel=2e-3)
