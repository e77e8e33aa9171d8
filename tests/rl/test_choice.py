"""The choice before the first step, of an anchor: its gradient against enumeration, its divergence and entropy."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from genkit.cli.commands.finetune import main as finetune
from genkit.cli.commands.train import main as train
from genkit.core import Batch, Draw, Label, Spec
from genkit.data.codecs import Identity
from genkit.diffusion.paths import Linear
from genkit.objectives import AnchoredFlow
from genkit.rl.finetune.chain import Chain, DenoisingTrajectory
from genkit.rl.finetune.divergence import compare_with_reference
from genkit.rl.finetune.dppo import DPPO
from genkit.rl.finetune.experience import Experience
from genkit.rl.finetune.methods import METHODS
from genkit.rl.finetune.mixed import Mixed
from genkit.rl.finetune.noise import FixedNoise
from genkit.rl.finetune.tasks import FunctionTask
from genkit.training.checkpoint import find_checkpoint
from genkit.training.directory import find_run, read_log
from tests.support.exact import F64, Constant
from tests.support.learning import make_learner

OBJECTIVE = AnchoredFlow(std=0.1, cond_dropout=0.0)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
CENTERS = torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64)
REWARDS = torch.tensor([0.0, 1.0, 3.0], dtype=F64)
SPEC = Spec((1,), {"anchor": Label(3, centers=(-1.0, 0.0, 1.0))})
GAMMA = 0.9


class Bank(nn.Module):
    """Three anchors, whose logits are the parameters."""

    def __init__(self, shares=SHARES, dtype=F64):
        super().__init__()
        self.logits = nn.Parameter(shares.to(dtype).log())
        self.register_buffer("centers", CENTERS.to(dtype))

    def forward(self, cond, like):
        return self.logits.expand(len(like), -1), self.centers

    @property
    def shares(self):
        return self.logits.detach().softmax(0)


class Same(nn.Module):
    """Predicts the data to be where x is."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x, t, cond):
        return x + self.shift


def learn_from(bank, net=None, steps=1, optimizer=torch.optim.SGD, demos=None):
    nets = {"net": net or Constant(0.0), "bank": bank}
    chain = Chain.on_grid(Linear(), steps, FixedNoise(0.1))
    return make_learner(nets, chain, SPEC, OBJECTIVE, optimizer=optimizer, demos=demos)


def first_anchor(number, start, stop):
    """Demonstrations at 0, all of the first anchor."""
    zeros, draw = torch.zeros(stop - start, 1, dtype=F64), Draw((number,), start, stop)
    return Batch(zeros, {"anchor": zeros[:, 0].long()}, draw=draw)


def every_choice(steps=1, rewards=REWARDS, rows=20):
    """Trajectories in which each anchor is as frequent as it is probable, so that means over rows are expectations."""
    index = torch.arange(3).repeat_interleave((SHARES * rows).round().long())
    xs = torch.zeros(steps + 1, rows, 1, dtype=F64)
    choice = SHARES.log().expand(1, rows, 3)
    trajectory = DenoisingTrajectory(xs, torch.zeros(steps, rows, 1, dtype=F64), None, choice)
    return Experience(trajectory, {"anchor": index}, rewards[index], None, {"reward": float((SHARES * rewards).sum())})


def slope_by_enumeration(rewards=REWARDS, h=1e-6):
    """Of ``E[R] = sum_a softmax(logits)_a R_a`` with the logits, by finite differences, in deviations of R."""
    slopes = []
    for a in range(3):
        ends = []
        for sign in (1, -1):
            logits = SHARES.log()
            logits[a] += sign * h
            ends.append(float((logits.softmax(0) * rewards).sum()))
        slopes.append((ends[0] - ends[1]) / (2 * h))
    mean = float((SHARES * rewards).sum())
    return torch.tensor(slopes) / math.sqrt(float((SHARES * (rewards - mean) ** 2).sum()))


