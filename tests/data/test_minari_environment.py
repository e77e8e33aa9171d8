"""The environment that a dataset of Minari names is that of the run's rollouts."""

import json

import numpy as np
import pytest

pytest.importorskip("minari")
pytest.importorskip("h5py")

import gymnasium
from minari import create_dataset_from_buffers
from minari.data_collector import EpisodeBuffer
from minari.storage.datasets_root_dir import get_dataset_path

from genkit.cli.main import main as genkit
from genkit.config import load_yaml
from genkit.data.demonstrations.minari import Minari
from genkit.training.directory import find_run

REACH = "tests.support.worlds:Reach-v0"


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Records two episodes as a dataset that names ``env``, and ``eval_env``; returns its folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def create(env, eval_env=None):
        buffers = []
        for i in range(2):
            obs = np.random.default_rng(i).normal(size=(21, 2))
            actions, rewards, ends = np.zeros((20, 1)), np.zeros(20), np.arange(20) == 19
            buffers.append(EpisodeBuffer(i, i, None, obs, actions, rewards, ends, ends & False, {}))
        create_dataset_from_buffers(
            "test/reach-v0", buffers, env=env, eval_env=eval_env, algorithm_name="none", code_permalink="none",
            observation_space=gymnasium.spaces.Box(-10, 10, (2,)), action_space=gymnasium.spaces.Box(-1, 1, (1,)),
            author="nobody", author_email="none", description="none",
        )  # fmt: skip
        return str(get_dataset_path("test/reach-v0"))

    return create


@pytest.mark.filterwarnings("ignore")
def test_rollouts_are_in_the_environment_of_the_dataset(record, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = record(gymnasium.make(REACH, goal=0.5, reward_type="sparse", max_episode_steps=9))
    tiny = "--steps 3 --batch 16 --backbone.width 8 --backbone.depth 1 --sample-every 0 --no-tensorboard --device cpu"
    assert genkit(["train", "--data=minari", "--data.root", root, *tiny.split(), "--workers", "0"]) == 0
    stored = load_yaml(find_run("runs/latest") / "config.yaml")["data"]
    assert stored["env"] == REACH
    assert set(stored["env_args"]) == {"max_episode_steps=9", "goal=0.5", 'reward_type="sparse"'}
    capsys.readouterr()
    rollout = ["rollout", "runs/latest", "--episodes", "2", "--json", "--no-picture"]
    assert genkit(rollout) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["length"], result["truncated"]) == (9, 1)
    assert 0 <= result["best_reward"]["value"] <= 1  # sparse
    assert genkit([*rollout, "--max-steps", "4", "--env-args", "reward_type=dense"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["length"] == 4
    assert result["best_reward"]["value"] < 0
    assert genkit(["train", "--resume", "runs/latest", "--steps", "4"]) == 0


@pytest.mark.filterwarnings("ignore")
def test_what_the_dataset_names_can_be_replaced(record):
    root = record(gymnasium.make(REACH, goal=0.5), gymnasium.make(REACH, goal=0.7))
    decided = Minari(root=root).with_decisions()
    assert (decided.environment, set(decided.environment_arguments)) == (REACH, {"max_episode_steps=12", "goal=0.7"})
    own = Minari(root=root, env_args=("goal=2.0",)).with_decisions()
    assert set(own.environment_arguments) == {"max_episode_steps=12", "goal=2.0"}
    other = Minari(root=root, env="Pendulum-v1").with_decisions()
    assert (other.environment, other.environment_arguments) == ("Pendulum-v1", ())
    assert Minari(root=root).with_decisions_of(decided) == decided


@pytest.mark.filterwarnings("ignore")
def test_environments_that_cannot_be_made_again_are_left_out(record):
    wrapped = gymnasium.wrappers.RescaleReward if hasattr(gymnasium.wrappers, "RescaleReward") else None
    wrapped = wrapped or (lambda env: gymnasium.wrappers.ClipReward(env, 0, 1))
    assert Minari(root=record(wrapped(gymnasium.make(REACH)))).with_decisions().environment == ""


@pytest.mark.filterwarnings("ignore")
def test_an_id_of_a_known_package_needs_no_module(record):
    assert Minari(root=record(gymnasium.make("Pendulum-v1"))).with_decisions().environment == "Pendulum-v1"
