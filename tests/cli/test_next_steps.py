"""Every command that a command prints as the next step runs as it is printed, on any data."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genkit.cli import main as cli
from genkit.cli.next_steps import suggest_use
from genkit.data import DATA
from genkit.training.run import load_run

TINY = ["--batch=8", "--steps=2", "--no-tensorboard", "--workers=0", "--device=cpu", "--ema=0.9"]
SMALL = {  # what keeps a printed command short; nothing that a person would have to add
    "train": ["--steps=2", "--batch=8", "--no-tensorboard", "--workers=0", "--device=cpu"],
    "sample": ["--device=cpu"],
    "report": [],
    "eval": ["--n=20", "--steps=1", "--device=cpu", "--features=raw", "--metrics=fid"],
    "rollout": ["--episodes=2", "--device=cpu"],
}
NEXT = re.compile(r"^\s*(?:next|then|straighten|one step|draws the image of:)\s+(genkit .*)$", re.M)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with 24 pictures of 16x16 in two classes, one of which has a name with a space."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "my pictures" / ("cat", "big dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return tmp_path / "my pictures"


def call(argv: list[str], capsys) -> list[str]:
    """Run a command; the commands that it prints."""
    capsys.readouterr()
    code = cli.main(argv)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return NEXT.findall(printed.out)


def follow(argv: list[str], capsys, depth: int = 2) -> list[str]:
    """Run a command, the commands that it prints, and so on; all printed commands. At least one is printed."""
    printed = call(argv, capsys)
    assert printed, argv
    everything = list(printed)
    for line in printed:
        program, name, *rest = shlex.split(line)
        assert program == "genkit"
        argv = [name, *rest, *[option for option in SMALL[name] if option.partition("=")[0] not in rest]]
        everything += follow(argv, capsys, depth - 1) if depth > 1 and name == "train" else call(argv, capsys)
    return everything


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ddpm", "gan", "vq", "classifier", "edm", "vae")]


@pytest.mark.parametrize("objective", ["flow", "autoencoder", *SLOW])
def test_after_training_on_a_folder(folder, objective, capsys):
    argv = ["train", f"--objective={objective}", "--data", str(folder), "--data.size=8", "--backbone.width=8", *TINY]
    printed = follow(argv, capsys)
    if objective == "autoencoder":  # the data of the first stage, without an option that says so
        run = load_run("runs/latest", device="cpu")
        assert (run.data_spec.shape, run.data_spec.cond["label"].names) == ((3, 8, 8), ("big dog", "cat"))
        assert len(printed) > 1


@pytest.mark.parametrize("data", ["digits", "moons", "checkerboard", "four-ways"])
def test_after_training_on_named_data(tmp_path, monkeypatch, data, capsys):
    monkeypatch.chdir(tmp_path)
    follow(["train", f"--data={data}", "--backbone.width=8", *TINY], capsys)


@pytest.mark.slow
def test_after_training_on_numbers_and_captions(folder, capsys):
    np.savez("numbers.npz", x=np.random.default_rng(0).normal(size=(40, 3)), y=np.arange(40) % 2)
    follow(["train", "--data=numbers.npz", "--backbone=mlp", "--backbone.width=8", *TINY], capsys)
    follow(["train", "--data", str(folder), "--data.captions", "it's a {label}", "--backbone.width=8", *TINY], capsys)


def test_after_demonstrations(tmp_path, monkeypatch, capsys):
    """From the recording to the policy in its environment; a recording without environment is measured."""
    monkeypatch.chdir(tmp_path)
    printed = follow(["demo", "four-ways", "--episodes=6", "--out", "my demos.npz"], capsys)
    assert any(line.startswith("genkit rollout") for line in printed)
    follow(["train", "--data=replay", "--data.root=my demos.npz", "--backbone.width=8", *TINY], capsys)


@pytest.mark.slow
def test_after_encoding_and_reflow(folder, capsys):
    argv = ["train", "--objective=vae", "--data", str(folder), "--data.labels=false", "--backbone.width=8", *TINY]
    call([*argv, "--objective.latent", "2", "4", "4"], capsys)
    follow(["encode", "runs/latest"], capsys)
    call([*argv, "--objective.latent", "6"], capsys)
    follow(["encode", "runs/latest"], capsys)
    call(["train", "--data", str(folder), "--data.size=8", "--backbone.width=8", *TINY], capsys)
    assert len(follow(["reflow", "runs/latest", "--n=16", "--steps=2"], capsys)) >= 2


@pytest.mark.slow
def test_after_export(folder, capsys):
    call(["train", "--data", str(folder), "--backbone.width=8", *TINY], capsys)
    capsys.readouterr()
    assert cli.main(["export", "runs/latest", "alone", "--to=run"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    commands = [line for line in lines if line.startswith("genkit ")]
    assert commands
    for line in commands:
        call([*shlex.split(line)[1:], "--n=4", "--device=cpu"], capsys)


def test_a_model_that_needs_more_than_a_class_is_measured(folder, capsys):
    """Nothing on the command line gives an observation, so the next step draws with those of the data."""
    call(["train", "--data=four-ways", "--data.env=", "--backbone.width=8", *TINY], capsys)
    assert [line.split()[1] for line in suggest_use(load_run("runs/latest", device="cpu"))] == ["eval"]


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["--data=replay", "--data.env=HalfCheetah-v5"], "genkit demo HalfCheetah-v5 --expert=ars --out none.npz"),
        (["--data=replay", "--data.env=four-ways"], "genkit demo four-ways --out none.npz"),
        (["--data=replay"], "genkit demo four-ways --out none.npz"),
        (["--data=pusht"], "pusht.zip"),
    ],
)  # fmt: skip
def test_a_missing_recording_names_the_environment_at_hand(argv, command, capsys):
    assert cli.main(["train", *argv, "--data.root=none.npz"]) == 2
    assert command in capsys.readouterr().err


def test_hints_name_the_file_or_run_at_hand(folder, capsys):
    call(["train", "--data", str(folder), "--data.held-out=0", "--backbone.width=8", *TINY], capsys)
    assert cli.main(["likelihood", "runs/latest"]) == 2
    error = capsys.readouterr().err
    assert str(folder / "test") in error
    assert "DIR" not in error
    assert cli.main(["sample", "runs/latest", "--classifier", "runs/latest"]) == 2
    command = capsys.readouterr().err.partition("genkit train ")[2]
    call(["train", *shlex.split(command), *SMALL["train"]], capsys)


def test_every_source_that_names_a_use_has_one_that_exists():
    for kind in DATA.values():
        if kind.usage:
            assert kind.usage.split()[1] in cli.COMMANDS
    assert Path(cli.__file__).is_file()
