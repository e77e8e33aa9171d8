"""Runs that several files fine-tune or roll out, hardly trained."""

import pytest

from genkit.cli.commands.train import main as train
from genkit.training.directory import find_run


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    out = tmp_path_factory.mktemp("policy")
    train(["--data=four-ways", "--data.n=20", "--objective.prediction=x0", "--backbone.width=32", "--backbone.depth=2",
           "--steps=30", "--batch=64", "--sample-every=0", "--no-tensorboard", "--device=cpu", "--precision=fp32",
           "--workers=0", "--out", str(out)])  # fmt: skip
    return find_run(out / "latest")


@pytest.fixture(scope="session")
def moons(tmp_path_factory):
    out = tmp_path_factory.mktemp("moons")
    train(["--data=moons", "--backbone.width=16", "--backbone.depth=1", "--steps=2", "--sample-every=0",
           "--no-tensorboard", "--device=cpu", "--out", str(out)])  # fmt: skip
    return find_run(out / "latest")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    train(["--data=digits", "--objective=flow", "--backbone=mlp", "--backbone.width=32", "--backbone.depth=1",
           "--steps=20", "--sample-every=0", "--no-tensorboard", "--device=cpu", "--precision=fp32", "--workers=0",
           "--out", str(out)])  # fmt: skip
    return find_run(out / "latest")