@pytest.mark.parametrize("last", [1, 2])
def test_the_gradient_of_the_choice_is_that_of_an_enumeration_of_all_choices(last):
    """Step 0 of a chain of 2 steps is a row beside those of the trained steps, and is discounted twice."""
    bank = Bank()
    method = DPPO(lr=0.01, batch=10_000, epochs=1, bc_coef=0.0, denoise_gamma=GAMMA, ft_denoising_steps=last)
    logs = method.improve(learn_from(bank, steps=2), None, every_choice(2), 0)
    moved = (bank.logits.detach() - SHARES.log()) / 0.01
    expected = slope_by_enumeration() * GAMMA**2 / (1 + last)
    assert torch.allclose(moved.float(), expected, rtol=1e-4)
    assert (logs["clipped_choice"], logs["kl_choice_step"]) == (0, pytest.approx(0, abs=1e-12))


def test_the_likelihood_ratio_of_mixed_has_the_same_gradient():
    moved = []
    for weight in (0.0, 1.0):  # without the reward the demonstrations alone
        bank = Bank()
        method = Mixed(lr=0.01, batch=10_000, weight=weight, ft_denoising_steps=1, bc_batch=4)
        torch.manual_seed(0)
        method.improve(learn_from(bank, demos=first_anchor), None, every_choice(), 0)
        moved.append(bank.logits.detach())
    assert torch.allclose(((moved[1] - moved[0]) / 0.01).float(), slope_by_enumeration() / 2, rtol=1e-4)


def test_a_choice_follows_a_reward_whose_gradient_goes_through_the_chain():
    """Rewards that depend on the anchor alone; the mean over many drawn choices is near the enumeration."""
    bank = Bank()
    task = FunctionTask(
        lambda x, cond: REWARDS[cond["anchor"]].float() + 0 * x[:, 0], "by anchor", Identity(), 20_000, 1
    )
    learner = learn_from(bank, demos=first_anchor)
    experience = task.collect(learner, 0)
    drawn = torch.bincount(experience.cond["anchor"], minlength=3) / 20_000
    assert torch.allclose(drawn.double(), SHARES, atol=0.012)  # 3.5 deviations
    method = Mixed(lr=0.01, batch=20_000, weight=0.5, gradient="through", bc_batch=1)
    method.improve(learner, task, experience, 0)
    moved = (bank.logits.detach() - SHARES.log()) / 0.01
    demonstrations = torch.tensor([1.0, 0, 0], dtype=F64) - SHARES  # of the cross-entropy of the demonstrations' anchor
    assert torch.allclose((moved - demonstrations).float(), 0.5 * slope_by_enumeration(), atol=0.015)


def test_divergence_and_entropy_of_the_choice_are_the_closed_forms():
    bank = Bank()
    learner = learn_from(bank, steps=2)  # its reference has these shares
    other = torch.tensor([0.1, 0.6, 0.3], dtype=F64)
    with torch.no_grad():
        bank.logits.copy_(other.log() + 7)
        learner.state.nets["net"].theta.fill_(0.4)
    task = FunctionTask(lambda x, cond: x[:, 0], "x", Identity(), 500, 1)
    experience, logs = compare_with_reference(learner, task.collect(learner, 0))
    kl = sum(p * math.log(p / q) for p, q in zip(other.tolist(), SHARES.tolist(), strict=True))
    assert logs["kl_choice"] == pytest.approx(kl, rel=1e-5)
    assert logs["choice_entropy_bits"] == pytest.approx(-sum(p * math.log2(p) for p in other.tolist()), rel=1e-5)
    assert torch.allclose(experience.reference_choice[0, 7].exp().double(), SHARES)
    # for x0 that is 0.4 further the two steps, to t = 1/2 and to 0, end 0.2 and 0.4 further, since x1 = x at t = 1 and
    # x1 = 2 x - x0 at 1/2; a step's divergence is the square of that over twice its variance
    shifts = [0.2, 0.4]
    assert logs["kl_reference"] == pytest.approx(kl + sum(s * s for s in shifts) / (2 * 0.1**2), rel=1e-4)


def test_the_price_of_divergence_is_paid_for_the_choice_too():
    """All rewards alike: nothing but the price moves the logits, down the slope of the divergence."""
    bank = Bank()
    learner = learn_from(bank)
    other = torch.tensor([0.1, 0.6, 0.3], dtype=F64)
    with torch.no_grad():
        bank.logits.copy_(other.log())
    experience = every_choice(rewards=torch.zeros(3, dtype=F64))
    experience = experience._replace(trajectory=experience.trajectory._replace(choice=other.log().expand(1, 20, 3)))
    DPPO(lr=0.01, epochs=1, bc_coef=0.0, kl=0.5).improve(learner, None, experience, 0)
    log_ratio = (other / SHARES).log()
    slope = other * (log_ratio - (other * log_ratio).sum())
    assert torch.allclose((bank.logits.detach() - other.log()) / 0.01, -0.5 * slope / 2, rtol=1e-6)


