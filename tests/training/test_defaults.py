"""Defaults that follow from other settings: the size and the number of a person's images, and a first stage."""

import logging

import numpy as np
import pytest
import yaml

import genkit
from genkit.backbones import MLP, DiT, UNet
from genkit.cli.commands.train import read_settings
from genkit.training.defaults import CPU_SETTINGS, LARGEST
from genkit.training.settings import TrainSettings

PLAIN = TrainSettings()
TINY = {"backbone": {"width": 8}, "batch": 8, "steps": 2, "tensorboard": False, "workers": 0, "device": "cpu"}


def images(path, side, n=4000, channels=3):
    np.savez(path, x=np.zeros((n, side, side, channels), np.uint8))
    return str(path)


def read(*argv):
    return read_settings([*argv, "--device=cpu"])[0]


def chosen(settings):
    return settings.backbone.width, settings.batch, settings.steps


@pytest.mark.parametrize("side", [8, 16, 17, 32, 48, 64, 100, 128, 160])
def test_a_step_on_a_cpu_costs_about_the_same_at_every_size(tmp_path, side):
    """In numbers that a step convolves, width^2 x batch x pixels, at most as many as the digits' settings at 32x32."""
    width, batch, steps = chosen(read(f"--data={images(tmp_path / 'a.npz', side, n=500 if side > 64 else 4000)}"))
    if side <= 16:
        assert (width, batch, steps) == (32, 64, 2000)
        return
    assert (width, batch) == next((v for limit, v in CPU_SETTINGS.items() if side <= limit), LARGEST)
    assert width**2 * batch * side**2 <= 32**2 * 64 * 32**2
    assert steps == 2000


@pytest.mark.parametrize(("n", "steps"), [(10, 500), (30, 500), (100, 700), (10_000, 2000)])
def test_few_images_are_not_repeated_forever(tmp_path, n, steps):
    assert read(f"--data={images(tmp_path / 'a.npz', 8, n)}").steps == steps


def test_what_is_given_is_kept_and_what_is_chosen_is_said(tmp_path, caplog):
    root, file = images(tmp_path / "a.npz", 64, 50), tmp_path / "given.yaml"
    with caplog.at_level(logging.INFO, "genkit"):
        assert chosen(read(f"--data={root}", "--batch=7", "--backbone.width=24")) == (24, 7, 1300)
    assert caplog.messages == ["defaults for 50 images of 3x64x64: --steps 1300"]
    caplog.clear()
    file.write_text(yaml.safe_dump({"data": {"name": "npz", "root": root}, "steps": 9, "backbone": {"width": 40}}))
    with caplog.at_level(logging.INFO, "genkit"):
        assert chosen(read(f"--config={file}")) == (40, 16, 9)
        assert chosen(read(f"--data={root}", "--backbone=unet")) == (32, 16, 1300)  # a name means its own defaults
        assert isinstance(read(f"--data={root}", "--backbone=dit").backbone, DiT)
    assert "--batch 16" in caplog.messages[0]


@pytest.mark.parametrize("argv", [[], ["--data=digits"], ["--data=moons"], ["--data=digits", "--data.size=64"]])
def test_named_data_sets_have_the_defaults_of_the_settings(argv, caplog):
    settings = read(*argv)
    assert (settings.batch, settings.steps) == (PLAIN.batch, PLAIN.steps)
    if "--data=moons" not in argv:
        assert settings.backbone == PLAIN.backbone
    assert not caplog.messages


def test_numbers_of_any_length_have_the_defaults_of_the_settings(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((5000, 40), np.float32))
    settings = read(f"--data={tmp_path / 'a.npz'}", "--backbone=mlp")
    assert (settings.batch, settings.steps) == (PLAIN.batch, PLAIN.steps)


def test_a_latent_model_is_trained_on_the_data_of_its_first_stage(tmp_path, monkeypatch):
    """In Python and on the command line; the classes that the stage did without are conditions again."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("a.npz", x=rng.integers(0, 256, (60, 16, 16), np.uint8), y=np.arange(60) % 3)
    data = {"name": "npz", "root": "a.npz", "labels": False, "size": 8, "held_out": 0.2}
    stage = genkit.train(objective={"name": "vae", "latent": [2, 4, 4]}, data=data, **TINY)
    run = genkit.train(codec=str(stage.directory), **TINY)
    assert run.config.data == stage.config.data.with_fields(labels=None)
    assert run.spec.cond["label"].num == 3
    settings = read("--objective=flow", f"--codec={stage.directory}")
    assert settings.data == run.config.data
    assert read(f"--codec={stage.directory}", "--data.held-out=0").data.held_out == 0
    assert read(f"--codec={stage.directory}", "--data=digits").data == PLAIN.data


def test_vectors_are_trained_with_an_mlp(tmp_path):
    """A U-Net needs images or sequences; one that is asked for is refused."""
    np.savez(tmp_path / "vectors.npz", x=np.random.default_rng(0).normal(size=(20, 5)))
    np.savez(tmp_path / "sequences.npz", x=np.random.default_rng(0).normal(size=(20, 3, 8)))
    assert isinstance(read(f"--data={tmp_path}/vectors.npz").backbone, MLP)
    assert isinstance(read(f"--data={tmp_path}/vectors.npz", "--backbone=unet").backbone, UNet)
    assert isinstance(read(f"--data={tmp_path}/sequences.npz").backbone, UNet)
    settings = {k: v for k, v in TINY.items() if k != "backbone"}
    run = genkit.train(data=str(tmp_path / "vectors.npz"), out=str(tmp_path / "runs"), **settings)
    assert run.sample(2, steps=1).x.shape == (2, 5)
