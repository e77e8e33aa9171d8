"""Preference pairs from rollouts, and policies that learn from them by Diffusion-DPO."""

import numpy as np
import pytest
import torch

import genkit
from genkit.cli.main import main as genkit_command
from genkit.core.arrays import refuse_other_kind, save_npz
from genkit.data.codecs import Actions
from genkit.diffusion.samplers import Seeds
from genkit.envs.four_ways import FourWays
from genkit.envs.recording import DemoSettings, record_demonstrations
from genkit.rl.finetune.dpo import encode_samples, read_pairs
from genkit.rl.finetune.loop import finetune
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.policy import Policy
from genkit.rl.policies.preferences import collect_pairs, find_score
from genkit.rl.policies.rollout import rollout
from genkit.training.directory import read_log
from tests.support.refusals import refuses


class Sum:
    """Observed: the steps so far and the sum of the first actions, which are the rewards; ``length`` steps."""

    obs_dim, action_dim, modes = 2, 2, 0

    def __init__(self, num, length, drift=0.0):
        self.num, self.max_steps, self.drift, self.obs, self.resets = num, length, drift, np.zeros((num, 2)), 0

    def reset(self, seeds, rows=None):
        rows = list(range(self.num)) if rows is None else rows
        self.obs[rows] = [[0, s % 7 / 100 + self.drift * self.resets] for s in seeds]
        self.resets += 1
        return self.obs.copy()

    def step(self, actions):
        self.obs = self.obs + np.stack([np.ones(self.num), actions[:, 0]], 1)
        end = self.obs[:, 0] >= self.max_steps
        return self.obs.copy(), actions[:, 0], np.zeros(self.num, bool), end, {}


def test_the_preferred_chunk_is_that_of_the_better_episode(policy):
    """Of episodes of one decision the return is the sum of the executed actions."""
    actor = Policy.load(policy, steps=1)
    pairs = collect_pairs(actor, Sum(4, 8), range(10), find_score("return"))
    gain = (pairs.chosen - pairs.rejected)[:, 0, :8].sum(1)
    assert len(gain) == 10
    assert (gain > 0).all()
    assert pairs.chosen.shape == (10, 2, 16)
    worst = collect_pairs(actor, Sum(4, 8), range(10), lambda episodes: -episodes.returns)
    assert np.array_equal(worst.chosen, pairs.rejected)
    refuses(lambda: collect_pairs(actor, Sum(4, 8), range(10), lambda e: 0 * e.returns), "none of 10 pairs", "differ")


def test_the_two_chunks_of_a_pair_have_one_observation(policy):
    actor, seeds = Policy.load(policy, steps=1), range(24)
    pairs = collect_pairs(actor, Sum(5, 24), seeds, find_score("return"))
    paths = run_episodes(actor, Sum(5, 24), seeds).paths
    seen = np.float32(np.concatenate([path[:24:8] for path in paths]))
    assert all((seen == obs[0]).all(1).any() for obs in pairs.cond["obs"])  # of an episode as it is without pairs
    assert set(pairs.cond["obs"][:, 0, 0]) == {0, 8, 16}  # any decision of an episode
    assert not (pairs.chosen == pairs.rejected).any()
    refuses(lambda: collect_pairs(actor, Sum(5, 24, drift=0.1), seeds, find_score("return")), "another course")


def test_what_can_be_preferred(policy):
    episodes = run_episodes(Policy.load(policy, steps=1), FourWays(4), range(8))
    episodes.info |= {"mode": np.arange(8) % 4, "success": np.arange(8) < 4}
    assert find_score("mode=2")(episodes).tolist() == [False, False, True, *[False] * 5]
    assert np.array_equal(find_score("return")(episodes), episodes.returns)
    assert np.array_equal(find_score("best_reward")(episodes), episodes.best)
    refuses(lambda: find_score("coverage")(episodes), "reports no coverage", "return")
    refuses(lambda: find_score("mode=x"), "prefer: given 'mode=x'", "success", "mode=2")


def test_chunks_of_relative_actions_are_given_as_the_environment_takes_them():
    codec = Actions((0.0, 0.0), (2.0, 4.0), (1.0, -1.0))
    obs, absolute = torch.tensor([[[5.0, 3.0]]]), torch.tensor([[[7.0], [8.0]]])
    x = encode_samples(absolute, "chosen", (1, 2, 1), codec, {"obs": obs})
    assert x.tolist() == [[[(7 - 3) / 2], [8 / 4]]]
    assert codec.to_absolute(x, obs).tolist() == absolute.tolist()


