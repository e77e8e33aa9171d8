"""``genkit.rollout``: one call, an object with a summary, pictures and files."""

import json
from dataclasses import fields, replace

import pytest

from genkit.cli.main import main
from genkit.integrations.export import export
from genkit.rl.policies.rollout import Rollouts, RolloutSettings, rollout


def test_one_call_returns_rollouts_and_prints_nothing(policy, tmp_path, capsys):
    calls = []
    rollouts = rollout(policy, episodes=4, num_envs=2, max_steps=16, film=1, progress=lambda *args: calls.append(args))
    assert calls == [("episodes", 0, 4), ("episodes", 0, 4), ("episodes", 2, 4), ("episodes", 2, 4), ("episodes", 4, 4)]
    summary = rollouts.summary()
    assert summary["episodes"] == 4
    assert summary["settings"]["max_steps"] == 16
    assert rollouts.pictures().keys() == {"paths", "actions"}
    assert str(rollouts).startswith("4 episodes, success")
    files = rollouts.save(tmp_path)
    name = "step30-k4-seed100000-n4-max_steps=16-num_envs=2"
    assert [f.name for f in files] == [
        f"{name}{end}" for end in (".json", "-paths.png", "-actions.png", "-episode0.gif")
    ]
    assert json.loads(files[0].read_text())["return"] == summary["return"]
    assert [f.suffix for f in rollouts.save(tmp_path / "plain", draw=False)] == [".json", ".gif"]
    assert capsys.readouterr() == ("", "")


def test_keywords_change_settings_and_mistakes_are_named(policy):
    settings = RolloutSettings(episodes=2, num_envs=2, max_steps=8)
    assert rollout(policy, settings, steps=1).settings == RolloutSettings(episodes=2, num_envs=2, max_steps=8, steps=1)
    with pytest.raises(ValueError, match=r"step_s: unknown.* did you mean steps"):
        rollout(policy, settings, step_s=1)


def test_a_file_name_holds_every_setting(policy):
    """Two rollouts that differ in any setting have different files."""
    first = rollout(policy, episodes=2, num_envs=2, max_steps=4)
    other = {
        "env": "pusht", "sampler": "heun", "conditions": ("skill=2",), "act_steps": 1, "max_steps": 5, "ema": "none",
        "env_args": ("a=b/c",), "device": "mps", "execution": "ensemble",
    }  # fmt: skip
    # the checkpoint and K are named as they are used; pairs are files of their own
    unnamed = ("step", "steps", "film", "workers", "pairs", "pair_episodes", "prefer")
    names = {first.name}
    for f in fields(RolloutSettings):
        if f.name in unnamed:
            continue
        value = other.get(f.name)
        settings = replace(first.settings, **{f.name: getattr(first.settings, f.name) + 1 if value is None else value})
        names.add(Rollouts(first.policy, first.env, first.episodes, settings, 1.0).name)
    assert len(names) == 1 + len(fields(RolloutSettings)) - len(unnamed)
    assert rollout(policy, episodes=2, num_envs=2, max_steps=4, steps=2).name not in names
    long = (
        replace(first.settings, env_args=("text=" + "x" * 300,)),
        replace(first.settings, env_args=("t=" + "x" * 301,)),
    )
    named = [Rollouts(first.policy, first.env, first.episodes, s, 1.0).name for s in long]
    assert named[0] != named[1]
    assert all(len(name) < 200 and "/" not in name for name in [*named, *names])


@pytest.mark.parametrize(
    ("change", "owner"),
    [({"expectile": 0.9}, "--offline-q"), ({"gamma": 0.5}, "--fit-q"), ({"pair_episodes": 3}, "--pairs"),
     ({"prefer": "success"}, "--pairs"), ({"ensemble_decay": 0.5}, "--execution ensemble"),
     ({"guidance_limit": 3.0, "execution": "ensemble"}, "--execution real-time")],
)  # fmt: skip
def test_settings_without_an_effect_are_refused(policy, change, owner):
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"{name}: given .* which has no effect without {owner}"):
        rollout(policy, episodes=2, **change)


def test_steps_of_a_policy_that_draws_in_one_pass_are_refused(tmp_path):
    argv = ["train", "--data=four-ways", "--data.n=20", "--objective=regression", "--backbone.width=8", "--steps=1",
            "--batch=8", "--device=cpu", "--no-tensorboard", f"--out={tmp_path}"]  # fmt: skip
    assert main(argv) == 0
    with pytest.raises(ValueError, match="steps: given 8, which has no effect on Regression"):
        rollout(tmp_path / "latest", episodes=2, steps=8)
    with pytest.raises(ValueError, match="steps: given 8, which has no effect on Regression"):
        export(tmp_path / "latest", tmp_path / "policy.pt", to={"name": "torchscript", "steps": 8})