def test_the_entropy_of_the_choice_is_rewarded():
    bank = Bank()
    method = DPPO(lr=0.01, epochs=1, bc_coef=0.0, choice_entropy_coef=0.5)
    method.improve(learn_from(bank), None, every_choice(rewards=torch.zeros(3, dtype=F64)), 0)
    entropy = -(SHARES * SHARES.log()).sum()
    slope = -SHARES * (SHARES.log() + entropy)
    assert torch.allclose((bank.logits.detach() - SHARES.log()) / 0.01, 0.5 * slope / 2, rtol=1e-6)


def test_the_choice_has_a_clip_and_a_stop_of_its_own():
    moved = {}
    for name, more in {
        "narrow": {"choice_clip": 0.05},
        "wide": {"choice_clip": 1e9},
        "stop": {"stop_kl": 1e-4},
    }.items():
        bank = Bank()
        method = DPPO(lr=0.05, epochs=40, bc_coef=0.0, **{"choice_clip": 1e9, "stop_kl": 1e9, "clip": 1e-9, **more})
        logs = method.improve(learn_from(bank), None, every_choice(), 0)
        moved[name] = float((bank.shares / SHARES)[2])
        assert logs["stopped_early"] == (name == "stop")
        assert (logs["clipped_choice"] > 0.2) == (name == "narrow")
    assert 1 < moved["stop"] < 1.05
    assert 1.05 < moved["narrow"] < 1.1 < 1.3 < moved["wide"]


def test_a_choice_that_is_given_is_no_choice():
    learner, z = learn_from(Bank()), torch.zeros(4, 1, dtype=F64)
    given, cond = learner.draw_trajectories(z, {"anchor": torch.tensor([2, 2, 0, 1])}, None)
    assert given.choice is None
    assert cond["anchor"].tolist() == [2, 2, 0, 1]
    drawn, cond = learner.draw_trajectories(z, {}, None)
    assert drawn.choice.shape == (1, 4, 3)
    assert torch.equal(learner.log_prob(drawn, cond)[0], SHARES.log()[cond["anchor"]])
    assert learner.log_prob(drawn, cond).shape == (2, 4)


def test_samples_for_a_function_have_the_models_own_anchors():
    """Not those of the demonstrations, whose other conditions they have."""
    demos = {"obs": torch.zeros(4, 2), "anchor": torch.zeros(4, dtype=torch.long)}
    task = FunctionTask(lambda x, cond: x[:, 0], "x", Identity(), 8, 2)
    spec = Spec((1,), {"anchor": SPEC.cond["anchor"], "obs": None})
    assert task.conditions(spec, 8, lambda n: demos, OBJECTIVE.chosen_condition).keys() == {"obs"}


def test_behaviour_cloning_counts_the_choice_once_and_the_flow_by_its_entries():
    """A loss is a mean over the entries of a sample, the cross-entropy of a choice is not."""
    spec = Spec((5,), {"anchor": Label(3, centers=(0.0,) * 15)})
    bank = Bank()
    bank.centers = torch.zeros(3, 5, dtype=F64)
    learner = learn_from(bank, demos=lambda number, start, stop: Batch(
        torch.zeros(stop - start, 5, dtype=F64), {"anchor": torch.full((stop - start,), 2)}))  # fmt: skip
    learner.spec = spec
    torch.manual_seed(0)
    value = learner.shares(torch.arange(8))[0].bc_loss(6).item()
    torch.manual_seed(0)
    batch = learner.demos(0, 0, 6)
    logs = OBJECTIVE.loss("denoise", learner.state.nets, batch).logs
    assert float(logs["choice"]) == pytest.approx(-math.log(0.2))
    assert value == pytest.approx(5 * float(logs["flow"]) - math.log(0.2), rel=1e-6)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.uses_chain])
