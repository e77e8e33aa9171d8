"""`genkit finetune` and ``genkit.finetune``: resuming, rewards by functions, mistakes."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from genkit.cli.commands.finetune import main as finetune
from genkit.cli.main import main as genkit
from genkit.config import load_yaml
from genkit.rl.finetune.loop import finetune as improve
from genkit.training.checkpoint import find_checkpoint
from genkit.training.directory import find_run, read_log
from genkit.training.run import load_run

HEIGHT = ["--reward", "tests.rl.test_finetune:height"]
LIGHT = ["--reward", "genkit.rl.finetune.image_rewards:brightness"]


def nan_reward(x, cond):
    return torch.where(torch.arange(len(x)) == 3, math.nan, x.flatten(1).sum(1))


def flat_reward(x, cond):
    return x.mean()


def first_number(x, cond):
    return x[:, 0]


def height(x, cond):
    return x[:, 1].mean(1)


SMALL = ["--num-envs", "8", "--num-steps", "4", "--eval-episodes", "8", "--method.batch", "64", "--method.warmup", "1",
         "--save-every", "2", "--no-tensorboard"]  # fmt: skip


def test_a_resumed_run_is_the_run_that_was_never_stopped(policy, tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    finetune([str(policy), "--iterations", "4", "--out", str(whole), *SMALL])
    finetune([str(policy), "--iterations", "2", "--out", str(part), *SMALL])
    finetune(["--resume", str(part / "latest"), "--iterations", "4", "--workers", "2"])  # in processes: the same
    a, b = (find_checkpoint(find_run(p / "latest")) for p in (whole, part))
    for file in ("nets.safetensors", "ema-0.99.safetensors", "optim.safetensors", "finetune.safetensors"):
        x, y = load_file(a / file), load_file(b / file)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x), file
    run = load_run(whole / "latest")
    old = load_run(policy)
    assert run.step == 4
    assert run.weights.endswith("ema-0.99.safetensors")
    assert any(
        not torch.equal(x, y) for x, y in zip(run.nets["net"].parameters(), old.nets["net"].parameters(), strict=True)
    )
    log = read_log(run.directory)
    assert {"before/success", "before/mode_entropy_bits"} <= log[0].keys()
    assert {"after/success", "after/mode_entropy_bits"} <= log[-1].keys()
    assert [r["step"] for r in log] == [0, 1, 2, 3, 4, 4]
    assert log[1]["kl_reference"] == log[2]["kl_reference"] == 0  # the critic warms up alone
    assert log[3]["kl_reference"] > 0
    assert genkit(["info", str(whole / "latest")]) == 0
    assert "after/success" in capsys.readouterr().out
    assert genkit(["rollout", str(whole / "latest"), "--episodes", "2", "--json", "--no-picture"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 2


def test_one_call_returns_the_improved_run(moons, tmp_path, capsys):
    calls = []
    run = improve(
        moons,
        reward="tests.rl.test_finetune:first_number",
        method={"name": "ddpo", "lr": 1e-2, "batch": 64},
        exploration_noise="sde",
        samples=64,
        iterations=3,
        eval_samples=30,
        tensorboard=True,
        device="cpu",
        out=str(tmp_path),
        progress=lambda what, done, total: calls.append((done, total)),
    )
    assert capsys.readouterr() == ("", "")
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert run.step == 3
    assert run.before["reward"]["value"] < run.after["reward"]["value"]
    assert run.sample(4).x.shape == (4, 2)
    assert list((run.directory / "tensorboard").iterdir())
    again = improve(run, reward="tests.rl.test_finetune:first_number", iterations=1, eval_samples=0, out=str(tmp_path))
    assert (again.before, again.after) == ({}, {})
    assert again.config.init == str(run.directory)
    more = improve(resume=run.directory, iterations=4, tensorboard=False)
    assert (more.step, more.before) == (4, run.before)
    with pytest.raises(ValueError, match=r"itertions: unknown.* did you mean iterations"):
        improve(moons, itertions=3)
    with pytest.raises(ValueError, match="run: not given"):
        improve()


def test_precision_micro_batches_and_threads_are_settings(moons, tmp_path):
    settings = {"reward": "tests.rl.test_finetune:first_number", "samples": 32, "iterations": 1, "eval_samples": 0}
    run = improve(moons, **settings, precision="bf16", micro_batch=8, threads=1, device="cpu", out=str(tmp_path))
    assert run.config.precision == "bf16"
    assert all(p.dtype == torch.float32 for p in run.nets["net"].parameters())
    stored = load_yaml(run.directory / "finetune.yaml")
    assert (stored["micro_batch"], stored["device"]) == (8, "cpu")


def test_a_function_is_a_reward_too(policy, tmp_path):
    finetune([str(policy), "--reward", "tests.rl.test_finetune:height", "--iterations", "6", "--samples", "128",
              "--method.lr", "2e-3", "--method.batch", "256", "--method.bc-coef", "0",
              "--out", str(tmp_path)])  # fmt: skip
    log = [r for r in read_log(find_run(tmp_path / "latest")) if "reward" in r]
    assert log[-1]["reward"] > log[0]["reward"] + log[0]["reward_std"]


def test_learned_noise_trains_along_and_resumes(policy, tmp_path):
    usual = ["--exploration-noise=learned", "--num-envs", "8", "--num-steps", "4", "--eval-episodes", "0",
             "--method.batch", "64", "--method.warmup", "0", "--save-every", "1", "--no-tensorboard"]  # fmt: skip
    finetune([str(policy), *usual, "--iterations", "2", "--out", str(tmp_path / "a")])
    finetune([str(policy), *usual, "--iterations", "1", "--out", str(tmp_path / "b")])
    finetune(["--resume", str(tmp_path / "b" / "latest"), "--iterations", "2"])
    a, b = (load_file(find_checkpoint(find_run(tmp_path / x / "latest")) / "finetune.safetensors") for x in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    last = [k for k in a if k.startswith("noise.") and "last" in k]
    assert last
    assert any(float(a[k].abs().max()) > 0 for k in last)  # it began at zero


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--reward", "tests.rl.test_finetune:nan_reward"],
            "nan_reward gave nan for sample 3",
        ),
        (
            ["--reward", "tests.rl.test_finetune:flat_reward"],
            r"flat_reward gave \(\) for 250 samples",
        ),
        (
            ["--reward", "brightness"],
            "reward: given 'brightness'; allowed: env, success, progress, frechet, or package.module:function",
        ),
        (["--reward", "no_such_module:f"], "reward: given no_such_module:f; there is no module no_such_module"),
        (["--reward", "tests.rl.test_finetune:nothing"], "the module has no such function"),
        (["--method=ppo"], "method: given 'ppo'; allowed: dppo, ddpo, mixed, rwr"),
        (["--exploration-noise=brown"], "exploration-noise: given 'brown'; allowed: fixed, ddim, sde"),
        (["--env", "five-ways"], "five-ways"),
        (["--mode", "7"], r"mode: given 7; allowed 0\.\.3"),
        (["--exploration-noise=ddim", "--min-std", "0"], "exploration_noise: step 4 of 4 has none"),
        (["--method=mixed", "--method.gradient", "through"], "an environment has no gradient; allowed: ratio"),
        (["--method.ft-denoising-steps", "5"], "ft_denoising_steps: given 5; allowed 1 … 4"),
        (
            ["--samples", "10", "--group", "3", "--reward", "tests.rl.test_finetune:height"],
            "group: given 3 of 10 samples",
        ),
        (
            ["--terminate-out-of-range", "8", *HEIGHT],
            "terminate_out_of_range: have no effect",
        ),
    ],
)
def test_bad_requests_in_one_line(policy, tmp_path, argv, message):
    with pytest.raises(ValueError, match=message) as e:
        finetune([str(policy), "--eval-episodes", "0", "--out", str(tmp_path), *argv])
    assert "\n" not in str(e.value)


def test_runs_that_cannot_be_improved(moons, policy, tmp_path):
    with pytest.raises(ValueError, match="not actions given obs"):
        finetune([str(moons), "--out", str(tmp_path)])
    with pytest.raises(ValueError, match=r"it has no finetune\.yaml"):
        finetune(["--resume", str(policy)])
    with pytest.raises(ValueError, match="run: not given"):
        finetune([])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--label", "10", *LIGHT], r"label: given 10; allowed 0\.\.9"),
        (["--method=rwr", "--exploration-noise=learned", *LIGHT], "exploration_noise: learned has no effect on rwr"),
        (["--method=mixed", "--method.gradient", "through", "--exploration-noise=learned", *LIGHT],
         "exploration_noise: learned is trained by the likelihood ratio"),
    ],
)  # fmt: skip
def test_bad_requests_of_images_in_one_line(digits, tmp_path, argv, message):
    with pytest.raises(ValueError, match=message) as e:
        finetune([str(digits), "--eval-samples", "0", "--out", str(tmp_path), *argv])
    assert "\n" not in str(e.value)


def test_labels_have_no_effect_in_an_environment(policy, tmp_path):
    with pytest.raises(ValueError, match="label, unconditional: have no effect in an environment"):
        finetune([str(policy), "--label", "3", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        *(([option, *HEIGHT], f"{name}: given 3, which has no effect if the reward is a function")
          for name in ("num_envs", "workers", "num_steps", "act_steps", "checkpoint_eval_episodes", "patience")
          for option in [f"--{name.replace('_', '-')}=3"]),
        (["--method.gae-lambda=0.5", *HEIGHT], "method.gae_lambda: given 0.5, which has no effect"),
        (["--method.critic-batch=5", *HEIGHT], "method.critic_batch: given 5, which has no effect"),
        (["--samples=64"], "samples: given 64, which has no effect in an environment"),
        (["--group=8"], "group: given 8, which has no effect in an environment"),
        (["--patience=3"], "patience: given 3, but no checkpoint is evaluated"),
    ],
)  # fmt: skip
def test_settings_without_an_effect_are_refused(policy, tmp_path, args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        finetune([str(policy), "--out", str(tmp_path), *args])
    assert not [*tmp_path.iterdir()]
