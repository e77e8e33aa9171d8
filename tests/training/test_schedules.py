"""Schedules: values in closed form, the plateau as torch has it, and both exact after a stop."""

import math
from dataclasses import replace

import pytest
import torch

from genkit import config
from genkit.training.directory import read_log
from genkit.training.schedules import SCHEDULES, Plateau, PlateauTracker, learning_rate
from genkit.training.settings import TrainSettings
from genkit.training.train import train


def rate(name, step, *argv, steps=110, warmup=10):
    settings = config.parse(TrainSettings, [f"--schedule={name}", "--lr=2", f"--steps={steps}", f"--warmup={warmup}",
                                            *argv])  # fmt: skip
    return learning_rate(settings, step)


VALUES = [
    ("constant", [], {10: 2.0, 109: 2.0}),
    ("cosine", [], {10: 2.0, 60: 1.0, 85: 1 - math.sqrt(0.5), 110: 0.0}),
    ("cosine", ["--schedule.floor=0.1"], {10: 2.0, 60: 1.1, 110: 0.2, 400: 0.2}),
    ("linear", [], {10: 2.0, 35: 1.5, 110: 0.0}),
    ("linear", ["--schedule.floor=0.5"], {10: 2.0, 60: 1.5, 110: 1.0}),
    ("wsd", [], {10: 2.0, 89: 2.0, 90: 2.0, 100: 1.0, 105: 0.5, 110: 0.0}),
    ("wsd", ["--schedule.decay=0.5", "--schedule.shape=sqrt"], {60: 2.0, 72: 2 - 2 * math.sqrt(0.24), 110: 0.0}),
    ("wsd", ["--schedule.decay=1", "--schedule.shape=cosine", "--schedule.floor=0.1"], {10: 2.0, 60: 1.1, 110: 0.2}),
    ("inverse-sqrt", [], {10: 2.0, 30: 2 * math.sqrt(10 / 30), 40: 1.0, 1000: 0.2}),
    ("inverse-sqrt", ["--schedule.timescale=100"], {110: 2 * math.sqrt(0.5), 310: 1.0}),
    ("restarts", ["--schedule.period=10"], {10: 2.0, 15: 1.0, 20: 2.0, 30: 1.0, 40: 2.0, 60: 1.0, 80: 2.0}),
    ("restarts", ["--schedule.period=20", "--schedule.growth=1", "--schedule.floor=0.5"], {20: 1.5, 30: 2.0, 40: 1.5}),
    ("plateau", [], {10: 2.0, 109: 2.0}),
]


@pytest.mark.parametrize(("name", "argv", "values"), VALUES)
def test_values(name, argv, values):
    assert rate(name, 0, *argv) == pytest.approx(0.2)
    assert rate(name, 9, *argv) == pytest.approx(2.0)
    for step, value in values.items():
        assert rate(name, step, *argv) == pytest.approx(value, abs=1e-12), step


@pytest.mark.parametrize(("argv", "steps"), [
    (["--steps=200"], 50), (["--steps=399"], 99), (["--steps=400"], 100), (["--steps=20000"], 100), (["--steps=3"], 0),
    (["--steps=300", "--warmup=100"], 100), (["--steps=20000", "--warmup=0"], 0),
    (["--steps=300", "--objective=gan"], 0),
])  # fmt: skip
def test_a_quarter_of_a_short_run_warms_up(argv, steps):
    settings = config.parse(TrainSettings, [*argv, "--lr=2", "--schedule=constant"])
    rates = [learning_rate(settings, step) for step in range(steps + 2)]
    assert rates == pytest.approx([2 * (step + 1) / steps for step in range(steps)] + [2, 2])


def test_every_schedule_has_values():
    assert {name for name, *_ in VALUES} == SCHEDULES.keys()


@pytest.mark.parametrize("schedule", [Plateau(patience=2, factor=0.3), Plateau(patience=0, cooldown=3, floor=0.01),
                                      Plateau(patience=1, threshold=0.05)])  # fmt: skip
def test_the_plateau_is_torchs(schedule):
    tracker = PlateauTracker(schedule, "val/loss")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=schedule.factor, patience=schedule.patience, threshold=schedule.threshold,
        cooldown=schedule.cooldown, min_lr=schedule.floor, eps=0.0,
    )  # fmt: skip
    losses = 1 + torch.rand(60, generator=torch.Generator().manual_seed(0)) - torch.linspace(0, 0.5, 60)
    for i, loss in enumerate(losses.tolist()):
        tracker.update({"step": i, "val/loss": loss})
        tracker.update({"step": i, "denoise/loss": 0.0})
        theirs.step(loss)
        assert tracker.share == pytest.approx(optimizer.param_groups[0]["lr"])
    assert tracker.share < 0.1


def test_a_loss_that_is_not_finite_is_no_improvement():
    tracker = PlateauTracker(Plateau(patience=0), "val/loss")
    assert [tracker.update({"val/loss": v}) for v in (None, 1.0, None, 0.5)] == [True, False, True, False]


def test_a_plateau_needs_validations():
    with pytest.raises(ValueError, match="give --val-every"):
        PlateauTracker.create(replace(TrainSettings(), schedule=Plateau()))


@pytest.mark.slow
def test_reductions_survive_a_stop(tmp_path):
    """A threshold that no loss reaches, so that every validation but the first reduces the rate."""
    tiny = {"data": "moons", "backbone": {"name": "mlp", "width": 8, "depth": 1}, "batch": 8, "save_every": 2,
            "val_every": 2, "val_n": 16, "sample_every": 0, "tensorboard": False, "workers": 0, "device": "cpu",
            "warmup": 0, "log_every": 1, "schedule": {"name": "plateau", "patience": 0, "threshold": 0.9}}  # fmt: skip
    whole = train(**tiny, steps=8, out=str(tmp_path / "a"))
    part = train(**tiny, steps=4, out=str(tmp_path / "b"))
    resumed = train(resume=part.directory, steps=8)
    logs = [[r["lr"] for r in read_log(run.directory) if "lr" in r] for run in (whole, resumed)]
    assert logs[0] == logs[1] == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4])
    weights = [[p for net in run.nets.values() for p in net.parameters()] for run in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