def test_dpo_learns_from_the_pairs_of_a_policy(policy, tmp_path):
    """By the command line, without a critic: the loss of the pairs begins at log 2 and falls."""
    collect_pairs(Policy.load(policy, steps=1), Sum(8, 8), range(40), find_score("return")).save(tmp_path / "p.npz")
    arguments = ["finetune", str(policy), "--method=dpo", "--steps=1", "--iterations=8", "--eval-episodes=4",
                 "--method.lr=1e-3", "--method.beta=100", "--num-envs=2", "--no-tensorboard", "--device=cpu",
                 f"--out={tmp_path}"]  # fmt: skip
    assert genkit_command([*arguments, f"--method.pairs={tmp_path / 'p.npz'}"]) == 0
    log = [r for r in read_log(tmp_path / "latest") if "loss" in r]
    assert log[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert max(r["loss"] for r in log[4:]) < 0.69
    assert not any("critic_loss" in r for r in log)
    assert genkit_command(arguments) == 2  # no pairs


def test_pairs_replace_pairs_and_nothing_else(policy, tmp_path):
    file = record_demonstrations(DemoSettings(env="four-ways", episodes=2), tmp_path / "d.npz").path
    few = {"pairs": str(file), "pair_episodes": 16, "episodes": 1, "env": "four-ways", "prefer": "return"}
    refuses(lambda: rollout(policy, **few), "pairs: ", "d.npz exists, and holds episode_ends, obs, action, not chosen")
    arrays = {name: np.zeros((1, 2, 16)) for name in ("chosen", "rejected")}
    refuse_other_kind(save_npz(tmp_path / "p.npz", arrays), ("chosen", "rejected"))
    refuses(
        lambda: record_demonstrations(DemoSettings(env="four-ways", episodes=2), tmp_path / "p.npz"), "holds chosen"
    )
    (tmp_path / "r.npz").write_text('{"genkit": "1"}')
    refuses(lambda: refuse_other_kind(tmp_path / "r.npz", ("chosen",)), "holds no arrays, not chosen")


UNUSED = {"max_kl": 1.0, "min_std": 0.1, "num_steps": 3, "terminate_out_of_range": 9.0, "samples": 8, "group": 4}


def test_dpo_refuses_what_has_no_effect_and_pairs_that_are_others_when_it_is_resumed(policy, tmp_path):
    file = collect_pairs(Policy.load(policy, steps=1), Sum(8, 8), range(8), find_score("return")).save(
        tmp_path / "p.npz"
    )
    settings = {"method": {"name": "dpo", "pairs": str(file)}, "steps": 1, "iterations": 1, "eval_episodes": 0,
                "num_envs": 2, "tensorboard": False, "device": "cpu", "out": str(tmp_path)}  # fmt: skip
    for name, value in UNUSED.items():
        refuses(
            lambda given={name: value}: finetune(policy, **settings, **given), f"{name}: has no effect", "pairs of a"
        )
    missing = {**settings, "method": {"name": "dpo", "pairs": str(tmp_path / "none.npz")}}
    refuses(lambda: finetune(policy, **missing), "pairs: ", "none.npz cannot be read")
    run = finetune(policy, **settings)
    assert finetune(resume=run.directory, iterations=2).step == 2
    with np.load(file) as stored:
        save_npz(file, {name: -stored[name] if name == "chosen" else stored[name] for name in stored.files})
    refuses(lambda: finetune(resume=run.directory, iterations=3), "p.npz has changed since", "put it back")


def test_each_chunk_of_an_anchored_policy_has_its_own_anchor(tmp_path):
    """The first of two episodes draws as the policy does: its recorded anchor and its noise give its chunk again."""
    run = genkit.train(objective={"name": "anchored", "cond_dropout": 0.0},
                       data={"name": "four-ways", "n": 20, "anchors": 4}, steps=1, batch=32,
                       backbone={"name": "mlp", "width": 16, "depth": 1}, sample_every=0, tensorboard=False,
                       device="cpu", precision="fp32", out=str(tmp_path))  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    for p in run.nets["net"].parameters():  # a new network's output is 0, whatever the anchor
        p += 0.2 * torch.randn(p.shape, generator=draw)
    actor = Policy.load(run)
    pairs = collect_pairs(actor, Sum(8, 8), range(40), find_score("return"))
    read = read_pairs(str(pairs.save(tmp_path / "p.npz")), run.codec, run.spec, "anchor")
    assert torch.equal(read.chosen_cond["obs"], read.rejected_cond["obs"])
    z, obs = Seeds(range(40))((2, 16)), {"obs": read.chosen_cond["obs"]}
    with torch.no_grad():
        same = [
            (actor.generate(z, {**obs, "anchor": cond["anchor"]}) - x).abs().flatten(1).amax(1) < 1e-4
            for x, cond in ((read.chosen, read.chosen_cond), (read.rejected, read.rejected_cond))
        ]
    assert (same[0] != same[1]).all()  # one of the two is the first episode's
    assert 0 < same[0].sum() < 40
    assert (read.chosen_cond["anchor"] != read.rejected_cond["anchor"]).float().mean() > 0.3
    refuses(lambda: read_pairs(str(tmp_path / "p.npz"), run.codec, run.spec), "chosen_anchor")
    with np.load(tmp_path / "p.npz") as stored:
        np.savez(tmp_path / "q.npz", **{k: stored[k] for k in stored.files if k != "rejected_anchor"})
    refuses(lambda: read_pairs(str(tmp_path / "q.npz"), run.codec, run.spec, "anchor"), "no array rejected_anchor")


@pytest.mark.slow
def test_the_preferred_way_is_taken_more_often(tmp_path):
    """Four ways: of 0.25 of the episodes by one way, pairs make more."""
    run = genkit.train(objective={"name": "anchored", "loss_space": "x0", "cond_dropout": 0.0, "std": 0.3},
                       data={"name": "four-ways", "anchors": 32}, backbone={"name": "mlp", "width": 64},
                       steps=800, batch=256, lr=1e-3, sample_every=0, tensorboard=False, device="cpu",
                       out=str(tmp_path))  # fmt: skip
    genkit.rollout(run, pairs=str(tmp_path / "p.npz"), pair_episodes=1500, prefer="mode=2", episodes=2, num_envs=200)
    method = {"name": "dpo", "pairs": str(tmp_path / "p.npz"), "beta": 3e4, "chosen_coef": 1.0}
    tuned = genkit.finetune(run, method=method, mode=2, iterations=40, device="cpu", tensorboard=False,
                            out=str(tmp_path))  # fmt: skip
    before, after = (r["success"]["value"] for r in (tuned.before, tuned.after))
    assert before < 0.4
    assert after > before + 0.25
