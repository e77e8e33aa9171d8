"""Real-time chunking: weights by hand, the exact conditional of Gaussian chunks, and four ways with a delay."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import genkit
from genkit.cli.main import main as cli
from genkit.core import Label, Prediction, Spec, Vector
from genkit.data.codecs import Actions
from genkit.diffusion.paths import PATHS, ODEOnlyPath
from genkit.diffusion.samplers import Seeds, bind
from genkit.envs import make
from genkit.objectives import AnchoredFlow
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.execution import DelayedPolicy, anchor_posterior, clip_continued, draw_choice
from genkit.rl.policies.planner import inpaint
from genkit.rl.policies.policy import Policy
from genkit.rl.policies.real_time import UNDERWAY, UNDERWAY_WEIGHT, continue_chunk, soft_mask
from tests.support.exact import F64
from tests.support.refusals import refuses


class GaussianChunks:
    """The exact denoiser of chunks ``N(mean, covariance)``, each of T numbers."""

    def __init__(self, path, mean, covariance):
        self.path, self.mean, self.covariance = path, mean, covariance

    def __call__(self, x, t, cond):
        assert not cond
        a, s = (c[:, None, None] for c in (self.path.alpha(t), self.path.sigma(t)))
        total = a**2 * self.covariance + s**2 * torch.eye(len(self.mean), dtype=F64)
        gain = a * torch.linalg.solve(total, self.covariance.expand_as(total)).mT
        x0 = self.mean + (gain @ (x - a[..., 0] * self.mean)[..., None])[..., 0]
        return Prediction(x0, (x - a[..., 0] * x0) / s[..., 0])


def underway(value, weight, rows):
    return {UNDERWAY: value.expand(rows, -1), UNDERWAY_WEIGHT: weight[None]}


def test_weights_of_the_old_chunk():
    # 8 actions, 3 executed since, the next 2 go on: 5 are left, of which 3 may change (paper, eq. 5)
    c = [(5 - i) / (5 - 2 + 1) for i in (2, 3, 4)]
    falling = [v * (math.exp(v) - 1) / (math.e - 1) for v in c]
    assert soft_mask(8, 2, 3).tolist() == pytest.approx([1, 1, *falling, 0, 0, 0])
    assert soft_mask(8, 4, 4).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert soft_mask(4, 0, 1)[0] < 1


@pytest.mark.parametrize("name", ["linear", "cosine", "ve"])
def test_independent_normal_actions_move_by_their_weight_exactly(name):
    """For data N(mean, I) the guided prediction is ``(1 - W) x0 + W y`` at every time: the rule has no error there."""
    path, mean = PATHS[name](), torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    plain = GaussianChunks(path, mean, torch.eye(3, dtype=F64))
    weight, y = torch.tensor([1.0, 0.4, 0.0], dtype=F64), torch.tensor([0.3, 0.7, 9.0], dtype=F64)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(5, 3, dtype=F64, generator=generator), torch.linspace(0.05, 0.95, 5, dtype=F64)
    before, after = plain(x, t, {}), continue_chunk()(plain)(x, t, underway(y, weight, 5))
    assert torch.allclose(after.x0, torch.lerp(before.x0, y, weight), atol=1e-12)
    again = path.alpha(t)[:, None] * after.x0 + path.sigma(t)[:, None] * after.x1
    assert torch.allclose(again, x, atol=1e-10)
    assert torch.equal(continue_chunk()(plain)(x, t, {}).x0, before.x0)
    # with a limit the pull is no stronger than the paper's beta: dv = beta J^T W (y - x0)
    limited, factor = continue_chunk(0.5)(plain)(x, t, underway(y, weight, 5)), 0.5 * path.alpha(t) / path.sigma(t)
    gain = path.alpha(t) / (path.alpha(t) ** 2 + path.sigma(t) ** 2)
    moved = torch.minimum(factor * path.sigma(t) ** 2 / path.alpha(t), 1 / gain)[:, None] * gain[:, None]
    assert torch.allclose(limited.x0[:, 1:], (before.x0 + moved * weight * (y - before.x0))[:, 1:], atol=1e-10)


def test_a_flow_from_a_centre_moves_by_the_weight_exactly_too():
    """For the source N(centre, spread^2) and data N(mean, I): the same rule, wherever the centre is."""
    path, spread, mean = PATHS["linear"](), 0.3, torch.tensor([1.0, -2.0], dtype=F64)
    center = torch.tensor([0.5, 4.0], dtype=F64)

    class Anchored:
        def __init__(self):
            self.path = ODEOnlyPath(path)

        def __call__(self, x, t, cond):
            alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
            gain = alpha / (alpha**2 + (spread * sigma) ** 2)
            x0 = mean + gain * (x - sigma * center - alpha * mean)
            return Prediction(x0, (x - alpha * x0) / sigma)

    weight, y = torch.tensor([1.0, 0.4], dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)
    x, t = torch.randn(5, 2, dtype=F64), torch.linspace(0.05, 0.95, 5, dtype=F64)
    before, after = Anchored()(x, t, {}), continue_chunk(spread=spread)(Anchored())(x, t, underway(y, weight, 5))
    assert torch.allclose(after.x0, torch.lerp(before.x0, y, weight), atol=1e-12)
    refuses(lambda: continue_chunk()(Anchored()), "no diffusion")


def test_the_anchor_of_the_next_chunk_follows_from_the_plan_and_the_conditions():
    """Bayes' rule: what the head says, times a normal about each anchor."""
    centers = torch.tensor([0.0, 1.0, 2.0, 3.0])
    prior = torch.tensor([0.4, 0.1, 0.5, 1e-30]).double()

    class Bank(torch.nn.Module):
        def forward(self, cond, like):
            return prior.log().expand(len(like), 4), centers[:, None, None]

    spec = Spec((1, 1), {"anchor": Label(4, centers=tuple(centers.tolist()))})
    run = SimpleNamespace(objective=AnchoredFlow(std=0.5), spec=spec, nets={"bank": Bank()})
    plans, weight = torch.tensor([0.1, 1.4, 2.9]).view(3, 1, 1), torch.full((1, 1, 1), 0.7)
    probs = anchor_posterior(run, {}, plans, weight)  # type: ignore[arg-type]
    expected = prior * torch.exp(-0.7 * (plans[:, 0] - centers).double() ** 2 / 0.5)
    assert torch.allclose(probs, expected / expected.sum(1, keepdim=True), atol=1e-6)
    drawn = draw_choice(probs[1].expand(4000, 4), Seeds(range(4000)))
    assert torch.allclose(torch.bincount(drawn, minlength=4) / 4000, probs[1].float(), atol=0.03)


