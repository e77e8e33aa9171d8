"""Fine-tuning of policies with conditions besides obs, and checkpoints that leave room for whole episodes."""

import shlex

import pytest
import torch

from genkit.cli.commands.finetune import main as finetune
from genkit.cli.commands.train import main as train
from genkit.cli.main import main as genkit
from genkit.config import load_yaml
from genkit.envs import make
from genkit.rl.finetune.settings import SAVE_EVERY, FinetuneSettings
from genkit.rl.finetune.setup import choose_save_interval
from genkit.rl.finetune.tasks import EnvironmentTask
from genkit.training.directory import find_run
from tests.support.refusals import refuses

SMALL = ["--num-envs", "4", "--num-steps", "3", "--eval-episodes", "4", "--method.batch", "64", "--method.warmup", "0",
         "--iterations", "1", "--no-tensorboard", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def skilled(tmp_path_factory):
    out = tmp_path_factory.mktemp("skilled")
    train(["--data=four-ways", "--data.n=20", "--data.conditions", "skill", "--backbone.width=16", "--backbone.depth=1",
           "--steps=3", "--batch=16", "--sample-every=0", "--no-tensorboard", "--device=cpu", "--workers=0", "--out",
           str(out)])  # fmt: skip
    return find_run(out / "latest")


def test_a_skill_is_given_to_all_episodes_and_the_printed_step_has_it(skilled, tmp_path, monkeypatch, capsys):
    seen = []
    decide = EnvironmentTask.decide

    def spy(self, learner, noise):
        decision = decide(self, learner, noise)
        seen.append(decision.cond["skill"])
        return decision

    monkeypatch.setattr(EnvironmentTask, "decide", spy)
    refuses(lambda: finetune([str(skilled), "--out", str(tmp_path), *SMALL]), "conditions: skill is missing")
    assert finetune([str(skilled), "--conditions", "skill=2", "--out", str(tmp_path), *SMALL]) == 0
    assert torch.equal(torch.stack(seen), torch.full((3, 4), 2))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("--conditions skill=2")
    command = shlex.split(line.removeprefix("next     genkit "))
    assert genkit([*command, "--episodes", "2", "--no-picture"]) == 0
    refuses(
        lambda: finetune([str(skilled), "--conditions", "skill=9", "--out", str(tmp_path), *SMALL]), "skill: given 9"
    )


def test_checkpoints_leave_room_for_whole_episodes(skilled, tmp_path):
    """Episodes begin anew at each; without a number there is room for a whole one after the first, which is cut."""
    notes: list[str] = []
    env = make("four-ways", 2, max_steps=1000)
    task = EnvironmentTask(env, None, act_steps=2, num_steps=40, gamma=1, gae_lambda=1)
    assert choose_save_interval(FinetuneSettings(), task, notes.append) == 25
    assert not notes
    assert choose_save_interval(FinetuneSettings(save_every=10), task, notes.append) == 10
    assert "after 800 of up to 1000 steps" in notes[0]
    assert "--save-every 25" in notes[0]
    env.max_steps = 100
    assert choose_save_interval(FinetuneSettings(), task, notes.append) == SAVE_EVERY
    finetune([str(skilled), "--conditions", "skill=2", "--out", str(tmp_path), *SMALL])
    settings = load_yaml(find_run(tmp_path / "latest") / "finetune.yaml")
    assert settings["save_every"] == max(SAVE_EVERY, -(-2 * make("four-ways", 1).max_steps // (3 * 8)))


def test_conditions_are_refused_where_they_have_no_effect(moons, tmp_path):
    reward = ["--reward", "tests.rl.test_finetune:first_number", "--conditions", "skill=2"]
    refuses(lambda: finetune([str(moons), *reward, "--out", str(tmp_path)]), "conditions", "have no effect")
