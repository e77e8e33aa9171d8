"""``genkit.rollout``: one call, an object with a summary, pictures and files."""

import json

import pytest

from genkit.rl.policies.rollout import RolloutSettings, rollout


def test_one_call_returns_rollouts_and_prints_nothing(policy, tmp_path, capsys):
    calls = []
    rollouts = rollout(policy, episodes=4, num_envs=2, max_steps=16, film=1, progress=lambda *args: calls.append(args))
    assert calls == [("episodes", 2, 4), ("episodes", 4, 4)]
    summary = rollouts.summary()
    assert summary["episodes"] == 4
    assert summary["settings"]["max_steps"] == 16
    assert rollouts.pictures().keys() == {"paths", "actions"}
    assert str(rollouts).startswith("4 episodes, success")
    files = rollouts.save(tmp_path)
    assert [f.name for f in files] == [
        f"step30-k4-seed100000-n4{end}" for end in (".json", "-paths.png", "-actions.png", "-episode0.gif")
    ]
    assert json.loads(files[0].read_text())["return"] == summary["return"]
    assert [f.suffix for f in rollouts.save(tmp_path / "plain", draw=False)] == [".json", ".gif"]
    assert capsys.readouterr() == ("", "")


def test_keywords_change_settings_and_mistakes_are_named(policy):
    settings = RolloutSettings(episodes=2, num_envs=2, max_steps=8)
    assert rollout(policy, settings, steps=1).settings == RolloutSettings(episodes=2, num_envs=2, max_steps=8, steps=1)
    with pytest.raises(ValueError, match=r"step_s: unknown.* did you mean steps"):
        rollout(policy, settings, step_s=1)
