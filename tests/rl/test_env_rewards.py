"""Rewards other than the environment's own."""

from dataclasses import replace

import numpy as np
import pytest

from genkit.envs.four_ways import FourWays, FourWaysExpert
from genkit.rl.finetune.env_rewards import ProgressReward, SingleModeReward, SuccessReward
from genkit.rl.finetune.loop import evaluate_policy
from genkit.rl.finetune.settings import FinetuneSettings
from genkit.rl.finetune.setup import build_env
from genkit.rl.policies.policy import Policy
from genkit.training.run import load_run


def test_one_mode_alone_is_rewarded():
    env = SingleModeReward(FourWays(8), 2)
    guide = FourWaysExpert(8)
    seeds = list(range(8))
    obs = env.reset(seeds)
    guide.reset(seeds)
    total, success = np.zeros(8), np.zeros(8, bool)
    for _ in range(80):
        obs, reward, _, _, info = env.step(guide.act(obs))
        total += reward
        success |= info["success"]
    assert total.tolist() == [0, 0, 1, 0] * 2
    assert success.tolist() == [False, False, True, False] * 2
    with pytest.raises(ValueError, match=r"mode: given 4; allowed 0\.\.3"):
        SingleModeReward(FourWays(2), 4)


class Nearby:
    """Two worlds that pay 0.9 a step for being near. The first succeeds in its third step, and says so from then on;
    without ``says`` neither says anything."""

    num, obs_dim, action_dim, max_steps, at = 2, 1, 1, 5, 0

    def __init__(self, says=True):
        self.says = says

    def reset(self, seeds, rows=None):
        self.at = 0
        return np.zeros((2, 1))

    def step(self, actions):
        self.at += 1
        good = np.array([self.at >= 3, False])
        return np.zeros((2, 1)), np.full(2, 0.9), np.zeros(2, bool), np.full(2, self.at == 5), (
            {"success": good.astype(float)} if self.says else {}
        )  # fmt: skip


def test_success_pays_once_and_nothing_else_does():
    env = SuccessReward(Nearby())
    for _ in range(2):  # and again after a reset
        env.reset([0, 1])
        paid = [env.step(np.zeros((2, 1)))[1].tolist() for _ in range(5)]
        assert paid == [[0, 0], [0, 0], [1, 0], [0, 0], [0, 0]]
    env.reset([1], [1])  # of the other row: what the first had, it has had
    assert [env.step(np.zeros((2, 1)))[1].tolist() for _ in range(5)] == [[0, 0]] * 5
    with pytest.raises(ValueError, match="reward: this environment does not say"):
        SuccessReward(Nearby(says=False))


class Rising(Nearby):
    """What a step is worth rises to 0.6, falls, and comes to 1 with success."""

    def step(self, actions):
        obs, _, terminated, truncated, info = super().step(actions)
        return obs, np.array([[0.2, 0.6, 1.0, 1.0, 0.5][self.at - 1], 0.3]), terminated, truncated, info


def test_progress_pays_for_coming_near_and_not_for_being_there():
    env = ProgressReward(Rising())
    for _ in range(2):
        env.reset([0, 1])
        paid = np.array([env.step(np.zeros((2, 1)))[1] for _ in range(5)])
        assert np.allclose(paid[:, 0], [0.2, 0.4, 0.4 + 1, 0, -0.5])
        assert np.allclose(paid[:, 1], [0.3, 0, 0, 0, 0])
    env.reset([1], [1])
    assert np.allclose(env.step(np.zeros((2, 1)))[1], [0.2 - 0.5, 0.3])
    with pytest.raises(ValueError, match="reward: this environment does not say"):
        ProgressReward(Nearby(says=False))


def test_an_environment_pays_what_the_settings_ask_for(policy):
    run = load_run(policy, device="cpu")
    actor = Policy.load(run)
    settings = FinetuneSettings(reward="progress", steps=2, eval_episodes=4)
    assert type(build_env(settings, actor, 2)) is ProgressReward
    assert type(build_env(replace(settings, reward="success"), actor, 2)) is SuccessReward
    assert type(build_env(replace(settings, reward="env"), actor, 2)) is FourWays
    one = build_env(replace(settings, mode=1), actor, 2)
    assert isinstance(one, SingleModeReward)
    assert type(one.env) is ProgressReward
    results = [evaluate_policy(replace(settings, reward=name), run, run.nets, range(4)) for name in ("env", "success")]
    assert [("best_reward" in f) for f in results] == [True, False]
    assert results[0]["success"] == results[1]["success"]
    assert results[1]["success"]["value"] == results[1]["return"]["value"]
