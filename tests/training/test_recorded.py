"""config.yaml is compared with what the checkpoints were saved with: weights mean nothing under other settings."""

import re

import pytest

from genkit.cli.main import main
from genkit.training.run import load_run

SMALL = ["--data=moons", "--data.n=64", "--backbone=mlp", "--backbone.width=8", "--steps=2", "--batch=8", "--workers=0",
         "--no-tensorboard", "--sample-every=0", "--device=cpu"]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    assert main(["train", *SMALL, f"--out={tmp_path}"]) == 0
    return tmp_path / "0000-moons-flow-mlp"


@pytest.mark.parametrize(("old", "new"), [
    ("prediction: velocity", "prediction: x0"), ("seed: 0", "seed: 7"), ("batch: 8", "batch: 16"),
    ("width: 8", "width: 9"), ("noise: 0.05", "noise: 0.5"), ("weight_decay: 0.0", "weight_decay: 0.1"),
])  # fmt: skip
def test_another_setting_than_the_weights_were_trained_with_is_refused(run, old, new, capsys):
    config = run / "config.yaml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    for argv in (["train", f"--resume={run}", "--steps=3"], ["sample", str(run)], ["info", str(run)]):
        assert main(argv) == 2
        assert "the weights were trained with" in capsys.readouterr().err


def test_a_file_that_was_cut_is_refused_wherever_the_cut_is(run, capsys):
    config = run / "config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    # lines of continued blocks begin with a blank: a cut before one is no YAML, or lacks settings within the block
    for i in range(1, len(lines)):
        config.write_text("".join(lines[:i]))
        with pytest.raises(ValueError, match=re.escape(str(config))):
            load_run(run)
    config.write_text("".join(lines))
    assert load_run(run).step == 2


def test_what_may_change_may_be_edited(run):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.001", "lr: 0.002").replace("save_every: 500", "save_every: 1"))
    assert main(["train", f"--resume={run}", "--steps=3"]) == 0
    assert load_run(run).config.lr == 0.002
    assert load_run(run).step == 3
