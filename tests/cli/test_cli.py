"""The command line as a user meets it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from genkit.cli import main as cli
from genkit.training.run import load_run

TRAIN = ["--tensorboard=false", "--device=cpu", "--steps=2", "--batch=8", "--sample-every=2", "--warmup=0"]
SMALL = {
    "moons": [*TRAIN, "--data=moons", "--backbone.width=32"],
    "digits": [*TRAIN, "--data=digits", "--backbone.width=16"],
}


@pytest.fixture(scope="module", params=SMALL)
def run(request, tmp_path_factory):
    """A tiny trained run of points, and one of images."""
    out = tmp_path_factory.mktemp(request.param) / "runs"
    assert cli.main(["train", "--objective=flow", *SMALL[request.param], f"--out={out}"]) == 0
    return out / "latest"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "runs"
    assert cli.main(["train", "--objective=ddpm", *SMALL["digits"], f"--out={out}"]) == 0
    return out / "latest"


def refused(capsys, *argv):
    """The one line with which genkit refuses."""
    assert cli.main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("genkit: ")
    assert err.count("\n") == 1, err
    return err


def test_help_is_instant_and_does_not_import_torch():
    code = "import sys; from genkit.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "genkit train --objective=flow" in done.stdout
    before = os.times()
    subprocess.run([sys.executable, "-m", "genkit", "--help"], capture_output=True, check=True)
    middle = os.times()
    subprocess.run([sys.executable, "-c", "import argparse, json, logging"], capture_output=True, check=True)
    after = os.times()
    ours, plain = (
        b.children_user + b.children_system - a.children_user - a.children_system
        for a, b in ((before, middle), (middle, after))
    )
    assert ours < 3 * plain + 0.05, (ours, plain)  # a ratio: the machine may be busy


@pytest.mark.parametrize("argv", [["--help"], [], ["train", "--help"], ["sample", "--help"], ["info", "--help"]])
def test_help(argv):
    done = subprocess.run([sys.executable, "-m", "genkit", *argv], capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage" in done.stdout.lower()


def test_a_reader_may_leave_before_the_help_ends():
    command = f"{sys.executable} -m genkit train --help | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_directory_is_complete(run):
    for name in ("config.yaml", "env.json", "log.jsonl", "loss.png", "latest/state.json", "samples/step-0000002.png"):
        assert (run / name).is_file(), name
    assert os.readlink(run) == run.resolve().name
    assert not [p for p in run.rglob("*") if p.name.startswith(".") or p.suffix == ".part"]


def test_info(run, capsys):
    assert cli.main(["info", str(run)]) == 0
    out = capsys.readouterr().out
    assert "step" in out
    assert "2 of 2" in out
    assert "name: flow" in out


def test_sample_formats(run, tmp_path, capsys):
    shape = load_run(run).spec.shape
    grid, arrays = tmp_path / "grid.png", tmp_path / "arrays.npz"
    assert cli.main(["sample", str(run), "--n=6", "--steps=2", f"--out={grid}"]) == 0
    assert Image.open(grid).size[0] > 50
    assert cli.main(["sample", str(run), "--n=6", "--steps=2", "--format=npz", f"--out={arrays}", "--label=1"]) == 0
    with np.load(arrays, allow_pickle=False) as z:
        assert z["arr_0"].shape == ((6, 8, 8, 1) if len(shape) == 3 else (6, 2))
        assert z["arr_0"].dtype == (np.uint8 if len(shape) == 3 else np.float32)
        assert (z["arr_1"] == 1).all()
    settings = json.loads((tmp_path / "arrays.npz.json").read_text())
    assert (settings["sampler"], settings["steps"], settings["nfe"]) == ("heun", 2, 3)
    assert settings["rows_per_sample"] == 3
    assert str(arrays) in capsys.readouterr().out


def test_sample_png_files_and_trajectory(digits, tmp_path):
    out = tmp_path / "images"
    assert cli.main(["sample", str(digits), "--n=12", "--steps=3", "--format=png", f"--out={out}", "--trajectory"]) == 0
    assert [p.name for p in sorted(out.glob("*.png"))] == [f"{i:06d}.png" for i in range(12)]
    assert Image.open(out / "000003.png").size == (8, 8)
    assert (out / "labels.txt").read_text().splitlines()[11] == "000011.png 1"  # without --label, classes in turn
    with Image.open(out / "trajectory.gif") as gif:
        assert gif.n_frames == 3


def test_sample_is_repeatable_and_seeded(digits, tmp_path):
    def draw(name, *more):
        out = tmp_path / f"{name}.npz"
        common = ["--n=4", "--steps=2", "--sampler=ancestral", "--format=npz", f"--out={out}"]
        assert cli.main(["sample", str(digits), *common, *more]) == 0
        return np.load(out, allow_pickle=False)["arr_0"]

    first = draw("a")
    assert (first == draw("b")).all()
    assert not (first == draw("c", "--seed=4")).all()
    assert np.abs(first.astype(int) - draw("d", "--batch=1")).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "heun", "ancestral", "dpmpp_2m"])
def test_every_sampler_samples_from_every_model(run, sampler, tmp_path):
    out = tmp_path / "x.npz"
    argv = ["sample", str(run), "--n=2", "--steps=3", f"--sampler={sampler}", "--guidance=2", "--format=npz"]
    assert cli.main([*argv, f"--out={out}"]) == 0
    assert np.isfinite(np.load(out, allow_pickle=False)["arr_0"]).all()


def test_likelihood_of_a_model_that_is_a_normal(tmp_path, capsys):
    """A network that still answers 0 (its last layer starts there) moves nothing: log p is that of N(0, I)."""
    argv = ["train", *SMALL["digits"], "--lr=1e-12", f"--out={tmp_path}"]
    assert cli.main(argv) == 0
    capsys.readouterr()
    options = ["--n=20", "--steps=100", "--json", "--ema=none"]
    assert cli.main(["likelihood", f"{tmp_path}/latest", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    data = load_run(tmp_path / "latest").config.data.load("test")
    x = data.x[:20].flatten(1).double() / 127.5 - 1
    nats = 0.5 * (x**2).sum(1) + 32 * np.log(2 * np.pi)
    expected = float(nats.mean()) / (64 * np.log(2)) + np.log2(127.5)
    assert result["bits_per_dim"]["value"] == pytest.approx(expected, abs=0.02)
    assert result["bits_per_dim"]["stderr"] == pytest.approx(float(nats.std()) / 20**0.5 / (64 * np.log(2)), rel=0.2)
    assert result["settings"]["n"] == 20


# ------------------------------------------------------------------------------------------------- mistakes
def test_unknown_command(capsys):
    assert "did you mean train?" in refused(capsys, "trian")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "--objective=flwo"], "did you mean flow?"),
        (["train", "--objective=flow", "--steps=0"], "steps"),
        (["train", "--objective=flow", "--objective.predictin=v"], "did you mean"),
        (["train", "--objective=flow", "--objective.prediction=eps"], "alpha(1) = 0"),
        (["train", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["train", "--resume=nowhere"], "does not exist"),
        (["train", "--data=moons", "--backbone=unet"], "try --backbone=mlp"),
        (["train", "--device=cuda"], "no such device"),
        (["train", "--data=folder", "--data.root=nowhere"], "nowhere"),
        (["sample", "nowhere"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == [], "a refused command left something behind"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--label=10"], "allowed 0..9"),
        (["--sampler=huen"], "did you mean heun?"),
        (["--steps=0"], "steps"),
        (["--n=0"], "n"),
        (["--ema=0.5"], "this run has"),
        (["--step=7"], "saved: 2"),
        (["--grid=none"], "allowed: uniform"),
        (["--trajectory", "--n=9", "--batch=4"], "--batch 9"),
        (["--device=cuda"], "no such device"),
        (["--out=grid.xyz", "--steps=1", "--n=1"], "try .png"),
    ],
)
def test_mistakes_in_sampling_are_one_line(capsys, digits, argv, says):
    assert says in refused(capsys, "sample", str(digits), *argv)


def test_guidance_without_conditions_is_refused(capsys, tmp_path):
    argv = ["train", *TRAIN, "--data=checkerboard", "--backbone.width=32", f"--out={tmp_path}"]
    assert cli.main(argv) == 0
    assert "no conditions" in refused(capsys, "sample", f"{tmp_path}/latest", "--guidance=2")
    assert "no classes" in refused(capsys, "sample", f"{tmp_path}/latest", "--label=1")


def test_a_bug_is_not_reported_as_a_users_mistake():
    def inside():
        return int("x")

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        inside()
    assert not cli.is_user_error(caught.value)