def test_every_method_moves_the_choice_to_where_the_reward_is(name):
    """The reward is at the third anchor, a tenth of the samples; no small step of the network leads there."""
    torch.manual_seed(0)
    bank = Bank(torch.tensor([0.6, 0.3, 0.1]))
    settings = {
        "dppo": {"bc_coef": 0.0},
        "ddpo": {"epochs": 5, "kl": 0.0},
        "dpo": {"epochs": 5},
        "mixed": {"weight": 10.0, "clip": 1.0},
        "rwr": {"demo_fraction": 0.02, "tau": 0.3},
    }.get(name, {})
    learner = learn_from(bank, Same(), optimizer=torch.optim.Adam, demos=first_anchor)
    task = FunctionTask(lambda x, cond: (x[:, 0] > 0.5).float(), "right", Identity(), 256, 1)
    method = METHODS[name](lr=0.05, batch=64, warmup=0, bc_batch=16, **settings)
    method.check(learner.chain, task)
    for i in range(15):
        method.update(learner, task, task.collect(learner, i), i)
    assert float(bank.shares[2]) > 0.5
    assert abs(learner.state.nets["net"].shift.item()) < 1


@pytest.mark.parametrize("ft_denoising_steps", [1, None])
def test_micro_batches_with_and_without_choices_change_nothing(ft_denoising_steps):
    method = DPPO(lr=0.01, batch=13, epochs=2, kl=0.1, choice_entropy_coef=0.1, bc_coef=0.1, bc_batch=8,
                  ft_denoising_steps=ft_denoising_steps)  # fmt: skip
    results, start = [], learn_from(Bank(), Same(), steps=2, demos=first_anchor)
    for micro_batch in (None, 1, 5):
        learner = learn_from(
            *(copy.deepcopy(start.state.nets[k]) for k in ("bank", "net")), steps=2, demos=first_anchor
        )
        learner.micro_batch = micro_batch
        task = FunctionTask(lambda x, cond: x[:, 0], "x", Identity(), 20, 1)
        torch.manual_seed(5)
        logs = method.update(learner, task, compare_with_reference(learner, task.collect(learner, 0))[0], 0)
        results.append((learner.state.nets["bank"].shares, logs))
    for shares, logs in results[1:]:
        assert logs == pytest.approx(results[0][1], rel=1e-6, abs=1e-9)
        assert torch.allclose(shares, results[0][0], rtol=1e-7)


def test_the_head_of_an_anchored_policy_is_fine_tuned_and_resumes(tmp_path):
    tiny = "--data=four-ways --data.n 40 --data.anchors 8 --objective=anchored --backbone.width 32 --backbone.depth 2"
    usual = "--batch 128 --sample-every 0 --no-tensorboard --device cpu --precision fp32 --workers 0"
    train([*tiny.split(), *usual.split(), "--steps", "30", "--out", str(tmp_path / "base")])
    learn = "--mode 2 --num-envs 8 --num-steps 4 --eval-episodes 0 --method.batch 64 --method.warmup 1 --save-every 2"
    learn = [str(tmp_path / "base" / "latest"), *learn.split(), "--no-tensorboard", "--device", "cpu"]
    finetune([*learn, "--iterations", "4", "--out", str(tmp_path / "a")])
    finetune([*learn, "--iterations", "2", "--out", str(tmp_path / "b")])
    finetune(["--resume", str(tmp_path / "b" / "latest"), "--iterations", "4"])
    a, b = (find_checkpoint(find_run(tmp_path / x / "latest")) for x in "ab")
    for file in ("nets.safetensors", "optim.safetensors"):
        x, y = load_file(a / file), load_file(b / file)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x), file
    before = load_file(find_checkpoint(find_run(tmp_path / "base" / "latest")) / "nets.safetensors")
    after = load_file(a / "nets.safetensors")
    head = [k for k in before if k.startswith("bank.head.") and "weight" in k]
    assert head
    assert [torch.equal(before[k], after[k]) for k in head].count(False) >= 2
    assert torch.equal(before["bank.centers"], after["bank.centers"])
    log = [r for r in read_log(find_run(tmp_path / "a" / "latest")) if "kl_choice" in r]
    assert log[0]["kl_choice"] == log[1]["kl_choice"] == 0 < log[-1]["kl_choice"] < log[-1]["kl_reference"]
    assert 0 < log[-1]["choice_entropy_bits"] < 3
