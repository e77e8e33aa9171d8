"""Rollouts while a policy is trained: they change nothing, are those of `genkit rollout`, survive an interruption."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator

from genkit.core import Batch
from genkit.data.codecs import Actions
from genkit.envs.four_ways import FourWays
from genkit.evaluation.report.curves import join_bounds
from genkit.evaluation.report.records import read_log as read_curves
from genkit.rl.finetune.loop import CHECKPOINT_SEED
from genkit.rl.policies.periodic import DRAWS, ROLLOUT_SEED, PeriodicRollouts, action_errors
from genkit.rl.policies.policy import Policy
from genkit.rl.policies.rollout import Q_SEED, RolloutSettings, rollout
from genkit.training.best import choose_metric, read_best
from genkit.training.directory import find_run, list_checkpoints, read_log, step_of
from genkit.training.loop import initial_state
from genkit.training.ranks import Ranks
from genkit.training.settings import TrainSettings, stored_settings
from genkit.training.train import train

QUICK = {
    "data": {"name": "four-ways", "n": 8}, "objective": {"name": "flow", "prediction": "x0"},
    "backbone": {"width": 16, "depth": 1}, "steps": 6, "batch": 16, "sample_every": 0, "log_every": 3, "device": "cpu",
    "precision": "fp32", "workers": 0, "tensorboard": False, "ema": (0.5,),
}  # fmt: skip
WATCHED = {"rollout_every": 3, "rollout_episodes": 3, "rollout_max_steps": 12, "rollout_steps": 2, "save_every": 6}


def rollouts_of(run):
    return [r for r in read_log(run) if any(k.startswith("rollout/") for k in r)]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    return train(**QUICK, **WATCHED, keep_best="success", out=str(tmp_path_factory.mktemp("watched"))).directory


def test_rollouts_are_those_of_genkit_rollout_and_change_no_training(watched, tmp_path):
    plain = train(**QUICK, save_every=6, out=str(tmp_path)).directory
    for file in sorted((plain / "latest").glob("*.safetensors")):
        assert file.read_bytes() == (watched / "latest" / file.name).read_bytes(), file.name
    assert [r["step"] for r in rollouts_of(watched)] == [3, 6]
    afterwards = rollout(watched, episodes=3, seed=ROLLOUT_SEED, steps=2, max_steps=12).summary()
    last = rollouts_of(watched)[-1]
    for name in ("success", "return", "best_reward"):
        logged = {key: last[f"rollout/{name}{end}"] for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))}
        assert logged == afterwards[name], name
    assert 0 < last["rollout/action_error_nearest"] < last["rollout/action_error"]
    assert read_best(watched).metric == "rollout/success"
    curves = join_bounds(read_curves(watched / "log.jsonl").curves)
    assert curves["rollout/success"][-1].high == last["rollout/success_high"]
    assert "rollout/success_low" not in curves


def test_a_rollout_that_a_signal_interrupts_is_made_when_the_run_is_resumed(watched, tmp_path, monkeypatch):
    step, calls = FourWays.step, []

    def interrupt(env, actions):
        calls.extend([env] if env.max_steps == WATCHED["rollout_max_steps"] else [])  # not of the demonstrations
        if len(calls) == 3:  # in the first one it is found out what the environment reports
            os.kill(os.getpid(), signal.SIGTERM)
        return step(env, actions)

    monkeypatch.setattr(FourWays, "step", interrupt)
    run = train(**QUICK, **WATCHED, keep_best="success", out=str(tmp_path))
    assert (run.ending, run.step, rollouts_of(run.directory)) == ("signal", 3, [])
    assert [step_of(p) for p in list_checkpoints(run.directory)] == [3]
    assert train(resume=run.directory).ending == "complete"
    assert rollouts_of(run.directory) == rollouts_of(watched)
    assert read_best(run.directory) == read_best(watched)
    for file in sorted((watched / "latest").glob("*.safetensors")):
        assert file.read_bytes() == (run.directory / "latest" / file.name).read_bytes(), file.name


def test_the_error_of_actions_is_that_of_the_executed_ones(watched):
    """A policy that is off by 0.5 in what is executed, for each window in another draw by 0.25, and by 9 elsewhere."""
    policy = Policy.load(watched)
    data = policy.run.config.data.load("test")
    held_out = Batch(data.x[:5], {k: v[:5] for k, v in data.cond.items()})
    true = policy.run.codec.encode(held_out).x
    draws = iter(torch.where(torch.eye(DRAWS, 5).bool(), 0.25, 0.5)[:, :, None, None])
    assert isinstance(policy.run.codec, Actions)

    def generate(z, cond, noise):
        x = true + 9
        x[:, :, : policy.act_steps] = true[:, :, : policy.act_steps] - next(draws)
        return x

    errors = action_errors(replace(policy, generate=generate), held_out)
    assert errors["action_error"] == pytest.approx((0.25 + 0.5 * (DRAWS - 1)) / DRAWS, rel=1e-5)
    assert errors["action_error_nearest"] == pytest.approx(0.25, rel=1e-5)


def test_ranks_share_the_episodes(watched):
    """The shares of three ranks, put together, are the episodes of one; the fourth has none."""
    settings = stored_settings(watched)
    data = settings.data.load("train")
    shares = [PeriodicRollouts(settings, data, Ranks(i, 4)).seeds for i in range(4)]
    assert sorted(seed for share in shares for seed in share) == [ROLLOUT_SEED + i for i in range(3)]
    assert len(shares[3]) == 0


def test_what_cannot_be_rolled_out_is_refused_before_training(tmp_path):
    def refusal(**changes):
        with pytest.raises(ValueError, match=r"rollout|keep_best|conditions") as error:
            train(**{**QUICK, **WATCHED, "out": str(tmp_path), **changes})
        return str(error.value)

    assert "has no demonstrations" in refusal(data="moons", backbone={"name": "mlp"})
    assert "conditions: skill" in refusal(data={"name": "four-ways", "n": 8, "conditions": ["skill"]})
    assert "did you mean success?" in refusal(keep_best="sucsess")
    assert "give --eval-every or --rollout-every, say 500" in refusal(rollout_every=0, keep_best="success")
    assert "give --rollout-every, say 500" in refusal(rollout_every=0, keep_best="rollout/success")
    assert not list(tmp_path.iterdir())
    assert (
        choose_metric("success", {"eval/fid": "lower", "rollout/success": "higher"}, {"eval": 5, "rollout": 5}).metric
        == "rollout/success"
    )


def test_demonstrations_without_an_environment_give_the_error_of_actions_alone(watched):
    settings = replace(stored_settings(watched), **{k: v for k, v in WATCHED.items() if k.startswith("rollout")})
    settings = replace(settings, data=replace(settings.data, env=""))
    assert isinstance(settings, TrainSettings)
    data = settings.data.load("train")
    state = initial_state(settings.objective, settings.objective.networks(settings.backbone, data.spec), settings)
    rollouts = PeriodicRollouts.create(settings, state, data, Accelerator(cpu=True))
    assert rollouts.directions == {"action_error": "lower", "action_error_nearest": "lower"}
    assert rollouts.describe() == "rollout  64 held-out windows, every 3 steps"
    measured = rollouts(state, watched, lambda: False)
    assert measured
    assert measured.values.keys() == rollouts.directions.keys()


@pytest.mark.slow
def test_two_ranks_roll_out_together(tmp_path):
    """The numbers of two ranks are those of one, also with fewer episodes than ranks."""
    logs = {}
    for ranks, episodes in ((1, 3), (2, 3), (2, 1)):
        args = ["train", "--data=four-ways", "--data.n=8", "--backbone.width=16", "--backbone.depth=1", "--steps=2",
                "--batch=16", "--rollout-every=1", f"--rollout-episodes={episodes}", "--rollout-max-steps=12",
                "--sample-every=0", "--device=cpu", "--precision=fp32", "--no-tensorboard", "--workers=0"]  # fmt: skip
        folder = tmp_path / f"{ranks}-{episodes}"
        folder.mkdir()
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(ranks), "-m", "genkit"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([*command, *args], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        logs[ranks, episodes] = rollouts_of(find_run(folder / "runs" / "latest"))
    assert [r["step"] for r in logs[2, 1]] == [1, 2]
    for alone, together in zip(logs[1, 3], logs[2, 3], strict=True):
        assert alone == pytest.approx(together, rel=1e-4)


def test_starts_are_used_by_nothing_else():
    """Rollouts, Q, choice of checkpoints and training each have seeds of their own."""
    starts = sorted([RolloutSettings().seed, CHECKPOINT_SEED, ROLLOUT_SEED, Q_SEED, 2**30])
    assert min(b - a for a, b in pairwise(starts)) >= 2**27
    assert torch.iinfo(torch.int32).max > ROLLOUT_SEED