def test_the_rest_of_a_chunk_follows_the_conditional_law():
    """Correlated actions (AR(1)): mean and deviation of the free actions given two that are held, by linear algebra.

    The guidance takes the actions for independent given x_t, so it has an error here: far below that of a chunk that
    ignores what is held, and of one that is only inpainted by replacement.
    """
    steps = torch.arange(6, dtype=F64)
    covariance, mean = 0.9 ** (steps[:, None] - steps).abs(), 0.3 * steps
    held, free, y = slice(0, 2), slice(2, 6), torch.tensor([2.0, 2.5, 0, 0, 0, 0], dtype=F64)
    gain = covariance[free, held] @ torch.linalg.inv(covariance[held, held])
    exact_mean = mean[free] + gain @ (y - mean)[held]
    exact_std = (covariance[free, free] - gain @ covariance[held, free]).diagonal().sqrt()
    weight = (steps < 2).to(F64)
    z = torch.randn(4000, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    chunks = GaussianChunks(PATHS["linear"](), mean, covariance)
    x = bind("heun", 30, continue_chunk())(chunks)(z, underway(y, weight, 4000))
    assert torch.allclose(x[:, held], y[held].expand(4000, 2), atol=1e-9)
    plain = bind("heun", 30)(chunks)(z, {})
    replaced = bind("heun", 30, inpaint(lambda x, cond: (weight == 1, y)))(chunks)(z, {})
    error = [float((rows[:, free].mean(0) - exact_mean).abs().max()) for rows in (x, replaced, plain)]
    assert 3 * error[0] < error[1] < error[2]
    assert float((x[:, free].std(0) / exact_std - 1).abs().max()) < 0.25


def test_each_chunk_is_given_the_actions_under_way(policy):
    """Chunk n has the actions 100 n + i: what the next one is drawn for, in the model's units and in its own time."""
    actor = Policy.load(policy, steps=1, act_steps=3)
    spec = replace(actor.run.spec, cond={"obs": Vector((2, 2))})  # one action of a chunk is past
    actor.run = replace(actor.run, spec=spec, codec=Actions((0.0, 0.0), (2.0, 2.0), (1.0, 0.0)))
    given = []

    def generate(z, cond, noise=None):
        given.append(cond)
        return ((100.0 * (len(given) - 1) + torch.arange(16.0) - 1).expand(len(z), 2, 16)) / 2

    delayed = DelayedPolicy(actor, 2, "real-time")
    delayed.policy.generate = generate
    delayed.reset([0])
    obs = np.array([[[0, 0], [7, 5]]], float)
    acted = [delayed.act(obs)[0, :, 0] - 5 for _ in range(3)]  # relative to the second observed number
    assert np.concatenate(acted).tolist() == [0, 1, 2, 3, 4, 102, 103, 104, 202]
    assert UNDERWAY not in given[0]
    y, weight = given[2][UNDERWAY][0] * 2, given[2][UNDERWAY_WEIGHT][0, 0]
    assert y[0, 1:13].tolist() == [103, 104, *range(105, 115)]
    assert y[1, 1:13].tolist() == y[0, 1:13].tolist()
    assert weight.tolist() == [0, *soft_mask(15, 2, 3).tolist()]
    delayed.reset([0])
    delayed.act(obs)
    assert UNDERWAY not in given[3]


def test_actions_stay_near_those_of_the_demonstrations(policy):
    """The guidance of a policy that is hardly trained throws its chunks away, each farther than the one before."""
    chunks, run = [], genkit.load(policy, device="cpu")
    draw = torch.Generator().manual_seed(0)
    for p in run.nets["net"].parameters():
        p += 0.2 * torch.randn(p.shape, generator=draw)
    actor = DelayedPolicy(Policy.load(run, steps=4, act_steps=4), 1, "real-time")
    run_episodes(actor, make("four-ways", 20), range(20), on_decision=lambda numbers, obs, chunk: chunks.append(chunk))
    codec = actor.policy.run.codec
    assert isinstance(codec, Actions)
    scaled = (np.concatenate(chunks[2:]).reshape(-1, 2) - codec.shift) / codec.scale  # those that continue others
    assert 1.9 < abs(scaled).max() < 2 + 1e-6
    wide = clip_continued(lambda z, cond, noise=None: 9 * z, 2.0)
    one = torch.ones(1, 2)
    assert wide(one, {}).max() == 9
    assert wide(one, {UNDERWAY: one}).max() == 2
    refuses(lambda: wide(one / 0, {UNDERWAY: one}), "real-time execution gave", "not finite", "--guidance-limit 5")


def test_who_can_act_in_real_time(policy, tmp_path, capsys):
    one_pass = genkit.train(objective="regression", data={"name": "four-ways", "n": 8}, backbone={"width": 8},
                            steps=1, sample_every=0, tensorboard=False, device="cpu", out=str(tmp_path))  # fmt: skip
    refuses(lambda: DelayedPolicy(Policy.load(one_pass), 2, "real-time"), "real-time", "Regression", "naive")
    refuses(lambda: continue_chunk(0.0), "guidance_limit: given 0.0")
    options = ["--episodes", "3", "--no-picture", "--json", "--delay", "4", "--act-steps", "4"]
    assert cli(["rollout", str(policy), *options, "--execution", "real-time", "--out", str(tmp_path)]) == 0
    capsys.readouterr()


@pytest.mark.slow
def test_four_ways_with_a_delay(tmp_path):
    """Of chunks that are drawn apart, half belong to other ways past the obstacle."""
    run = genkit.train(objective={"name": "flow", "prediction": "x0", "loss_space": "x0", "cond_dropout": 0.0},
                       data="four-ways", backbone={"width": 128}, steps=2000, batch=256, sample_every=0,
                       tensorboard=False, device="cpu", precision="fp32", out=str(tmp_path))  # fmt: skip

    def success(execution):
        actor = DelayedPolicy(Policy.load(run, steps=8, act_steps=4), 4, execution)
        return run_episodes(actor, make("four-ways", 100), range(200)).info["success"].mean()

    assert success("naive") < 0.6
    assert success("real-time") > 0.7
