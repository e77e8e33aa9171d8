"""Evaluation while training: it changes nothing, agrees with `genkit eval` afterwards, and finds mistakes early."""

import subprocess
import sys
from dataclasses import replace

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from genkit.backbones import MLP
from genkit.evaluation import Card, open_data
from genkit.evaluation.periodic import PeriodicEvaluation
from genkit.training.directory import read_log
from genkit.training.loop import initial_state
from genkit.training.settings import TrainSettings
from tests.support.evaluation import TRAIN, evaluate_to_card, refusal, subprocess_environment, train, values


def test_evaluating_does_not_change_a_training(tmp_path):
    args = ["--data=moons", "--data.n=300", "--backbone.width=16", "--steps=6", "--save-every=3", "--log-every=3"]
    plain = train(tmp_path / "a", *args)
    evaluated = train(tmp_path / "b", *args, "--eval-every=3", "--eval-n=40", "--eval-steps=2",
                      "--eval-metrics=w2,fid", "--tensorboard=true")  # fmt: skip
    for file in sorted((plain / "latest").glob("*.safetensors")):
        assert file.read_bytes() == (evaluated / "latest" / file.name).read_bytes(), file.name
    logs = [read_log(run) for run in (plain, evaluated)]
    losses = [[record["denoise/loss"] for record in log if "denoise/loss" in record] for log in logs]
    assert losses[0] == losses[1]
    logged = {record["step"]: record["eval/w2"] for record in logs[1] if "eval/w2" in record}
    assert list(logged) == [3, 6]
    paths = sorted((evaluated / "eval").glob("*.json"))
    assert [values(Card.load(path))["w2"] for path in paths] == list(logged.values())
    afterwards = evaluate_to_card(
        tmp_path, evaluated, "--n=40", "--steps=2", "--metrics=w2,fid", "--batch=16", "--step=3"
    )
    while_training = Card.load(paths[0])
    assert values(afterwards) == values(while_training)
    assert afterwards.settings["weights_sha256"] == while_training.settings["weights_sha256"]
    events = EventAccumulator(str(evaluated / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("eval/w2")] == [3, 6]


def test_networks_train_on_after_an_evaluation(tmp_path):
    """Without an average the networks themselves are evaluated, and must get their dropout back."""
    cfg = replace(TrainSettings(), eval_every=1, eval_n=4, eval_steps=1, ema=(), precision="fp32")
    cfg = replace(cfg, data=open_data("moons").config, backbone=MLP(width=8))
    data = cfg.data.load("train")
    state = initial_state(cfg.objective, cfg.objective.networks(cfg.backbone, data.spec), cfg)
    modes = []
    state.nets["net"].train().register_forward_hook(lambda net, *_: modes.append(net.training))
    card = PeriodicEvaluation.create(cfg, state, data, Accelerator(cpu=True)).evaluate(state, tmp_path)
    assert set(modes) == {False}
    assert state.nets["net"].training
    assert card.settings["ema"] == "none"


@pytest.mark.slow
def test_two_ranks_that_train_evaluate_together(tmp_path):
    """The card is what one rank makes of that checkpoint afterwards."""
    args = ["train", *TRAIN, "--data=moons", "--data.n=300", "--backbone.width=16", "--steps=4", "--eval-every=2",
            "--eval-n=50", "--eval-metrics=fid,w2", "--save-every=2"]  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "genkit"]
    done = subprocess.run(
        [*command, *args], cwd=tmp_path, env=subprocess_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = (tmp_path / "runs" / "latest").resolve()
    by_step = {card.settings["step"]: card for card in map(Card.load, run.glob("eval/*.json"))}
    assert sorted(by_step) == [2, 4]
    for step, card in by_step.items():
        alone = evaluate_to_card(tmp_path, run, "--n=50", "--metrics=fid,w2", "--batch=16", f"--step={step}")
        assert card.settings["ranks"] == 2
        assert values(alone) == pytest.approx(values(card), rel=1e-10)


def test_mistakes_are_found_before_training(tmp_path, capsys):
    argv = ["train", *TRAIN, f"--out={tmp_path}", "--data=moons", "--steps=2", "--eval-every=1"]
    assert "did you mean mmd?" in refusal(capsys, *argv, "--eval-metrics=mmf")
    assert "did you mean raw?" in refusal(capsys, *argv, "--eval-features=ray")
    assert not list(tmp_path.iterdir())
