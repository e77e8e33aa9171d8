"""A DDPM with cosine betas samples sanely by default, and alike wherever samples are drawn.

The network of a run of one step says next to nothing, so unclipped samples from t = 1 would be ``z / alpha(1)``.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from genkit.cli.main import main
from genkit.core import pictures
from genkit.diffusion.paths import end_time
from genkit.diffusion.samplers import Seeds
from genkit.evaluation import Card
from genkit.training.run import load_run
from genkit.training.sampling import Sampling, grid_size
from genkit.training.shown import GRID_SIZE

TINY = ["--backbone=mlp", "--backbone.width=8", "--batch=16", "--steps=1", "--workers=0", "--no-tensorboard",
        "--device=cpu"]  # fmt: skip
COSINE = ["--objective=ddpm", "--objective.betas=cosine"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    evaluated = ["--eval-every=1", "--eval-n=40", "--eval-steps=3", "--eval-metrics=fid", "--eval-features=raw"]
    assert main(["train", "--data=digits", *COSINE, *TINY, *evaluated, "--sample-every=1", f"--out={folder}"]) == 0
    return load_run(folder / "latest", device="cpu")


def largest(run, **settings):
    noise = Seeds(range(8))
    generate = run.generator(Sampling(steps=3, **settings))
    return float(generate(noise(run.spec.shape), {"label": torch.arange(8)}, noise).abs().max())


def test_pixels_are_clipped_by_default_and_not_if_told_so(run):
    assert largest(run) == largest(run, clip=True)
    assert largest(run) <= 1.0001
    assert 5 < largest(run, clip=False) < 1000  # 1 / MIN_ALPHA times a normal, instead of 1 / 5e-5
    assert Sampling().resolved(run) == {"sampler": "heun", "steps": 20, "grid": "uniform", "clip": True}
    assert (
        Sampling(clip=False).resolved(run).items()
        >= {"clip": False, "start": round(end_time(run.denoiser.path), 4)}.items()
    )


def test_the_picture_and_the_card_of_training_are_those_of_the_commands(run, tmp_path):
    picture = next((run.directory / "samples").glob("*.png"))
    samples = run.sample(grid_size(run.data_spec, GRID_SIZE))
    pictures.save_image(samples.grid(), tmp_path / "again.png")
    assert Image.open(picture).tobytes() == Image.open(tmp_path / "again.png").tobytes()
    card = Card.load(next((run.directory / "eval").glob("*.json")))
    assert card.settings["clip"] is True
    options = ["--n=40", "--steps=3", "--metrics=fid", "--features=raw", "--batch=16", "--json"]
    for clip, same in (([], True), (["--clip"], True), (["--clip=false"], False)):
        assert main(["eval", str(run.directory), *options, *clip, f"--out={tmp_path}/{same}{len(clip)}.json"]) == 0
        again = Card.load(tmp_path / f"{same}{len(clip)}.json")
        assert (again.metrics["fid"].value == card.metrics["fid"].value) == same
        assert again.settings["clip"] is same
        assert ("start" in again.settings) != same


@pytest.mark.parametrize(
    ("flags", "name", "clip"),
    [
        ([], "heun3-clip-seed0", True),
        (["--clip"], "heun3-clip-seed0", True),
        (["--clip=false"], "heun3-start0.99", False),
        (["--no-clip"], "heun3-start0.99", False),
    ],
)
def test_the_name_and_settings_of_samples_say_what_held(run, flags, name, clip, capsys):
    assert main(["sample", str(run.directory), "--n=4", "--steps=3", *flags]) == 0
    out = capsys.readouterr().out.split()[0]
    assert name in out
    settings = json.loads(Path(out + ".json").read_text())
    assert settings["clip"] is clip
    assert settings.get("start", 1) == (1 if clip else 0.9936)


@pytest.mark.parametrize(
    ("argv", "clips"),
    [
        (["--data=digits", "--objective=ddpm"], True),
        (["--data=digits", "--objective=ddpm", "--objective.prediction=v"], False),
        (["--data=moons", *COSINE], False),  # beyond [-1, 1]
        (["--data=digits", "--objective=flow"], False),
        (["--data=digits", "--objective=edm"], False),
        (["--data=digits", "--objective=vae"], False),
    ],
)
def test_only_predictions_of_the_noise_of_bounded_data_are_clipped(tmp_path, argv, clips):
    assert main(["train", *argv, *TINY, "--sample-every=0", f"--out={tmp_path}"]) == 0
    run = load_run(tmp_path / "latest", device="cpu")
    assert Sampling().clips(run) == clips
    assert "start" not in Sampling().resolved(run) or argv[0] == "--data=moons"
