"""What a training run will take: sizes in closed form and against a real run, times against a known delay."""

import re
import time
from dataclasses import dataclass

import pytest

import genkit
from genkit import config
from genkit.cli.main import main
from genkit.objectives import Flow
from genkit.training.dry_run import estimate_training
from genkit.training.settings import TrainSettings

DELAY = 0.02
SMALL = ["--data=moons", "--data.n=64", "--backbone.width=16", "--backbone.depth=2", "--batch=16", "--workers=0",
         "--no-tensorboard", "--device=cpu", "--steps=40", "--ema", "0.9", "0.99"]  # fmt: skip


@dataclass(frozen=True)
class Slow(Flow):
    """A flow whose loss takes a known time."""

    def loss(self, phase, nets, batch):
        time.sleep(DELAY)
        return super().loss(phase, nets, batch)


def test_its_settings_are_those_of_a_run_and_it_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("genkit.training.dry_run.SECONDS", 0.0)
    assert main(["train", *SMALL, "--dry-run", "--val-every=10", "--max-time=1h"]) == 0
    text = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", "c.yaml"]) == 0
    out = capsys.readouterr().out
    assert "trained 40 steps" in out
    settings = config.from_dict(TrainSettings, config.load_yaml(tmp_path / "c.yaml"))
    assert settings.warmup == 10
    assert config.dump(genkit.load(tmp_path / "runs/latest").config) == config.dump(settings)

    # the size of a checkpoint is that of the files, but for their headers
    folder = next((tmp_path / "runs/latest/checkpoints").glob("step-*"))
    size = sum(
        p.stat().st_size - int.from_bytes(p.read_bytes()[:8], "little") - 8 for p in folder.glob("*.safetensors")
    )
    estimate = estimate_training(settings)
    assert estimate.checkpoint_bytes == size
    assert estimate.disk_bytes == 4 * size

    # float32 networks without buffers, AdamW with two moments and a step for each parameter
    count = sum(p.numel() for p in genkit.load(tmp_path / "runs/latest").nets["net"].parameters())
    tensors = len(list(genkit.load(tmp_path / "runs/latest").nets["net"].parameters()))
    assert estimate.networks == {"net": count}
    parts = {k: v for k, v in estimate.memory.items() if k != "peak"}
    assert parts == {"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count + 4 * tensors,
                     "averages": 8 * count}  # fmt: skip
    assert estimate.memory["peak"] > 50e6
    assert re.search(r"# time     about \d+ s for 40 steps", text)


def test_the_time_is_that_of_its_parts():
    start = time.monotonic()
    estimate = estimate_training(
        objective=f"{__name__}:Slow", data={"name": "moons", "n": 64}, steps=100_000, device="cpu", batch=16,
        sample_every=50_000, eval_every=0, val_every=10_000, max_time="1m", backbone={"width": 16},
    )  # fmt: skip
    elapsed = time.monotonic() - start
    assert estimate.steps_timed >= 5
    assert DELAY < estimate.step_seconds < 2 * elapsed / estimate.steps_timed  # a median of what was waited for
    assert estimate.seconds["steps"] == 100_000 * estimate.step_seconds
    assert estimate.seconds["validations"] >= 10 * 2 * 4 * DELAY  # 64 samples in fours of 16, both weights
    assert estimate.seconds["pictures"] > 0
    assert estimate.seconds["evaluations"] == 0
    assert estimate.total_seconds == sum(estimate.seconds.values())
    share = 100 * 60 / estimate.total_seconds
    assert f"--max-time 1m ends it after about {share:.0f} % of the steps" in str(estimate)


@pytest.mark.parametrize("name", ["gan", "autoencoder", "classifier"])
def test_every_kind_of_objective_can_be_estimated(monkeypatch, name):
    monkeypatch.setattr("genkit.training.dry_run.SECONDS", 0.0)
    objective = {"name": name, "latent": (4, 4, 4)} if name == "autoencoder" else name
    estimate = estimate_training(
        objective=objective, data="digits", backbone={"name": "mlp", "width": 16}, device="cpu"
    )
    assert estimate.steps_timed == 5
    assert (estimate.seconds["pictures"] > 0) == (name == "gan")


def test_only_a_new_run_is_estimated(tmp_path, capsys):
    assert main(["train", *SMALL, "--step=3", "--dry-run"]) == 2
    assert "step: given 3 with dry_run, which estimates a new run" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"dry_run: genkit.train trains; estimate with genkit.estimate_training"):
        genkit.train(data="moons", dry_run=True)
